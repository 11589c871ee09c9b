"""For all families, create_cache() and generate() do what check_model() says."""

import itertools

import pytest

import fade_fast
from fade_fast.hf.layer import TieredLayer
from fade_ref.config import FadeConfig

from ..marks import named, slow_but
from .cells import OFF, SAFE, SMALL, create
from .families import FAMILIES, KINDS
from .modes import PROMPT, Run, prompt

CONFIGS = {
    "off": OFF,
    "safe": SAFE,
    "evicting": FadeConfig(**SMALL, int4_budget=8),
    "three bits": FadeConfig(**SMALL, middle_k_bits=3, middle_v_bits=2),
}


@pytest.mark.parametrize("config", slow_but(CONFIGS.values(), CONFIGS["evicting"]), ids=CONFIGS)
@pytest.mark.parametrize("family", named(FAMILIES.values(), *KINDS))
def test_what_is_promised_is_done(family, config):
    model, length = family.model(), PROMPT + 7
    before = model.config._attn_implementation
    check = fade_fast.check_model(model, config, length=length)
    assert model.config._attn_implementation == before, "nothing is attached"
    if not check.served:
        assert check.refused in str(check)
        with pytest.raises(ValueError) as error:
            create(model, config)
        assert str(error.value) == check.refused
        return
    cache = create(model, config)
    Run(model, lambda: cache).generate(prompt(batch=1))
    memory = cache.memory()
    other = memory.dense - check.dense
    assert cache.get_seq_length() == length
    assert check.packed == memory.packed - other
    assert [layer.tiered for layer in check.layers] == [
        isinstance(layer, TieredLayer) for layer in cache.layers
    ]
    assert (check.decode == "packed") == family.dispatches
    groups = itertools.groupby(layer.text for layer in check.layers)
    lines = str(check).splitlines()
    told = [line for line in lines if "of tables that all caches of the model share" in line]
    assert len(lines) == 2 + len(told) + len(list(groups))
    assert len(told) == (check.tables > check.packed // 64)
    assert check.tables == memory.tables or not config.compresses  # made with the first token
