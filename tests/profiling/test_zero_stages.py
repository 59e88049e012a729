"""The same run under every ZeRO stage: equal global batches, the table, and the bar."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import zero_stages


class Runs:
    """Stand-in for ``trained``: losses of 2, but for one that is off under stage 2 on two ranks."""

    def __init__(self, off: float) -> None:
        self.off = off
        self.given: list[tuple[int, dict[str, Any]]] = []

    def __call__(
        self, config: Path, folder: Path, given: dict[str, Any], options: argparse.Namespace, ranks: int
    ) -> list[dict[str, Any]]:
        self.given.append((ranks, given))
        steps = given["embrag.train.max_steps"]
        found = [2.0] * steps
        if (ranks, given["zero_optimization"]) == (2, {"stage": 2}):
            found[3] += self.off
        return [{"kind": "train", "loss": loss} for loss in found] + [{"kind": "validation"}]


@pytest.mark.parametrize(("off", "status"), [(1e-5, 0), (1e-4, 1)])
def test_the_largest_difference_is_found_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: float, status: int
) -> None:
    runs = Runs(off)
    monkeypatch.setattr(zero_stages, "trained", runs)
    monkeypatch.setattr(sys, "argv", ["zero_stages.py", "--out", str(tmp_path), "--steps", "6"])
    if status:
        with pytest.raises(SystemExit) as ended:
            zero_stages.main()
        assert ended.value.code == status
    else:
        zero_stages.main()
    table = (tmp_path / "zero_stages.md").read_text().splitlines()
    assert table[0] == "| ZeRO stage, 6 steps | 1 rank | 2 ranks |"
    assert "| 1 | 0.0e+00 | 0.0e+00 |" in table and f"| 2 | 0.0e+00 | {off / 2:.1e} |" in table
    assert len(table) == 2 + len(zero_stages.STAGES)
    differences = json.loads((tmp_path / "zero_stages.json").read_text())["differences"]
    assert differences["2"]["2"] == pytest.approx(off / 2)
    # All runs take the same number of samples a step.
    assert {ranks * given["gradient_accumulation_steps"] for ranks, given in runs.given} == {2}
    assert {ranks for ranks, _ in runs.given} == {1, 2}
