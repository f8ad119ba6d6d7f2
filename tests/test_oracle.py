"""What fails says what it was about."""

import pytest
from oracle import python

import fastattn

FAILING = """
import numpy as np
from oracle import check

def test_numbers():
    query = np.ones((2, 3), np.float32)
    check(query, query, query, causal=True)
    keywords = {"window": (1, None), "bias": np.zeros((50, 60))}
    assert (query == 2).all()
"""


@pytest.mark.slow
def test_a_failure_prints_shapes_dtypes_keywords_and_the_isa(tmp_path):
    (tmp_path / "test_failing.py").write_text(FAILING)
    done = python("-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", str(tmp_path))
    assert done.returncode == 1
    assert f"isa: {fastattn.show_config(mode='dicts')['isa']}" in done.stdout
    assert "query: float32 (2, 3)" in done.stdout
    assert "keywords: {window: (1, None), bias: float64 (50, 60)}" in done.stdout
