"""Names of contigs: which names of two files stand for the same contig."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence

_HUMAN_CODES = {"23": "X", "24": "Y", "25": "XY", "26": "MT", "M": "MT"}
"""PLINK's numbers for the contigs that have letters in humans, and the short name of the mitochondrion."""
_LAST_CODE = 26
_PSEUDOAUTOSOMAL = ("XY", "PAR1", "PAR2")


def reconcile(names: Iterable[str], to: Iterable[str]) -> dict[str, str]:
    """Map each of ``names`` to the one of ``to`` that means the same contig; a name without one is left out.

    Three rules are tried one after another, and the first that applies to a name decides:

    1. The same name.
    2. The same name in any case, without ``chr`` and, for numbers, without zeros at the start: ``chr20``, ``CHR20``
       and ``20``; ``chr01`` and ``1``; ``chrX`` and ``x``.
    3. PLINK's numbers: 23 is ``X``, 24 is ``Y``, 25 is ``XY``, 26 is ``MT``; ``M`` is ``MT``. ``chr`` and case do not
       matter here either. Where a file numbers contigs beyond 26 the species is not human, so 23 to 26 are themselves.

    Rules 2 and 3 do not guess. If several of ``names``, or several of ``to``, are alike by a rule, none of them is
    mapped by it: with ``20`` and ``chr20`` in ``names`` and ``20`` in ``to``, ``chr20`` is left out. So two names never
    share a contig, but for one case: the pseudoautosomal regions (``25``, ``XY``, ``PAR1``, ``PAR2``) lie on X, and go
    to the ``X`` of ``to`` where ``to`` does not have them apart.
    """
    own, other = list(dict.fromkeys(names)), list(dict.fromkeys(to))
    coded = not any(int(bare) > _LAST_CODE for bare in map(_bare, own + other) if bare.isdecimal())

    def human(name: str) -> str:
        bare = _bare(name)
        return _HUMAN_CODES.get(bare, bare) if coded or not bare.isdecimal() else bare

    known = set(other)
    found = {name: name for name in own if name in known}
    for key in (_bare, human):
        alike, candidates = _grouped(own, key), _grouped(other, key)
        for kind, group in alike.items():
            if len(group) == len(candidates[kind]) == 1:
                found.setdefault(group[0], candidates[kind][0])
    on_x = _grouped(other, human)["X"]
    if len(on_x) == 1:
        for name in own:
            if human(name) in _PSEUDOAUTOSOMAL:
                found.setdefault(name, on_x[0])
    return {name: found[name] for name in own if name in found}


def _bare(name: str) -> str:
    """Name in capitals, without ``chr`` and without the zeros that a number starts with."""
    bare = re.sub("^CHR(?=.)", "", name.upper())
    return re.sub("^0+(?=[0-9]+$)", "", bare)


def _grouped(names: Collection[str], key: Callable[[str], str]) -> defaultdict[str, list[str]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[key(name)].append(name)
    return groups


def listed(names: Sequence[str]) -> str:
    """The first names as text, and how many others there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")
