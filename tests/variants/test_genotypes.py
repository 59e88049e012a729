"""Genotype texts decoded: the fast way, the general way, and a slow one agree."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.variants.genotypes import (
    DIPLOID,
    HAPLOID,
    UNKNOWN,
    BadGenotype,
    Calls,
    GenotypeDecoder,
    decode_biallelic,
    parse_genotype,
)

Parsed = tuple[int, int, int, bool]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0|0", (0, 0, DIPLOID, False)),
        ("1|0", (1, 0, DIPLOID, False)),
        ("0/1", (0, 1, DIPLOID, True)),
        ("12|3", (12, 3, DIPLOID, False)),
        # A homozygote has one phase, whatever stands between its alleles.
        ("0/0", (0, 0, DIPLOID, False)),
        ("1/1", (1, 1, DIPLOID, False)),
        ("1/2", (1, 2, DIPLOID, True)),
        ("./.", (-1, -1, DIPLOID, False)),
        (".|.", (-1, -1, DIPLOID, False)),
        ("./1", (-1, 1, DIPLOID, True)),
        ("1/.", (1, -1, DIPLOID, True)),
        (".|1", (-1, 1, DIPLOID, False)),
        ("0|.", (0, -1, DIPLOID, False)),
        ("0", (0, 0, HAPLOID, False)),
        ("1", (1, 1, HAPLOID, False)),
        (".", (-1, -1, UNKNOWN, False)),
        # VCF 4.4 may state the phase of the first allele, too.
        ("|0|1", (0, 1, DIPLOID, False)),
        ("/0/1", (0, 1, DIPLOID, True)),
        ("|1", (1, 1, HAPLOID, False)),
        ("/1", (1, 1, HAPLOID, False)),
        ("|.|1", (-1, 1, DIPLOID, False)),
        ("/./.", (-1, -1, DIPLOID, False)),
    ],
)
def test_parse_genotype(text: str, expected: Parsed) -> None:
    assert parse_genotype(text.encode()) == expected


@pytest.mark.parametrize(
    "text", ["", "|", "/", "0|", "|0|", "0||1", "||1", "a", "0|b", "+1", "0 1", "-1", "0\\1", "00001", "\u0661"]
)
def test_what_is_no_genotype(text: str) -> None:
    with pytest.raises(BadGenotype, match=r"is not a genotype|has 3 alleles") as fault:
        parse_genotype(text.encode(), 7)
    assert fault.value.sample == 7


@pytest.mark.parametrize("text", ["0|1|1", "0/1/1/1", "|0|1|1", ".|.|."])
def test_more_than_two_alleles(text: str) -> None:
    with pytest.raises(BadGenotype, match="more than two are not supported"):
        parse_genotype(text.encode())


def slow(texts: list[str], allele: int) -> tuple[list[int], list[bool], list[int], list[bool]]:
    """The calls at the site of one ALT of a record."""
    alleles, missing, ploidy, unphased = [], [], [], []
    for text in texts:
        parts = re.split("[/|]", text[1:] if text[0] in "/|" else text)
        pair = parts if len(parts) == 2 else 2 * parts
        here = [int(part != "." and part != "0" and int(part) == allele) for part in pair]
        alleles += here
        missing += [part == "." for part in pair]
        ploidy.append(DIPLOID if len(parts) == 2 else HAPLOID if pair[0] != "." else UNKNOWN)
        unphased.append("/" in text[1:] and (here[0] != here[1] or (pair[0] == ".") != (pair[1] == ".")))
    return alleles, missing, ploidy, unphased


def same(calls: Calls, expected: tuple[list[int], list[bool], list[int], list[bool]]) -> None:
    """Assert that calls are the expected ones, with None only where nothing is to be said."""
    assert calls.alleles.dtype == np.uint8 and calls.alleles.tolist() == expected[0]
    usual = (False, DIPLOID, False)
    for found, wanted, value in zip(calls[1:], expected[1:], usual, strict=True):
        if all(each == value for each in wanted):
            assert found is None
        else:
            assert found is not None and found.tolist() == wanted
            assert found.dtype == (np.uint8 if value == DIPLOID else bool)


numbers = st.sampled_from([".", "0", "1", "2", "3"])
genotype = st.one_of(
    numbers,
    st.tuples(numbers, st.sampled_from("/|"), numbers).map("".join),
    st.tuples(st.sampled_from("/|"), numbers, st.sampled_from("/|"), numbers).map("".join),
)


@given(st.lists(st.lists(genotype, min_size=4, max_size=4), min_size=1, max_size=6), st.integers(0, 3))
def test_decoder_equals_a_loop_over_the_texts(records: list[list[str]], allele: int) -> None:
    decoder = GenotypeDecoder()
    for texts in records:
        same(decoder.decode([text.encode() for text in texts], allele, 3), slow(texts, allele))


biallelic = st.tuples(st.sampled_from(".01"), st.sampled_from("/|"), st.sampled_from(".01")).map("".join)


@given(st.lists(st.one_of(st.sampled_from(["0|0", "1|0", "0|1", "1|1"]), biallelic), min_size=1, max_size=9))
def test_the_fast_way_equals_a_loop_over_the_texts(texts: list[str]) -> None:
    found = decode_biallelic("\t".join(texts).encode(), len(texts))
    assert found is not None
    same(found, slow(texts, 1))


def test_every_text_of_three_characters_is_decoded_as_the_general_way_does_or_left_to_it() -> None:
    characters = b"\t./|0123\x00\x80:a"
    for text in (bytes((a, b, c)) for a in characters for b in characters for c in characters):
        for place in range(3):
            texts = [b"0|1", b"0|1", b"0|1"]
            texts[place] = text
            found = decode_biallelic(b"\t".join(texts), 3)
            if found is not None:
                same(found, slow([each.decode() for each in texts], 1))
            else:
                assert not re.fullmatch(rb"[.01][/|][.01]", text)


@pytest.mark.parametrize("text", [b"0|1", b"0|1\t1", b"0|1\t1|1\t", b"0|1:1|1", b"", b"0|1\t1|1\t0|0"])
def test_the_fast_way_leaves_other_texts_to_the_general_one(text: bytes) -> None:
    assert decode_biallelic(text, 2) is None


def test_an_allele_above_the_records() -> None:
    decoder = GenotypeDecoder()
    with pytest.raises(BadGenotype, match="has an allele above 1") as fault:
        decoder.decode([b"0|1", b"2|.", b"3|1"], 1, 1)
    assert fault.value.sample == 1
    same(decoder.decode([b"0|1", b"2|.", b"3|1"], 3, 3), slow(["0|1", "2|.", "3|1"], 3))
