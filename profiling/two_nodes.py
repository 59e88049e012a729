"""Two nodes on one machine: a run over two network namespaces trains as two ranks of one machine do.

    python profiling/two_nodes.py [--out FOLDER]

Either namespace is a node with a name, an address and a cache folder of its own; a pair of virtual network cards joins
them. On each, DeepSpeed's launcher starts one rank, as it would on two machines (``--hostfile``, ``--no_ssh``). The
losses must equal those of two ranks on one machine. Then the nodes get a run folder that they do not share, which must
be refused in one line. It needs Linux with ``ip``, ``unshare`` and ``nsenter``, and root or namespaces for users.

The result is printed as Markdown. The exit status is 0 if all is well, 1 if not, and 77 where namespaces are not to be
had. It takes two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12
SKIPPED = 77
"""Exit status of a check that this machine cannot do, as automake has it."""
_ADDRESSES = ("10.77.0.1", "10.77.0.2")
_INSIDE = "EMBRAG_TWO_NODES_INSIDE"
_PORT = 29_511
_SETTINGS = (
    "embrag.data.window_sites=64",
    "embrag.data.overlap_sites=16",
    "embrag.data.flank_sites=32",
    "embrag.data.validation_samples=6",
    "embrag.masking.curriculum_steps=10",
    "embrag.retrieval.k=16",
    "embrag.model.dims=16",
    "embrag.model.layers=1",
    f"embrag.train.max_steps={STEPS}",
    "embrag.train.log_every=1",
    "embrag.train.eval_every=6",
    "embrag.validation.windows=2",
    "train_micro_batch_size_per_gpu=6",
)
_PANEL = ("--length-bp=150000", "--panel-samples=60", "--target-samples=9", "--seed=11")


@dataclass(frozen=True)
class Node:
    """A network namespace with its host name, kept open by the process ``keeper``."""

    name: str
    keeper: int

    def command(self, *arguments: object) -> list[str]:
        """The command line that runs a program there."""
        return ["nsenter", "-t", str(self.keeper), "--net", "--uts", *map(str, arguments)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for logs and runs (default: a temporary one)")
    options = parser.parse_args()
    if _INSIDE not in os.environ:
        _enter_namespace()
    with ExitStack() as opened:
        folder = options.out or Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="two-nodes-")))
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        nodes = opened.enter_context(two_nodes())
        sys.exit(0 if compare(folder, nodes) else 1)


def _enter_namespace() -> None:
    """Run this script again in a network namespace, with the rights of root there; ends with 77 if that cannot be."""
    missing = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        _skip(f"{', '.join(missing)}: not installed (iproute2 and util-linux have them)")
    for own in (["unshare", "--net", "--uts"], ["unshare", "--user", "--map-root-user", "--net", "--uts"]):
        # All that the script will do there, and in the order in which it does.
        probe = "ip link set lo up && ip link add name probe type veth peer name other && unshare --net --uts true"
        if subprocess.run([*own, "sh", "-c", probe], capture_output=True, check=False).returncode == 0:
            os.execvpe(own[0], [*own, sys.executable, *sys.argv], {**os.environ, _INSIDE: "1"})
    _skip("this machine lends no network namespaces to this user; try as root")


def _skip(reason: str) -> None:
    print(f"skipped: {reason}", file=sys.stderr)
    sys.exit(SKIPPED)


@contextmanager
def two_nodes() -> Iterator[list[Node]]:
    """Two namespaces joined by a pair of virtual network cards, ``wire`` in both."""
    keepers = [subprocess.Popen(["unshare", "--net", "--uts", "sleep", "infinity"]) for _ in _ADDRESSES]
    try:
        nodes = [Node(f"node{number}", keeper.pid) for number, keeper in enumerate(keepers)]
        _run(["ip", "link", "set", "lo", "up"])
        own = os.readlink("/proc/self/ns/net")
        for node in nodes:
            while os.readlink(f"/proc/{node.keeper}/ns/net") == own:
                time.sleep(0.01)
        _run(["ip", "link", "add", "name", "card0", "type", "veth", "peer", "name", "card1"])
        for number, (node, address) in enumerate(zip(nodes, _ADDRESSES, strict=True)):
            _run(["ip", "link", "set", f"card{number}", "netns", str(node.keeper)])
            _run(node.command("ip", "link", "set", f"card{number}", "name", "wire"))
            _run(node.command("ip", "address", "add", f"{address}/24", "dev", "wire"))
            _run(node.command("ip", "link", "set", "wire", "up"))
            _run(node.command("ip", "link", "set", "lo", "up"))
            _run(node.command("hostname", node.name))
        yield nodes
    finally:
        for keeper in keepers:
            keeper.kill()
            keeper.wait()


def compare(folder: Path, nodes: list[Node]) -> bool:
    """Train on one machine and on two nodes, print what was found, and return whether all is well."""
    data = folder / "data"
    if not data.exists():
        _run([sys.executable, ROOT / "launch" / "simulate.py", "--out", data, *_PANEL], env=_environment(folder))
    on_one = ["--num_accelerators", "2", f"--master_port={_PORT}"]
    (alone,) = _train([[*_launcher(), *on_one, *_training(folder, "one-machine")]], [_environment(folder)], folder)
    together = _on_nodes(folder, nodes, [str(folder / "two-nodes")] * 2, "two-nodes")
    apart = _on_nodes(folder, nodes, ["apart"] * 2, "unshared")
    losses = [losses_of(folder / name / "metrics.jsonl") for name in ("one-machine", "two-nodes")]
    largest = max((abs(one - two) for one, two in zip(*losses, strict=False)), default=float("inf"))
    refusals = [line for _, text in apart for line in text.splitlines() if "cannot see the folder that rank 0" in line]
    found = {
        "two ranks on one machine": (alone[0] == 0 and len(losses[0]) == STEPS, f"{len(losses[0])} steps"),
        "one rank on each of two nodes": (
            all(status == 0 for status, _ in together) and len(losses[1]) == STEPS,
            f"{len(losses[1])} steps",
        ),
        "losses of the two": (largest == 0.0, f"largest difference {largest:g}"),
        "caches that the nodes do not share": (
            all(any((folder / node.name / "cache").rglob("panel-*")) for node in nodes),
            "each node packed the panel",
        ),
        "a run folder that they do not share": (
            len(refusals) == 1 and all(status != 0 for status, _ in apart),
            f"{len(refusals)} line: {refusals[0].strip() if refusals else ''}",
        ),
    }
    print("| check | result | |\n|---|---|---|")
    for name, (well, words) in found.items():
        print(f"| {name} | {'ok' if well else 'FAILED'} | {words} |")
    well = all(each for each, _ in found.values())
    if not well:
        print(f"The output of all launchers is in {folder}/*.log.", file=sys.stderr)
    return well


def _on_nodes(folder: Path, nodes: list[Node], run_dirs: list[str], name: str) -> list[tuple[int, str]]:
    """Exit status and output of the launcher on each node; relative run folders lie in the node's own folder."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{node.name} slots=1\n" for node in nodes), encoding="utf-8")
    commands, environments = [], []
    for number, (node, run_dir) in enumerate(zip(nodes, run_dirs, strict=True)):
        (folder / node.name).mkdir(exist_ok=True)
        place = [f"--hostfile={hostfile}", "--no_ssh", f"--node_rank={number}"]
        place += [f"--master_addr={_ADDRESSES[0]}", f"--master_port={_PORT}"]
        commands.append(node.command(*_launcher(), *place, *_training(folder, run_dir)))
        # Gloo would take the address of the host's name, which these nodes cannot resolve.
        environments.append(_environment(folder / node.name) | {"GLOO_SOCKET_IFNAME": "wire"})
    return _train(commands, environments, folder, name)


