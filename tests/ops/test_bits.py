"""Packing and unpacking of alleles, against numpy."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.ops.bits import pack, pack_host, unpack, unpack_chosen, unpack_host, unpack_samples


@given(seed=st.integers(0, 2**32), rows=st.integers(0, 5), count=st.integers(1, 40))
def test_packing_is_numpys_and_undone_by_unpacking(seed: int, rows: int, count: int) -> None:
    alleles = np.random.default_rng(seed).integers(0, 2, (rows, count), dtype=np.uint8)
    packed = pack(torch.from_numpy(alleles))
    assert np.array_equal(packed.numpy(), np.packbits(alleles, axis=1, bitorder="little"))
    assert torch.equal(unpack(packed, count), torch.from_numpy(alleles))


@given(data=st.data(), rows=st.integers(0, 5), count=st.integers(1, 40))
def test_a_range_of_haplotypes_is_unpacked_alone(data: st.DataObject, rows: int, count: int) -> None:
    first = data.draw(st.integers(0, count))
    last = data.draw(st.integers(first, count))
    alleles = np.random.default_rng(rows).integers(0, 2, (rows, count), dtype=np.uint8)
    assert np.array_equal(unpack_host(pack_host(alleles), first, last), alleles[:, first:last])
    assert unpack_host(pack_host(alleles), 0, count).flags.c_contiguous
    chosen = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=5)), dtype=np.int64)
    assert np.array_equal(unpack_chosen(pack_host(alleles), chosen), alleles[:, chosen])


@given(seed=st.integers(0, 2**32), sites=st.integers(0, 5), count=st.integers(1, 20), data=st.data())
def test_samples_are_unpacked_alone_with_both_haplotypes(
    seed: int, sites: int, count: int, data: st.DataObject
) -> None:
    alleles = np.random.default_rng(seed).integers(0, 2, (sites, 2 * count), dtype=np.uint8)
    chosen = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=6)), dtype=np.int64)
    found = unpack_samples(pack_host(alleles), chosen)
    haplotypes = (2 * chosen[:, None] + np.arange(2)).reshape(-1)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    assert np.array_equal(found, alleles[:, haplotypes].T)
