"""What is made for each parser: files, by the number of the input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.fuzz import mutate, seeds
from tests.fuzz.mutate import Mutator, Rng, mutated

Files = dict[str, bytes]
SEED = 20261126


@dataclass(frozen=True)
class Kind:
    """Kind of input: how its files are made, and its share of a run.

    ``oracle`` names the file that bcftools reads, too. ``reader`` names the function of :mod:`tests.fuzz.targets`.
    ``seconds`` is the time that an input may take.
    """

    name: str
    make: Callable[[Rng], Files]
    share: int
    reader: str
    oracle: str | None = None
    seconds: float = 10.0


def files_of(kind: Kind, number: int) -> Files:
    """Files of an input by name: a function of kind and number alone."""
    code = list(KINDS).index(kind.name)
    return kind.make(np.random.default_rng([SEED, code, number]))


def _one(name: str, choices: tuple[bytes, ...], mutators: tuple[Mutator, ...]) -> Callable[[Rng], Files]:
    return lambda rng: {name: mutated(rng, mutate.one_of(rng, choices), mutators)}


def _contained(rng: Rng) -> Files:
    """A bgzipped VCF of which the compressed bytes are mutated, in blocks of any size."""
    text = mutate.one_of(rng, seeds.VARIANTS)
    whole = seeds.small_blocks(text) if rng.random() < 0.7 else mutate.bgzf(text)
    return {"in.vcf.gz": mutated(rng, whole, mutate.BGZF)}


def _gzipped(rng: Rng) -> Files:
    """A gzipped VCF: the text mutated, or the compressed bytes, or several members."""
    text = mutate.one_of(rng, seeds.VARIANTS)
    if rng.random() < 0.5:
        text = mutated(rng, text, mutate.VCF)
        cut = int(rng.integers(len(text) + 1))
        return {"in.vcf.gz": seeds.gzipped(text[:cut]) + seeds.gzipped(text[cut:])}
    return {"in.vcf.gz": mutated(rng, seeds.gzipped(text), mutate.BYTES)}


def _bcf(rng: Rng) -> Files:
    """A BCF: its content mutated and bgzipped again (rarely gzipped or plain), or the compressed bytes."""
    content = mutate.one_of(rng, seeds.bcfs())
    draw = rng.random()
    if draw < 0.15:
        return {"in.bcf": mutated(rng, seeds.small_blocks(content), mutate.BGZF)}
    content = mutated(rng, content, mutate.BCF)
    return {"in.bcf": seeds.gzipped(content) if draw < 0.2 else content if draw < 0.25 else mutate.bgzf(content)}


def _imputed(rng: Rng) -> Files:
    """An imputed file, plain or bgzipped."""
    text = mutated(rng, mutate.one_of(rng, seeds.IMPUTED), mutate.DOSAGES)
    return {"in.vcf": mutate.bgzf(text) if rng.random() < 0.2 else text}


def _imputation(name: str) -> Callable[[Rng], Files]:
    """All files of an imputation, one of them mutated; any one for the name ``*``."""

    def make(rng: Rng) -> Files:
        files = dict(seeds.imputation())
        chosen = name if name != "*" else list(files)[int(rng.integers(len(files)))]
        files[chosen] = mutated(rng, files[chosen], mutate.DOSAGES if chosen == "imputed.vcf" else mutate.VCF)
        return files

    return make


def _table(name: str, choices: tuple[bytes, ...]) -> Callable[[Rng], Files]:
    def make(rng: Rng) -> Files:
        text = mutated(rng, mutate.one_of(rng, choices), mutate.TABLE)
        if rng.random() < 0.1:
            text = mutated(rng, seeds.gzipped(text), mutate.BYTES) if rng.random() < 0.5 else seeds.gzipped(text)
        return {name: text}

    return make


def _configuration(rng: Rng) -> Files:
    """A configuration mutated, or one with mutated values of the option ``--set``, a line each."""
    whole = mutate.one_of(rng, seeds.configurations())
    if rng.random() < 0.7:
        return {"run.json": mutated(rng, whole, mutate.JSON)}
    return {"run.json": whole, "set": mutated(rng, mutate.one_of(rng, seeds.OVERRIDES), mutate.OVERRIDES)}


def _model(rng: Rng) -> Files:
    return {"model.safetensors": mutated(rng, seeds.model(), mutate.SAFETENSORS)}


def _checkpoint(rng: Rng) -> Files:
    files = dict(seeds.checkpoint())
    name = "facts.json" if rng.random() < 0.8 else "latest"
    files[name] = mutated(rng, files[name], mutate.JSON if name == "facts.json" else mutate.BYTES + mutate.LINES)
    return files


def _cache(rng: Rng) -> Files:
    """A mutation of one file of a packed panel, which the reader packs first: its name, and a seed for the mutator."""
    names = ("sites.npz", "meta.json", "alleles.bits", "missing.bits", "unphased.bits", "ploidy.npz", "excluded.tsv")
    name = names[int(rng.integers(len(names)))]
    return {"in.vcf": mutate.one_of(rng, seeds.VARIANTS), "mutation": f"{name} {int(rng.integers(2**31))}".encode()}


KINDS = {
    kind.name: kind
    for kind in (
        Kind("vcf", _one("in.vcf", seeds.VARIANTS, mutate.VCF), 24, "variants", "in.vcf"),
        Kind("bgzf", _contained, 9, "variants", "in.vcf.gz"),
        Kind("gzip", _gzipped, 6, "variants", "in.vcf.gz"),
        Kind("bcf", _bcf, 15, "variants", "in.bcf"),
        Kind("imputed", _imputed, 9, "imputed", "in.vcf"),
        Kind("truth", _one("in.vcf", seeds.TRUTHS, mutate.DOSAGES), 5, "truth", "in.vcf"),
        Kind("evaluate", _imputation("*"), 3, "evaluation"),
        Kind("targets", _imputation("target.vcf"), 2, "targets"),
        Kind("impute", _imputation("target.vcf"), 1, "impute", seconds=60.0),
        Kind("map", _table("map", seeds.MAPS), 7, "genetic_map"),
        Kind("samples", _table("samples.tsv", seeds.SAMPLES), 3, "samples"),
        Kind("windows", _table("windows", seeds.WINDOWS), 3, "windows"),
        Kind("manifest", _table("manifest", seeds.MANIFESTS), 3, "manifest"),
        Kind("relatives", _table("relatives", seeds.RELATIVES), 2, "relatives"),
        Kind("config", _configuration, 6, "configuration"),
        Kind("model", _model, 4, "model"),
        Kind("checkpoint", _checkpoint, 2, "checkpoint"),
        Kind("cache", _cache, 3, "cache"),
    )
}
