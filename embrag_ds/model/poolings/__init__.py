"""Poolings of retrieved haplotypes, one a module, named as the setting ``model.fusion`` names it.

A module of this folder has one class whose name ends in ``Pooling``; docs/extending.md shows how to write another.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from torch import nn


def found() -> dict[str, type[nn.Module]]:
    """The class of every module of this folder, by the module's name."""
    return {each.name: _class_of(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__)}


def _class_of(name: str) -> type[nn.Module]:
    classes = [each for each in vars(import_module(name)).values() if isinstance(each, type)]
    (kind,) = (each for each in classes if each.__module__ == name and each.__name__.endswith("Pooling"))
    return kind


POOLINGS = found()
"""Pooling modules by the setting ``model.fusion``."""
