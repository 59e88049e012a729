"""The notebook in examples/: what is committed has outputs, and executed anew it gives such outputs again."""

from __future__ import annotations

import base64
import copy
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.ranks import LAUNCHER

MOST_SECONDS = 600
"""For a cell, on a busy machine that compiles loops first."""
MOST_BYTES = 500_000


@pytest.fixture(scope="module")
def committed(root: Path) -> NotebookNode:
    """The notebook as it is committed."""
    return nbformat.read(root / "examples" / "quickstart.ipynb", as_version=4)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which the notebook is executed, and makes its own."""
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def executed(root: Path, committed: NotebookNode, work: Path) -> NotebookNode:
    """The notebook after an execution; its commands are those beside this Python."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment["TMPDIR"] = str(work)
    notebook: NotebookNode = copy.deepcopy(committed)
    for cell in code_cells(notebook):
        cell.outputs = []
    client = NotebookClient(notebook, timeout=MOST_SECONDS, resources={"metadata": {"path": str(work)}})
    client.execute(env=environment)
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def streams(notebook: NotebookNode) -> str:
    """Text that the cells print."""
    return "".join(each.text for cell in code_cells(notebook) for each in cell.outputs if each.output_type == "stream")


def images(notebook: NotebookNode) -> list[bytes]:
    """Images that the cells show."""
    data = [each.get("data", {}) for cell in code_cells(notebook) for each in cell.outputs]
    return [base64.b64decode(each["image/png"]) for each in data if "image/png" in each]


def check_outputs(notebook: NotebookNode) -> None:
    """The table has all three methods, the posterior its size, and there are three plots."""
    said = streams(notebook)
    table = dict(re.findall(r"^(embrag_ds|allele frequency|nearest haplotype) .* (\S+)$", said, re.MULTILINE))
    assert len(table) == 3 and float(table["embrag_ds"]) > float(table["nearest haplotype"])
    assert "step 20/20" in said and "imputed.vcf.gz: 30 samples in" in said
    typed, haplotypes, sites = re.findall(r"(\d+) typed sites, (\d+) haplotypes, (\d+) sites", said)[0]
    wrong, untyped = re.findall(r"(\d+) of (\d+) untyped alleles are on the wrong side", said)[0]
    assert int(haplotypes) == 480 and int(untyped) == int(sites) - int(typed)
    assert int(wrong) < 0.05 * int(untyped)
    shown = images(notebook)
    assert len(shown) == 3 and all(each.startswith(b"\x89PNG") and len(each) > 10_000 for each in shown)


def test_the_committed_notebook_has_its_outputs(root: Path, committed: NotebookNode) -> None:
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    check_outputs(committed)
    assert (root / "examples" / "quickstart.ipynb").stat().st_size < MOST_BYTES


@pytest.mark.long
def test_the_notebook_runs(executed: NotebookNode, work: Path) -> None:
    check_outputs(executed)
    (scores,) = work.glob("embrag-quickstart-*/scores.json")
    r2 = {name: tool["aggregate_r2"]["all"] for name, tool in json.loads(scores.read_text())["tools"].items()}
    assert r2["embrag_ds"] > r2["nearest haplotype"] > r2["allele frequency"]


def test_its_sentences_are_short_and_its_links_lead_somewhere(root: Path, committed: NotebookNode) -> None:
    prose = [cell.source for cell in committed.cells if cell.cell_type == "markdown"]
    for sentence in re.split(r"(?<=[.!?:])\s+|\n\n|\n- ", "\n\n".join(prose)):
        assert len(sentence.split()) < 25, sentence
    links = re.findall(r"\]\(([^)#]+)\)", "\n".join(prose))
    assert len(links) > 3 and all((root / "examples" / link).exists() for link in links), links
