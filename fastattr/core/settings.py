"""Settings: read a YAML file into config dataclasses, and check every value before anything runs.

A value is checked against its field's type: `Literal` fields list their choices, numbers are finite and not negative, and
every element of a list is checked. What depends on several settings is checked by the dataclass itself (`__post_init__`).
YAML takes `no`, `true`, `2026` and `1e-3` for something else than the words that they are; here the field decides.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastattr.core.errors import ArtifactNotFoundError, InputError

Config = TypeVar("Config")
LONGEST_QUOTE = 60
"""Characters of a wrong value that an error repeats."""


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A value that YAML took for a truth value, a number or a date, and how it was written."""

    text: str
    value: Any

    def __repr__(self) -> str:
        return self.text


class Loader(yaml.SafeLoader):
    """YAML without tags of Python, with scalars as they were written, refusing a key that comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                word = "comes twice" if isinstance(key, yaml.ScalarNode) else "is no word"
                raise yaml.constructor.ConstructorError(None, None, f"the key {quoted(key.value)} {word}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _as_written(loader: Loader, node: yaml.ScalarNode) -> Any:
    """A scalar with its text; one that only looks like a number or a date is its text alone."""
    try:
        return Scalar(node.value, yaml.SafeLoader.yaml_constructors[node.tag](loader, node))
    except (ValueError, KeyError):
        return node.value


for _kind in ("bool", "int", "float", "timestamp"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _as_written)


def read_yaml(path: str | Path, kind: type[Config]) -> Config:
    """Read and check a config file.

    Args:
        path: a YAML file.
        kind: the dataclass that it fills; a section may be a dataclass too, and what is left out keeps its default.

    Raises:
        ArtifactNotFoundError: there is no such file.
        InputError: it is not YAML, or a setting is unknown, of another type, none of the choices or out of range; the text
            names it, and what it may be.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactNotFoundError(f"there is no config file {path}; see hub_scripts/configs/ for examples.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: it is no UTF-8
        raise InputError(f"{path} is not valid YAML: {error}") from error
    config = build(kind, values, where=str(path))
    assert isinstance(config, kind)
    return config


def build(kind: type, values: Any, *, where: str) -> Any:
    """A dataclass from a mapping, nested ones included; unknown keys are errors, sections keep their own defaults."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected a mapping of settings, found {quoted(values)}.")
    known = {item.name: item for item in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            raise InputError(
                f"{where}: unknown setting {quoted(name)}{did_you_mean(str(name), known)}; known are {', '.join(known)}."
            )
    hints = typing.get_type_hints(kind)
    arguments = {name: _section(known[name], hints[name], value, where=f"{where}: {name}") for name, value in values.items()}
    missing = [name for name, item in known.items() if name not in values and _is_required(item)]
    if missing:
        raise InputError(f"{where}: {', '.join(missing)} must be given.")
    try:
        return kind(**arguments)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def quoted(value: Any) -> str:
    """A value as an error repeats it."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """', did you mean ...?' where one of the words is like it, else ''."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def at_least(config: Any, least: float, *names: str) -> None:
    """Check numbers of a config.

    Raises:
        InputError: one is smaller than `least`; the text names it.
    """
    for name in names:
        value = getattr(config, name)
        if any(number < least for number in (value if isinstance(value, tuple) else (value,))):
            raise InputError(f"{name} must be at least {least:g}, got {value}")


def _is_required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _section(item: dataclasses.Field[Any], hint: Any, value: Any, *, where: str) -> Any:
    """One setting's value: a section of its own, or a plain value."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if not all(map(dataclasses.is_dataclass, kinds)):
        return _convert(hint, value, where=where)
    value = {} if value is None else value  # a section whose lines are all commented out
    if len(kinds) > 1:
        return _one_of(kinds, value, where=where)
    assert callable(item.default_factory)
    return build(hint, _merge(dataclasses.asdict(item.default_factory()), value, where=where), where=where)


def _convert(hint: Any, value: Any, *, where: str) -> Any:
    """A plain value in its field's type.

    Raises:
        InputError: it is of another.
    """
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where}: expected a list, found {quoted(value)}; write [{quoted(value)}] for one.")
        kinds = typing.get_args(hint)
        if kinds[-1] is not Ellipsis and len(kinds) != len(value):
            raise InputError(f"{where}: expected a list of {len(kinds)}, found {quoted(value)}.")
        return tuple(_convert(kinds[0], each, where=f"{where}[{row}]") for row, each in enumerate(value))
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where}: expected a mapping, found {quoted(value)}.")
        key, kind = typing.get_args(hint)
        return {_convert(key, k, where=where): _convert(kind, each, where=f"{where}: {k}") for k, each in value.items()}
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        text = _text(value)
        if text not in choices:
            listed = ", ".join(repr(choice) for choice in choices)
            raise InputError(f"{where}: expected one of {listed}, found {quoted(value)}{did_you_mean(str(text), choices)}.")
        return text
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    converters = {bool: _truth, int: _integer, float: _number, str: _text}
    for kind in kinds:
        if kind in converters and (found := converters[kind](value)) is not None:
            if not isinstance(found, str) and found < 0:
                raise InputError(f"{where}: must not be negative, found {quoted(value)}.")
            return found
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "nothing"}
    expected = " or ".join(words.get(kind, str(kind)) for kind in kinds)
    raise InputError(f"{where}: expected {expected}, found {quoted(value)}.")


def _text(value: Any) -> str | None:
    found = value.text if isinstance(value, Scalar) else value
    return found if isinstance(found, str) else None


def _truth(value: Any) -> bool | None:
    found = value.value if isinstance(value, Scalar) else value
    return found if isinstance(found, bool) else None


def _number(value: Any) -> float | None:
    found = value.value if isinstance(value, Scalar) else value
    if isinstance(found, str):  # YAML takes '1e-3' for a word
        try:
            found = float(found)
        except ValueError:
            return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)


def _integer(value: Any) -> int | None:
    found = value.value if isinstance(value, Scalar) else value
    if isinstance(found, int) and not isinstance(found, bool):
        return found
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None


def _one_of(kinds: tuple[type, ...], values: Any, *, where: str) -> Any:
    """Of several dataclasses the one that has a setting without default which `values` names; else the first."""
    for kind in kinds[1:]:
        required = {item.name for item in dataclasses.fields(kind) if _is_required(item)}
        if isinstance(values, dict) and required & set(values):
            return build(kind, values, where=where)
    return build(kinds[0], _merge(dataclasses.asdict(kinds[0]()), values, where=where), where=where)


def _merge(defaults: dict[str, Any], values: Any, *, where: str) -> dict[str, Any]:
    """A section's values over its defaults, so that one setting of a nested section can be changed alone."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected a mapping of settings, found {quoted(values)}.")
    merged = dict(defaults)
    for key, value in values.items():
        nested = isinstance(value, dict) and isinstance(defaults.get(key), dict)
        merged[key] = _merge(defaults[key], value, where=f"{where}: {key}") if nested else value
    return merged
