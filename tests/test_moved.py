"""Old import paths of public names: they work, and warn."""

import importlib
import sys

import pytest

import fade_fast
from fade_fast import deprecated


@pytest.mark.parametrize("old, new", deprecated.MOVED.items())
def test_old_modules_are_the_new_ones(old, new):
    name = f"fade_fast.{old}"
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=f"{name} moved to fade_fast.{new}"):
        module = importlib.import_module(name)
    assert module is importlib.import_module(f"fade_fast.{new}")


def test_old_names_of_modules_that_are_packages_now():
    with pytest.warns(DeprecationWarning, match="fade_fast.cache.TieredKVCache moved to fade_fast.hf.cache"):
        from fade_fast.cache import TieredKVCache
    assert TieredKVCache is fade_fast.TieredKVCache
    with pytest.raises(ImportError):
        from fade_fast.cache import nonsense  # noqa: F401
