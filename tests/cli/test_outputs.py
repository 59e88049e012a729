"""No command replaces what it reads, and a file or folder that it cannot use is one line before its work."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from embrag_ds.cli.main import main
from embrag_ds.data import cache
from embrag_ds.data.simulate import DefaultData
from embrag_ds.evaluation import external_tools
from embrag_ds.export import PRETRAINED

INDEXED = ("panel", "target", "truth")


@pytest.fixture
def study(simulated: DefaultData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """Copies of the simulated files by name; the cache must not come to be."""
    folder = tmp_path / "study"
    shutil.copytree(simulated.panel.parent, folder)
    shutil.copy(PRETRAINED, folder / "my.safetensors")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = signal.getsignal(signal.SIGTERM)
    files = {name: folder / f"{name}.vcf.gz" for name in INDEXED}
    yield files | {"map": folder / "genetic.map", "samples": folder / "samples.tsv", "model": folder / "my.safetensors"}
    signal.signal(signal.SIGTERM, before)


Refused = Callable[..., str]


@pytest.fixture
def refused(study: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Function that runs a command, which must end with status 2 and one line, and must not have done anything."""

    def state() -> dict[str, str]:
        files = (path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "matplotlib")
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def run(*arguments: object, works: bool = False) -> str:
        before = state()
        with pytest.raises(SystemExit) as ended:
            main(arguments=[str(each) for each in arguments])
        lines = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and lines[-1].startswith("error: ") and "Traceback" not in "".join(lines)
        if not works:
            assert [line for line in lines if not line.startswith("model ")] == lines[-1:]
            assert state() == before and not (tmp_path / "cache" / "embrag_ds").exists()
        return lines[-1]

    return run


def impute(study: dict[str, Path], **replaced: object) -> list[object]:
    files = {name: study[name] for name in ("panel", "target", "map", "samples", "model")} | replaced
    given = (f"--{name.replace('_', '-')}={path}" for name, path in files.items() if path is not None)
    return ["impute", "--adapt=off", *given]


def linked(path: Path, link: Path, how: str) -> Path:
    if how == "itself":
        return path
    (os.link if how == "hard" else os.symlink)(path, link)
    return link


@pytest.mark.parametrize("how", ["itself", "hard", "symbolic"])
@pytest.mark.parametrize("name", ["target", "panel", "map", "samples", "model"])
def test_an_imputed_file_replaces_no_input(
    study: dict[str, Path], refused: Refused, tmp_path: Path, name: str, how: str
) -> None:
    if how == "itself" and name in ("map", "samples", "model"):
        how = "hard"  # their names do not end as the output's must
    out = linked(study[name], tmp_path / "out.vcf.gz", how)
    error = refused(*impute(study, out=out))
    assert error == f"error: {out}: --out is the same file as --{name} {study[name]}, which would be lost; " + (
        "choose another name"
    )


