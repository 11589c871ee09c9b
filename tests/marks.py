"""A sample of a grid of parameters is quick; the rest is slow."""

import pytest


def slow_but(values, *sample) -> list:
    """What `parametrize` takes: `values`, of which all that are not in `sample` are marked slow.

    A tuple holds several arguments.
    """
    values = list(values)
    assert all(value in values for value in sample), "a sample is of the grid"
    return [value if value in sample else _slow(value) for value in values]


def _slow(value):
    arguments = value if isinstance(value, tuple) else (value,)
    return pytest.param(*arguments, marks=pytest.mark.slow)


def named(things, *sample: str) -> list:
    """The same of things that have a name, which is their id, too; `sample` are names."""
    return [pytest.param(x, id=x.name, marks=[] if x.name in sample else pytest.mark.slow) for x in things]
