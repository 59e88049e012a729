"""Pages of what Beagle and minimac4 write themselves. Skipped where neither is installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from embrag_ds.data.simulate import DefaultData
from embrag_ds.evaluation.external_tools import impute_with_tools
from tests.reports.pages import Parsed
from tests.reports.test_imputed_report import check

TOOLS = [name for name in ("beagle", "minimac4") if shutil.which(name)]


@pytest.mark.skipif(not TOOLS, reason="neither Beagle nor minimac4 (apt-get install beagle minimac4)")
def test_the_numbers_of_other_programs(report: Callable[..., Parsed], simulated: DefaultData, tmp_path: Path) -> None:
    files, _ = impute_with_tools(simulated.panel, simulated.target, simulated.genetic_map, tmp_path / "tools", 1)
    assert set(files) == set(TOOLS)
    for name, path in files.items():
        found = report(path)
        check(found, path)
        assert name.removesuffix("4") in found.numbers["sources"][0].lower() and found.numbers["typed"] > 20
