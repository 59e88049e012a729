"""The report page of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from embrag_ds.evaluation.metrics import BIN_NAMES, DISJOINT_BINS
from embrag_ds.reports.bars import columns_chart
from embrag_ds.reports.charts import COLOURS
from embrag_ds.reports.page import Page
from embrag_ds.reports.profile_part import profile_charts, profile_tables
from embrag_ds.reports.run_curves import (
    TRAINING,
    masks,
    memory_chart,
    resumes,
    staleness_chart,
    training_charts,
    validation_charts,
    value,
)
from embrag_ds.reports.run_facts import EVALUATION, RunFacts
from embrag_ds.reports.text import date, duration, facts, folded, lines, number, paragraph, plain, table, thinned
from embrag_ds.runs.folder import OUTCOME
from embrag_ds.runs.record import CONFIG, METRICS, PROFILE, RUN_LOG, VERSIONS

_MOST_LINES = 5000
_STATES = {
    "finished": "The run has finished.",
    "stopped": "The run was stopped by a signal, after a checkpoint.",
    "interrupted": "The run was interrupted, without a checkpoint at its end.",
    "failed": "The run has failed.",
    "running": "The run is under way, or was killed before it could say how it ended.",
}


def run_numbers(run: RunFacts) -> dict[str, Any]:
    """The page's numbers, for JSON; of very many lines of metrics some, evenly apart."""
    training = thinned(run.lines("train"), _MOST_LINES)
    validation = thinned(run.lines("validation"), _MOST_LINES)
    columns = {name: [value(line, name) for line in training] for name in TRAINING}
    return {
        "kind": "run",
        "outcome": run.outcome,
        "steps": _last_step(run),
        "max_steps": run.setting("embrag.train.max_steps"),
        "training": {"step": [line["step"] for line in training]}
        | {name: column for name, column in columns.items() if any(each is not None for each in column)},
        "validation": [
            {"step": line["step"], "score": value(line, "score"), "masks": masks(line)} for line in validation
        ],
        "resumes": [{"step": line["step"], "changes": line.get("changes")} for line in resumes(run)],
        "superseded": 0 if run.metrics is None else run.metrics.superseded,
        "torn": 0 if run.metrics is None else run.metrics.torn,
        "complaints": None if run.log is None else run.log.complained,
        "profiles": {
            name: {"peaks": each.get("peaks"), "phases": each.get("phases")} for name, each in run.profiles.items()
        },
        "evaluation": None if run.evaluation is None else _aggregate_r2(run.evaluation),
        "unreadable": run.unreadable,
    }


def run_page(run: RunFacts) -> Page:
    """The page of a run."""
    page = Page(f"Run {plain(run.folder.resolve().name)}", f"Training run in {plain(run.folder)}")
    page.add("How it ended", _ending(run))
    page.add("Training", _training(run))
    page.add("Validation", _validation(run))
    page.add("Memory and phases", _memory(run))
    page.add("Reference cache", staleness_chart(run))
    page.add("Evaluation", _evaluation(run))
    page.add("Configuration", _configuration(run))
    page.add("Versions", _versions(run))
    page.add("Log", _log(run))
    return page


def _ending(run: RunFacts) -> str:
    outcome = run.outcome or {}
    state = outcome.get("state")
    if run.outcome is None:
        said = _absent(run, OUTCOME, f"There is no {OUTCOME}, so how the run ended is not known.")
    else:
        said = _STATES.get(str(state), f"{OUTCOME} has a state that is not known here: {state}.")
    content = paragraph(said, "bad" if state in ("failed", "interrupted", None) else "")
    if state in ("failed", "stopped", "interrupted"):
        content += paragraph(f"Reason: {outcome.get('reason')}")
    if outcome.get("restart"):
        content += paragraph("If it has ended, --resume goes on from its newest checkpoint.")
    last = max(_all_lines(run), key=lambda line: value(line, "time") or 0.0, default={})
    most = value({"steps": run.setting("embrag.train.max_steps")}, "steps")
    content += facts(
        [
            ("state", state or "unknown"),
            ("steps", f"{number(_last_step(run))} of {'unknown' if most is None else number(most)}"),
            ("newest checkpoint, step", value(outcome, "step")),
            ("time of training, all starts", duration(value(last, "total_seconds"))),
            (f"last line of {METRICS}", date(last.get("time"))),
            (f"{OUTCOME} of", date(outcome.get("time"))),
        ]
    )
    return content + _interruptions(run)


def _interruptions(run: RunFacts) -> str:
    content = ""
    if run.metrics is not None and run.metrics.torn:
        content += paragraph(
            f"{number(run.metrics.torn)} of {METRICS}'s lines are not whole, as a killed process leaves one. They are "
            "left out."
        )
    if run.metrics is not None and run.metrics.superseded:
        content += paragraph(
            f"{number(run.metrics.superseded)} of {METRICS}'s lines were superseded when the run was resumed or went "
            "over the same steps again. They are left out."
        )
    if found := resumes(run):
        rows = [(f"{line['step']:,}", date(line.get("time")), _changes(line)) for line in found]
        content += table(["from step", "when", "changed settings"], rows, f"Resumed: {len(rows)}", texts=3)
    return content


def _changes(line: dict[str, Any]) -> str:
    changes = line.get("changes")
    return ", ".join(f"{name}: {each}" for name, each in changes.items()) if isinstance(changes, dict) else "none"