def _train(
    commands: list[list[str]], environments: list[dict[str, str]], folder: Path, name: str = "one-machine"
) -> list[tuple[int, str]]:
    logs = [folder / f"{name}-{number}.log" for number in range(len(commands))]
    started = []
    for command, environment, log in zip(commands, environments, logs, strict=True):
        with log.open("w", encoding="utf-8") as stream:
            where = Path(environment["XDG_CACHE_HOME"]).parent
            started.append(
                subprocess.Popen(command, env=environment, cwd=where, stdout=stream, stderr=subprocess.STDOUT)
            )
    try:
        statuses = [process.wait(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(status, log.read_text(encoding="utf-8")) for status, log in zip(statuses, logs, strict=True)]


def _launcher() -> list[str]:
    return [sys.executable, str(Path(sys.executable).with_name("deepspeed"))]


def _training(folder: Path, run_dir: str) -> list[str]:
    files = [f"--panel={folder / 'data' / 'panel.vcf.gz'}", f"--map={folder / 'data' / 'genetic.map'}"]
    settings = [part for each in _SETTINGS for part in ("--set", each)]
    script = [str(ROOT / "launch" / "train.py"), "--deepspeed_config", str(ROOT / "ds_configs" / "quickstart.json")]
    return [*script, *files, f"--run-dir={Path(folder / run_dir) if run_dir == 'one-machine' else run_dir}", *settings]


def _environment(own: Path) -> dict[str, str]:
    """Environment of a node whose cache lies in its ``own`` folder."""
    ours = {
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(own / "cache"),
    }
    return {**os.environ, **ours}


def losses_of(path: Path) -> list[float]:
    """The losses in a ``metrics.jsonl``, step by step."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def _run(command: list[object] | list[str], env: dict[str, str] | None = None) -> None:
    subprocess.run([str(part) for part in command], check=True, env=env)


if __name__ == "__main__":
    main()
