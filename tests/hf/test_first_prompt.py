"""A model that cannot run a text by itself: its first prompt gives the matrices of the codec."""

import copy
import functools

import pytest
import torch
from transformers import LlamaForCausalLM

import fade_fast
from fade_fast.hf import first_prompt
from fade_fast.hf.first_prompt import LEAST, PromptCalibration
from fade_fast.hf.models import CACHE_NAME
from fade_fast.kernels import rotated
from fade_ref import matched as spec
from fade_ref.config import FadeConfig
from fade_ref.rope import NOPE, Rope, rotate

from ..cache.test_decode_graph import compiled
from ..marks import slow_but
from ..models import compressed_tokens, dense, generate, new_cache, prompt, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*could not be verified")
SMALL = dict(recent_window=8, block_size=4, quant_backend="matched")


class Needy(LlamaForCausalLM):
    """A model that needs more than tokens."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args, extra=None, **kwargs):
        if extra is None:
            raise ValueError("this model needs more than tokens")
        return super().forward(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return super().prepare_inputs_for_generation(*args, **kwargs) | dict(extra=1)


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    """The user's cache folder is one of the test. Nothing may be written to it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    yield tmp_path / "user"
    assert not list((tmp_path / "user").rglob("*.safetensors"))


def needy(**config):
    model = tiny_llama(layers=3, **config)
    model.__class__ = Needy
    return model


def read(model, cache, ids):
    """Logits of some tokens."""
    with torch.no_grad():
        return model(ids, extra=1, **{CACHE_NAME: cache}).logits


def heard(model, ids):
    """Queries, keys and values of a text, and the scale of scores, by layer."""
    found = {}

    def note(module, query, key, value, mask, scaling=None, **kwargs):
        found[module.layer_idx] = query, key, value, scaling
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        ).transpose(1, 2), None

    from transformers import AttentionInterface

    AttentionInterface.register("note", note)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("note")
    with torch.no_grad():
        twin(ids, extra=1, use_cache=False)
    return found


def test_moments_and_codes_of_a_first_prompt():
    model, ids = needy(), prompt(70)["input_ids"]
    cache = fade_fast.create_cache(model, FadeConfig(**SMALL))
    assert isinstance(cache.calibration, PromptCalibration) and not cache.calibration.moments
    assert "matrices will fit the first prompt" in cache.describe()
    vectors = heard(model, ids)
    read(model, cache, ids)
    assert "matrices fit the first prompt of this process, 70 tokens" in cache.describe()
    for layer in cache.tiered:
        query, keys, values, scaling = (x if isinstance(x, float) else x[0] for x in vectors[layer.index])
        output = model.model.layers[layer.index].self_attn.o_proj.weight
        expected = spec.measure(query, keys, values, output, NOPE, scaling, first_prompt.SINKS)
        for found, exact in zip(cache.calibration.moments[layer.index], expected):
            assert (found - exact).norm() < 1e-5 * exact.norm()
        # How keys are rotated is not known, so they are stored less their own mean.
        count = layer.middle.count
        assert count == 70 - 4 - 8 - (70 - 4 - 8) % 4
        stored = keys[:, 4 : 4 + count]
        mean = rotated.key_mean(stored[None].unflatten(2, (-1, 4)), None)
        assert torch.equal(layer.middle.means["mean"], mean)
        tables = cache.calibration.of_layer(layer.index, "moved", 4, torch.device("cpu"))
        codec = spec.MatchedCodec(4, spec.matched(*spec.frame(expected, "moved", NOPE)[1:]))
        codes = codec.encode(stored.double(), mean[0].double().repeat_interleave(4, dim=1)).codes
        same = (layer.middle.tiers[0].records["key_codes"][0] == codes).float().mean()
        assert same > 0.999 and torch.equal(layer.format.matrices[0].encode, tables[1].encode)


def test_caches_share_the_tables_of_the_first_prompt(tmp_path):
    model, other = needy(), prompt(60, seed=5)["input_ids"]
    caches = [fade_fast.create_cache(model, FadeConfig(**SMALL)) for _ in range(2)]
    twin = copy.deepcopy(caches[0])
    read(model, caches[0], prompt(50)["input_ids"])
    before = {i: m.keys.clone() for i, m in caches[0].calibration.moments.items()}
    read(model, caches[1], other)
    late = fade_fast.create_cache(model, "int4")
    assert caches[0].calibration is caches[1].calibration is twin.calibration is late.calibration
    assert all(torch.equal(late.calibration.moments[i].keys, before[i]) for i in range(3))
    tables = [{x.data_ptr() for layer in c.tiered for x in layer.format.tensors()} for c in caches]
    assert tables[0] == tables[1]
    read(model, twin, other)
    assert torch.equal(read(model, twin, other[:, :1]), read(model, caches[1], other[:, :1]))
    # In another process the same text may have other codes: a file has its tables with it.
    twin.save(tmp_path / "file")
    text = dict(input_ids=torch.cat((other, other[:, :2]), dim=1))
    text["attention_mask"] = torch.ones_like(text["input_ids"])
    expected = generate(model, caches[1], text, new=12)
    first_prompt._known.clear()
    loaded = fade_fast.load_cache(tmp_path / "file", model)
    assert "first prompt of a process" in loaded.describe() and loaded.calibration.of_prompt
    assert torch.equal(generate(model, loaded, text, new=12), expected)
    fresh = fade_fast.create_cache(model, FadeConfig(**SMALL))
    assert not fresh.calibration.moments


