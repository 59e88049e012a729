"""Checkpoints are read without running what is in them."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from embrag_ds.engine import distributed
from embrag_ds.engine.unpickling import ALLOWED, tensors_only
from embrag_ds.errors import UserError
from embrag_ds.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer]


class Payload:
    """An object that makes a file when it is unpickled, as a tampered checkpoint might do worse things."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.made),))


class Hidden:
    """A payload inside one of the types that are allowed."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return (LossScaler, (Payload(self.made),))


class State(Hidden):
    """A payload in the state of an allowed type."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (LossScaler, (1,), {"cur_scale": Payload(self.made)})


class Loader(Hidden):
    """A payload in bytes that a function of torch would unpickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        content = io.BytesIO()
        torch.save(Payload(self.made), content)
        return (torch.storage._load_from_bytes, (content.getvalue(),))


def as_zip(value: object, path: Path) -> None:
    torch.save(value, path)


def as_legacy(value: object, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def in_protocol_4(value: object, path: Path) -> None:
    torch.save(value, path, pickle_protocol=4)


def in_protocol_4_legacy(value: object, path: Path) -> None:
    torch.save(value, path, pickle_protocol=4, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [as_zip, as_legacy])
@pytest.mark.parametrize("kind", [Payload, Hidden, State, Loader])
def test_a_file_that_would_run_something_is_refused(
    tmp_path: Path, kind: type[Payload], write: Callable[[object, Path], None]
) -> None:
    path, made = tmp_path / "states.pt", tmp_path / "made"
    write({"module": {"weight": torch.zeros(2)}, "reference": [kind(made)]}, path)
    named = "torch.storage._load_from_bytes" if kind is Loader else "posix.mkdir"
    with pytest.raises(UserError) as raised, tensors_only("start anew"):
        torch.load(path, weights_only=False)
    said = str(raised.value)
    assert said.startswith(f"{path}: it holds {named}, which may run code") and said.endswith("; start anew")
    assert "\n" not in said and not made.exists()
    torch.load(path, weights_only=False)  # the payload is live
    assert made.exists()


@pytest.mark.parametrize("write", [in_protocol_4, in_protocol_4_legacy])
def test_instructions_that_checkpoints_do_not_use_are_refused(
    tmp_path: Path, write: Callable[[object, Path], None]
) -> None:
    path, made = tmp_path / "states.pt", tmp_path / "made"
    write({"reference": [Payload(made)]}, path)
    with pytest.raises(UnpicklingError, match=r"^states\.pt: Unsupported operand \d+$"), tensors_only():
        torch.load(path, weights_only=False)
    assert not made.exists()


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    path, made = tmp_path / "states.pt", tmp_path / "made"
    path.write_bytes(pickle.dumps(Payload(made), protocol=2))
    with pytest.raises(UserError, match=r"states\.pt: it holds posix\.mkdir"), tensors_only():
        torch.load(path, weights_only=False)
    assert not made.exists()


def test_programs_and_archives_are_refused(tmp_path: Path) -> None:
    script, archive = tmp_path / "script.pt", tmp_path / "archive.pt"
    writer = torch._C.PyTorchFileWriter(str(script))  # TorchScript itself is deprecated
    for record in ("constants.pkl", "data.pkl"):
        writer.write_record(record, pickle.dumps((), protocol=2), len(pickle.dumps((), protocol=2)))
    writer.write_end_of_file()
    with tarfile.open(archive, "w") as made:
        made.add(script, "storages")
    for path, what in ((script, "TorchScript archives"), (archive, r"files saved in the legacy \.tar format")):
        with pytest.raises(UserError, match=rf"{path.name}: it holds {what}, which may run code"), tensors_only():
            torch.load(path, weights_only=False)


def test_afterwards_torch_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    path, made = tmp_path / "states.pt", tmp_path / "made"
    torch.save(Payload(made), path)
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([LossScaler]):
        for _ in range(2):
            with pytest.raises(UserError), tensors_only(), tensors_only():
                torch.load(path)
        assert set(torch.serialization.get_safe_globals()) == {*before, LossScaler}
    assert set(torch.serialization.get_safe_globals()) == before
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1" and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert not made.exists()
    with pytest.raises(UnpicklingError, match="ours"), tensors_only():
        raise UnpicklingError("ours")
    with pytest.raises(RuntimeError, match="ours"), tensors_only():
        raise RuntimeError("ours")


# All pairs of stage and precision save no more types than these.
KINDS = {
    "bf16 with fp32 gradients, stage 1": ["bf16.enabled=true", "data_types.grad_accum_dtype=fp32"],
    "autocast, stage 2": ['torch_autocast={"enabled": true, "dtype": "bfloat16"}', "zero_optimization.stage=2"],
    "offloaded and frozen, stage 3": [
        'zero_optimization={"stage": 3, "offload_optimizer": {"device": "cpu"}}',
        'embrag.train.frozen=["pooling"]',
    ],
    "frozen, legacy files": ['embrag.train.frozen=["pooling"]', "checkpoint.checkpoint_serialization=false"],
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_every_checkpoint_of_ours_is_read(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, settings: list[str]
) -> None:
    monkeypatch.setattr(distributed, "cpu_has_bf16", lambda: True)
    refresh = ["embrag.retrieval.encoding=refresh", 'embrag.retrieval.refresh={"every_steps": 1, "lag_steps": 1}']
    saved = make_trainer("run", *refresh, *settings, "embrag.train.max_steps=1")
    saved.run()
    resumed = make_trainer("run", *refresh, *settings, resume=True)
    assert resumed.state == saved.state and resumed.engine.global_steps == 1
    resumed.reference.close()


@pytest.mark.parametrize("pattern", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_tampered_checkpoint_is_refused_by_name(make_trainer: MakeTrainer, tmp_path: Path, pattern: str) -> None:
    make_trainer("run", "embrag.train.max_steps=1").run()
    path, made = tmp_path / "run" / "checkpoints" / "step1" / pattern, tmp_path / "made"
    content = torch.load(path, weights_only=False)
    for write in (as_zip, as_legacy, in_protocol_4):
        write({"extra": Payload(made), **content}, path)
        with pytest.raises(UserError) as raised:
            make_trainer("run", resume=True)
        said = str(raised.value)
        assert str(path.parent) in said and path.name in said and "\n" not in said
        assert said.endswith("start a new run folder") and not made.exists()


def test_only_types_without_methods_that_run_something_are_allowed() -> None:
    """A type is called with arguments from the file, so its constructor must do no more than keep them."""
    assert {kind.__qualname__ for kind in ALLOWED} == {
        "DynamicLossScaler",
        "LossScaler",
        "ZeroStageEnum",
        "fragment_address",
    }


class Named:
    """What ``getattr`` gives, as some versions of Python pickle a member of an enum."""

    def __init__(self, *given: object):
        self.given = given

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.given


def test_a_member_of_an_enum_may_be_pickled_by_its_name(tmp_path: Path) -> None:
    """As Python 3.11.2 does with the ZeRO stage that DeepSpeed saves."""
    torch.save({"stage": Named(ZeroStageEnum, "gradients")}, tmp_path / "state.pt")
    with tensors_only():
        assert torch.load(tmp_path / "state.pt", weights_only=False) == {"stage": ZeroStageEnum.gradients}


@pytest.mark.parametrize("given", [(LossScaler, "__init__"), (ZeroStageEnum, "mro"), (ZeroStageEnum, "__class__")])
def test_nothing_else_is_had_by_its_name(tmp_path: Path, given: tuple[object, str]) -> None:
    torch.save({"state": Named(*given)}, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"state\.pt: it holds builtins\.getattr, which may run code"), tensors_only():
        torch.load(tmp_path / "state.pt", weights_only=False)
