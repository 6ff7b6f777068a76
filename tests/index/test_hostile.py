"""No file makes FAISS end the process: whoever makes an attributor makes its checksums too."""

from __future__ import annotations

import random
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastattr import ArtifactDamagedError
from fastattr.index.build import build_index
from fastattr.index.files import map_index, save_index
from fastattr.index.search import Ranked, Shards
from tests.fuzz import outcomes
from tests.tiny import unit

ROWS, DIM = 300, 16
KINDS = ("Flat", "SQ8", "SQ4", "PQ4x4", "RaBitQ", "HNSW16", "HNSW16_SQ8", "PCAR8,Flat", "OPQ4_8,SQ8")
KINDS += ("IVF8,Flat", "IVF8,SQ4", "IVF8,RaBitQ", "IVF8,PQ4x4", "PCAR8,IVF8,RaBitQ")
NUMBERS = (0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1, ROWS, ROWS + 1, ROWS - 1, DIM * ROWS)


@pytest.mark.parametrize("kind", [b"IxFI", b"IHNs", b"IxSQ", b"IwSq", b"Ixrq"])
@pytest.mark.parametrize("length", [4, 12, 27, 30, 31, 36])
def test_a_file_cut_in_its_header_is_refused(tmp_path, kind, length):
    """Files of this shape ended the process: FAISS's mapping reader reads beyond the end."""
    header = kind + struct.pack("<iqqq?i", 64, 2000, 1 << 20, 1 << 20, True, 0)
    path = tmp_path / "index.faiss"
    path.write_bytes(header[:length])
    with pytest.raises(ArtifactDamagedError, match="FAISS"):
        map_index(path, inverted=False)


@pytest.mark.parametrize(("kind", "mapped"), [("Flat", True), ("SQfp16", True), ("HNSW16_SQ8", True), ("PCAR8,Flat", False)])
def test_large_kinds_are_mapped_and_answer_as_before(tmp_path, kind, mapped):
    """An exhaustive index that is copied into every process would take the machine's memory many times."""
    vectors = unit(np.random.default_rng(0), ROWS, DIM)
    built = build_index(vectors, kind)
    save_index(built, tmp_path / "index.faiss")
    loaded = map_index(tmp_path / "index.faiss", inverted=False)
    np.testing.assert_array_equal(loaded.search(vectors[:5], 7)[1], built.search(vectors[:5], 7)[1])
    inside = str(tmp_path / "index.faiss") in Path("/proc/self/maps").read_text()
    assert inside == mapped


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Cut, or with some numbers changed, mostly near the beginning where sizes are."""
    changed = bytearray(data)
    if chance.random() < 0.3:
        return bytes(changed[: chance.randrange(len(changed))])
    for _ in range(chance.choice([1, 1, 2, 4])):
        at = chance.randrange(min(len(changed), 400) if chance.random() < 0.6 else len(changed))
        number = struct.pack("<Q", chance.choice(NUMBERS))
        piece = bytes([chance.randrange(256)]) if chance.random() < 0.5 else number[: chance.choice([4, 8])]
        changed[at : at + len(piece)] = piece
    return bytes(changed)


def outcome(path: Path, queries: np.ndarray, *, inverted: bool) -> str:
    """What becomes of opening a file and searching it: an answer, or the error that callers expect."""
    try:
        index = map_index(path, inverted=inverted)
        if (index.ntotal, index.d) == (ROWS, DIM):
            Ranked(Shards([(index, 0)])).search(queries, 20, allowed=np.arange(ROWS) != 5)
        return "answers"
    except ArtifactDamagedError:
        return "refuses"


def fuzz(folder: Path, kind: str, count: int) -> Counter[str]:
    """Outcomes of so many changed files of one kind, tried by a process of their own."""
    vectors = unit(np.random.default_rng(0), ROWS, DIM)
    path, chance, inverted = folder / "index.faiss", random.Random(kind), "IVF" in kind
    save_index(build_index(vectors, kind), path)
    data = path.read_bytes()
    assert outcome(path, vectors[:3], inverted=inverted) == "answers"

    def attempt(_: int) -> str:
        path.write_bytes(mutated(data, chance))
        return outcome(path, vectors[:3], inverted=inverted)

    return outcomes(folder, count, attempt)


@pytest.mark.parametrize("kind", KINDS)
def test_no_changed_file_ends_the_process(tmp_path, kind):
    """A crash in native code is nothing that a caller can catch."""
    assert fuzz(tmp_path, kind, 40)["refuses"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_none_of_very_many_changed_files_ends_the_process(tmp_path, kind):
    """As above, 500 files of each kind."""
    assert fuzz(tmp_path, kind, 500).total() == 500