def test_a_short_prompt_waits_for_the_first_demotion(tmp_path):
    model, inputs = needy(), prompt(LEAST - 1, batch=2)
    config = FadeConfig(recent_window=48, block_size=16, quant_backend="matched")
    cache = fade_fast.create_cache(model, config)
    output = generate(model, cache, inputs, new=8)
    assert not cache.calibration.moments and compressed_tokens(cache) == 0
    assert torch.equal(output, generate(model, dense(model), inputs, new=8))
    cache.save(tmp_path / "file")  # without tables
    loaded = fade_fast.load_cache(tmp_path / "file", model)
    more = dict(input_ids=torch.cat((inputs["input_ids"], output), dim=1))
    more["attention_mask"] = torch.ones_like(more["input_ids"])
    expected = generate(model, cache, more, new=40)
    calibration = cache.calibration
    assert set(calibration.moments) == {0, 1, 2} and calibration.tokens == 16 * len(output)
    assert compressed_tokens(cache) > 0 and compressed_tokens(loaded) == 0
    assert torch.equal(generate(model, loaded, more, new=40), expected)
    layer = cache.tiered[0]
    assert not layer.format.awaits_tables and layer.middle.tiers[0].records.count % 16 == 0
    even = calibration.moments[0].queries
    assert torch.equal(even, torch.eye(even.shape[-1]).expand_as(even))


CAPTURED = {
    "keeps all": dict(),
    "evicts": dict(int4_budget=12, int2_budget=8, positions="original"),
    "selects": dict(select=16, block_size=8),
}


@pytest.mark.parametrize("name", slow_but(CAPTURED, "keeps all"))
def test_captured_steps_before_there_are_tables(name):
    model, inputs = needy(), prompt(8)
    config = FadeConfig(**SMALL | CAPTURED[name])
    texts = []
    for run in (compiled, generate):
        first_prompt._known.clear()
        cache = fade_fast.create_cache(model, config)
        texts.append(run(model, cache, inputs, new=40)[:, -40:])
        assert compressed_tokens(cache) > 0 and cache.calibration.tokens == config.block_size
        assert cache.decode_graph.steps == (39 if run is compiled else 0)
    assert torch.equal(*texts)


@pytest.mark.parametrize("rope", [NOPE, Rope(torch.tensor([1.0, 0.1, 0.01]).double(), interleaved=False)])
def test_moments_without_queries(rope):
    draw = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 2, 50, 8, generator=draw, dtype=torch.float64)
    at = torch.arange(4, 54)
    found = spec.measure_alone(rotate(keys, at, rope), values, at, None, rope)
    centered = keys - keys.mean(1, keepdim=True)
    assert torch.allclose(found.mean, keys.mean(1))
    assert torch.allclose(found.keys, centered.mT @ centered / 50)
    assert torch.allclose(found.values, values.mT @ values / 50)
    assert torch.equal(found.queries, torch.eye(8, dtype=torch.float64).expand(2, -1, -1))


def test_padding_and_rows():
    """Of a batch with padding the longest row is measured; without, as many rows as in a calibration."""
    model, rows = needy(), prompt(40, batch=2, pads=(0, 6))
    cache = fade_fast.create_cache(model, FadeConfig(**SMALL))
    generate(model, cache, rows, new=1)
    assert cache.calibration.tokens == 40
    alone = heard(model, rows["input_ids"][:1])[0]
    expected = spec.measure(*(x[0] for x in alone[:3]), None, NOPE, alone[3], first_prompt.SINKS)
    assert torch.allclose(cache.calibration.moments[0].values.double(), expected.values, rtol=1e-4, atol=1e-7)
    first_prompt._known.clear()
    cache = fade_fast.create_cache(model, FadeConfig(**SMALL))
    generate(model, cache, prompt(40, batch=2), new=1)
    assert cache.calibration.tokens == 80


def test_what_is_not_finite_gives_no_moments():
    model, ids = needy(), prompt(50)["input_ids"]
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.inf
    cache = fade_fast.create_cache(model, FadeConfig(**SMALL))
    read(model, cache, ids)
    moments = cache.calibration.moments
    assert set(moments) == {0, 1, 2} and all(x.isfinite().all() for m in moments.values() for x in m)


def test_presets_and_checks():
    model = needy()
    cache = fade_fast.create_cache(model, "safe")
    assert cache.fade_config == FadeConfig.preset("int4") and "needs more than tokens" in cache.choice.untried
    assert "their loss is unknown" in cache.describe() and not cache.calibration.moments
    found = fade_fast.check_model(model, "safe")
    assert not found.refused and found.packed < found.dense and not cache.calibration.moments
    kept = FadeConfig(**SMALL, layer_bits={1: (16, 16)})
    cache = new_cache(model, kept)
    read(model, cache, prompt(50)["input_ids"])
    assert set(cache.calibration.moments) == {0, 2}  # the other layer needs no tables
    read(model, fade_fast.create_cache(model, FadeConfig(**SMALL)), prompt(50)["input_ids"])
    assert set(cache.calibration.moments) == {0, 1, 2}
