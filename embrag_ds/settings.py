"""Settings classes: strict frozen dataclasses, and how a section of a configuration file becomes one.

:func:`strict_settings` makes a pydantic dataclass of a class: it checks types without converting them (a whole number
passes for a number, nothing else passes for anything else), refuses unknown keys, and cannot be changed afterwards.
Rules about values stand in ``__post_init__``, said with :func:`embrag_ds.errors.require`. Built in Python, a settings
object with a wrong type or key is a ``pydantic.ValidationError``. Read from a file by :func:`parse_settings`, it is a
:class:`~embrag_ds.errors.UserError` of one line.
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
    """Class decorator: a frozen dataclass whose types are checked when it is built."""
    made: Any = pydantic.dataclasses.dataclass(kind, frozen=True, config=_STRICT)
    return made


def parse_settings(kind: type[Settings], tree: Any, where: str, source: str) -> Settings:
    """``tree``, as JSON has it, as settings of ``kind``.

    ``where`` is the section's dotted name and ``source`` its file, for the errors. An unknown key, a wrong type and a
    broken rule are :class:`~embrag_ds.errors.UserError`; an unknown key is named before anything else.
    """
    try:
        # As JSON, because there a list is what a tuple looks like, and strict checks know that.
        return TypeAdapter(kind).validate_json(json.dumps(tree))
    except ValidationError as fault:
        errors = sorted(fault.errors(include_url=False), key=lambda error: error["type"] != _UNKNOWN_KEY)
        raise UserError(f"{source}: {_complaint(kind, tree, where, errors[0])}") from None
    except UserError as fault:
        raise UserError(f"{source}: {fault}") from None


def nearest(name: str, known: Iterable[str], what: str = "keys") -> str:
    """What to say of an unknown name: the one it resembles, or all ``what`` there are."""
    spellings = {each.lower(): each for each in sorted(known, reverse=True)}
    close = difflib.get_close_matches(name.lower(), spellings, n=1, cutoff=0.5)
    return f"did you mean {spellings[close[0]]!r}?" if close else f"known {what}: {', '.join(sorted(known))}"


def as_json(value: Any) -> str:
    """A value of a configuration as its file spells it, cut short if it is long."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _complaint(kind: type, tree: Any, where: str, error: ErrorDetails) -> str:
    """One of pydantic's errors in words, with the innermost key that a file can name."""
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
            break  # an item of a list: the list is named, as a whole
        tree, where = tree[name], f"{where}.{name}"
    return f"{where} must be {_expected(hint)}, not {as_json(tree)}"


def _expected(hint: Any) -> str:
    """A type annotation in words; only what JSON can say and our settings use."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return f"{_expected(inner)}, or null"
    if origin is Literal:
        return f"one of {', '.join(map(as_json, arguments))}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of {_PLURALS[arguments[0]]}"
    if origin is tuple:
        return f"a list of {len(arguments)} {_PLURALS[arguments[0]]}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a section"
    return _WORDS[hint]
