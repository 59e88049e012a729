"""What started this process: a launcher that tells every rank its place, one whose words mean the same, or nothing.

DeepSpeed's launcher and torchrun set the five variables of :data:`PLACE`. ``srun`` and the launchers of MPI libraries
have variables of their own, and from those the five are derived. A process of several whose place cannot be derived is
refused, because it would train alone, in the folder of the others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from embrag_ds.errors import SaidByMain, UserError

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which torch and DeepSpeed know a rank, the number of ranks, and where rank 0 listens."""
RANKS_HERE = "LOCAL_WORLD_SIZE"
"""Variable that holds the number of ranks on this machine, which torchrun sets, too."""
DEFAULT_PORT = 29_500
_HERE = "127.0.0.1"
_LOWEST_PORT, _PORTS = 10_000, 20_000  # below those that Linux gives to connections
_STEPS_PER_JOB = 16
_BY_HAND = f"start with deepspeed or torchrun, or set {', '.join(PLACE)} for every process"


@dataclass(frozen=True)
class Mpi:
    """Variables of a launcher of MPI programs: rank and number of ranks, of all and on this machine."""

    name: str
    rank: str
    ranks: str
    local_rank: tuple[str, ...]
    ranks_here: tuple[str, ...]
    forward: str
    """How this launcher is told to set a variable for every process."""


_MPI = (
    Mpi(
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        "-x MASTER_ADDR=HOST",
    ),
    Mpi(
        "MVAPICH's mpirun",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
        "MASTER_ADDR=HOST",
    ),
    Mpi(
        "MPICH's or Intel's mpirun",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
        "-genv MASTER_ADDR HOST",
    ),
)
_UNKNOWN = {
    "jsrun": ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    "flux": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    "PALS": ("PALS_RANKID", "PALS_NRANKS"),
    "aprun": ("ALPS_APP_PE", "ALPS_APP_SIZE"),
    "PMIx": ("PMIX_RANK", "PMIX_SIZE"),
}
"""Launchers whose variables name a rank, but not enough of its place: the variables of rank and number of ranks."""


@dataclass(frozen=True)
class Place:
    """Place of a process among the ranks: ``address`` and ``port`` are where rank 0 listens."""

    rank: int
    local_rank: int
    ranks: int
    ranks_here: int
    address: str
    port: int

    def variables(self) -> dict[str, str]:
        """The variables of :data:`PLACE` and :data:`RANKS_HERE`."""
        values = (self.rank, self.local_rank, self.ranks, self.address, self.port, self.ranks_here)
        return dict(zip((*PLACE, RANKS_HERE), map(str, values), strict=True))


