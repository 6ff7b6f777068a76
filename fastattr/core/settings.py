"""Settings: read a YAML file into config dataclasses, and check every value against its field's type before anything runs.

What depends on several settings is checked by the dataclass itself (`__post_init__`). YAML takes `no`, `true`, `2026` and
`1e-3` for something else than the words that they are; here the field decides.
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
LONGEST_QUOTE = 60  # characters of a wrong value that an error repeats


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
    """Read and check a YAML file that fills a dataclass; a section may be a dataclass too, and what is left out is default.

    Raises InputError if it is not YAML, or a setting is unknown, of another type, none of the choices or out of range, and
    ArtifactNotFoundError if there is no such file.
    """
    if not Path(path).is_file():
        raise ArtifactNotFoundError(f"there is no config file {path}; see hub_scripts/configs/ for examples.")
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: it is no UTF-8
        raise InputError(f"{path} is not valid YAML: {error}") from error
    return build(kind, values, where=str(path))


def build(kind: type[Config], values: Any, *, where: str) -> Config:
    """A dataclass from a mapping, nested ones included; unknown keys are errors, sections keep their own defaults."""
    known = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in _mapping(values, where):
        if name not in known:
            near = did_you_mean(str(name), known)
            raise InputError(f"{where}: unknown setting {quoted(name)}{near}; known are {', '.join(known)}.")
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
    """Raise InputError, which names it, if one of these numbers of a config is smaller than `least`."""
    for name in names:
        value = getattr(config, name)
        if any(number < least for number in (value if isinstance(value, tuple) else (value,))):
            raise InputError(f"{name} must be at least {least:g}, got {value}")


def _is_required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected a mapping of settings, found {quoted(values)}.")
    return values


def _section(item: dataclasses.Field[Any], hint: Any, value: Any, *, where: str) -> Any:
    """One setting's value: a section of its own, or a plain value."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if not all(map(dataclasses.is_dataclass, kinds)):
        return _convert(hint, value, where=where)
    values = _mapping({} if value is None else value, where)  # None: a section whose lines are all commented out
    for kind in kinds[1:]:  # of several dataclasses the one that has a setting without default which is given; else the first
        if any(each.name in values and _is_required(each) for each in dataclasses.fields(kind)):
            return build(kind, values, where=where)
    default = item.default_factory() if callable(item.default_factory) else kinds[0]()
    return build(kinds[0], _merge(dataclasses.asdict(default), values), where=where)


def _convert(hint: Any, value: Any, *, where: str) -> Any:
    """A plain value in its field's type; InputError if it is of another."""
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
    text, found = (value.text, value.value) if isinstance(value, Scalar) else (value, value)
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if text not in choices:
            near, listed = did_you_mean(str(text), choices), ", ".join(map(repr, choices))
            raise InputError(f"{where}: expected one of {listed}, found {quoted(value)}{near}.")
        return text
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    if bool in kinds and isinstance(found, bool):
        return found
    number = _number(found)
    for kind in (int, float):
        if kind in kinds and number is not None and (kind is float or number.is_integer()):
            if number < 0:
                raise InputError(f"{where}: must not be negative, found {quoted(value)}.")
            return found if isinstance(found, kind) else kind(number)
    if str in kinds and isinstance(text, str):
        return text
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "nothing"}
    expected = " or ".join(words.get(kind, str(kind)) for kind in kinds)
    raise InputError(f"{where}: expected {expected}, found {quoted(value)}.")


def _number(found: Any) -> float | None:
    """A finite number, also of a word such as '1e-3', which YAML takes for none."""
    try:
        number = float(found) if isinstance(found, int | float | str) and not isinstance(found, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _merge(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A section's values over its defaults, so that one setting of a nested section can be changed alone."""
    nested = {key for key in values if isinstance(values[key], dict) and isinstance(defaults.get(key), dict)}
    return {**defaults, **values, **{key: _merge(defaults[key], values[key]) for key in nested}}
