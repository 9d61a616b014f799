"""Outside data, validated as a whole before anything uses it: JSON against a type, with the key's path in the message.

The types are `msgspec` structs and dataclasses whose annotations state kinds and bounds. JSON has no NaN and no
infinity, and msgspec reads none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from .errors import CascadeError, plain, shortened, shown

T = TypeVar("T")
E = TypeVar("E", bound=CascadeError)


class _Key(str):
    """A step into a mapping; a plain text is a step to a field of a struct."""


def parse_json(data: bytes | str, where: str, error: type[E]) -> Any:
    """JSON as plain values.

    Args:
        data: UTF-8.
        where: a file, or what the text is, for the message.
        error: the class to raise.

    Raises:
        error: it is no JSON.
    """
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as reason:
        raise error(f"{plain(where)} is not readable JSON: {plain(str(reason))}") from None


def validated(document: Any, kind: type[T], where: str, error: type[E]) -> T:
    """Plain values as a type.

    Args:
        document: dicts, lists, strings, numbers, booleans and None.
        kind: a struct or dataclass.
        where: a file, or what the values are, for the message.
        error: the class to raise; it carries the key's path as ``field``, the value, and what is accepted there.

    Raises:
        error: a key is missing, unknown, or of another kind or size than ``kind`` says.
    """
    try:
        return msgspec.convert(document, kind)
    except (msgspec.ValidationError, RecursionError) as reason:
        text = str(reason)
    what, _, place = text.partition(" - at ")
    of_key = place.startswith("`key` in ")
    steps = _steps(document, kind, place.removeprefix("`key` in ").strip("`"), text)
    if of_key:
        key = _first_failing(document, steps, kind, text)
        mapping = _type_at(inspect.type_info(kind), steps)
        accepted = accepted_by(mapping.key_type) if isinstance(mapping, inspect.DictType) else "another key"
        told, value = f"the key {shown(key)} is not accepted; a key must be {accepted}", key
    elif about := _ABOUT_A_KEY.fullmatch(what):
        of, steps = steps, [*steps, about[2]]
        missing = about[1] == "missing required"
        accepted = accepted_by(_type_at(inspect.type_info(kind), steps if missing else of), names=not missing)
        told = f"the key is missing; it must be {accepted}" if missing else f"the key is not known; {accepted}"
        value = _at(document, steps)
    elif _OF_MSGSPEC.match(what):
        accepted, value = accepted_by(_type_at(inspect.type_info(kind), steps)), _at(document, steps)
        told = f"{_quoted(value)} is not accepted; it must be {accepted}"
    else:  # a type's own check of fields that are right one by one
        accepted, value = shortened(plain(what), 200), _at(document, steps)
        told = accepted
    path = _written(steps)
    raise error(f"{plain(where)}: {path or 'the document'}: {told}", field=path or "$", value=value, accepted=accepted)


def accepted_by(kind: inspect.Type | None, names: bool = False) -> str:
    """What a type accepts, in words.

    Args:
        kind: from `msgspec.inspect`; None: nobody knows.
        names: of an object, the names of its keys.
    """
    match kind:
        case inspect.IntType():
            return f"an integer{_bounds(kind)}"
        case inspect.FloatType():
            return f"a number{_bounds(kind)}"
        case inspect.StrType(pattern=None):
            return f"a text{_lengths(kind, 'character')}"
        case inspect.StrType():
            return f"a text of the form {kind.pattern}"
        case inspect.BoolType():
            return "true or false"
        case inspect.NoneType():
            return "null"
        case inspect.LiteralType(values=values):
            words = sorted(plain(str(value)) for value in values)
            return f"one of {', '.join(words)}" if len(words) > 1 else words[0]
        case inspect.TupleType(item_types=items):
            return f"a list of {len(items)} entries"
        case inspect.VarTupleType() | inspect.ListType():
            return f"a list{_lengths(kind, 'entry', 'entries')}"
        case inspect.UnionType(types=types):
            return " or ".join(accepted_by(one) for one in types)
        case inspect.StructType(fields=fields) | inspect.DataclassType(fields=fields) if names:
            return f"known are {', '.join(field.encode_name for field in fields)}"
        case inspect.DictType():
            return f"an object{_lengths(kind, 'key')}"
        case _:
            return "an object"


def _bounds(kind: inspect.IntType | inspect.FloatType) -> str:
    """`` from 1 to 9``, `` above 0 and up to 9``, or less where a bound is missing."""
    low = f"from {kind.ge:g}" if kind.ge is not None else f"above {kind.gt:g}" if kind.gt is not None else None
    high = kind.le if isinstance(kind.le, int) else None if kind.le is None else f"{kind.le:g}"
    if low is None:
        return "" if high is None else f" of at most {high}"
    return f" {low}" + ("" if high is None else f" to {high}" if kind.ge is not None else f" and up to {high}")


def _lengths(kind: Any, one: str, many: str | None = None) -> str:
    """`` of 1 to 9 characters``, or less where a bound is missing."""
    least, most, many = kind.min_length, kind.max_length, many or f"{one}s"
    if least is None and most is None:
        return ""
    if most is None:
        return f" of at least {least} {one if least == 1 else many}"
    return f" of up to {most} {many}" if not least else f" of {least} to {most} {many}"


def _quoted(value: Any) -> str:
    return "an object" if isinstance(value, Mapping) else shown(value)


_OF_MSGSPEC = re.compile(r"Expected `|Invalid enum value |Number out of range|Integer value out of range")
_ABOUT_A_KEY = re.compile(r"Object (missing required|contains unknown) field `(.*)`", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|(\[\.\.\.\])")


def _steps(document: Any, kind: type[Any], path: str, text: str) -> list[str | int]:
    """The steps of a path of msgspec's such as ``$.files[...].bytes``, with the keys that it leaves open."""
    steps: list[str | int] = []
    for match in _STEP.finditer(path):
        name, index, unknown = match.groups()
        if unknown:
            key = _first_failing(document, steps, kind, text)
            document = _with(document, steps, {key: _at(document, steps)[key]})
            steps.append(_Key(key))
        else:
            steps.append(name if index is None else int(index))
    return steps