def take_place(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables of :data:`PLACE` where a launcher was recognised by others; raises as :func:`place_of` does.

    It comes before torch is imported, which then says of a lost connection no more than its exception does.
    """
    place = place_of(environment)
    if place is None:
        return
    if "RANK" not in environment:
        environment.update(place.variables())
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a page for each rank that has ended


def place_of(environment: Mapping[str, str]) -> Place | None:
    """Place of a process with these variables; None where nothing says that it is one of several.

    Raises :class:`UserError` for variables that are missing, are no numbers or contradict each other, and for a
    launcher that is not known or does not say where rank 0 is.
    """
    others = _by_mpi(environment) or _by_srun(environment)
    given = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environment]
    if given:
        return _by_place(environment, given[0], others)
    if others is not None:
        return others.place(environment)
    for launcher, (rank, ranks) in _UNKNOWN.items():
        if environment.get(rank, "").isdigit() and environment.get(ranks) != "1" and not _alone(environment):
            raise UserError(f"{rank} is set, so {launcher} started this process, which is not known here; {_BY_HAND}")
    return None


@dataclass(frozen=True)
class _Found:
    """A launcher recognised by its own variables; ``address`` is None where it does not say where rank 0 is."""

    name: str
    rank_variable: str
    ranks_variable: str
    rank: int
    local_rank: int
    ranks: int
    ranks_here: int
    address: str | None
    port: int
    forward: str

    def place(self, environment: Mapping[str, str]) -> Place:
        address = environment.get("MASTER_ADDR") or self.address
        if address is None:
            kind = UserError if self.rank == 0 else SaidByMain
            raise kind(
                f"MASTER_ADDR is not set, and {self.name} does not say on which of several machines rank 0 is; "
                f"add {self.forward} to its command line, with the first machine's name or address for HOST"
            )
        port = self.port
        if "MASTER_PORT" in environment:
            port = _number(environment, "MASTER_PORT", self.name)
        _require_port(port)
        return Place(self.rank, self.local_rank, self.ranks, self.ranks_here, address, port)


def _alone(environment: Mapping[str, str]) -> bool:
    """Whether a known launcher says that this is its only process."""
    sizes = (*(each.ranks for each in _MPI), "SLURM_STEP_NUM_TASKS")
    return any(environment.get(name) == "1" for name in sizes)


def _by_place(environment: Mapping[str, str], given: str, others: _Found | None) -> Place:
    """Place of a process that DeepSpeed's launcher, torchrun or the user's script has told it."""
    for name in PLACE:
        if not environment.get(name):
            raise UserError(f"{given} is set, but {name} is not; {_BY_HAND}, or unset {given} to run one rank")
    rank, local_rank, ranks, port = (
        _number(environment, name, "the launcher") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    )
    if rank >= ranks:
        raise UserError(f"RANK is {rank}, and WORLD_SIZE {ranks}: ranks are 0 to WORLD_SIZE - 1; {_BY_HAND}")
    _require_port(port)
    local = next((name for name in (RANKS_HERE, "LOCAL_SIZE") if environment.get(name)), None)
    # Without a word of them, all ranks are here that may be: those of this script are few.
    ranks_here = ranks if local is None else _number(environment, local, "the launcher")
    if local_rank >= ranks_here:
        raise UserError(
            f"LOCAL_RANK is {local_rank}, and {local or 'WORLD_SIZE'} {ranks_here}: there is no such rank; {_BY_HAND}"
        )
    if others is not None:
        _require_agreement(environment, rank, ranks, others)
    return Place(rank, local_rank, ranks, ranks_here, environment["MASTER_ADDR"], port)


def _require_agreement(environment: Mapping[str, str], rank: int, ranks: int, others: _Found) -> None:
    """Raise :class:`UserError` where srun or mpirun started several processes that were all told the same place."""
    # One of these launchers may well start another one on every machine, which then names more ranks.
    nested = any(name in environment for name in ("TORCHELASTIC_RUN_ID", "CROSS_RANK"))
    if ranks < others.ranks or (ranks == others.ranks and rank != others.rank and not nested):
        raise UserError(
            f"RANK {rank} of WORLD_SIZE {ranks} contradicts {others.rank_variable} {others.rank} of "
            f"{others.ranks_variable} {others.ranks}, which {others.name} set; unset RANK, LOCAL_RANK and WORLD_SIZE"
        )


def _by_mpi(environment: Mapping[str, str]) -> _Found | None:
    for each in _MPI:
        if each.ranks not in environment and each.rank not in environment:
            continue
        ranks = _number(environment, each.ranks, each.name)
        rank = _number(environment, each.rank, each.name)
        if ranks == 1:
            return None
        if _is_srun(environment, each, rank, ranks):
            continue
        local_rank, ranks_here = (
            _number(environment, next((name for name in names if name in environment), names[0]), each.name)
            for names in (each.local_rank, each.ranks_here)
        )
        if not (rank < ranks and local_rank < ranks_here <= ranks):
            raise UserError(
                f"{each.rank} {rank} of {each.ranks} {ranks}, here {local_rank} of {ranks_here}: "
                f"what {each.name} set is contradictory; {_BY_HAND}"
            )
        address = _HERE if ranks_here == ranks else None
        return _Found(
            each.name,
            each.rank,
            each.ranks,
            rank,
            local_rank,
            ranks,
            ranks_here,
            address,
            DEFAULT_PORT,
            each.forward,
        )
    return None


def _is_srun(environment: Mapping[str, str], mpi: Mpi, rank: int, ranks: int) -> bool:
    """Whether srun itself set the variables of an MPI library (``srun --mpi=pmi2``), since its own say the same."""
    same = environment.get("SLURM_STEP_NUM_TASKS") == str(ranks) and environment.get("SLURM_PROCID") == str(rank)
    return same and not any(name in environment for name in mpi.local_rank)


def _by_srun(environment: Mapping[str, str]) -> _Found | None:
    # Only srun sets the number of a step's tasks; the shell of a batch job has SLURM_PROCID, too, and is one process.
    if "SLURM_STEP_NUM_TASKS" not in environment:
        return None
    ranks = _number(environment, "SLURM_STEP_NUM_TASKS", "srun")
    if ranks == 1:
        return None
    rank = _number(environment, "SLURM_PROCID", "srun")
    local_rank = _number(environment, "SLURM_LOCALID", "srun")
    nodes = _nodes(_text(environment, "SLURM_STEP_NODELIST", "srun"))
    ranks_here = ranks
    if len(nodes) > 1:
        ranks_here = _tasks_here(environment, len(nodes))
    if not (rank < ranks and local_rank < ranks_here <= ranks):
        raise UserError(
            f"SLURM_PROCID {rank} of SLURM_STEP_NUM_TASKS {ranks}, here SLURM_LOCALID {local_rank} of {ranks_here}: "
            f"what srun set is contradictory; {_BY_HAND}"
        )
    return _Found(
        "srun",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        rank,
        local_rank,
        ranks,
        ranks_here,
        nodes[0] if len(nodes) > 1 else _HERE,
        _port_of_job(environment),
        "--export=ALL,MASTER_ADDR=HOST",
    )


def _port_of_job(environment: Mapping[str, str]) -> int:
    """A port that differs between jobs, and between the steps of a job, that may run on one machine."""
    job = _number(environment, "SLURM_JOB_ID", "srun") if "MASTER_PORT" not in environment else 0
    step = environment.get("SLURM_STEP_ID", "0")
    return _LOWEST_PORT + (job * _STEPS_PER_JOB + (int(step) if step.isdigit() else 0)) % _PORTS


def _tasks_here(environment: Mapping[str, str], nodes: int) -> int:
    """Number of a step's tasks on this node, of a list like ``4(x2),3`` in the order of nodes."""
    node = _number(environment, "SLURM_NODEID", "srun")
    text = _text(environment, "SLURM_STEP_TASKS_PER_NODE", "srun")
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part)
        if found is None:
            raise _unreadable("SLURM_STEP_TASKS_PER_NODE", text)
        counts += [int(found[1])] * min(int(found[2] or 1), nodes)
    if node >= len(counts):
        raise _unreadable("SLURM_STEP_TASKS_PER_NODE", text)
    return counts[node]


