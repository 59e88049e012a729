"""The exception for faults of the user's input or settings."""


class UserError(Exception):
    """A fault of the user's input or settings, as opposed to a bug.

    The message is one line that names the file, the record or key, and the remedy. Commands print it as ``error: ...``
    and exit with status 2. Any other exception is a bug and keeps its traceback.
    """


def require(condition: bool, key: str, rule: str) -> None:
    """Raise a :class:`UserError` about the setting ``embrag.<key>``, with the text ``rule``, if ``condition`` fails."""
    if not condition:
        raise UserError(f"embrag.{key}: {rule}")