def _first_failing(document: Any, steps: Sequence[str | int], kind: type[Any], text: str) -> Any:
    """The key of a mapping at which msgspec fails: the last of the fewest first keys with which it fails so."""
    entries = list(_at(document, steps).items())
    fine, failing = 0, len(entries)
    while failing - fine > 1:
        half = (fine + failing) // 2
        try:
            msgspec.convert(_with(document, steps, dict(entries[:half])), kind)
            fails = False
        except (msgspec.ValidationError, RecursionError) as reason:
            fails = str(reason) == text
        fine, failing = (fine, half) if fails else (half, failing)
    return entries[failing - 1][0]


def _with(value: Any, steps: Sequence[str | int], other: Any) -> Any:
    """A document with another value at a place."""
    if not steps:
        return other
    first, *rest = steps
    changed: Any = dict(value) if isinstance(value, Mapping) else list(value)
    changed[first] = _with(value[first], rest, other)
    return changed


def _at(document: Any, steps: Sequence[str | int]) -> Any:
    """The value at a place; None where there is none."""
    value = document
    for step in steps:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _type_at(kind: inspect.Type, steps: Sequence[str | int]) -> inspect.Type | None:
    """The type of what lies at a place; None where nobody knows."""
    if not steps:
        return kind
    first, *rest = steps
    match kind:
        case inspect.UnionType(types=types):
            found = [_type_at(one, steps) for one in types]
            return next((one for one in found if one is not None), None)
        case inspect.StructType(fields=fields) | inspect.DataclassType(fields=fields):
            return next((_type_at(field.type, rest) for field in fields if field.encode_name == first), None)
        case inspect.DictType(value_type=inner):
            return _type_at(inner, rest)
        case inspect.VarTupleType(item_type=inner) | inspect.ListType(item_type=inner):
            return _type_at(inner, rest)
        case inspect.TupleType(item_types=inners) if isinstance(first, int) and first < len(inners):
            return _type_at(inners[first], rest)
        case _:
            return None


def _written(steps: Sequence[str | int]) -> str:
    """Steps as a path such as ``engines[0].ranges['batch'].min``."""
    made = ""
    for step in steps:
        if isinstance(step, int):
            made += f"[{step}]"
        else:
            name = shortened(plain(step))
            made += f"['{name}']" if isinstance(step, _Key) else f".{name}"
    return made.removeprefix(".")