def _nodes(text: str) -> list[str]:
    """Names in SLURM's list of nodes: ``n[01-03,7],gpu2`` is n01, n02, n03, n7 and gpu2."""
    names: list[str] = []
    # Commas within brackets belong to a range.
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if not parts or ",".join(parts) != text:
        raise _unreadable("SLURM_STEP_NODELIST", text)
    for part in parts:
        names += _expanded(part, text)
    return names


def _expanded(part: str, whole: str) -> list[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        return [part]
    ranges, _, tail = rest.partition("]")
    names: list[str] = []
    for each in ranges.split(","):
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", each)
        if found is None:
            raise _unreadable("SLURM_STEP_NODELIST", whole)
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < first + 1_000_000:
            raise _unreadable("SLURM_STEP_NODELIST", whole)
        numbers = [f"{head}{number:0{len(found[1])}d}" for number in range(first, last + 1)]
        names += [name + end for name in numbers for end in (_expanded(tail, whole) if tail else [""])]
    return names


def _text(environment: Mapping[str, str], name: str, launcher: str) -> str:
    if not environment.get(name):
        raise UserError(f"{name} is not set, although {launcher} started this process; {_BY_HAND}")
    return environment[name]


def _number(environment: Mapping[str, str], name: str, launcher: str) -> int:
    text = _text(environment, name, launcher)
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise UserError(f"{name} is {text[:50]!r}, which is no whole number; {_BY_HAND}")
    return int(text)


def _require_port(port: int) -> None:
    if not 1 <= port < 1 << 16:
        raise UserError(f"MASTER_PORT is {port}: ports are 1 to 65535; choose one on which nothing listens")


def _unreadable(name: str, text: str) -> UserError:
    return UserError(f"{name} is {text[:80]!r}, which cannot be read; {_BY_HAND}")
