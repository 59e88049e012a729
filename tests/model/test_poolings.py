"""Poolings by name: those of the folder, and one that is added as docs/extending.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from embrag_ds.errors import UserError
from embrag_ds.model import poolings
from embrag_ds.model.settings import ModelConfig
from embrag_ds.ops.dosage import dense_alleles


def test_every_module_of_the_folder_is_a_value_of_the_setting(root: Path) -> None:
    files = {path.stem for path in (root / "embrag_ds/model/poolings").glob("*.py")} - {"__init__"}
    assert set(poolings.fusions()) == files >= {"copying", "rare_variant"}
    with pytest.raises(UserError, match=r"^embrag\.model\.fusion: must be one of .*rare_variant.*, not 'copy'$"):
        ModelConfig(fusion="copy")


def test_the_pooling_of_the_page_works_as_one_new_file(
    root: Path, build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (root / "docs/extending.md").read_text(encoding="utf-8")
    (place,) = re.findall(r"`(\w+)\.py` in that folder", page)
    (code,) = re.findall(r"```python\n(.+?)```", page, flags=re.DOTALL)
    (tmp_path / f"{place}.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(poolings, "__path__", [*poolings.__path__, str(tmp_path)])
    assert place in poolings.fusions()
    world = build(4)
    network = build.imputer(trained=False, fusion=ModelConfig(fusion=place).fusion)
    batch = world.collator(network.embedding, k=5)(world.batch_of(1, [0, 3], world.masked(1, 2, 1)))
    pooled = network.pooling(batch, batch.retrieved, torch.ones(1))
    mean = dense_alleles(batch.retrieved.alleles).float().mean(1)
    torch.testing.assert_close(pooled.dosage, mean.expand_as(pooled.dosage))
    torch.testing.assert_close(pooled.ancestry.sum(1), torch.ones_like(pooled.dosage))
    assert torch.isfinite(network(batch).logits).all()
