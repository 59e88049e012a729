"""The exception for faults of the user's input or settings."""

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class UserError(Exception):
    """A fault of the user's input or settings, as opposed to a bug.

    The message is one line that names the file, the record or key, and the remedy. Commands print it as ``error: ...``
    and exit with status 2. Any other exception is a bug and keeps its traceback. Control characters of a faulty file,
    which could break the line or steer a terminal, are written as escapes such as ``\\r``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_CONTROL.sub(lambda found: repr(found.group())[1:-1], message))


class SaidByMain(UserError):
    """A :class:`UserError` that rank 0 raises, too: the other ranks end as it does, and leave the line to it."""


def require(condition: bool, key: str, rule: str) -> None:
    """Raise a :class:`UserError` about the setting ``embrag.<key>``, with the text ``rule``, if ``condition`` fails."""
    if not condition:
        raise UserError(f"embrag.{key}: {rule}")
