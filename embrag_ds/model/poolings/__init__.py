"""Poolings of retrieved haplotypes, one a module, named as the setting ``model.fusion`` names it.

A module of this folder has one class whose name ends in ``Pooling``; docs/extending.md shows how to write another.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def fusions() -> tuple[str, ...]:
    """Values of the setting ``model.fusion``: the names of the modules of this folder."""
    return tuple(each.name for each in pkgutil.iter_modules(__path__))


def pooling_class(fusion: str) -> type[nn.Module]:
    """The class of the module with this name, which is imported now."""
    name = f"{__name__}.{fusion}"
    classes = [each for each in vars(import_module(name)).values() if isinstance(each, type)]
    (kind,) = (each for each in classes if each.__module__ == name and each.__name__.endswith("Pooling"))
    return kind
