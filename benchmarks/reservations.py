"""Are creators' reservations found? What a corpus of 24 small files leaves out, and what it should.

    python benchmarks/reservations.py --json benchmarks/results/reservations.json

Every standard, yes and no, over JPEG, PNG, WebP, TIFF and AVIF, damaged XMP, and files that say nothing: tests/reserved.py.
C2PA's files need the extra c2pa. `reservations_found` counts files that are judged right; a damaged packet must be listed, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import pyarrow.parquet as pq  # noqa: E402

from fastattr.corpus.stage import CorpusConfig, run  # noqa: E402
from fastattr.corpus.store import Corpus  # noqa: E402
from tests.reserved import write_cases  # noqa: E402


def measure(work: Path) -> dict[str, object]:
    """Write the files, read them as a corpus, and compare."""
    expected = write_cases(work / "pictures")
    manifest = run(CorpusConfig(kind="folder", path=str(work / "pictures")), work / "corpus")
    corpus = Corpus(work / "corpus")
    noted = dict(zip(corpus.image_ids, corpus.column("metadata"), strict=True))
    skipped = {row["name"]: row["reason"] for row in pq.read_table(work / "corpus" / "skipped.parquet").to_pylist()}
    wrong = [
        name
        for name, reserved in expected.items()
        if (reserved and not skipped.get(name, "").startswith("reserved by "))
        or (not reserved and ("damaged" in name) != ("reserved_unread" in noted.get(name, "damaged")))
    ]
    return {
        "reservations_found": len(expected) - len(wrong),
        "reservations_files": len(expected),
        "wrong": wrong,
        "counts": manifest["reservations"],
        "left_out": {name: skipped[name] for name, reserved in expected.items() if reserved and name in skipped},
    }


def main() -> None:
    """Print the figures, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text = json.dumps(measure(Path(scratch)), indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
