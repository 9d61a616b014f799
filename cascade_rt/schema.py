"""Outside data, validated as a whole before anything uses it: JSON against a type, with the key's path in the message.

The types are `msgspec` structs and dataclasses whose annotations state kinds and bounds. JSON has no NaN and no
infinity, and msgspec reads none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from .errors import CascadeError, plain, shortened, shown

T = TypeVar("T")
E = TypeVar("E", bound=CascadeError)


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
        error: the class to raise; it carries the key's path as ``field``, and the value.

    Raises:
        error: a key is missing, unknown, or of another kind or size than ``kind`` says.
    """
    try:
        return msgspec.convert(document, kind)
    except (msgspec.ValidationError, RecursionError) as reason:
        text = str(reason)
    what, _, place = text.partition(" - at ")
    of_key = place.startswith("`key` in ")
    path = _path(document, kind, place.removeprefix("`key` in ").strip("`") or "$", text)
    found, said = _at(document, path), ""
    if of_key:
        found = next((key for key in found if _fails_alone(document, path, key, kind, text)), None)
        said = f"the key {shown(found)}: "
    elif about := _ABOUT_A_KEY.fullmatch(what):
        path = f"{path}.{shortened(plain(about[1]))}"
        found = _at(document, path)
    given = "" if of_key or found is _MISSING or isinstance(found, dict) else f"; it is {shown(found)}"
    told = f"{said}{shortened(plain(what), 200)}{given}"
    raise error(
        f"{plain(where)}: {path.removeprefix('$.').replace('$', 'the document')}: {told}",
        field=path.removeprefix("$."),
        value=None if found is _MISSING else found,
        accepted=what,
    )


_ABOUT_A_KEY = re.compile(r"Object (?:missing required|contains unknown) field `(.*)`", re.DOTALL)
_MISSING = object()
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|\['(.*?)'\]")


def _at(document: Any, path: str) -> Any:
    """The value at a path such as ``$.engines[0].ranges['batch']``."""
    value = document
    for match in _STEP.finditer(path):
        name, index, key = match.groups()
        try:
            value = value[int(index)] if index is not None else value[name if name is not None else key]
        except (KeyError, IndexError, TypeError):
            return _MISSING
    return value


def _path(document: Any, kind: type[Any], path: str, text: str) -> str:
    """The path with the key that msgspec leaves open: it writes ``[...]`` for an entry of a mapping."""
    while "[...]" in path:
        before, _, after = path.partition("[...]")
        mapping = _at(document, before)
        if not isinstance(mapping, Mapping):
            return path
        for key in mapping:
            if _fails_alone(document, before, key, kind, text):
                path = f"{before}['{shortened(plain(str(key)))}']{after}"
                break
        else:
            return path.replace("[...]", "")
    return path


def _fails_alone(document: Any, path: str, key: Any, kind: type[Any], text: str) -> bool:
    """Whether the document fails in the same way with this key as the only one of the mapping at ``path``."""

    def with_one(value: Any, steps: list[Any]) -> Any:
        if not steps:
            return {key: value[key]}
        first, *rest = steps
        changed = dict(value) if isinstance(value, dict) else list(value)
        changed[first] = with_one(value[first], rest)
        return changed

    steps = [int(m[2]) if m[2] is not None else (m[1] if m[1] is not None else m[3]) for m in _STEP.finditer(path)]
    try:
        msgspec.convert(with_one(document, steps), kind)
    except (msgspec.ValidationError, RecursionError) as reason:
        return str(reason) == text
    return False
