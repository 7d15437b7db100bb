"""A limit takes rows of every class, however they are ordered, and the first ones of rows that are mixed."""

import numpy as np
import pytest

from tscnc_hf.data.splits import first_rows


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0), (0, 1, 2, 0, 1, 2)])
def test_of_rows_that_lie_class_by_class_some_of_each_are_taken(order):
    labels = np.repeat(order, 100)
    taken = labels[first_rows(np.arange(len(labels)), labels, 60, "test_limit")]
    assert set(taken) == set(order) and len(taken) == 60


def test_of_mixed_rows_the_first_are_taken():
    for labels in (np.random.default_rng(0).integers(0, 10, 300), np.arange(300) % 3, np.zeros(300, int)):
        assert first_rows(np.arange(300), labels, 60, "test_limit").tolist() == list(range(60))
    uneven = (np.random.default_rng(1).random(300) > 0.95).astype(int)
    assert first_rows(np.arange(300), uneven, 60, "test_limit").tolist() == list(range(60))
