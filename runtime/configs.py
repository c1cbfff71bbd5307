"""Frozen dataclasses from TOML tables and JSON objects, strictly: an unknown or mistyped key is an error that names the nearest right one."""

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union

from .errors import DualmatchError

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `cls` from a mapping.

    Args:
        cls: a dataclass; fields may be bool, int, float, str, unions of these such as `int | str`, `Literal`, tuples of these,
            mappings with text keys, `X | None`, other dataclasses, or `Any`.
        values: the mapping; fields with defaults may be left out.
        where: what the mapping is, for messages ("recipe my.toml, [model]").

    Raises:
        DualmatchError: an unknown key, a missing key, a value of the wrong type, or one that `cls` itself refuses.
    """
    assert is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    known = [field.name for field in fields(cls)]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"it takes {', '.join(known)}."
            raise DualmatchError(f"{where} has no option {key!r}; {hint}")
    built = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    for field in fields(cls):
        if field.name not in built and field.default is MISSING and field.default_factory is MISSING:
            raise DualmatchError(f"{where} lacks the option {field.name!r}.")
    try:
        return cls(**built)
    except DualmatchError as error:
        raise DualmatchError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [argument for argument in arguments if argument is not type(None)]
        if len(choices) == 1:
            return _convert(choices[0], value, where)
        if type(value) not in choices:
            names = " or ".join(choice.__name__ for choice in choices)
            raise DualmatchError(f"{where} must be of type {names}, got {value!r}.")
        return value
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise DualmatchError(f"{where} must be a table, got {value!r}.")
        return from_mapping(typing.cast("type[Any]", hint), value, where)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise DualmatchError(f"{where} must be a table, got {value!r}.")
        return {key: _convert(arguments[1], entry, f"{where}.{key}") for key, entry in value.items()}
    if origin is Literal:
        if (type(value), value) not in [(type(choice), choice) for choice in arguments]:  # True equals 1, but is not it
            raise DualmatchError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {value!r}.")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise DualmatchError(f"{where} must be a list, got {value!r}.")
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(inner) != len(value):
            raise DualmatchError(f"{where} must have {len(inner)} entries, got {len(value)}.")
        return tuple(
            _convert(one, entry, f"{where}[{i}]") for i, (one, entry) in enumerate(zip(inner, value, strict=True))
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise DualmatchError(f"{where} must be of type {hint.__name__}, got {value!r}.")
    return value


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a configuration value outside [low, high]."""
    if not low <= value <= high:
        raise DualmatchError(f"{name} must lie between {low} and {high}, got {value}.")
