"""Where a cache forgets, it says so: once, before it drops anything, and never where it keeps all."""

import warnings
from pathlib import Path

import pytest

import fade_fast
from fade_fast.cache import eviction
from fade_ref.config import POLICIES, FadeConfig

from .. import models
from ..models import EVICTING, SAFE, SMALL, generate, new_cache, prompt, tiny_llama


@pytest.fixture(autouse=True)
def unwarned(monkeypatch):
    monkeypatch.setattr(eviction, "_warned", False)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def told(model, config, inputs, new=8):
    """The cache after a text, and the warnings about eviction."""
    cache = new_cache(model, config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(model, cache, inputs, new)
    caught = [w for w in caught if issubclass(w.category, fade_fast.EvictionWarning)]
    assert all(Path(w.filename) == Path(models.__file__) for w in caught)  # which called generate()
    return cache, [str(w.message) for w in caught]


def test_once_in_a_process(model):
    cache, said = told(model, EVICTING, prompt(90))
    assert len(said) == 1 and "eviction_policy='position'" in said[0]
    memory = cache.memory()
    held = sum(n for name, n in memory.tokens.items() if name != "EVICTED")
    assert memory.forgotten == 97 - held > 30
    assert not told(model, EVICTING, prompt(90))[1]


@pytest.mark.parametrize(
    "config", [SAFE, EVICTING, FadeConfig(recent_window=None)], ids=("safe", "short", "off")
)
def test_not_where_nothing_is_dropped(model, config):
    cache, said = told(model, config, prompt(40 if config is EVICTING else 90))
    assert not said and cache.memory().forgotten == 0


@pytest.mark.parametrize("policy", ["adaptive", "h2o"])
def test_rows_with_padding(model, policy):
    """Padding is not a token: rows that keep their tokens forget none, others are counted."""
    config = FadeConfig(**SMALL, int4_budget=24, eviction_policy=policy)
    few = prompt(90, batch=2, pads=(60, 58))
    cache, said = told(model, config, few)
    assert not said and cache.memory().forgotten == 0
    cache, said = told(model, config, prompt(90, batch=2, pads=(60, 0)))
    assert len(said) == 1 and cache.memory().forgotten > 20


def test_as_an_error_it_stops_before_anything_is_dropped(model):
    cache = new_cache(model, EVICTING)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fade_fast.EvictionWarning)
        with pytest.raises(fade_fast.EvictionWarning):
            generate(model, cache, prompt(90))
    assert cache.memory(compact=False).forgotten == 0


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "position"])
def test_a_policy_without_a_budget(policy):
    with pytest.warns(UserWarning, match=f"eviction_policy='{policy}' has no effect without a budget"):
        FadeConfig(eviction_policy=policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FadeConfig(eviction_policy=policy, int4_budget=0)
