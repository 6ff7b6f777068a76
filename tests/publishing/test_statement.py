"""Statements: exact to the cent, deaf to splits, and nothing is paid that does not hold."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastattr import FastAttributor, InputError, StatementPolicy, make_statement, verify_statement
from fastattr.attributor import many
from fastattr.attributor.attribution import RECEIPT, content_sha256
from fastattr.cli.main import main
from fastattr.core.settings import read_yaml
from fastattr.publishing.statement import COUNTED, UNIT, Tally, lines_of, whole_cents
from tests.made import base_features, write_attributor

DOCS = Path(__file__).parents[2] / "docs" / "statements.md"
EMBEDDING = base64.b64encode(np.eye(12, dtype="<f4")[0]).decode()


@pytest.fixture(scope="module")
def attributor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images by Ada and Bob, without calibration."""
    return write_attributor(tmp_path_factory.mktemp("made") / "attributor")


@pytest.fixture(scope="module")
def model(attributor: Path) -> str:
    return FastAttributor.from_pretrained(attributor).versions()["model"]


def made(model: str, named: dict[str, tuple], *, query: int = 0, above: tuple = (0.8, 0.6, 0.9), **changes) -> str:
    """A receipt as `Attribution.to_json` writes it."""
    rows = [{"creator": name, "share": s, "low": low, "high": high, "named": True} for name, (s, low, high) in named.items()]
    rest = {"creator": "spread", "share": 1 - sum(row["share"] for row in rows), "low": 0.0, "high": 1.0, "named": False}
    values = {
        "format": RECEIPT,
        "date": "2026-11-07T12:00:00+00:00",
        "versions": {"model": model},
        "query": {"sha256": hashlib.sha256(b"%d" % query).hexdigest(), "embedding": EMBEDDING, "k": 1, "prompt": "p"},
        "results": [],
        "model": {"name": "made"},
        "warnings": [],
        "near_copies": None,
        "shares": [*rows, rest],
        "above_noise": above and dict(zip(("share", "low", "high"), above, strict=True)),
        **changes,
    }
    return json.dumps({**values, "sha256": content_sha256(values)})


def stated(attributor: Path, receipts: list[str], folder: Path, **options) -> dict:
    """The statement of some receipts for 100 EUR in November."""
    folder.mkdir(exist_ok=True)
    (folder / "receipts.jsonl").write_text("\n".join(receipts))
    options = {"pool": "100", "period": "2026-11", **options}
    return make_statement(attributor, [folder / "receipts.jsonl"], folder / "out", **options)


def paid(statement: dict) -> dict[str, str]:
    return {line["owner"]: line["amount"] for line in statement["lines"]}


TWO = {"Ada": (0.4, 0.2, 0.6), "Bob": (0.2, 0.0, 0.5)}


