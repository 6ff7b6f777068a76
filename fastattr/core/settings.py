"""Settings: read a YAML file into config dataclasses, and check every value before anything runs."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastattr.core.errors import ArtifactNotFoundError, InputError

Config = TypeVar("Config")


def read_yaml(path: str | Path, kind: type[Config]) -> Config:
    """Read and check a config file.

    Args:
        path: a YAML file.
        kind: the dataclass that it fills; a section may be a dataclass too, and what is left out keeps its default.

    Raises:
        ArtifactNotFoundError: there is no such file.
        InputError: it is not YAML, or a setting is unknown or out of range; the text names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactNotFoundError(f"there is no config file {path}; see hub_scripts/configs/ for examples.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    config = _build(kind, values, where=str(path))
    assert isinstance(config, kind)
    return config


def _build(kind: type, values: Any, *, where: str) -> Any:
    """A dataclass from a mapping, nested ones included; unknown keys are errors, sections keep their own defaults."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected a mapping of settings, found {type(values).__name__}.")
    known = {item.name: item for item in dataclasses.fields(kind)}
    unknown = set(values) - set(known)
    if unknown:
        raise InputError(f"{where}: unknown setting {sorted(unknown)[0]!r}; known are {', '.join(known)}.")
    hints = typing.get_type_hints(kind)
    arguments = {name: _convert(known[name], hints[name], value, where=f"{where}: {name}") for name, value in values.items()}
    try:
        return kind(**arguments)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _convert(item: dataclasses.Field[Any], hint: Any, value: Any, *, where: str) -> Any:
    """One setting's value in its field's type."""
    if isinstance(hint, types.UnionType) and all(map(dataclasses.is_dataclass, typing.get_args(hint))):
        return _one_of(typing.get_args(hint), value, where=where)
    if dataclasses.is_dataclass(hint):
        assert callable(item.default_factory)
        defaults = dataclasses.asdict(item.default_factory())
        return _build(typing.cast(type, hint), _merge(defaults, value, where=where), where=where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where}: expected a list, found {value!r}.")
        return tuple(value)
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed)
        raise InputError(f"{where}: expected {names}, found {value!r}.")
    return value


def _one_of(kinds: tuple[type, ...], values: Any, *, where: str) -> Any:
    """Of several dataclasses the one that has a setting without default which `values` names; else the first."""
    for kind in kinds[1:]:
        required = {item.name for item in dataclasses.fields(kind) if item.default is item.default_factory}
        if isinstance(values, dict) and required & set(values):
            return _build(kind, values, where=where)
    return _build(kinds[0], _merge(dataclasses.asdict(kinds[0]()), values, where=where), where=where)


def _merge(defaults: dict[str, Any], values: Any, *, where: str) -> dict[str, Any]:
    """A section's values over its defaults, so that one setting of a nested section can be changed alone."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected a mapping of settings, found {values!r}.")
    merged = dict(defaults)
    for key, value in values.items():
        nested = isinstance(value, dict) and isinstance(defaults.get(key), dict)
        merged[key] = _merge(defaults[key], value, where=f"{where}: {key}") if nested else value
    return merged
