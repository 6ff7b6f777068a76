"""Statements: exact to the cent, deaf to splits, a million receipts in bounded memory.

    python benchmarks/statements.py --json benchmarks/results/statements.json     # 15 minutes on 2 cores; --quick

Receipts are answers of the embedded attributor to its drawings on record. `split_gain`: the largest gain, a part of the pool,
of an owner whose images get 2 to 50 names before the drawings are asked about again, under every kind of policy. Seconds and
memory: of `fastattr statement` over the same receipts with hashes of their own, in a table as of `attribute-many`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import machine
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fastattr import FastAttributor, StatementPolicy, make_statement
from fastattr.core.files import read_json

SETTINGS = itertools.product((0.0, 0.2), (0.0, 10.0), ("keep", "divide"), ("creators", "picture"))
KINDS = [StatementPolicy(influence=0.8, flat=a, floor=b, remainder=c, signal=d) for a, b, c, d in SETTINGS]


def answers(own: FastAttributor, count: int, path: Path) -> Path:
    """A file of receipts: answers to drawings on record."""
    rows = pq.read_table(own.file("generated.parquet")).slice(0, count).to_pylist()
    pictures = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in rows]
    found = own.attribute(pictures, [row["prompt"] for row in rows], k=10)
    path.write_text("\n".join(answer.to_json() for answer in found), encoding="utf-8")
    return path


def paid(own: FastAttributor, receipts: Path, policy: StatementPolicy, pool: int = 100_000) -> dict[str, int]:
    """Cents of each owner, by receipts of this year; '' keeps the rest."""
    money, period = str(Decimal(pool).scaleb(-2)), time.strftime("%Y", time.gmtime())
    made = make_statement(own, [receipts], receipts.parent / "out", policy=policy, pool=money, period=period)
    return {row["owner"]: int(Decimal(row["amount"]) * 100) for row in [*made["lines"], {"owner": "", "amount": made["kept"]}]}


def sums(folder: Path, receipts: Path, quick: bool) -> dict[str, Any]:
    """By how many cents amounts and what is kept differ from the pool."""
    rng, errors, moved, own = random.Random(0), [], 0, FastAttributor.from_pretrained(folder)
    for _ in range(20 if quick else 1000):
        a, b, pool = round(rng.random(), 3), round(rng.random(), 3), rng.randint(0, 10**8)
        owners = dict.fromkeys(rng.sample(["Google", "Microsoft", "Liz Bravo", "Lisa Thiel"], 2), "one house")
        drawn = {"influence": min(a, b), "flat": round(abs(a - b), 3), "floor": rng.choice([0.0, 5.0, 20.0]), "owners": owners}
        found = paid(own, receipts, dataclasses.replace(rng.choice(KINDS), **drawn), pool)
        errors.append(abs(sum(found.values()) - pool))
        moved += found[""] < pool
    return {"statement_sum_error_cents": max(errors), "statement_policies": len(errors), "statement_policies_that_pay": moved}


def splits(folder: Path, receipts: Path, quick: bool) -> dict[str, Any]:
    """What an owner gains whose images are dealt out to several names."""
    rng, gains, own = random.Random(1), [], FastAttributor.from_pretrained(folder)
    before = [paid(own, receipts, policy) for policy in KINDS]
    largest = sorted(before[-1].keys() - {""}, key=lambda owner: -before[-1][owner])[:12]
    for number in range(2 if quick else 12):
        owner, shells, split = rng.choice(largest), rng.choice([2, 3, 5, 10, 50]), folder.with_name(f"split-{number}")
        own.save_pretrained(split)
        other = FastAttributor.from_pretrained(split)
        rows = [row["image_id"] for row in own.catalog.select(["image_id", "creator"]).to_pylist() if row["creator"] == owner]
        other.update({image: {"creator": f"{owner} / {rng.randrange(shells)}"} for image in rows})
        parted = answers(other, len(receipts.read_text(encoding="utf-8").splitlines()), folder.with_name("parted.jsonl"))
        for policy, whole in zip(KINDS, before, strict=True):
            shares = paid(other, parted, policy).items()
            gains.append(sum(cents for name, cents in shares if name.startswith(f"{owner} / ")) - whole.get(owner, 0))
    return {"split_gain": max(gains) / 1e5, "split_mean": sum(gains) / len(gains) / 1e5, "split_cases": len(gains)}


def million(folder: Path, receipts: Path, quick: bool) -> dict[str, Any]:
    """Time and memory of the command over very many receipts."""
    rows, work = 5_000 if quick else 1_000_000, folder.parent
    known = [json.loads(text) for text in receipts.read_text(encoding="utf-8").splitlines()]
    bare = [{name: value for name, value in each.items() if name not in {"sha256", "model"}} for each in known]
    forms = [json.dumps(each, sort_keys=True, separators=(",", ":")) for each in bare]

    def sealed(row: int) -> str:
        receipt = known[row % len(known)]
        text = forms[row % len(known)].replace(receipt["query"]["sha256"], hashlib.sha256(b"%d" % row).hexdigest())
        model, own = json.dumps(receipt["model"]), hashlib.sha256(text.encode()).hexdigest()
        return f'{text[:-1]},"model":{model},"sha256":"{own}"}}'

    with pq.ParquetWriter(work / "many.parquet", pa.schema({"receipt": pa.string()}), compression="zstd") as writer:
        for start in range(0, rows, 1000):
            writer.write_table(pa.table({"receipt": [sealed(row) for row in range(start, start + 1000)]}))
    (work / "policy.yaml").write_text("signal: picture\n", encoding="utf-8")
    command = f"-m fastattr statement {folder} {work}/many.parquet --pool 1000 --policy {work}/policy.yaml --out {work}/million"
    command += f" --period {known[0]['date'][:4]}"
    started = time.perf_counter()
    subprocess.run([sys.executable, *command.split()], capture_output=True, check=True)
    seconds, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {"million_seconds": seconds * 1e6 / rows, "million_cpu_seconds": (used.ru_utime + used.ru_stime) * 1e6 / rows}
    counted = read_json(work / "million" / "statement.json")["receipts"]["counted"]
    figures |= {"peak_memory_mb": used.ru_maxrss / 1024, "receipts_counted": counted}
    return {f"statement_{name}": value for name, value in figures.items()}


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the result; figures of other parts stay")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--parts", nargs="+", default=["million", "splits", "sums"])
    options = parser.parse_args()
    result = read_json(options.json) if options.json and options.json.exists() else {}
    with tempfile.TemporaryDirectory(prefix="fastattr-") as name:
        folder, own = Path(name) / "emoji", FastAttributor.from_pretrained("emoji")
        own.save_pretrained(folder)
        receipts = answers(own, 4 if options.quick else 16, folder.with_name("receipts.jsonl"))
        for part in options.parts:
            result |= {"million": million, "splits": splits, "sums": sums}[part](folder, receipts, options.quick)
    machine.report({**result, "seed": 0, "quick": options.quick, **machine.describe()}, options.json)


if __name__ == "__main__":
    machine.run(main)
