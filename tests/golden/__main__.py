"""Renew the golden losses, or compare with them: see :mod:`tests.golden`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from embrag_ds.engine.distributed import DistributedContext, start_distributed
from embrag_ds.runs.record import device_name, package_versions
from tests import golden


def renewed(names: Iterable[str], distributed: DistributedContext, folder: Path, writes: bool) -> Iterator[str]:
    """Run the runs in ``folder``, keep their losses if this ``writes``, and yield a line about each."""
    inputs = golden.panel_inputs(folder)
    device = distributed.device.type
    for name in names:
        before = golden.read(name, device).losses
        losses = golden.losses_of(name, inputs, distributed, folder)
        moved = "" if before is None else f", moved by {golden.largest_difference(losses, before):.2g} at most"
        yield f"{name} on {device}: {losses[0]:.6f} to {losses[-1]:.6f}{moved}"
        if writes:
            packages = {each: version for each, version in package_versions().items() if version}
            made_on = {"device": device_name(distributed.device), "panel": golden.fingerprint(), **packages}
            golden.write(name, device, golden.Golden(losses, made_on))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description="Renew the golden losses.")
    parser.add_argument("run", nargs="*", metavar="RUN", help=f"of {', '.join(golden.RUNS)} (default: all)")
    parser.add_argument("--compare", action="store_true", help="print the largest relative difference; write nothing")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    options = parser.parse_args()
    if not set(options.run) <= set(golden.RUNS):
        parser.error(f"there are {', '.join(golden.RUNS)}")
    torch.set_num_threads(options.threads)
    distributed = start_distributed()
    with tempfile.TemporaryDirectory() as folder:
        for line in renewed(options.run or golden.RUNS, distributed, Path(folder), writes=not options.compare):
            sys.stdout.write(f"{line}\n")
    distributed.close()


if __name__ == "__main__":
    main()
