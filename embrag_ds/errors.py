"""The one exception that means: the user's input or settings are at fault."""


class UserError(Exception):
    """A fault the user can mend.

    The message is one line that names the file, the record or key, and the remedy. The entry
    points print it as ``error: ...`` and exit with status 2; anything else is a bug and shows
    its traceback.
    """


def require(condition: bool, key: str, rule: str) -> None:
    """Raise a :class:`UserError` about ``embrag.key`` unless ``condition`` holds."""
    if not condition:
        raise UserError(f"embrag.{key}: {rule}")
