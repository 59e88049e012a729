"""Faults of training runs, provoked for real: killed jobs and ranks, signals, damaged files, a full disk.

    python profiling/faults.py --work /tmp/faults --kills 50 --rank-kills 20

Every run is started by DeepSpeed's launcher on two ranks of this machine, with a checkpoint after every step. After the
fault it is resumed to its end and compared with one that was left alone: losses, scores and exported weights must be
equal to the last bit. What is printed is a Markdown table. The full disk is a tmpfs, which needs the right to mount.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from machine import free_port
from safetensors.torch import load_file

from embrag_ds.runs.checkpoints import newest_first, newest_step
from embrag_ds.runs.folder import CHECKPOINTS, read_outcome
from embrag_ds.runs.record import METRICS, read_metrics
from embrag_ds.seeds import Purpose, generator

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    "data.window_sites=64",
    "data.overlap_sites=16",
    "data.flank_sites=32",
    "data.validation_samples=6",
    "retrieval.k=16",
    "model.dims=16",
    "model.layers=1",
    "train.log_every=1",
    "train.eval_every=20",
    "train.checkpoint_every=1",
    "train.patience_s=60",
    "validation.windows=1",
)
START_S = 180.0
"""Seconds within which a run must reach its next step."""


@dataclass
class Job:
    """A run under the launcher, in a process group of its own, and what its ranks say on stderr."""

    process: subprocess.Popen[bytes]
    folder: Path
    log: Path

    def ranks(self) -> list[psutil.Process]:
        """Processes of the ranks, by rank."""
        found = {}
        for each in psutil.Process(self.process.pid).children(recursive=True):
            try:
                line = each.cmdline()
            except psutil.Error:
                continue
            number = next((part.partition("=")[2] for part in line if part.startswith("--local_rank=")), None)
            if number is not None:
                found[int(number)] = each
        return [found[number] for number in sorted(found)]

    def kill(self) -> None:
        """Kill the launcher and all ranks at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ended(self, within_s: float = 120.0) -> str:
        """What the run said, once it has ended by itself."""
        self.process.wait(within_s)
        return self.log.read_text(errors="replace")


class Bench:
    """Folder with a panel, and the runs on it."""

    def __init__(self, work: Path):
        self.work = work
        self.panel = work / "panel"
        self._turn = 0
        if not self.panel.exists():
            size = ["--length-bp=150000", "--panel-samples=60", "--target-samples=9", "--typed-spacing-bp=2000"]
            subprocess.run(
                [sys.executable, ROOT / "launch" / "simulate.py", "--out", self.panel, *size, "--seed=11"],
                check=True,
                env=self._environment(),
            )

    def start(self, folder: Path, *more: str) -> Job:
        """Start a run in ``folder`` on two ranks."""
        self._turn += 1
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators=2"]
        command += [f"--master_port={free_port()}", str(ROOT / "launch" / "train.py"), "--deepspeed_config=quickstart"]
        command += [f"--panel={self.panel / 'panel.vcf.gz'}", f"--map={self.panel / 'genetic.map'}"]
        command += [
            f"--run-dir={folder}",
            f"--cache-dir={self.work / 'cache'}",
            "--set=train_micro_batch_size_per_gpu=6",
        ]
        command += [*(f"--set=embrag.{each}" for each in SETTINGS), *more]
        log = self.work / f"{self._turn}.err"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=stream, start_new_session=True, env=self._environment()
            )
        return Job(process, folder, log)

    def finish(self, folder: Path, steps: int) -> None:
        """Resume the run in ``folder`` up to ``steps`` steps; it must end well."""
        self._end(folder, steps, "--resume")

    def equals_one_left_alone(self, folder: Path, steps: int) -> bool:
        """Whether a run of that many steps has the losses, scores and model of one that nothing happened to."""
        alone = self.work / f"alone-{steps}"
        if not (alone / "model.safetensors").exists():
            shutil.rmtree(alone, ignore_errors=True)
            self._end(alone, steps)
        return _results(folder) == _results(alone)

    def _end(self, folder: Path, steps: int, *more: str) -> None:
        job = self.start(folder, f"--max-steps={steps}", *more)
        said = job.ended(600)
        if job.process.returncode:
            raise RuntimeError(f"{folder} did not reach step {steps}:\n{said}")

    @staticmethod
    def _environment() -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def step_of(folder: Path) -> int:
    """Step of a run's newest finished checkpoint; 0 for none."""
    return newest_step(folder / CHECKPOINTS)


