"""Damage, and what comes of it: helpers of the tests that try very many damaged files."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss

JUNK: tuple[Any, ...] = (None, True, -1, 0, 7, 2**63, 1e308, "", "x", "../x", "\0", "9" * 400, [], {}, [1], {"a": 1})
"""What takes the place of a value."""


def outcomes(folder: Path, count: int, attempt: Callable[[int], str]) -> Counter[str]:
    """What `attempt` says of so many tries, made by a forked process: neither a signal nor an error may end it.

    Forked, so that a crash in native code is a failed test; with one OpenMP thread, since a fork has no others.
    """
    faiss.omp_set_num_threads(1)
    process = os.fork()
    if not process:
        number = 0
        try:
            for number in range(count):
                found = attempt(number)
                with (folder / "outcomes").open("a") as notes:
                    notes.write(f"{found}\n")
        except BaseException as error:
            (folder / "error").write_text(f"try {number}: {error!r}")
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    found = (folder / "outcomes").read_text().split() if (folder / "outcomes").exists() else []
    assert not os.WIFSIGNALED(status), f"try {len(found)}: signal {os.WTERMSIG(status)}"
    assert not (folder / "error").exists(), (folder / "error").read_text()
    return Counter(found)


def damaged(value: Any, chance: random.Random) -> Any:
    """A JSON value with one part taken away or replaced."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.1:
        return chance.choice(JUNK)
    key = chance.choice(sorted(value)) if isinstance(value, dict) else chance.randrange(len(value))
    changed = dict(value) if isinstance(value, dict) else list(value)
    if chance.random() < 0.2:
        del changed[key]
    else:
        changed[key] = damaged(value[key], chance)
    return changed


def damaged_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes that are cut, or of which some are others."""
    if not data or chance.random() < 0.3:
        return data[: chance.randrange(len(data) + 1)]
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(changed))
        changed[at : at + 1] = chance.choice([bytes([chance.randrange(256)]), b"", b"\xff" * 8, b"\0" * 8])
        changed = changed or bytearray(b"x")
    return bytes(changed)
