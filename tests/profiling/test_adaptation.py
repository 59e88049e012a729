"""The benchmark of adaptation: its panels, the tuning of other tools, the tables, and what it skips."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import adaptation
import adaptation_panels
import adaptation_report
import adaptation_tools
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.data.simulate import DefaultData, SimulationSettings
from embrag_ds.errors import UserError
from embrag_ds.evaluation.metrics import BIN_NAMES
from embrag_ds.maps.genetic_map import GeneticMap
from tests.whole_files import read_phased


@pytest.fixture
def held(simulated: DefaultData) -> Any:
    """A panel that is cut out of the simulated one."""
    panels = adaptation_panels
    return panels.Held(simulated.panel.name, panels.spaced(2_000), simulated.genetic_map.name, targets=20)


def test_targets_are_held_out_of_the_panel(held, simulated: DefaultData, tmp_path: Path) -> None:
    files = adaptation_panels.prepare(held, simulated.panel.parent, tmp_path / "one")
    whole, panel, target, truth = (
        read_phased(path) for path in (simulated.panel, files.panel, files.target, files.truth)
    )
    assert len(truth.samples) == 20 and target.samples == truth.samples
    assert not set(panel.samples) & set(truth.samples) and {*panel.samples, *truth.samples} == set(whole.samples)
    copies = panel.alleles.sum(axis=1, dtype=int)
    assert ((copies > 0) & (copies < panel.alleles.shape[1])).all() and len(copies) < len(whole.sites)
    maf = dict(zip(panel.sites.pos.tolist(), np.minimum(copies, 80 - copies) / 80, strict=True))
    assert min(maf[pos] for pos in target.sites.pos.tolist()) >= 0.05
    common = {pos // 2_000 for pos, value in maf.items() if value >= 0.05}
    assert (target.sites.pos // 2_000).tolist() == sorted(common)
    rows = np.searchsorted(truth.sites.pos, target.sites.pos)
    np.testing.assert_array_equal(target.alleles, truth.alleles[rows])
    assert files.genetic_map is not None and files.genetic_map.read_bytes() == simulated.genetic_map.read_bytes()


def test_a_panel_is_made_once_and_the_same_again(held, simulated: DefaultData, tmp_path: Path) -> None:
    prepare, data = adaptation_panels.prepare, simulated.panel.parent
    first = prepare(held, data, tmp_path / "one")
    made = first.panel.stat().st_mtime_ns
    assert prepare(held, data, tmp_path / "one") == first and first.panel.stat().st_mtime_ns == made
    again = prepare(replace(held, panel_samples=10), data, tmp_path / "two")
    assert read_phased(again.truth).samples == read_phased(first.truth).samples
    small, large = (read_phased(each.panel) for each in (again, first))
    assert len(small.samples) == 10 and set(small.samples) < set(large.samples)


def test_a_panel_of_few_sites(tmp_path: Path) -> None:
    settings = SimulationSettings(length_bp=100_000, panel_samples=30, target_samples=6, typed_spacing_bp=4_000)
    spec = adaptation_panels.Simulated(settings, sites=50)
    files = adaptation_panels.prepare(spec, tmp_path, tmp_path / "few")
    panel, target, truth = (read_phased(path) for path in (files.panel, files.target, files.truth))
    assert len(panel.sites) == len(truth.sites) == 50 and len(target.sites) == 10
    assert set(target.sites.pos.tolist()) <= set(panel.sites.pos.tolist())
    assert panel.sites.pos[-1] - panel.sites.pos[0] > 80_000


def test_every_panel_is_of_a_known_kind_and_no_targets_are_official() -> None:
    specs = adaptation_panels.SPECS
    assert len(specs) >= 10
    assert not [name for name, spec in specs.items() if "target" in spec.source or "truth" in spec.source]


@given(rate=st.floats(-4, 4), error=st.floats(-6, -1), tool=st.sampled_from(["beagle", "minimac4"]))
def test_tuning_finds_the_best_within_half_a_step(rate: float, error: float, tool: str) -> None:
    default_error = {"beagle": 1e-5, "minimac4": 1e-2}[tool]

    def score(setting) -> float:
        away = math.log10(setting.scale or 1.0) - rate
        return -(away**2) - 0.01 * (math.log10(setting.error or default_error) - error) ** 2

    best, tried = adaptation_tools.tune(score, tool)
    assert 5 < len(tried) <= 11 and len({setting for setting, _ in tried}) == len(tried)
    assert score(best) == max(value for _, value in tried)
    if abs(rate) <= 3.2:
        assert abs(math.log10(best.scale or 1.0) - rate) <= 0.27
    if -4 <= error <= -2:
        assert abs(math.log10(best.error or default_error) - error) <= 1.01


def test_a_setting_that_fails_is_not_chosen() -> None:
    best, tried = adaptation_tools.tune(lambda setting: math.nan if setting.scale else 0.5, "beagle")
    assert best.scale is None and dict(tried)[best] == 0.5


def test_tools_get_the_tuned_rate_and_mismatch(simulated: DefaultData, tmp_path: Path, monkeypatch) -> None:
    """Beagle as its effective size, minimac4 in its map, which without one has 1 cM/Mb."""
    tools, commands = adaptation_tools, []

    def run(command, log) -> None:
        commands.append([str(word) for word in command])

    monkeypatch.setattr(tools, "run_logged", run)
    files = adaptation_panels.Prepared.of(simulated.panel.parent)
    setting = tools.Setting(10.0, 1e-3)
    folder = tmp_path / "run"
    folder.mkdir()
    tools.run_tool("beagle", files, setting, folder)
    assert {"ne=1000000", "err=0.001", f"map={folder}/genetic.map"} <= set(commands[-1])
    bp = np.linspace(1, 150_000, 5)
    given_cm = GeneticMap.read(simulated.genetic_map)._interpolate("1", bp)
    assert GeneticMap.read(folder / "genetic.map")._interpolate("1", bp) == pytest.approx(given_cm, abs=1e-6)
    tools.run_tool("minimac4", files, setting, folder)
    assert "--match-error" not in commands[-2] and commands[-1][-2:] == ["--match-error", "0.001"]
    assert GeneticMap.read(folder / "genetic.map")._interpolate("1", bp) == pytest.approx(10 * given_cm, abs=1e-5)
    without_map = replace(files, genetic_map=None)
    tools.run_tool("minimac4", without_map, tools.Setting(), folder)
    assert "--map" not in commands[-1]
    tools.run_tool("minimac4", without_map, setting, folder)
    assert GeneticMap.read(folder / "genetic.map")._interpolate("1", bp) == pytest.approx(bp * 1e-5, abs=1e-5)
    assert setting.described("beagle") == "ne=1000000 err=0.001" and tools.Setting().described("minimac4") == "default"
    assert setting.described("minimac4") == "map x 10 --match-error 0.001"


def canned(name: str, gain: float, lead: float) -> dict[str, Any]:
    """A result whose values are the same in all bins but <0.1 %, which has none."""
    runs = {"adapted": 0.8, "as shipped": 0.8 - gain, "beagle, tuned": 0.8 - lead, "minimac4, tuned": 0.5}
    defined = [None] + [1.0] * (len(BIN_NAMES) - 1)

    def values(value: float) -> dict[str, float | None]:
        return {key: each and value for key, each in zip(BIN_NAMES, defined, strict=True)}

    def difference(other: str) -> dict[str, Any]:
        between = runs["adapted"] - runs[other]
        limits = [between - 0.01, between + 0.01]
        interval = {key: limits if each else [None, None] for key, each in zip(BIN_NAMES, defined, strict=True)}
        return {"a": "adapted", "b": other, "difference": values(between), "interval": interval}

    cost = {"seconds": 20.4, "cpu_seconds": 39.6}
    return {
        "name": name,
        "shape": {"samples": 50, "targets": 9, "sites": 300, "typed": 40, "map": "none"},
        "ours": {"auto": cost, "off": cost},
        "adaptation": {"seconds": 90.0, "cpu_seconds": 170.0},
        "tools": {"beagle": {"setting": "ne=1000", "tuned": cost}},
        "report": {
            "sites": dict.fromkeys(BIN_NAMES, 7),
            "tools": {run: {"aggregate_r2": values(r2), "called_carriers": None} for run, r2 in runs.items()},
            "differences": [difference(other) for other in list(runs)[1:]],
        },
    }


def test_the_table_has_gain_lead_times_and_the_worst_case() -> None:
    text = adaptation_report.table([canned("one", 0.0072, 0.0304), canned("two", -0.0004, 0.2)])
    assert "| one | 50 | 9 | 300 | 40 | none | 20 (40) | 90 (170) | ne=1000 | 20 (40) |  |  |" in text
    gain = "+.0072 (\N{MINUS SIGN}.0028 to +.0172)"
    assert f"| one |  | {' | '.join([gain] * 6)} |" in text
    assert "| two |  | +.2000 (+.1900 to +.2100) |" in text
    assert "|  | as shipped |  | .7928 |" in text
    assert "Smallest gain: \N{MINUS SIGN}.0004 (" in text and ", two, 0.1-0.5 %, 7 sites, from as shipped." in text
    assert "Smallest lead: +.0304 (" in text and text.endswith(", one, 0.1-0.5 %, 7 sites, from beagle, tuned.\n")
    rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(rows) == {13, 9, 10}


def test_called_carriers_of_several_splits_are_counted_together() -> None:
    results = [canned(name, 0.1, 0.1) for name in ("real-split1", "real-split2", "other-2", "without")]
    numbers = [(10, 0.9, 0.8), (30, 0.7, 0.9), (5, 0.5, 1.0)]
    for result, (number, said, right) in zip(results, numbers, strict=False):
        empty = {"number": 0, "said": None, "right": None, "interval": [None, None]}
        given = {"number": number, "said": said, "right": right, "interval": [0, 0]}
        result["report"]["tools"]["adapted"]["called_carriers"] = {
            name: given if name == "all" else empty for name in BIN_NAMES
        }
    rows = adaptation_report.carriers_table(results).splitlines()[2:]
    blank = " |  |" + "  |" * (len(BIN_NAMES) - 2)
    assert rows == [
        f"| real-split1{blank} 10: 0.900, 0.800 |",
        f"| real-split2{blank} 30: 0.700, 0.900 |",
        f"| other-2{blank} 5: 0.500, 1.000 |",
        f"| real, all splits{blank} 40: 0.750, 0.875 |",
    ]


def test_it_skips_what_is_done_and_names_what_it_cannot_do(
    held, simulated: DefaultData, tmp_path: Path, monkeypatch, caplog, capsys
) -> None:
    data, commands = simulated.panel.parent, []

    def run(command, log) -> None:
        """Stand-in for ``embrag impute``: the truth, named so that it is found."""
        given = [str(word) for word in command]
        commands.append(given)
        shutil.copyfile(tmp_path / "out" / "small" / "data" / "truth.vcf.gz", given[given.index("--out") + 1])
        Path(given[given.index("--report") + 1]).write_text('{"adaptation": {"kept": true}}')

    absent = replace(held, source="nowhere.vcf.gz")
    monkeypatch.setattr(adaptation, "SPECS", {"small": held, "absent": absent})
    monkeypatch.setattr(adaptation, "run_logged", run)
    monkeypatch.setattr(adaptation, "able", lambda genetic_map: [])
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "argv", ["adaptation.py", "--data", str(data), "--out", str(tmp_path / "out")])
    adaptation.main()
    assert "absent: skipped, because" in caplog.text
    assert [words[-2:] for words in commands] == [["--adapt", "off"], ["--adapt", "auto"]]
    caches = [words[words.index("--cache-dir") + 1] for words in commands]
    assert len(set(caches)) == 2 and not any(Path(each).exists() for each in caches)
    (result,) = json.loads((tmp_path / "out" / "adaptation.json").read_text())["panels"]
    assert result["ours"]["auto"]["adaptation"] == {"kept": True} and result["shape"]["targets"] == 20
    assert result["report"]["tools"]["adapted"]["aggregate_r2"]["all"] == pytest.approx(1.0)
    table = (tmp_path / "out" / "adaptation.md").read_text()
    assert capsys.readouterr().out == table and "| small | 40 | 20 |" in table
    adaptation.main()
    assert len(commands) == 2 and capsys.readouterr().out == table
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--only", "small,none"])
    with pytest.raises(UserError, match="--only none: there is no such panel; choose from small, absent"):
        adaptation.main()