def test_the_receipt_that_the_guide_does_by_hand(attributor, model, tmp_path):
    """A guide whose sum is another than the program's is worse than none."""
    text = DOCS.read_text(encoding="utf-8")
    (tmp_path / "policy.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[0])
    policy = read_yaml(tmp_path / "policy.yaml", StatementPolicy)
    receipts = [made(model, TWO, above=(0.8, 0.6, 0.9)), made(model, {"Bob": (0.3, 0.0, 0.5)}, query=1)]
    found = stated(attributor, receipts, tmp_path, pool="1000", policy=policy)
    assert paid(found) == {"Ada": "225.00", "Bob": "112.50"}
    assert found["kept"] == "662.50"
    assert {(line["low"], line["high"]) for line in found["lines"]} == {("112.50", "337.50"), ("0.00", "281.25")}
    for amount in ("225.00", "112.50", "662.50", "337.50", "281.25"):
        assert amount in text


def drawn(rng: random.Random) -> tuple[StatementPolicy, list[tuple[list[tuple], int]], dict[str, int], int]:
    """A policy, (shares, certain part) of some receipts, images by creator, and a pool in cents."""
    names = [f"n{i}" for i in range(rng.randint(1, 8))]
    influence = round(rng.random(), rng.randint(0, 3))
    policy = StatementPolicy(
        influence=influence,
        flat=round((1 - influence) * rng.random() * 0.99, 4) if rng.random() < 0.6 else 0.0,
        floor=rng.choice([0.0, 0.01, round(rng.random() * 20, 2)]),
        remainder=rng.choice(["keep", "divide"]),
        signal=rng.choice(["creators", "picture"]),
        owners={name: "together" for name in names if rng.random() < 0.2},
    )
    receipts = []
    for _ in range(rng.randint(1, 12)):
        parts = [rng.random() ** 3 for _ in range(len(names) + 1)]
        shares = [(name, part / sum(parts)) for name, part in zip(names, parts, strict=False) if rng.random() < 0.7]
        rows = [(name, s, s * rng.choice([0.0, rng.random()]), s + (1 - s) * rng.random()) for name, s in shares]
        receipts.append((rows, rng.choice([0, UNIT, rng.randint(1, UNIT)])))
    images = {name: rng.randint(0, 40_000_000) for name in [*names, "", "idle"]}
    return policy, receipts, images, rng.choice([0, 1, 7, 100, 99_999, rng.randint(0, 10**9)])


def lines(policy, receipts, images, cents) -> tuple[dict[str, Decimal], Decimal]:
    """What each owner is paid, and what is kept."""
    tally = Tally("", "", policy)
    for rows, certain in receipts:
        tally.counts[COUNTED] += 1
        tally.take(rows, certain)
    found, kept = lines_of(tally, images if policy.flat else {}, cents, 2)
    assert all(Decimal(line["low"]) >= 0 for line in found)
    assert all(Decimal(line["amount"]) <= Decimal(line["high"]) for line in found)
    return {line["owner"]: Decimal(line["amount"]) for line in found}, Decimal(kept)


def test_cents_add_up_to_the_pool_for_a_thousand_policies():
    """A cent that is lost or made is a cent that an auditor asks about; the order of receipts must not move one either."""
    rng = random.Random(0)
    moved = 0
    for _ in range(1000):
        policy, receipts, images, cents = drawn(rng)
        amounts, kept = lines(policy, receipts, images, cents)
        assert sum(amounts.values()) + kept == Decimal(cents).scaleb(-2)
        assert kept >= 0
        assert min(amounts.values(), default=0) >= 0
        assert lines(policy, rng.sample(receipts, len(receipts)), images, cents) == (amounts, kept)
        moved += any(amounts.values())
    assert moved > 400


def split(name: str, value: float, shells: int, rng: random.Random) -> list[tuple[str, float]]:
    """A share, in steps of 1 / UNIT, cut into shells."""
    cuts = sorted(rng.randint(0, round(value * UNIT)) for _ in range(shells - 1))
    ends = [0, *cuts, round(value * UNIT)]
    return [(f"{name}-{i}", (ends[i + 1] - ends[i]) / UNIT) for i in range(shells)]


def test_splitting_an_owner_never_raises_the_sum_for_a_thousand_policies():
    """Whoever is paid more under fifty names will use fifty names. Intervals of parts are relatively as wide, or wider."""
    rng = random.Random(1)
    for _ in range(1000):
        policy, receipts, images, cents = drawn(rng)
        whole, _ = lines(policy, receipts, images, cents)
        shells, name = rng.randint(2, 50), rng.choice(list(images)[:-2])
        cut = []
        for rows, certain in receipts:
            parts = []
            for owner, share, low, high in rows:
                if owner != name:
                    parts.append((owner, share, low, high))
                    continue
                for shell, part in split(name, share, shells, rng):
                    if part >= rng.choice([0.0, 0.01]):  # with less, a receipt does not name it
                        parts.append((shell, part, part * low / share * rng.choice([0, 1, rng.random()]), max(high, part)))
            cut.append((parts, certain))
        count = images.pop(name)
        cuts = sorted(rng.randint(0, count) for _ in range(shells - 1))
        images |= {f"{name}-{i}": b - a for i, (a, b) in enumerate(zip([0, *cuts], [*cuts, count], strict=True))}
        mapped = name in policy.owners  # shells are not declared: the owner's other names are paid as before
        parted, _ = lines(policy, cut, images, cents)
        together = {"together"} if mapped else {name}
        before = sum(amount for owner, amount in whole.items() if owner in together)
        after = sum(amount for owner, amount in parted.items() if owner in together or owner.startswith(f"{name}-"))
        assert after <= before, (policy, name, shells)


def test_largest_remainders_would_reward_a_split():
    """Why cents are given by highest averages: the same leftover cents, and shells that take none of them."""
    from fractions import Fraction

    whole = {"Ada": Fraction(12, 10), **{f"other {i}": Fraction(1, 100) for i in range(80)}}
    shells = {f"Ada {i}": Fraction(12, 500) for i in range(50)} | {name: due for name, due in whole.items() if name != "Ada"}
    assert whole_cents(whole, sum(whole.values()))["Ada"] == 2
    assert sum(cents for name, cents in whole_cents(shells, sum(shells.values())).items() if name.startswith("Ada")) <= 2
    by_remainder = sorted(shells, key=lambda name: -shells[name])[:2]
    assert all(name.startswith("Ada") for name in by_remainder)


@pytest.mark.parametrize("policy", [StatementPolicy(), StatementPolicy(remainder="divide"), StatementPolicy(signal="picture")])
def test_a_receipt_whose_intervals_all_include_zero_moves_no_money(attributor, model, tmp_path, policy):
    """Noise would be paid, and most to those who have most images."""
    noise = {"Ada": (0.5, 0.0, 0.9), "Bob": (0.3, 0.0, 0.9)}
    receipts = [made(model, noise, above=(0.8, 0.0, 1.0)), made(model, noise, above=None, query=1), made(model, {}, query=2)]
    found = stated(attributor, receipts, tmp_path, policy=policy)
    assert (found["kept"], found["receipts"]["no signal"]) == ("100.00", 3)
    certain = made(model, noise, above=(0.8, 0.4, 1.0))  # together above noise, each alone not
    assert (stated(attributor, [certain], tmp_path, policy=policy)["kept"] == "100.00") == (policy.signal == "creators")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"versions": {"model": "0" * 64}}, "another model"),
        ({"date": "2026-11-07"}, "date"),
        ({"date": 7}, "date"),
        ({"shares": [{"creator": "Eve", "share": 0.9, "low": 0.95, "high": 1.0, "named": True}]}, "can't be so"),
        ({"shares": [{"creator": "Eve", "share": 0.6, "low": 0.5, "high": 0.7, "named": True}] * 2}, "can't be so"),
        ({"shares": [{"creator": "Eve", "share": float("nan"), "low": 0.5, "high": 1.0, "named": True}]}, "can't be so"),
        ({"shares": None}, "no shares"),
        ({"above_noise": {"share": 0.1, "low": 0.9, "high": 1.0}}, "can't be so"),
        ({"format": "fastattr-receipt-9"}, "format"),
    ],
)
def test_a_receipt_that_can_not_be_true_is_listed_and_not_paid(attributor, model, tmp_path, changes, says):
    """Money for what anyone has typed."""
    found = stated(attributor, [made(model, TWO), made(model, {"Eve": (0.9, 0.8, 1.0)}, query=1, **changes)], tmp_path)
    assert found["receipts"] == {"counted": 1, "no signal": 0, "repeated": 0, "failed": 1, "other period": 0}
    assert says in found["failed"][0]
    assert found["failed"][0].startswith("../receipts.jsonl, row 2: ")
    assert set(paid(found)) == {"Ada", "Bob"}


