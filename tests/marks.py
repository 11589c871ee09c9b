"""Samples of parameter grids: which cases are quick, which are slow, and which run only in the full grid."""

import itertools
import os

import pytest

#: Whether `pairwise` returns the full grid.
FULL = os.environ.get("FADE_GRID") == "full"


def slow_but(values, *sample) -> list:
    """`values` as arguments of `parametrize`. All values that are not in `sample` are marked slow.

    A tuple contains several arguments.
    """
    values = list(values)
    assert all(value in values for value in sample), "the sample must be part of the grid"
    return [value if value in sample else _slow(value) for value in values]


def _slow(value):
    arguments = value if isinstance(value, tuple) else (value,)
    return pytest.param(*arguments, marks=pytest.mark.slow)


def named(things, *sample: str) -> list:
    """The same for objects with a name. The name is also the test id. `sample` contains names."""
    return [pytest.param(x, id=x.name, marks=[] if x.name in sample else pytest.mark.slow) for x in things]


def pairwise(*axes, keep=(), full: bool = FULL) -> list[tuple]:
    """A small sample of the grid of `axes`, as tuples. Each pair of values of two axes occurs at least once.

    The sample depends only on the arguments. It contains the tuples in `keep`. With `FADE_GRID=full` the
    result is the full grid.

    >>> pairwise("ab", (0, 1), (False, True), full=False)
    [('a', 0, False), ('a', 1, True), ('b', 0, True), ('b', 1, False)]
    """
    grid = list(itertools.product(*axes))
    assert all(case in grid for case in keep), "`keep` must be part of the grid"
    if full:
        return grid
    chosen = set(keep)
    missing = set().union(*map(_pairs, grid)).difference(*map(_pairs, keep))
    while missing:
        best = max(grid, key=lambda case: len(_pairs(case) & missing))  # the first of several
        chosen.add(best)
        missing -= _pairs(best)
    return [case for case in grid if case in chosen]


def _pairs(case: tuple) -> set:
    """All pairs of values in a case. A value includes the index of its axis."""
    return set(itertools.combinations(enumerate(case), 2))


def part(value, cases: list[tuple]) -> list[tuple]:
    """The cases whose first value is `value`, without this value."""
    return [case[1:] for case in cases if case[0] == value]
