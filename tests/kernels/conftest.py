"""Fixtures of the tests of kernels."""

import pytest

from fade_fast.kernels import packed


@pytest.fixture
def eager_tile(monkeypatch):
    """A function that sets the number of slots that an eager step attends to at once."""
    return lambda slots: monkeypatch.setattr(packed, "EAGER_TILE", slots)