def test_damage_a_restriction_a_repetition_and_another_month_are_not_paid(attributor, model, tmp_path):
    """Each would pay somebody twice, or for what was not asked."""
    whole = made(model, TWO)
    part = json.loads(made(model, TWO, query=2))
    part["query"]["where"] = {"creator": ["Ada"]}
    part["sha256"] = content_sha256(part)
    late = made(model, TWO, query=3, date="2026-12-01T00:30:00+01:00")  # still November in UTC
    receipts = [whole, whole, whole.replace("0.4", "0.5"), "{", "[1]", json.dumps(part), late]
    receipts.append(made(model, TWO, query=4, date="2026-12-01T00:30:00+00:00"))
    found = stated(attributor, receipts, tmp_path)
    assert found["receipts"] == {"counted": 2, "no signal": 0, "repeated": 1, "failed": 4, "other period": 1}
    rows = pq.read_table(tmp_path / "out" / "receipts.parquet").to_pylist()
    assert [row["row"] for row in rows if row["lines"]] == [1, 7]
    numbers = {line["line"]: line for line in found["lines"]}
    assert {numbers[number]["owner"] for number in rows[0]["lines"]} == {"Ada", "Bob"}
    assert all(line["receipts"] == 2 for line in found["lines"])


def test_a_file_of_lines_a_folder_and_a_table_say_the_same(attributor, model, tmp_path):
    """A reader that skips a kind of file would pay nobody of it."""
    receipts = [made(model, {f"n{i % 7}": (0.4, 0.2, 0.6)}, query=i) for i in range(30)]
    expected = paid(stated(attributor, receipts, tmp_path))
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for i, text in enumerate(receipts[:10]):
        (tmp_path / "folder" / f"{i}.json").write_text(json.dumps(json.loads(text), indent=1))
    (tmp_path / "folder" / "deep" / "b.jsonl").write_text("\n\n".join(receipts[10:20]))
    pq.write_table(pa.table({"receipt": receipts[20:]}), tmp_path / "folder" / "part.parquet")
    (tmp_path / "folder" / "manifest.json").write_text("{}")
    again = make_statement(attributor, [tmp_path / "folder"], tmp_path / "folder", pool=100, period="2026")  # beside them
    assert paid(again) == expected
    assert verify_statement(tmp_path / "folder" / "statement.json") == []
    pq.write_table(pa.table({"query_id": ["q"]}), tmp_path / "bare.parquet")
    with pytest.raises(InputError, match="--receipts"):
        make_statement(attributor, [tmp_path / "bare.parquet"], tmp_path / "x", pool=1, period="2026")


