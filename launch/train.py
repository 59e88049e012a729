"""Train V18 with DeepSpeed: ``deepspeed launch/train.py --deepspeed_config ds_configs/v18.json``.

With nothing else given, the panel is the embedded default, simulated on first use.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

from embrag_ds.engine.deepspeed_settings import load_training_config
from embrag_ds.engine.initialize import World, start_world
from embrag_ds.engine.inputs import PanelFiles, open_inputs_on_all_ranks
from embrag_ds.engine.profile import PROFILES, Profile
from embrag_ds.engine.trainer import Trainer
from embrag_ds.errors import UserError
from embrag_ds.launching import run_main
from embrag_ds.retrieval.timeline import NO_TIMELINE


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train Embedding RAG on a phased reference panel.")
    parser.add_argument("--deepspeed_config", type=Path, required=True, metavar="JSON", help="a file, or v18, v17, ...")
    parser.add_argument("--panel", type=Path, metavar="VCF", help="phased, indexed .vcf.gz or .bcf")
    parser.add_argument("--map", type=Path, help="genetic map, PLINK or SHAPEIT/Eagle format (default: 1 cM/Mb)")
    parser.add_argument("--samples", type=Path, metavar="TSV", help="sample and population, one person a line")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/<config>-<date>-<time>")
    parser.add_argument("--max-steps", type=int, metavar="N", help="stop at step N (the schedule stays)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --run-dir (default: the newest)")
    parser.add_argument("--init-from", type=Path, metavar="FILE", help="start from the weights of a model.safetensors")
    parser.add_argument(
        "--profile", choices=PROFILES, help="measure time and memory; snapshot: allocations, too (CUDA)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. embrag.model.dims=128; repeatable"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    return parser.parse_args()


def choose_run_dir(arguments: argparse.Namespace, world: World) -> Path:
    """The folder asked for, the newest one to resume, or a new one named by the clock of rank 0."""
    stem = arguments.deepspeed_config.stem
    if arguments.run_dir is not None:
        run_dir = arguments.run_dir
    elif arguments.resume:
        found = sorted(Path("runs").glob(f"{stem}-*/checkpoints/latest"))
        if not found:
            raise UserError(f"--resume: no run of {stem} with a checkpoint under runs/; name one with --run-dir")
        run_dir = found[-1].parents[1]
    else:
        run_dir = Path("runs") / world.agree(f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not arguments.resume and (run_dir / "metrics.jsonl").exists():
        raise UserError(f"{run_dir}: holds a run already; add --resume, or choose another --run-dir")
    return run_dir


def main() -> None:
    arguments = parse_arguments()
    overrides = list(arguments.set)
    if arguments.max_steps is not None:
        overrides.append(f"embrag.train.max_steps={arguments.max_steps}")
    if arguments.resume and arguments.init_from:
        raise UserError("--resume goes on from a checkpoint, --init-from starts anew: give one of them")
    config = load_training_config(arguments.deepspeed_config, overrides)
    world = start_world()
    run_dir = choose_run_dir(arguments, world)
    profile = Profile(arguments.profile, run_dir, world) if arguments.profile else nullcontext(NO_TIMELINE)
    files = PanelFiles(arguments.panel, arguments.map, arguments.samples)
    inputs = open_inputs_on_all_ranks(files, config.embrag.data, world)
    with profile as timeline:
        Trainer(config, inputs, run_dir, world, arguments.resume, arguments.init_from, timeline).run()
    world.close()


if __name__ == "__main__":
    run_main(main)