def until(condition: Callable[[], bool], job: Job, what: str) -> None:
    """Wait for a condition while the job runs."""
    began = time.monotonic()
    while not condition():
        if job.process.poll() is not None or time.monotonic() - began > START_S:
            raise RuntimeError(f"{what} did not come about:\n{job.log.read_text(errors='replace')}")
        time.sleep(0.002)


def running(bench: Bench, folder: Path, *more: str) -> Job:
    """A run that has saved at least two new checkpoints."""
    resume = ["--resume"] if step_of(folder) else []
    before = step_of(folder)
    job = bench.start(folder, "--max-steps=100000", *resume, *more)
    until(lambda: step_of(folder) >= before + 2, job, "the second checkpoint")
    return job


def kills_of_the_job(bench: Bench, folder: Path, times: int, rng: np.random.Generator) -> str:
    """SIGKILL to launcher and ranks at random moments."""
    for number in range(times):
        job = running(bench, folder)
        time.sleep(rng.random() * 2)
        job.kill()
        print(f"kill {number + 1}: step {step_of(folder)}", file=sys.stderr, flush=True)
    return f"{times} times"


def kills_of_a_rank(bench: Bench, folder: Path, times: int, rng: np.random.Generator) -> str:
    """SIGKILL to one of two ranks, every other time while a checkpoint is being written."""
    saving = 0
    for number in range(times):
        job = running(bench, folder)
        if number % 2:
            until(lambda: any((folder / CHECKPOINTS).glob(".tmp-step*")), job, "a save")
            time.sleep(rng.random() * 0.02)
            saving += 1
        else:
            time.sleep(rng.random() * 2)
        job.ranks()[number // 2 % 2].kill()
        said = job.ended()
        assert "Traceback" not in said, said
        print(f"rank kill {number + 1}: step {step_of(folder)}", file=sys.stderr, flush=True)
    return f"{times} times, {saving} of them while a checkpoint was written"


def a_signal(number: int, launcher: bool) -> Callable[[Bench, Path], str]:
    """A signal to the launcher, or to rank 0 alone: both ranks save and end."""

    def provoke(bench: Bench, folder: Path) -> str:
        job = running(bench, folder)
        process = psutil.Process(job.process.pid).children()[0] if launcher else job.ranks()[0]
        began = time.monotonic()
        process.send_signal(number)
        said = job.ended()
        outcome = read_outcome(folder)
        name = signal.Signals(number).name
        assert "Traceback" not in said and f"{name}: a checkpoint at the next step boundary" in said, said
        assert (outcome["state"], outcome["restart"], outcome["reason"]) == ("stopped", True, name), outcome
        assert outcome["step"] == step_of(folder), outcome
        return f"ended after {time.monotonic() - began:.1f} s; outcome.json: stopped, restart, step {outcome['step']}"

    return provoke


def an_interrupt_twice(bench: Bench, folder: Path) -> str:
    """SIGINT twice to rank 0, which stands in a long step: it ends at once."""
    job = running(bench, folder)
    first, second = job.ranks()
    second.suspend()  # so that no step boundary comes
    first.send_signal(signal.SIGINT)
    time.sleep(1)
    first.send_signal(signal.SIGINT)
    began = time.monotonic()
    time.sleep(1)
    second.resume()
    job.ended()
    return f"ended after {time.monotonic() - began:.1f} s"


def damaged(spoil: Callable[[Path], None], pattern: str) -> Callable[[Bench, Path], str]:
    """A file of the newest checkpoint is damaged: the one before it is taken, and the fault named."""

    def provoke(bench: Bench, folder: Path) -> str:
        running(bench, folder, "--set=embrag.train.keep_checkpoints=3").kill()
        newest = newest_first(folder / CHECKPOINTS)[0]
        path = folder / CHECKPOINTS / pattern if pattern == "latest" else next(newest.glob(pattern))
        spoil(path)
        job = running(bench, folder)
        job.kill()
        said = job.log.read_text(errors="replace")
        if pattern == "latest":
            return "read past"
        line = next(each for each in said.splitlines() if "not whole" in each)
        assert newest.name in line and path.name in line, said
        return line.partition("(")[2].rpartition(")")[0]

    return provoke


def a_full_disk(bench: Bench, folder: Path) -> str:
    """The run folder lies on a tmpfs without room for another checkpoint."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
    job = running(bench, folder)
    try:
        ballast = folder / "ballast"
        with ballast.open("wb", buffering=0) as stream, suppress(OSError):
            while True:
                stream.write(b"\0" * 4096)
        said = job.ended()
        line = next(each for each in said.splitlines() if each.startswith("error: "))
        assert "Traceback" not in said and "free some space" in line, said
        ballast.unlink()
        bench.finish(folder, step_of(folder) + 3)
        shutil.copytree(folder, folder.with_name("full-copy"))
    finally:
        if job.process.poll() is None:
            job.kill()
        subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()
    folder.with_name("full-copy").rename(folder)
    return line.removeprefix("error: ").replace(str(folder), "RUN")


def a_second_start(bench: Bench, folder: Path) -> str:
    """Another run is started in the folder of one that runs; that one goes on."""
    job = running(bench, folder)
    said = bench.start(folder, "--resume").ended()
    line = next(each for each in said.splitlines() if each.startswith("error: "))
    assert "is training in this folder" in line, said
    at = step_of(folder)
    until(lambda: step_of(folder) > at, job, "another step")
    job.kill()
    return line.removeprefix("error: ").replace(str(folder), "RUN")


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(bytes(content))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _results(folder: Path) -> tuple[list[object], dict[str, bytes]]:
    kept = ("kind", "step", "loss", "gradient_norm", "learning_rate", "score")
    lines = [[line.get(key) for key in kept] for line in read_metrics(folder / METRICS)]
    # The header has the settings of the start that wrote it, max_steps among them.
    tensors = load_file(folder / "model.safetensors")
    return sorted(lines, key=str), {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def main() -> None:
    """Provoke the faults one after the other, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="new folder")
    parser.add_argument("--kills", type=int, default=50, help="of the whole job")
    parser.add_argument("--rank-kills", type=int, default=20, help="of one of two ranks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[""], help="faults whose name contains one of these")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    bench, rng = Bench(options.work), generator(Purpose.FAULTS, options.seed)
    faults: dict[str, Callable[[Bench, Path], str]] = {
        "SIGTERM to the launcher": a_signal(signal.SIGTERM, True),
        "SIGTERM to one rank": a_signal(signal.SIGTERM, False),
        "SIGUSR1 to one rank": a_signal(signal.SIGUSR1, False),
        "SIGINT to one rank": a_signal(signal.SIGINT, False),
        "SIGINT twice": an_interrupt_twice,
        "optimiser states cut in half": damaged(_half, "*_optim_states.pt"),
        "model states cut in half": damaged(_half, "*model_states.pt"),
        "optimiser states missing": damaged(Path.unlink, "*_optim_states.pt"),
        "a flipped bit in optimiser states": damaged(_flip, "*_optim_states.pt"),
        "a flipped bit in model states": damaged(_flip, "*model_states.pt"),
        "no manifest": damaged(Path.unlink, "manifest.json"),
        "a flipped bit in the manifest": damaged(_flip, "manifest.json"),
        "latest empty": damaged(_empty, "latest"),
        "latest missing": damaged(Path.unlink, "latest"),
        "a full disk (tmpfs)": a_full_disk,
        "a second start in the folder": a_second_start,
        "one of two ranks killed": lambda bench, folder: kills_of_a_rank(bench, folder, options.rank_kills, rng),
        "the whole job killed": lambda bench, folder: kills_of_the_job(bench, folder, options.kills, rng),
    }
    print("| fault | what came of it | resumed run equal |\n|---|---|---|", flush=True)
    failed = False
    for number, (name, provoke) in enumerate(faults.items()):
        if not any(each in name for each in options.only):
            continue
        folder = options.work / f"run-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            found = provoke(bench, folder)
            steps = step_of(folder) + 3
            bench.finish(folder, steps)
            equal = bench.equals_one_left_alone(folder, steps)
        except (AssertionError, RuntimeError, subprocess.SubprocessError, StopIteration, OSError) as fault:
            found, equal = f"{type(fault).__name__}: {' '.join(str(fault).split())[:600]}", False
        failed |= not equal
        print(f"| {name} | {found} | {'to the last bit' if equal else '**no**'} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
