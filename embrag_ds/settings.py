"""Strict settings: frozen dataclasses with type checks, and the parsing of a configuration section into one.

:func:`strict_settings` makes a pydantic dataclass of a class. It checks types without converting them; only a whole
number also passes as a float. It refuses unknown keys and later changes. Rules about values are checked in
``__post_init__`` with :func:`embrag_ds.errors.require`.

Constructed in Python, settings with a wrong type or key raise ``pydantic.ValidationError``. Read from a file by
:func:`parse_settings`, they raise a :class:`~embrag_ds.errors.UserError` of one line.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

import pydantic.dataclasses
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import dataclass_transform

from embrag_ds.errors import UserError

Settings = TypeVar("Settings")

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_UNKNOWN_KEY, _NOT_UNICODE = "unexpected_keyword_argument", "json_invalid"
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}
_LONGEST_VALUE = 60


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def strict_settings(kind: type[Settings]) -> type[Settings]:
    """Class decorator that makes a frozen dataclass whose field types are checked on construction."""
    made: Any = pydantic.dataclasses.dataclass(kind, frozen=True, config=_STRICT)
    return made


def parse_settings(kind: type[Settings], tree: Any, where: str, source: str) -> Settings:
    """Parse a JSON tree into settings of the class ``kind``.

    ``where`` is the section's dotted name and ``source`` its file, both for errors. Raises
    :class:`~embrag_ds.errors.UserError` for an unknown key, a wrong type or a broken rule. Unknown keys come first.
    """
    try:
        # Parsed as JSON, because strict checks then accept a list for a tuple.
        return TypeAdapter(kind).validate_json(json.dumps(tree))
    except ValidationError as fault:
        errors = sorted(fault.errors(include_url=False), key=lambda error: error["type"] != _UNKNOWN_KEY)
        raise UserError(f"{source}: {_complaint(kind, tree, where, errors[0])}") from None
    except UserError as fault:
        raise UserError(f"{source}: {fault}") from None


def nearest(name: str, known: Iterable[str], what: str = "keys") -> str:
    """Advice about an unknown name: the known name that it resembles, or all known ``what``."""
    spellings = {each.lower(): each for each in sorted(known, reverse=True)}
    close = difflib.get_close_matches(name.lower(), spellings, n=1, cutoff=0.5)
    return f"did you mean {spellings[close[0]]!r}?" if close else f"known {what}: {', '.join(sorted(known))}"


def as_json(value: Any) -> str:
    """A configuration value as JSON text, cut off after 60 characters."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _complaint(kind: type, tree: Any, where: str, error: ErrorDetails) -> str:
    """One of pydantic's errors in words, naming the innermost key that a file can contain."""
    if error["type"] == _NOT_UNICODE:
        return f"{where}: a text in it is not Unicode"
    hint: Any = kind
    for name in error["loc"]:
        if dataclasses.is_dataclass(hint):
            hints = typing.get_type_hints(hint)
            if name not in hints:
                return f"unknown key {where}.{name}; {nearest(str(name), hints)}"
            hint = hints[str(name)]
        elif typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        else:
            break  # the error names the whole list, not its item
        tree, where = tree[name], f"{where}.{name}"
    return f"{where} must be {_expected(hint)}, not {as_json(tree)}"


def _expected(hint: Any) -> str:
    """A type annotation in words; covers the types that settings use."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return ", or ".join("null" if each is type(None) else _expected(each) for each in arguments)
    if origin is Literal:
        return f"{'one of ' if len(arguments) > 1 else ''}{', '.join(map(as_json, arguments))}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of {_PLURALS[arguments[0]]}"
    if origin is tuple:
        return f"a list of {len(arguments)} {_PLURALS[arguments[0]]}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a section"
    return _WORDS[hint]
