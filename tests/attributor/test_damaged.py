"""Damaged attributors and receipts, sealed anew or not: a clear error or the right answer, never a crash."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastattr import FastattrError, FastAttributor, read_info
from fastattr.attributor.folder import seal
from fastattr.attributor.receipts import read_receipt, verify
from fastattr.core.files import sha256_file
from tests.attributor.test_golden import GOLDEN
from tests.fuzz import damaged, damaged_bytes, outcomes
from tests.made import QUERY, write_attributor
from tests.tiny import draw

MANY = pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
KINDS = {"SQfp16": {}, "IVF4,SQ4": {}, "PCAR8,SQ8": {"shard_rows": 25}}
"""Of the made attributors; a fourth has encoders, a calibration and pictures."""


def answer_of(folder: Path) -> list[str]:
    """What an attributor answers, after everything that is usually asked of it."""
    attributor = FastAttributor.from_pretrained(folder)
    read_info(folder)
    if attributor.config["encoders"]:
        answer = attributor.attribute(draw("red", "circle", "plain"), "red circle, plain style", k=5)
    else:
        answer = attributor.attribute_features(QUERY[None], ["x"], 5)[0]
    json.loads(answer.to_json())
    assert len(answer._repr_html_()) > 0
    assert len(answer.to_pandas()) == len(answer) <= len(attributor)
    assert np.isfinite([result.similarity for result in answer]).all()
    attributor.history()
    return [result.image_id for result in answer]


def damage(folder: Path, chance: random.Random) -> bool:
    """Damage one file of an attributor; whether its checksums and seal then say that all is well."""
    config = json.loads((folder / "config.json").read_text())
    sealed = chance.random() < 0.7
    if chance.random() < 0.4:
        config = damaged(config, chance)
    else:
        name = chance.choice([*sorted(config["sha256"]), "changes.sqlite"])
        path, how = folder / name, chance.random()
        if how < 0.1:
            path.unlink(missing_ok=True)
        elif how < 0.2:
            path.write_bytes((folder / chance.choice(sorted(config["sha256"]))).read_bytes())
        elif how < 0.25:
            path.unlink(missing_ok=True)
            path.mkdir()
        else:
            path.write_bytes(damaged_bytes(path.read_bytes() if path.exists() else b"SQLite format 3\0" * 9, chance))
        if sealed and path.is_file() and name in config["sha256"]:
            config["sha256"][name] = sha256_file(path)
    if sealed and isinstance(config, dict):
        config = seal(config)
    (folder / "config.json").write_text(json.dumps(config))
    return sealed


@pytest.mark.parametrize("count", [30, MANY])
def test_a_damaged_attributor_is_refused_or_answers(tmp_path: Path, count: int):
    """Whoever changes a file can seal it anew: a KeyError tells nobody what is wrong, and a crash ends a server."""
    sources = [write_attributor(tmp_path / kind, factory=kind, **settings) for kind, settings in KINDS.items()]
    sources.append(GOLDEN / "tiny")
    right = [answer_of(source) for source in sources]

    def attempt(number: int) -> str:
        chance, folder = random.Random(number), tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sources[number % len(sources)], folder)
        sealed = damage(folder, chance)
        try:
            found = answer_of(folder)
        except FastattrError:
            return "refused"
        assert sealed or found == right[number % len(sources)]
        return "answered"

    assert outcomes(tmp_path, count, attempt)["refused"] > count / 2


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_damaged_receipt_is_refused_or_held_against_the_attributor(tmp_path: Path, count: int):
    """Receipts come from strangers, too."""
    attributor = FastAttributor.from_pretrained(write_attributor(tmp_path / "attributor"))
    whole = json.loads(attributor.attribute_features(QUERY[None], ["x"], 5, where={"creator": "Ada"})[0].to_json())
    path = tmp_path / "receipt.json"

    def attempt(number: int) -> str:
        chance = random.Random(number)
        if chance.random() < 0.2:
            path.write_bytes(damaged_bytes(json.dumps(whole).encode(), chance))
        else:
            path.write_text(json.dumps(damaged(whole, chance)))
        try:
            return "differs" if verify(read_receipt(path), attributor) else "same"
        except FastattrError:
            return "refused"

    found = outcomes(tmp_path, count, attempt)
    assert min(found["refused"], found["differs"]) > 0
