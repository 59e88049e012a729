"""The exception for faults of the user's input."""

from __future__ import annotations

import pickle

import pytest

from embrag_ds.errors import UserError


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("in.vcf: 1:5: REF is 'é'; give bases", "in.vcf: 1:5: REF is 'é'; give bases"),
        ("a\r\nb", r"a\r\nb"),
        ("a\x1b[31mb\x85c\u2028d\0", r"a\x1b[31mb\x85c\u2028d\x00"),
        ("a\udce9b", "a\udce9b"),
    ],
)
def test_an_error_is_one_line_whatever_a_file_holds(given: str, shown: str) -> None:
    assert str(UserError(given)) == shown
    assert str(pickle.loads(pickle.dumps(UserError(given)))) == shown
