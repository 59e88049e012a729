"""Fixtures of adaptation: a tiny network, the simulated panel, and the sites its targets are typed at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from embrag_ds.adaptation.learner import Source
from embrag_ds.config import RunConfig
from embrag_ds.data.inputs import PanelInputs
from embrag_ds.data.simulate import DefaultData
from embrag_ds.export import ExportedModel
from tests.untrained import untrained
from tests.whole_files import read_phased

MakeConfig = Callable[..., RunConfig]
MakeModel = Callable[..., ExportedModel]
MakeSource = Callable[..., Source]


@pytest.fixture
def make_model(make_config: MakeConfig) -> MakeModel:
    """Function that builds a network with random weights, and a residual, with ``dotted.key=value`` settings."""

    def make(*overrides: str) -> ExportedModel:
        config = make_config("embrag.data.flank_sites=64", *overrides)
        found = untrained(config, head=0.05)
        encodes = config.embrag.retrieval.mode == "embedding" and config.embrag.retrieval.encoding != "live"
        return found if encodes else ExportedModel.of(found.config, found.weights, None)

    return make


@pytest.fixture
def model(make_model: MakeModel) -> ExportedModel:
    return make_model()


@pytest.fixture(scope="session")
def typed(simulated: DefaultData, inputs: PanelInputs) -> np.ndarray:
    """Sites of the panel that the simulated targets are typed at, bool [S]."""
    known = set(read_phased(simulated.target).sites.identities())
    return np.array([site in known for site in inputs.panel.sites.identities()])


@pytest.fixture
def make_source(inputs: PanelInputs, typed: np.ndarray) -> MakeSource:
    """Function that builds the source of an adaptation to the simulated panel, with some of its fields replaced."""
    whole = Source(inputs, typed, np.arange(len(inputs.panel.samples)), torch.device("cpu"), True, False)
    return lambda **replaced: replace(whole, **replaced)


@pytest.fixture
def source(make_source: MakeSource) -> Source:
    return make_source()