def test_an_imputed_file_replaces_none_of_the_default_data(
    study: dict[str, Path], refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(study["panel"].parent, tmp_path / "default")
    default = DefaultData(*(tmp_path / "default" / study[name].name for name in (*INDEXED, "map", "samples")))
    monkeypatch.setattr("embrag_ds.data.inputs.default_data", lambda settings: default)
    monkeypatch.setattr("embrag_ds.imputation.impute.default_data", lambda settings: default)
    assert "same file as --panel" in refused("impute", f"--out={default.panel}")
    assert "same file as --target" in refused("impute", f"--out={default.target}")


@pytest.mark.parametrize(
    ("option", "made"),
    [("--json", ""), ("--markdown", ""), ("--plots", "r2.png"), ("--plots", "calibration.png")]
    + [
        ("--run-tools", name)
        for name in ("beagle.vcf.gz", "minimac4.vcf.gz", "selphi.vcf.gz", "panel.msav", "genetic.map", "beagle.log")
    ],
)
@pytest.mark.parametrize("name", ["truth", "panel", "target", "imputed", "map", "samples"])
def test_a_report_replaces_no_input(
    study: dict[str, Path],
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    made: str,
    name: str,
) -> None:
    monkeypatch.setattr(external_tools, "impute_with_tools", lambda *given: pytest.fail("a tool was run"))
    study["imputed"] = Path(shutil.copy(study["truth"], tmp_path / "i.vcf.gz"))
    given = [f"--{each}={study[each]}" for each in ("truth", "panel", "target", "map", "samples", "imputed")]
    (tmp_path / "results").mkdir()
    out = tmp_path / "results"
    for suffix in ("", ".tbi") if name in ("panel", "truth") and not made else ("",):
        link = out / (made or f"out{suffix}")
        os.link(f"{study[name]}{suffix}", link)
        error = refused("evaluate", *given, f"{option}={out if made else link}")
        assert f"{link}: {option} is the same file as" in error and f"--{name} {study[name]}, which would be" in error


def test_two_reports_are_two_files(study: dict[str, Path], refused: Refused, tmp_path: Path) -> None:
    given = [f"--{each}={study[each]}" for each in ("truth", "panel", "target")]
    given += ["--baselines", f"--json={tmp_path / 'out'}", f"--markdown={tmp_path / 'study' / '..' / 'out'}"]
    assert "--markdown is the same file as --json" in refused("evaluate", *given)
    plots = [f"--plots={tmp_path}", f"--json={tmp_path / 'r2.png'}"]
    assert "--plots is the same file as --json" in refused("evaluate", *given[:4], *plots)


def train(study: dict[str, Path], root: Path, *more: object) -> list[object]:
    given = [f"--{each}={study[each]}" for each in ("panel", "map", "samples")]
    return ["train", f"--deepspeed_config={root / 'ds_configs' / 'quickstart.json'}", *given, *more]


@pytest.mark.parametrize("made", ["model.safetensors", "config.json", "versions.json", "run.log"])
@pytest.mark.parametrize("name", ["panel", "map", "samples", "model", "config", "windows", "manifest", "relatives"])
@pytest.mark.usefixtures("distributed")
def test_a_run_replaces_no_input(
    study: dict[str, Path], refused: Refused, root: Path, tmp_path: Path, made: str, name: str
) -> None:
    (tmp_path / "run").mkdir()
    file = study.get(name, tmp_path / name)
    if name not in study:
        file.write_bytes((root / "ds_configs" / "quickstart.json").read_bytes() if name == "config" else b"")
    link = tmp_path / "run" / made
    os.link(file, link)
    more = {
        "model": f"--init-from={file}",
        "config": f"--deepspeed_config={file}",
        "windows": f"--set=embrag.data.windows_file={file}",
        "manifest": f"--set=embrag.masking.array_manifest={file}",
        "relatives": f"--set=embrag.retrieval.relatives={file}",
    }
    error = refused(*train(study, root, f"--run-dir={tmp_path / 'run'}", *([more[name]] if name in more else [])))
    assert f"{link}: --run-dir is the same file as" in error and f" {file}, which would be lost" in error


@pytest.mark.usefixtures("distributed")
def test_a_run_that_cannot_begin_says_so_at_once(
    study: dict[str, Path], refused: Refused, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert "file: cannot write in this folder" in refused(*train(study, root, f"--run-dir={tmp_path / 'file'}"))
    run = f"--run-dir={tmp_path / 'run'}"
    for key in ("embrag.data.windows_file", "embrag.masking.array_manifest", "embrag.retrieval.relatives"):
        error = refused(*train(study, root, run, f"--set={key}={tmp_path / 'none'}"))
        assert f"none: cannot read it (No such file or directory); check what {key} names" in error
    os.mkfifo(tmp_path / "pipe")
    assert "this is a pipe; give a file" in refused(*train(study, root, run, f"--panel={tmp_path / 'pipe'}"))
    error = refused(*train(study, root, run, f"--cache-dir={tmp_path / 'file'}"))
    assert "file: cannot write to the cache folder (" in error and "--cache-dir" in error


def test_a_cache_folder_that_cannot_be_written_to_and_another_one(
    study: dict[str, Path], refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    out, other = tmp_path / "out.vcf.gz", tmp_path / "other \udcff"
    way_out = "; name another folder with --cache-dir, or with XDG_CACHE_HOME"
    error = refused(*impute(study, out=out))
    assert f"error: {tmp_path / 'file' / 'embrag_ds'}: cannot write to the cache folder (" in error
    assert error.endswith(way_out)
    scored = [f"--{each}={study[each]}" for each in ("truth", "panel", "target")]
    assert refused("evaluate", *scored, "--baselines").endswith(way_out)
    assert refused("impute", f"--out={out}").endswith(way_out)  # the default data set
    main(arguments=[str(each) for each in (*impute(study, out=out, cache_dir=other), "--transformer", "off")])
    main(arguments=[str(each) for each in ("evaluate", *scored, f"--imputed={out}", f"--cache-dir={other}")])
    assert out.exists() and [path.name[:6] for path in other.glob("[!.]*")] == ["panel-"]


def test_inputs_and_devices_are_tried_before_the_panel_is_packed(
    study: dict[str, Path], refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.vcf.gz"
    for name in ("target", "panel", "map", "samples"):
        error = refused(*impute(study, out=out, **{name: tmp_path / "none"}))
        assert error == f"error: {tmp_path / 'none'}: cannot read it (No such file or directory); check what " + (
            f"--{name} names"
        )
    given = [f"--{each}={study[each]}" for each in ("truth", "panel", "target")]
    assert "check what --imputed names" in refused("evaluate", *given, f"--imputed=a={tmp_path / 'none'}")
    for option in ("--plots", "--run-tools"):
        error = refused("evaluate", *given, "--baselines", f"{option}={tmp_path / 'study' / 'genetic.map'}")
        assert error == f"error: {study['map']}: cannot write in this folder (Not a directory); choose another"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, complaint in (
        ("cuda", "torch sees 0 CUDA devices; use cpu"),
        ("cuda:7", "torch sees 0 CUDA devices; use cpu"),
        ("mps", "embrag_ds has no kernels for it; use cpu or cuda"),
        ("meta", "embrag_ds has no kernels for it; use cpu or cuda"),
        ("cuda:x", "no such device; use cpu or cuda"),
        ("", "no such device; use cpu or cuda"),
    ):
        assert refused(*impute(study, out=out, device=device)) == f"error: --device {device}: {complaint}"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    error = refused(*impute(study, out=out, device="cuda:2"))
    assert error == "error: --device cuda:2: torch sees 2 CUDA devices; use cpu or cuda:0 or cuda:1"


def test_a_disk_too_small_for_the_output_is_found_before_imputation(
    study: dict[str, Path], refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 10))
    error = refused(*impute(study, out=tmp_path / "out.vcf.gz"), works=True)
    assert "out.vcf.gz: it needs at least 0.0 MB" in error and not (tmp_path / "out.vcf.gz").exists()
    assert [path.name[:6] for path in (tmp_path / "cache" / "embrag_ds").glob("[!.]*")] == ["panel-"]


def test_a_model_holds_no_path_of_its_training() -> None:
    with PRETRAINED.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(json.loads(stream.read(size))["__metadata__"]["embrag_ds"])
    settings = header["embrag"]
    assert settings["data"]["windows_file"] is settings["data"]["cache_dir"] is None
    assert settings["masking"]["array_manifest"] is settings["retrieval"]["relatives"] is None
    assert cache.SEAL not in json.dumps(header) and "/" not in json.dumps(header)
