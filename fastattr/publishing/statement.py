"""Statement: divide a pool of money by the receipts of a period. A share is an estimate of influence, not a debt.

Every receipt moves the same part of the pool at most. How much of it moves follows from the picture's influence above noise,
never from how names are cut; each creator named gets its share of that. So two names are never paid more than the one that
they were, nor by the rounding to cents, which is D'Hondt's. What is not moved is kept by the payer. Sums are of whole
numbers, so that no order of receipts changes them.

Reads receipts, one at a time: .json, .jsonl, .parquet of `attribute-many --receipts`, folders of them. Writes statement.json,
.csv, .html, and receipts.parquet: each receipt of the period, its hash, what became of it, the lines that it is part of.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from itertools import islice
from os.path import relpath
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastattr.attributor.attribution import content_sha256, to_csv
from fastattr.attributor.attributor import FastAttributor
from fastattr.attributor.receipts import checked, verify
from fastattr.core.errors import ArtifactDamagedError, ArtifactNotFoundError, FastattrError, InputError, harmless
from fastattr.core.files import atomic_path, read_json, temporary_folder, write_json
from fastattr.core.settings import build
from fastattr.core.stages import MANIFEST
from fastattr.students.shares import families_of

FORMAT = "fastattr-statement-1"
NOTE = "A share is an estimate of influence, not a debt. Intervals are of 95%, as if all receipts erred alike."
JSON, CSV, HTML, RECEIPTS = FILES = ("statement.json", "statement.csv", "statement.html", "receipts.parquet")
TEMPLATE = Path(__file__).parents[1] / "templates" / HTML
UNIT = 10**15  # a whole share; receipts have 15 decimals, so that their shares are whole numbers of it
SLACK = 1e-9  # by which rounded shares may leave their bounds
TINY = Fraction(1, 10**6)  # of a cent, by which rounding moves the ends of intervals
LISTED = 100  # failed receipts that statement.json lists; receipts.parquet has all
# Decimals of currencies (ISO 4217) that have not 2.
DECIMALS = dict.fromkeys(("CLP", "ISK", "JPY", "KRW", "VND", "XAF", "XOF"), 0) | dict.fromkeys(("BHD", "JOD", "KWD", "TND"), 3)
COUNTED, NO_SIGNAL, REPEATED = "counted", "no signal", "repeated"
KEY = ["sha256", "status"]
SCHEMA = pa.schema({name: pa.string() for name in ("source", *KEY)} | {"row": pa.int64(), "lines": pa.list_(pa.int32())})
LINE = ("line", "owner", "amount", "low", "high", "receipts", "below_floor")


@dataclass(frozen=True, kw_only=True)
class StatementPolicy:
    """How a pool is divided; under no setting does splitting a name raise its sum."""

    influence: float = 1.0
    """Part of the pool that receipts move."""
    flat: float = 0.0
    """Part divided by the number of catalogue images, near-duplicates counting once together; never by head."""
    floor: float = 0.0
    """In units of the currency: who is due less gets nothing."""
    remainder: Literal["keep", "divide"] = "keep"
    """What is spread too thinly to name: kept, or divided among those that the receipt names, in proportion to their shares."""
    signal: Literal["creators", "picture"] = "creators"
    """A receipt moves money if the interval of a creator lies above zero, or that of all images together. It then moves 1 - 1/r
    of its part, r being the influence of all images over the distance down to the lower end of its interval."""
    owners: dict[str, str] = field(default_factory=dict)
    """Who is paid for a name; others are paid themselves."""

    def __post_init__(self) -> None:
        if _exact(self.influence) + _exact(self.flat) > 1 or min(self.influence, self.flat, self.floor) < 0:
            raise InputError(f"influence + flat must be at most 1, nothing negative, got {self.influence} + {self.flat}")
        chained = [
            name for name, owner in self.owners.items() if not name or not owner or self.owners.get(owner, owner) != owner
        ]
        if chained:
            raise InputError(f"owners: {chained[0]!r} is paid to {self.owners[chained[0]]!r}, who must be paid itself")


def make_statement(
    attributor: FastAttributor | str | Path,
    receipts: Sequence[str | Path],
    out: str | Path,
    *,
    pool: str | float,
    period: str,
    currency: str = "EUR",
    policy: StatementPolicy | None = None,
) -> dict[str, Any]:
    """Divide a pool among the creators that a period's receipts name; writes `FILES` and returns the statement.

    Args:
        attributor: itself, or 'emoji', a folder or a Hub id; receipts of another model are listed, not paid.
        receipts: files and folders. The same picture with the same prompt counts once.
        out: folder to write.
        pool: in units of the currency.
        period: '2026', '2026-11' or '2026-11-28', in UTC.
        currency: its three letters.
        policy: how it is divided.

    Raises:
        InputError: pool, period or currency are none, or a file holds no receipts.
        As `FastAttributor.from_pretrained`.
    """
    policy, asked = policy or StatementPolicy(), {"pool": str(pool), "currency": currency, "period": period}
    if not isinstance(attributor, FastAttributor):
        attributor = FastAttributor.from_pretrained(attributor, thumbnails=False)
    return _write(_facts(attributor, policy), list(map(Path, receipts)), Path(out), Path(out), asked, policy)


def verify_statement(path: Path, *, attributor: str = "") -> list[str]:
    """Make a statement again from its receipts, which must lie where it says; with an attributor, also replay each of them.

    Returns:
        A sentence for each receipt that fails, or else for each thing that the statement should say otherwise.

    Raises:
        ArtifactDamagedError: it is no statement, or receipts.parquet is missing.
        ArtifactNotFoundError: a file of receipts is missing.
    """
    said, own = read_json(path), FastAttributor.from_pretrained(attributor, thumbnails=False) if attributor else None
    try:
        policy: StatementPolicy = build(StatementPolicy, said["policy"], where=str(path))
        asked = {name: str(said[name]) for name in ("pool", "currency", "period")}
        sources, facts = [path.parent / source for source in said["sources"]], said["attributor"]
        facts = {**facts, **_facts(own, policy), "name": facts["name"]} if own else facts
        was = {f"line of {line['owner']}": line for line in said.pop("lines")} | said
        listed = pq.read_table(path.with_name(RECEIPTS), columns=["source", "row", *KEY])
    except (KeyError, TypeError, AttributeError, FileNotFoundError, pa.ArrowException) as error:
        raise ArtifactDamagedError(f"{path} is no statement, or damaged, or without its {RECEIPTS}.") from error
    with temporary_folder(path.parent) as scratch:
        again = _write(facts, sources, scratch, path.parent, asked, policy)
        found = pq.read_table(scratch / RECEIPTS, columns=listed.column_names)
    gone, new = (
        {
            (row["source"], row["row"]): row["status"]
            for row in one.join(two.select(KEY), KEY, join_type="left anti").to_pylist()
        }
        for one, two in ((listed, found), (found, listed))
    )
    lines = [f"{at[0]}, row {at[1]}: was {gone.get(at, 'absent')}, is: {new.get(at, 'absent')}" for at in sorted(gone | new)]
    for source, row, text in read_receipts(sources if own else ()):
        with contextlib.suppress(FastattrError):  # one that must not be paid was not
            assert own
            replayed = verify(_receipt(text, facts["versions"]["model"])[0], own)
            lines += [f"{relpath(source, path.parent)}, row {row}: {line}" for line in replayed]
    now = {f"line of {line['owner']}": line for line in again.pop("lines")} | again
    return lines or [
        f"{name}: the statement says {was.get(name)}, its receipts give {now.get(name)}."
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]


def read_receipts(sources: Sequence[Path]) -> Iterator[tuple[Path, int, str | bytes]]:
    """(file, row, JSON) of every receipt in files and folders, one at a time."""
    for source in sources:
        if source.is_dir():
            found = (path for path in sorted(source.rglob("[!.]*")) if path.name not in (MANIFEST, *FILES))
            yield from read_receipts([path for path in found if path.suffix in {".json", ".jsonl", ".parquet"}])
        elif not source.is_file():
            raise ArtifactNotFoundError(
                f"there are no receipts at {source}; give a .json, .jsonl or .parquet file or a folder."
            )
        elif source.suffix == ".parquet":
            with pq.ParquetFile(source) as file:
                if "receipt" not in file.schema_arrow.names:
                    raise InputError(f"{source} has no column 'receipt'; run `fastattr attribute-many` with --receipts.")
                texts = (
                    text for batch in file.iter_batches(1024, columns=["receipt"]) for text in batch["receipt"].to_pylist()
                )
                yield from ((source, row, text or "") for row, text in enumerate(texts, start=1))
        elif source.suffix == ".jsonl":
            with source.open("rb") as lines:
                yield from ((source, row, line) for row, line in enumerate(lines, start=1) if line.strip())
        else:
            yield source, 1, source.read_bytes()


def _receipt(text: str | bytes, model: str) -> tuple[dict[str, Any], str, list[tuple[str, float, float, float]], int]:
    """A receipt, its date in UTC, (creator, share, low, high) of whom it names, the certain part of its influence in units.

    Raises:
        FastattrError: it must not be paid; the text says why.
    """
    try:
        receipt = checked(json.loads(text), "it")
        if content_sha256(receipt) != receipt.get("sha256"):
            raise ArtifactDamagedError("it has no SHA-256, or not that of its content.")
        if receipt["versions"]["model"] != model:
            raise InputError("another model answered.")
        if receipt["query"].get("where") or not re.fullmatch("[0-9a-f]{64}", receipt["query"]["sha256"]):
            raise InputError("it was asked of a part of the catalogue, or of no picture.")
        when, above = datetime.fromisoformat(receipt["date"]), receipt["above_noise"]
        named = [row for row in receipt["shares"] if row["named"] and row["creator"] != ""]
        rows = [(row["creator"], row["share"], row["low"] or 0.0, row["high"] or 1.0) for row in named]
        certain = _units(above["low"]) * UNIT // _units(above["share"]) if above and above["low"] else 0
        sound = when.tzinfo is not None and 0 <= certain <= UNIT and sum(row[1] for row in rows) <= 1 + SLACK
        sound &= all(isinstance(row[0], str) for row in rows) and len({row[0] for row in rows}) == len(rows)
        if not sound or not all(0 <= low <= share + SLACK <= high + 2 * SLACK <= 1 + 3 * SLACK for _, share, low, high in rows):
            raise ArtifactDamagedError("its date or shares can't be so.")
    except FastattrError:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ArtifactDamagedError("it is not JSON, or has no date, or no shares with intervals.") from error
    return receipt, when.astimezone(UTC).date().isoformat(), rows, certain


class Tally:
    """What receipts give each owner; UNIT ** 2 is all that one may move."""

    def __init__(self, model: str, period: str, policy: StatementPolicy) -> None:
        self.model, self.period, self.policy = model, period, policy
        self.counts = dict.fromkeys((COUNTED, NO_SIGNAL, REPEATED, "failed", "other period"), 0)
        self.failed: list[str] = []
        self.sums: dict[str, list[int]] = {}  # of an owner: number of its line, receipts, sum, low, high
        self.rest = 0  # what rounding has left of receipts that are divided
        self._seen: set[bytes] = set()

    def rows(self, sources: Sequence[Path], beside: Path) -> Iterator[dict[str, Any]]:
        """Take up all receipts; gives a row of receipts.parquet for each that is of the period or fails."""
        for path, row, text in read_receipts(sources):
            found: dict[str, Any] = {"source": relpath(path, beside), "row": row, "lines": []}
            try:
                receipt, date, shares, certain = _receipt(text, self.model)
            except FastattrError as error:
                self.counts["failed"] += 1
                self.failed += [f"{found['source']}, row {row}: {error}"] * (len(self.failed) < LISTED)
                yield {**found, "sha256": hashlib.sha256(str(text).encode()).hexdigest(), "status": str(error)[:200]}
                continue
            status, query = "other period", bytes.fromhex(receipt["query"]["sha256"])[:16]
            if date.startswith(self.period):
                status = REPEATED
                if query not in self._seen:
                    self._seen.add(query)
                    found["lines"] = self.take(shares, certain)
                    status = COUNTED if found["lines"] else NO_SIGNAL
                yield {**found, "sha256": receipt["sha256"], "status": status}
            self.counts[status] += 1

    def take(self, shares: list[tuple[str, float, float, float]], certain: int) -> list[int]:
        """Add (creator, share, low, high) of one receipt, of which a certain part moves; gives the numbers of its lines."""
        if self.policy.signal == "creators" and not any(low > 0 for _, _, low, _ in shares):
            return []
        divided, moved, lines = self.policy.remainder == "divide", 0, set[int]()
        whole = sum(_units(share) for _, share, _, _ in shares) if divided else UNIT
        for name, *values in shares if certain and whole else ():
            line = self.sums.setdefault(self.policy.owners.get(name, name), [len(self.sums), 0, 0, 0, 0])
            line[1] += line[0] not in lines
            parts = [certain * min(_units(value) * UNIT // whole, UNIT) for value in values]
            line[2:] = [old + part for old, part in zip(line[2:], parts, strict=True)]
            moved += parts[0]
            lines.add(line[0])
        self.rest += certain * UNIT - moved if lines and divided else 0
        return sorted(lines)


def _write(
    facts: dict[str, Any], sources: list[Path], out: Path, beside: Path, asked: dict[str, str], policy: StatementPolicy
) -> dict[str, Any]:
    """Make a statement whose paths are relative to `beside`, and write it into `out`."""
    from jinja2 import Environment, StrictUndefined
    from pandas import DataFrame

    decimals = DECIMALS.get(asked["currency"], 2)
    cents = _cents(asked["pool"], decimals)
    if not re.fullmatch("[A-Z]{3}", asked["currency"]):
        raise InputError(f"a currency has three capital letters, as in EUR, got {asked['currency']!r}.")
    if not re.fullmatch(r"\d{4}(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?)?", asked["period"]):
        raise InputError(f"a period is a year, month or day, as in 2026-11, got {asked['period']!r}.")
    tally = Tally(facts["versions"]["model"], asked["period"], policy)
    with atomic_path(out / RECEIPTS) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        rows = tally.rows(sources, beside)
        while batch := list(islice(rows, 20_000)):
            writer.write_table(pa.Table.from_pylist(batch, schema=SCHEMA))
    lines, kept = lines_of(tally, facts.get("images", {}), cents, decimals)
    statement: dict[str, Any] = {"format": FORMAT, "note": NOTE, **asked, "policy": asdict(policy), "attributor": facts}
    statement |= {"sources": [relpath(source, beside) for source in sources], "receipts": tally.counts, "failed": tally.failed}
    statement |= {"kept": kept, "lines": lines}
    with atomic_path(out / CSV) as temporary:
        last = dict.fromkeys(LINE, "") | {"owner": "kept by the payer", "amount": kept}
        temporary.write_text(to_csv(DataFrame([*lines, last]).assign(currency=asked["currency"])), encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["harmless"] = harmless
    with atomic_path(out / HTML) as temporary:
        temporary.write_text(page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(statement), encoding="utf-8")
    write_json(out / JSON, statement)
    return statement


def lines_of(tally: Tally, images: Mapping[str, int], cents: int, decimals: int) -> tuple[list[dict[str, Any]], str]:
    """The lines of a statement, the largest amount first, and what is kept."""
    policy, flat = tally.policy, dict[str, int]()
    for name, count in images.items():
        owner = policy.owners.get(name, name)
        flat[owner] = flat.get(owner, 0) + count
    no_one = flat.pop("", 0)  # stays with the payer
    for owner in flat:
        tally.sums.setdefault(owner, [len(tally.sums), 0, 0, 0, 0])
    per_unit = cents * _exact(policy.influence) / max((tally.counts[COUNTED] + tally.counts[NO_SIGNAL]) * UNIT**2, 1)
    per_image = cents * _exact(policy.flat) / max(sum(flat.values()) + no_one, 1)
    due = {
        owner: [value * per_unit + flat.get(owner, 0) * per_image for value in values]
        for owner, (_, _, *values) in tally.sums.items()
    }
    floor = _exact(policy.floor) * 10**decimals
    above = {owner: middle for owner, (middle, _, _) in due.items() if middle >= floor}
    amounts = whole_cents(above, sum(above.values()) + tally.rest * per_unit)

    def money(value: int) -> str:
        return str(Decimal(value).scaleb(-decimals))

    lines = []
    for owner in sorted(due, key=lambda owner: (-amounts.get(owner, 0), -due[owner][0], owner)):
        amount, (middle, low, high) = amounts.get(owner, 0), due[owner]
        number, receipts, *_ = tally.sums[owner]
        cells = money(amount), money(math.floor(low + TINY)), money(max(math.ceil(high - TINY), amount))
        lines.append(dict(zip(LINE, (number, owner, *cells, receipts, middle < floor), strict=True)))
    return lines, money(cents - sum(amounts.values()))


def whole_cents(due: Mapping[str, Fraction], total: Fraction) -> dict[str, int]:
    """What is due in whole cents that add up to the total, rounded down, by the method of D'Hondt (Jefferson).

    Everyone gets the whole cents of what is due; each further cent goes to the largest due / (cents + 1), of equal ones to the
    larger due, then by name. Largest remainders would pay a cent to each of many shells; this method never rewards a split
    (Balinski and Young, Fair Representation, 1982).
    """
    amounts = {owner: math.floor(value) for owner, value in due.items()}
    heap = [(-value / (amounts[owner] + 1), -value, owner) for owner, value in due.items()]
    heapq.heapify(heap)
    for _ in range(math.floor(total) - sum(amounts.values()) if heap else 0):
        owner = heap[0][2]
        amounts[owner] += 1
        heapq.heapreplace(heap, (-due[owner] / (amounts[owner] + 1), -due[owner], owner))
    return amounts


def _facts(own: FastAttributor, policy: StatementPolicy) -> dict[str, Any]:
    """Name and versions of an attributor; for a flat part also how many millionths of images each creator has."""
    facts = {"name": own.name, "versions": own.versions()}
    if not policy.flat:
        return facts
    families = families_of(own.catalog["family"].to_pylist())
    names, of_name = np.unique([name or "" for name in own.catalog["creator"].to_pylist()], return_inverse=True)
    counts = np.bincount(of_name, weights=1_000_000 // np.bincount(families)[families]).astype(int)
    return facts | {"images": dict(zip(names.tolist(), counts.tolist(), strict=True))}


def _units(share: float) -> int:
    return round(share * UNIT)


def _exact(value: float) -> Fraction:
    """A setting as it is written."""
    return Fraction(str(value))


def _cents(pool: str, decimals: int) -> int:
    """A pool in its currency's smallest unit."""
    try:
        cents = Fraction(Decimal(pool)) * 10**decimals
    except (InvalidOperation, ValueError, OverflowError):
        cents = Fraction(-1)
    if cents.denominator > 1 or not 0 <= cents < 10**18:
        raise InputError(f"a pool is an amount of money with at most {decimals} decimals, as in 1000, got {pool!r}.")
    return int(cents)