def test_a_statement_verifies_or_says_which_receipt_fails(attributor, model, tmp_path, capsys):
    """A statement that only its maker can check is a claim."""
    receipts = [made(model, {f"n{i % 3}": (0.4, 0.2, 0.6)}, query=i) for i in range(9)]
    stated(attributor, receipts, tmp_path, policy=StatementPolicy(influence=0.5, flat=0.5))
    path = tmp_path / "out" / "statement.json"
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert main(["verify", str(path)]) == 0
    stated(attributor, receipts, tmp_path, policy=StatementPolicy(influence=0.5, flat=0.5))
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before  # the same again, byte by byte
    (tmp_path / "receipts.jsonl").write_text("\n".join([*receipts[:4], receipts[4].replace("0.4", "0.5"), *receipts[5:]]))
    assert main(["verify", str(path)]) == 1
    said = capsys.readouterr().out.splitlines()[1:]
    assert len(said) == 1
    assert said[0].startswith("../receipts.jsonl, row 5: was counted, is: it has no SHA-256")
    (tmp_path / "receipts.jsonl").write_text("\n".join(receipts[:-1]))
    assert verify_statement(path) == ["../receipts.jsonl, row 9: was counted, is: absent"]
    (tmp_path / "receipts.jsonl").write_text("\n".join(receipts))
    path.write_text(path.read_text().replace('"amount": "', '"amount": "1', 1))
    (said,) = verify_statement(path)
    assert said.startswith("line of ")
    replayed = verify_statement(path, attributor=str(attributor))  # none was ever answered by it
    assert len([line for line in replayed if "row 3" in line]) >= 1


def test_names_are_harmless_in_a_spreadsheet_and_on_the_page(attributor, model, tmp_path):
    """A creator's name is what a stranger wrote; it must not run where money is looked at."""
    names = ["=HYPERLINK(1)", "+1", "-1", "@x", "<script>alert(1)</script>", 'a,b\n"c', "\u202eevil"]
    stated(attributor, [made(model, dict.fromkeys(names, (0.1, 0.05, 0.2)))], tmp_path)
    import csv

    with (tmp_path / "out" / "statement.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(names) + 1
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row.values())
    assert all(re.fullmatch(r"\d+\.\d\d", row["amount"]) for row in rows)
    page = (tmp_path / "out" / "statement.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "\u202e" not in page
    assert "an estimate of influence, not a debt" in page


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("influence: 0.9\nflat: 0.2", "at most 1"),
        ("floor: -1", "negative"),
        ("remainder: share", "expected one of 'keep', 'divide'"),
        ("flaat: 0.1", "did you mean 'flat'"),
        ("owners: [a, b]", "expected a mapping"),
        ("owners: {a: b, b: c}", "'b'"),
        ("owners: {a: ''}", "'a'"),
        ("owners: {a: 1, a: 2}", "comes twice"),
    ],
)
def test_a_wrong_policy_is_refused_in_words(tmp_path, text, says):
    """A setting that is read as another pays other people."""
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(InputError, match=re.escape(says)):
        read_yaml(tmp_path / "policy.yaml", StatementPolicy)


@pytest.mark.parametrize(
    "wrong", [{"pool": "-1"}, {"pool": "1.001"}, {"pool": "nan"}, {"pool": "1e400"}, {"currency": "€"}, {"period": "2026-13"}]
)
def test_a_wrong_pool_currency_or_period_is_refused(attributor, model, tmp_path, wrong):
    """A thousand euros and a thousandth of one differ by a point."""
    with pytest.raises(InputError):
        stated(attributor, [made(model, TWO)], tmp_path, **wrong)
    assert stated(attributor, [made(model, TWO)], tmp_path, pool="1000", currency="JPY")["kept"].isdigit()


def test_answers_of_a_table_of_queries_become_a_statement(attributor, tmp_path, capsys):
    """What `attribute-many` writes, the command divides; without a calibration only the flat part moves, by images."""
    rows = [{"query_id": f"q{i}", "prompt": "p", "features": row.tolist()} for i, row in enumerate(base_features(5, seed=3))]
    (tmp_path / "queries.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    many.run(str(attributor), tmp_path / "queries.jsonl", tmp_path / "answers", k=3, receipts=True)
    (tmp_path / "policy.yaml").write_text("influence: 0.5\nflat: 0.5\nowners: {2026: Ada}")
    period = json.loads(pq.read_table(next((tmp_path / "answers").glob("*.parquet")))["receipt"][0].as_py())["date"][:7]
    command = ["statement", str(attributor), str(tmp_path / "answers"), "--period", period, "--pool", "10.01"]
    command += ["--policy", str(tmp_path / "policy.yaml"), "--out", str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["receipts"]["no signal"] == 5
    assert (paid(found), found["kept"]) == ({"Ada": "2.50", "Bob": "2.50"}, "5.01")
    assert main(["verify", str(tmp_path / "out" / "statement.json"), "--model", str(attributor)]) == 0
