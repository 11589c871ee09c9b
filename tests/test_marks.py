"""The samples of parameter grids."""

import itertools

import pytest

from .marks import pairwise, part, slow_but

AXES = ("abcdefgh", [(), (0, 11), (3, 6)], range(6))


@pytest.mark.parametrize("axes", [AXES, ([1, 2], "ab"), ([1, 2], "ab", [None, True], range(5))])
def test_pairwise_contains_every_pair_of_values(axes):
    cases = pairwise(*axes, full=False)
    for i, j in itertools.combinations(range(len(axes)), 2):
        assert {(case[i], case[j]) for case in cases} == set(itertools.product(axes[i], axes[j]))
    assert cases == pairwise(*axes, full=False)


def test_pairwise_is_small_and_keeps_what_it_must():
    keep = [("a", (), 0), ("a", (), 1), ("h", (3, 6), 5)]
    cases = pairwise(*AXES, keep=keep, full=False)
    assert set(keep) <= set(cases) and len(cases) == len(set(cases)) <= 55  # at least 8 * 6
    with pytest.raises(AssertionError, match="keep"):
        pairwise(*AXES, keep=[("z", (), 0)])


def test_pairwise_with_the_full_grid():
    assert pairwise(*AXES, full=True) == list(itertools.product(*AXES))


def test_part_and_slow_but():
    cases = pairwise("ab", (0, 1), (False, True), full=False)
    assert part("b", cases) == [(0, True), (1, False)]
    assert slow_but(part("b", cases), (0, True))[0] == (0, True)