def _training(run: RunFacts) -> str:
    if run.lines("train"):
        return training_charts(run)
    return paragraph(_absent(run, METRICS, "No line of training has been written yet."))


def _validation(run: RunFacts) -> str:
    if run.lines("validation"):
        return validation_charts(run)
    every = run.setting("embrag.train.eval_every")
    when = f"; embrag.train.eval_every is {every}" if isinstance(every, int) else ""
    return paragraph(f"There has been no validation yet{when}.")


def _memory(run: RunFacts) -> str:
    charts = [memory_chart(run)] if run.lines("train") else []
    charts += [chart for name, each in run.profiles.items() for chart in profile_charts(name, each)]
    content = f'<div class="charts">{"".join(charts)}</div>\n' if charts else ""
    if PROFILE not in run.profiles:
        said = "This run was not profiled: --profile nvml measures memory over time, and the phases of a step."
        if (run.outcome or {}).get("state") == "running":
            said = f"There is no {PROFILE}, which a run with --profile nvml writes when it ends."
        content += paragraph(_absent(run, PROFILE, said))
    return content + "".join(profile_tables(name, each) for name, each in run.profiles.items())


def _evaluation(run: RunFacts) -> str:
    if run.evaluation is None:
        said = f"The folder has no {EVALUATION}, which embrag evaluate --json can write there."
        return paragraph(_absent(run, EVALUATION, said))
    tools = _aggregate_r2(run.evaluation)
    if not tools:
        return paragraph(f"{EVALUATION} has no aggregate r2 of any tool.")
    columns = {tool: [r2.get(name) for name in DISJOINT_BINS] for tool, r2 in list(tools.items())[: len(COLOURS)]}
    axes = ("minor-allele frequency in the panel", "aggregate r2")
    chart = columns_chart("Aggregate dosage r2 against the truth", axes, DISJOINT_BINS, columns)
    rows: list[list[object]] = [[tool, *(r2.get(name) for name in BIN_NAMES)] for tool, r2 in tools.items()]
    sites = run.evaluation.get("sites")
    if isinstance(sites, dict):
        rows.insert(0, ["sites", *(value(sites, name) for name in BIN_NAMES)])
    samples = number(value(run.evaluation, "samples"))
    caption = f"Aggregate dosage r2 by minor-allele frequency, {samples} samples"
    return table(["", *BIN_NAMES], rows, caption) + f'<div class="charts">{chart}</div>\n'


def _configuration(run: RunFacts) -> str:
    if run.config is None:
        said = f"There is no {CONFIG}: the run ended before its settings were written."
        return paragraph(_absent(run, CONFIG, said))
    ours = run.config.get("embrag")
    halves = {
        "Our half": list(_flat(ours, "embrag.")) if isinstance(ours, dict) else [],
        "DeepSpeed's half": list(_flat({name: each for name, each in run.config.items() if name != "embrag"})),
    }
    return "".join(
        folded(f"{half}: {len(rows)} settings", table(["key", "value"], rows, f"{half}, in force", texts=2))
        for half, rows in halves.items()
    )


def _versions(run: RunFacts) -> str:
    if run.versions is None:
        return paragraph(_absent(run, VERSIONS, f"There is no {VERSIONS}: the run ended before it was written."))
    found = dict(run.versions)
    command = found.pop("command", None)
    said = paragraph("Command: " + " ".join(map(str, command))) if isinstance(command, list) else ""
    return said + table(["what", "value"], _flat(found), "Versions and machine", texts=2)


def _log(run: RunFacts) -> str:
    if run.log is None:
        return paragraph(_absent(run, RUN_LOG, f"There is no {RUN_LOG}."))
    shown = run.log.complaints
    content = paragraph("No warning and no error was logged.")
    if shown:
        more = f", the first {len(shown)}" if run.log.complained > len(shown) else ""
        content = lines(shown, f"Warnings and errors: {run.log.complained:,}{more}")
    failed = (run.outcome or {}).get("state") == "failed"
    end = lines(run.log.last, f"The last {len(run.log.last)} lines")
    return content + folded("End of the log", end, is_open=failed)


def _absent(run: RunFacts, name: str, otherwise: str) -> str:
    """Why a file is not used: it cannot be read, or what ``otherwise`` says."""
    return f"{name} cannot be read: {run.unreadable[name]}." if name in run.unreadable else otherwise


def _all_lines(run: RunFacts) -> list[dict[str, Any]]:
    return [] if run.metrics is None else [*run.metrics.held, *run.metrics.resumes]


def _last_step(run: RunFacts) -> int:
    """The last step that counts: a resumed run may not have come as far as it was."""
    held = [] if run.metrics is None else run.metrics.held
    return max((line["step"] for line in [*held, *resumes(run)[-1:]]), default=0)


def _aggregate_r2(evaluation: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Aggregate r2 of each tool by bin."""
    tools = evaluation.get("tools")
    found = {}
    for name, scores in tools.items() if isinstance(tools, dict) else ():
        r2 = scores.get("aggregate_r2") if isinstance(scores, dict) else None
        if isinstance(r2, dict):
            found[str(name)] = {each: value(r2, each) for each in BIN_NAMES}
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings by their dotted path, with their values as text."""
    for name, each in values.items():
        if isinstance(each, dict) and each:
            yield from _flat(each, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "none" if each is None else str(each)
