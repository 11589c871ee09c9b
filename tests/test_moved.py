"""Old import paths of public names: they work, and warn."""

import importlib
import sys

import pytest

import fade_fast
from fade_fast import deprecated
from fade_ref import moved


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


@pytest.mark.parametrize("module", moved.MOVED)
def test_old_names_of_the_specification(module):
    place = importlib.import_module(f"fade_ref.{module}")
    for old, new in moved.MOVED[module].items():
        home, name = new.split(".")
        with pytest.warns(DeprecationWarning, match=f"fade_ref.{module}.{old} moved to fade_ref.{new};"):
            thing = getattr(place, old)
        assert thing is getattr(importlib.import_module(f"fade_ref.{home}"), name)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = place.nonsense


def test_an_old_module_does_not_replace_the_function_of_its_name():
    import fade_fast.attach  # noqa: F401 - the old module

    with pytest.warns(DeprecationWarning, match="fade_fast.attach.detach moved to fade_fast.hf.attach"):
        from fade_fast.attach import detach
    assert callable(fade_fast.attach) and detach is fade_fast.detach
