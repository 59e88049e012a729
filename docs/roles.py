"""Extension of the API pages: names that docstrings mark with a role of Sphinx are shown as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:mod|class|func|meth|attr|data):`~?(?:embrag_ds\.)?([\w.]+)`")


class Roles(griffe.Extension):
    """Takes the roles away before a page is rendered."""

    def on_instance(self, *, obj: griffe.Object, **given: Any) -> None:
        """Look at the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
