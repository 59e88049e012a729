"""The batch that is in force, and settings that ask for more than the panel has: the run takes what there is, and says
so once.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from embrag_ds.config import EmbragConfig
from embrag_ds.errors import UserError

logger = logging.getLogger(__name__)


def settled_batch(settings: dict[str, Any], ranks: int) -> dict[str, Any]:
    """DeepSpeed's settings with the micro-batches of a step that follow from ``train_batch_size``, where it is set.

    Raises :class:`UserError` if it does not fit the other settings and the number of ``ranks``.
    """
    whole, steps = settings.get("train_batch_size"), settings.get("gradient_accumulation_steps")
    if whole is None:
        return settings
    micro = settings["train_micro_batch_size_per_gpu"]
    at_once = micro * ranks
    if whole % at_once == 0 and steps in (None, whole // at_once):
        return {**copy.deepcopy(settings), "gradient_accumulation_steps": whole // at_once}
    product = f"train_micro_batch_size_per_gpu {micro} x {ranks} ranks"
    if steps is not None:
        product += f" x gradient_accumulation_steps {steps}"
    raise UserError(
        f"train_batch_size is {whole}, and {product} is {at_once * (steps or 1)}; leave out train_batch_size, or make "
        f"it {'that number' if steps else 'a multiple of that number'}"
    )


def fit_micro_batch(settings: dict[str, Any], samples: int, ranks: int, is_main: bool) -> dict[str, Any]:
    """DeepSpeed's settings with a micro-batch of no more than the ``samples`` to train on; ``is_main`` then warns.

    So engine and run folder have the batch that is in force. Raises :class:`UserError` if ``train_batch_size`` is set,
    too, because the run could not have it.
    """
    key = "train_micro_batch_size_per_gpu"
    asked = settings[key]
    if asked <= samples or samples < 2:  # of so few the sampler says that they are too few
        return settings
    counts = f"{key} is {asked}, and the panel has {samples} samples to train on"
    if "train_batch_size" in settings:
        raise UserError(f"{counts}, so train_batch_size cannot be {settings['train_batch_size']}; leave it out")
    if is_main:
        step = samples * settings.get("gradient_accumulation_steps", 1) * ranks
        logger.warning(
            f"{counts}: micro-batches have {samples}, and a step {step}; lower {key}, or give a panel of more samples"
        )
    return {**copy.deepcopy(settings), key: samples}


def warn_of_fewer_neighbours(config: EmbragConfig, found: int, is_main: bool) -> None:
    """Warn if every query gets only ``found`` neighbours, because the panel has fewer than ``retrieval.k``."""
    asked = config.retrieval.k
    if is_main and config.retrieval.mode != "none" and found < asked:
        logger.warning(
            f"embrag.retrieval.k is {asked}, and the panel has {found} haplotypes that every query may retrieve, so it "
            f"gets {found}; lower embrag.retrieval.k, or give a panel of more samples"
        )
