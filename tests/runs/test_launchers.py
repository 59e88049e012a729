"""How a process was started is read from its environment, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from embrag_ds.errors import SaidByMain, UserError
from embrag_ds.runs.launchers import Place, place_of, take_place

DEEPSPEED = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
}
TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}
# What the shell of a batch job has, before any srun.
SBATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "1",
}
MPICH = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}, None),
        (DEEPSPEED, Place(3, 1, 4, 2, "10.0.0.1", 29500)),
        (TORCHRUN, Place(1, 1, 2, 2, "127.0.0.1", 29500)),
        (SBATCH, None),
        (SBATCH | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        (SRUN, Place(3, 1, 5, 2, "gpu07", 10_000 + (4711 * 16 + 2) % 20_000)),
        (SRUN | {"SLURM_NODEID": "2", "SLURM_LOCALID": "0"}, Place(3, 0, 5, 1, "gpu07", 10_000 + 15378)),
        (SRUN | {"MASTER_PORT": "1234", "MASTER_ADDR": "ib0"}, Place(3, 1, 5, 2, "ib0", 1234)),
        (without(SRUN, "SLURM_JOB_ID") | {"MASTER_PORT": "1234"}, Place(3, 1, 5, 2, "gpu07", 1234)),
        (
            without(SRUN, "SLURM_STEP_TASKS_PER_NODE") | {"SLURM_STEP_NODELIST": "gpu07"},
            Place(3, 1, 5, 5, "127.0.0.1", 25378),
        ),
        # One launcher on every machine, started by srun.
        (SRUN | TORCHRUN | {"WORLD_SIZE": "10"}, Place(1, 1, 10, 2, "127.0.0.1", 29500)),
        (
            SRUN | TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
            Place(1, 1, 2, 2, "127.0.0.1", 29500),
        ),
        (OPEN_MPI, Place(1, 1, 2, 2, "127.0.0.1", 29500)),
        (OPEN_MPI | {"MASTER_PORT": "7"}, Place(1, 1, 2, 2, "127.0.0.1", 7)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "MASTER_ADDR": "n1"},
            Place(3, 1, 4, 2, "n1", 29500),
        ),
        # Open MPI's daemons are started by srun.
        (OPEN_MPI | SRUN | {"SLURM_STEP_NUM_TASKS": "2"}, Place(1, 1, 2, 2, "127.0.0.1", 29500)),
        (MPICH, Place(0, 0, 2, 2, "127.0.0.1", 29500)),
        # srun --mpi=pmi2
        (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "5"}, Place(3, 1, 5, 2, "gpu07", 25378)),
        ({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
    ],
)
def test_the_place_of_a_rank(environment: dict[str, str], expected: Place | None) -> None:
    assert place_of(environment) == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[01-04,7],other3", "node01"),
        ("a,b", "a"),
        ("rack[3-4]n[08-09]", "rack3n08"),
        ("login-1.site.org,x", "login-1.site.org"),
    ],
)
def test_rank_0_is_on_the_first_node(nodes: str, first: str) -> None:
    place = place_of(SRUN | {"SLURM_STEP_NODELIST": nodes})
    assert place is not None and place.address == first


def test_every_node_of_a_list_is_counted() -> None:
    # Three tasks on each of node01 to node04, one on node7 and one on other3.
    several = {"SLURM_STEP_NODELIST": "node[01-04,7],other3", "SLURM_STEP_TASKS_PER_NODE": "3(x4),1(x2)"}
    place = place_of(
        SRUN | several | {"SLURM_STEP_NUM_TASKS": "14", "SLURM_PROCID": "13", "SLURM_LOCALID": "0", "SLURM_NODEID": "5"}
    )
    assert place is not None and (place.ranks, place.ranks_here) == (14, 1)


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        (without(DEEPSPEED, "MASTER_PORT"), "RANK is set, but MASTER_PORT is not; start with deepspeed or torchrun"),
        (without(DEEPSPEED, "RANK"), "WORLD_SIZE is set, but RANK is not"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set, but RANK is not"),
        (DEEPSPEED | {"RANK": "x"}, "RANK is 'x', which is no whole number"),
        (DEEPSPEED | {"RANK": "-1"}, "RANK is '-1'"),
        (DEEPSPEED | {"RANK": "4"}, "RANK is 4, and WORLD_SIZE 4: ranks are 0 to"),
        (DEEPSPEED | {"LOCAL_RANK": "2"}, "LOCAL_RANK is 2, and LOCAL_SIZE 2"),
        (DEEPSPEED | {"MASTER_PORT": "0"}, "MASTER_PORT is 0: ports are 1 to 65535"),
        (DEEPSPEED | {"MASTER_PORT": "99999"}, "MASTER_PORT is 99999"),
        # The same place exported to all tasks: every one of them would train alone.
        (
            SRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "RANK 0 of WORLD_SIZE 1 contradicts SLURM_PROCID 3 of SLURM_STEP_NUM_TASKS 5, which srun set; unset RANK",
        ),
        (
            OPEN_MPI | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "RANK 0 of WORLD_SIZE 2 contradicts OMPI_COMM_WORLD_RANK 1 of OMPI_COMM_WORLD_SIZE 2",
        ),
        (without(SRUN, "SLURM_PROCID"), "SLURM_PROCID is not set, although srun started this process"),
        (without(SRUN, "SLURM_LOCALID"), "SLURM_LOCALID is not set"),
        (without(SRUN, "SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST is not set"),
        (without(SRUN, "SLURM_NODEID"), "SLURM_NODEID is not set"),
        (without(SRUN, "SLURM_JOB_ID"), "SLURM_JOB_ID is not set"),
        (SRUN | {"SLURM_PROCID": "5"}, "SLURM_PROCID 5 of SLURM_STEP_NUM_TASKS 5, here SLURM_LOCALID 1 of 2"),
        (SRUN | {"SLURM_LOCALID": "2"}, "here SLURM_LOCALID 2 of 2: what srun set is contradictory"),
        (SRUN | {"SLURM_STEP_NODELIST": "n[1"}, "SLURM_STEP_NODELIST is 'n[1', which cannot be read"),
        (SRUN | {"SLURM_STEP_NODELIST": "n[1-]"}, "SLURM_STEP_NODELIST is 'n[1-]'"),
        (SRUN | {"SLURM_STEP_NODELIST": "n[9-1]"}, "SLURM_STEP_NODELIST is 'n[9-1]'"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2"}, "SLURM_STEP_TASKS_PER_NODE is '2', which cannot be read"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x"}, "SLURM_STEP_TASKS_PER_NODE is '2(x'"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK"), "OMPI_COMM_WORLD_LOCAL_RANK is not set, although Open MPI's"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK is not set"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "2"}, "OMPI_COMM_WORLD_RANK 2 of OMPI_COMM_WORLD_SIZE 2, here 1 of 2"),
        (OPEN_MPI | {"MASTER_PORT": "many"}, "MASTER_PORT is 'many'"),
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            "MASTER_ADDR is not set, and Open MPI's mpirun does not say on which of several machines rank 0 is; "
            "add -x MASTER_ADDR=HOST to its command line",
        ),
        (without(MPICH, "MPI_LOCALRANKID"), "MPI_LOCALRANKID is not set"),
        ({"JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "2"}, "JSM_NAMESPACE_RANK is set, so jsrun started this"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK is set"),
    ],
)
def test_what_leaves_the_place_open_is_refused(environment: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        place_of(environment)
    assert complaint in str(caught.value)
    assert not isinstance(caught.value, SaidByMain)


def test_only_rank_0_says_that_its_machine_is_not_known() -> None:
    with pytest.raises(SaidByMain):
        place_of(OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"})


def test_variables_are_set_only_where_no_launcher_did() -> None:
    told = dict(DEEPSPEED)
    take_place(told)
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    assert told == DEEPSPEED | quiet
    alone: dict[str, str] = {}
    take_place(alone)
    assert alone == {}
    mpi = dict(OPEN_MPI)
    take_place(mpi)
    expected = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert mpi == OPEN_MPI | expected | {"LOCAL_WORLD_SIZE": "2"} | quiet
