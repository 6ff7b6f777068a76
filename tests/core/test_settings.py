"""Settings: every value of a config file is what its field says, or the file is refused by name before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from fastattr import ArtifactNotFoundError, InputError
from fastattr.core.settings import at_least, read_yaml


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A section."""

    rate: float = 0.5
    steps: int = 10
    widths: tuple[int, ...] = (1, 2)
    span: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Named:
    """Another, which `named` tells from the first."""

    named: str
    least: int = 1

    def __post_init__(self) -> None:
        at_least(self, 1, "least")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A config with every kind of field."""

    name: str
    kind: Literal["true", "no", "other"] = "other"
    flag: bool = False
    words: tuple[str, ...] = ()
    limit: float | None = None
    inner: Inner = field(default_factory=lambda: Inner(steps=20))
    either: Inner | Named = field(default_factory=Inner)


def read(tmp_path: Path, text: str) -> Any:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    return read_yaml(tmp_path / "config.yaml", Config)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind: true", {"kind": "true"}),
        ("kind: no", {"kind": "no"}),
        ("flag: yes", {"flag": True}),
        ("name: 2026-01-01", {"name": "2026-01-01"}),
        ("name: 0123", {"name": "0123"}),
        ("words: [on, 1, x]", {"words": ("on", "1", "x")}),
        ("limit: 1e-3", {"limit": 1e-3}),
        ("limit: 3", {"limit": 3.0}),
        ("limit:", {"limit": None}),
        ("inner: {rate: 1}", {"inner": Inner(rate=1.0, steps=20)}),
        ("inner: {steps: 1e4}", {"inner": Inner(steps=10_000)}),
        ("inner:", {"inner": Inner(steps=20)}),
        ("either: {named: x}", {"either": Named(named="x")}),
        ("either: {steps: 3}", {"either": Inner(steps=3)}),
        ("\ufeffflag: true", {"flag": True}),
    ],
)
def test_a_value_is_read_as_its_field_means_it(tmp_path: Path, text: str, expected: dict[str, Any]):
    """YAML makes a truth value of `no`, a date of a name and a word of 1e-3; the documented way to write it must work."""
    named = text if "name:" in text else f"{text}\nname: x"
    assert read(tmp_path, named) == Config(**{"name": "x", **expected})


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("kind: tru", "kind: expected one of 'true', 'no', 'other', found 'tru' (did you mean 'true'?)"),
        ("flag: 1", "flag: expected true or false, found 1"),
        ("flag: maybe", "flag"),
        ("words: x", "words: expected a list"),
        ("words: [x, [y]]", r"words[1]: expected text"),
        ("words: {x: y}", "words"),
        ("limit: -1", "limit: must not be negative"),
        ("limit: .nan", "limit"),
        ("limit: .inf", "limit"),
        ("limit: true", "limit: expected a number or nothing, found true"),
        ("limit: [1]", "limit"),
        ("inner: {steps: 1.5}", "inner: steps: expected a whole number, found 1.5"),
        ("inner: {steps: yes}", "inner: steps"),
        ("inner: {widths: [1, x]}", "inner: widths[1]"),
        ("inner: {span: [0.1]}", "inner: span: expected a list of 2"),
        ("inner: {stpes: 1}", "unknown setting 'stpes' (did you mean 'steps'?)"),
        ("inner: 3", "inner: expected a mapping"),
        ("inner: {rate: {a: 1}}", "inner: rate"),
        ("either: {named: x, least: 0}", "least must be at least 1, got 0"),
        ("either: {named: 3, rate: 1}", "unknown setting 'rate'"),
        ("flga: true", "did you mean 'flag'"),
        ("flag: true\nflag: false", "twice"),
        ("- a", "expected a mapping"),
        ("", "expected a mapping of settings, found nothing"),
        ("a: [", "not valid YAML"),
        ("a: !!python/object/apply:os.system [x]", "not valid YAML"),
        ("words: " + "[" * 3000 + "]" * 3000, "not valid YAML"),
        ("limit: 2026-13-45", "limit"),
        ("1: 2", "unknown setting"),
        ("? [a]\n: b", "not valid YAML"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path: Path, text: str, where: str):
    """A setting that is ignored, or fails after hours of work, is worse than one that is refused at once."""
    with pytest.raises(InputError) as refused:
        read(tmp_path, text if "name" in text or not text or text[0] in "-1?" else f"name: x\n{text}")
    assert where in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_what_must_be_given_is_named(tmp_path: Path):
    """A dataclass' own message says 'missing 1 required keyword-only argument'."""
    with pytest.raises(InputError, match=r"config\.yaml: name must be given"):
        read(tmp_path, "flag: true")


def test_a_missing_or_binary_file_is_refused(tmp_path: Path):
    """A picture that is taken for the config must not end in a traceback."""
    with pytest.raises(ArtifactNotFoundError, match="no config file"):
        read_yaml(tmp_path / "nothing.yaml", Config)
    (tmp_path / "config.yaml").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(InputError, match="not valid YAML"):
        read_yaml(tmp_path / "config.yaml", Config)


def test_two_hundred_damaged_files_are_read_or_refused(tmp_path: Path):
    """Whatever an editor leaves behind: an error that names the file, never a crash of another kind."""
    good = b"name: x\nkind: no\nwords: [a, b]\ninner: {steps: 3, widths: [4, 5]}\neither: {named: y}\nlimit: 1.5\n"
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        data = bytearray(good)
        for _ in range(int(rng.integers(1, 6))):
            place = int(rng.integers(len(data)))
            kind = rng.integers(3)
            if kind == 0:
                data[place] = int(rng.integers(256))
            elif kind == 1:
                del data[place : place + int(rng.integers(1, 9))]
            else:
                data[place:place] = rng.choice([b"{", b"[", b": ", b"\n", b"&a *a", b"!!", b"- ", b"\x00", b"~", b"'", b"%"])
        (tmp_path / "config.yaml").write_bytes(data)
        try:
            assert isinstance(read_yaml(tmp_path / "config.yaml", Config), Config)
        except InputError:
            refused += 1
    assert refused > 50
