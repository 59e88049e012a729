"""What adapting the model to the panel gains, on many panels, beside Beagle and minimac4 with defaults and tuned.

    python profiling/adaptation.py --data shared/data --out FOLDER [--only NAME,NAME] [--tools-only]

The targets of every panel are samples held out of it (adaptation_panels.py). ``embrag impute`` runs twice, as its user
would run it: with the model as shipped, and adapted. Both find the panel packed and no adapted model. The seconds of
adaptation are those of the second run beyond the first. The tools are tuned on other samples held out of the panel
(adaptation_tools.py).

FOLDER/PANEL keeps the files of a panel, the outputs of all runs and their logs, and what is there is not made again:
remove FOLDER/PANEL/result.json to run ours again, or FOLDER/PANEL/TOOL.json for a tool. FOLDER gets adaptation.md
(adaptation_report.py) and adaptation.json, with all panels that are done.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from adaptation_panels import SPECS, Prepared, prepare
from adaptation_report import AUTO, OFF, TUNED, r2_table, table, worst
from adaptation_tools import ERRORS, compare_with, measured

from embrag_ds.cli.command import run_command
from embrag_ds.data.panel import open_panel
from embrag_ds.data.programs import run_logged
from embrag_ds.errors import UserError
from embrag_ds.evaluation.external_tools import able
from embrag_ds.evaluation.report import Report
from embrag_ds.evaluation.score import evaluate
from embrag_ds.files import make_folder, write_json, write_text
from embrag_ds.variants.records import VariantReader

logger = logging.getLogger("embrag_ds.profiling.adaptation")

ROOT = Path(__file__).resolve().parent.parent
OURS = {"auto": AUTO, "off": OFF}
"""Value of ``--adapt`` -> name of the run in a report."""
OUTPUT, RESULT = "imputed.vcf.gz", "result.json"


def impute(files: Prepared, adapt: str, folder: Path) -> dict[str, Any]:
    """Impute with launch/impute.py in ``folder``: the cost, and what the report says of adaptation."""
    make_folder(folder)
    cache, described = folder / "cache", folder / "report.json"
    open_panel(files.panel, cache, progress=False)
    given: list[str | Path] = ["--panel", files.panel, "--target", files.target, "--out", folder / OUTPUT]
    given += ["--cache-dir", cache, "--report", described]
    if files.genetic_map is not None:
        given += ["--map", files.genetic_map]
    elif files.cm_per_mb is not None:
        given += ["--cm-per-mb", f"{files.cm_per_mb:g}"]
    with measured() as cost:
        run_logged([sys.executable, ROOT / "launch" / "impute.py", *given, "--adapt", adapt], folder / "log")
    shutil.rmtree(cache)
    report = json.loads(described.read_text(encoding="utf-8"))
    return {**asdict(cost), "adaptation": report["adaptation"]}


def run_tools(files: Prepared, folder: Path) -> dict[str, dict[str, Any]]:
    """What :func:`compare_with` returns for every tool that is installed and takes the panel, made or read."""
    found = {}
    for tool in (each for each in able(files.genetic_map) if each in ERRORS):
        path = folder / f"{tool}.json"
        if not path.exists():
            try:
                write_json(path, compare_with(tool, files, folder / "tools", folder / "cache"))
            except UserError as fault:
                logger.warning(f"{folder.name}: without {tool}: {fault}")
                continue
        found[tool] = json.loads(path.read_text(encoding="utf-8"))
    return found


def score(files: Prepared, folder: Path, ours: Mapping[str, Path], tools: Mapping[str, dict[str, Any]]) -> Report:
    """Scores of our runs {name: output}, first, and of both runs of every tool."""
    imputed: dict[str, Path | str] = dict(ours)
    for tool, each in tools.items():
        imputed[tool] = folder / "tools" / each["default"]["output"]
        imputed[TUNED[tool]] = folder / "tools" / each["tuned"]["output"]
    return evaluate(files.truth, imputed, files.panel, files.target, cache_dir=folder / "cache")


def measure(name: str, data: Path, folder: Path, tools_only: bool) -> None:
    """Do what is left to do for a panel, up to its ``result.json``."""
    files = prepare(SPECS[name], data, folder)
    tools = run_tools(files, folder)
    if tools_only:
        if tools:
            report = score(files, folder, {}, tools)
            logger.info(r2_table([{"name": name, "report": report.to_json()}]))
        return
    # As shipped first: what a first run compiles is no part of adaptation.
    ours = {adapt: impute(files, adapt, folder / adapt) for adapt in reversed(OURS)}
    report = score(files, folder, {run: folder / adapt / OUTPUT for adapt, run in OURS.items()}, tools)
    with VariantReader(files.panel) as vcf:
        samples, sites = len(vcf.samples), sum(1 for _ in vcf.sites())
    used_map = f"{files.cm_per_mb:g} cM/Mb" if files.cm_per_mb else "given" if files.genetic_map else "none"
    shape = {"samples": samples, "targets": report.samples, "sites": sites, "typed": report.typed_sites}
    result = {
        "name": name,
        "date": date.today().isoformat(),
        "threads": os.cpu_count(),
        "shape": {**shape, "map": used_map},
        "ours": ours,
        "adaptation": {key: ours["auto"][key] - ours["off"][key] for key in ("seconds", "cpu_seconds")},
        "tools": tools,
        "report": report.to_json(),
    }
    write_json(folder / RESULT, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with kgp_chr20, maize and so on")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", metavar="NAME,NAME", help=f"of {', '.join(SPECS)}")
    parser.add_argument("--tools-only", action="store_true", help="prepare the panels, run the tools and score them")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    names = options.only.split(",") if options.only else list(SPECS)
    unknown = [name for name in names if name not in SPECS]
    if unknown:
        raise UserError(f"--only {','.join(unknown)}: there is no such panel; choose from {', '.join(SPECS)}")
    for name in names:
        folder = options.out / name
        if (folder / RESULT).exists():
            continue
        source = options.data / SPECS[name].source
        if not source.exists():
            logger.warning(f"{name}: skipped, because {source} does not exist")
            continue
        try:
            measure(name, options.data, folder, options.tools_only)
        except UserError as fault:
            logger.warning(f"{name}: failed: {fault}")
    paths = [options.out / name / RESULT for name in SPECS]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    if results:
        worst_cases = {kind: asdict(each) for kind, each in worst(results).items()}
        write_json(options.out / "adaptation.json", {"panels": results, "worst": worst_cases})
        write_text(options.out / "adaptation.md", table(results))
        sys.stdout.write(table(results))


if __name__ == "__main__":
    for room in ("data", "evaluation", "variants"):
        logging.getLogger(f"embrag_ds.{room}").setLevel(logging.WARNING)
    run_command(main)
