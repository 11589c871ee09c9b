"""Saved caches: the same bits again, or a clear refusal."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer

import fade_fast
from fade_fast.hf.models import CACHE_NAME
from fade_fast.saved import checkpoint
from fade_ref.config import FadeConfig

from ..marks import slow_but
from ..models import compressed_tokens, generate, prompt, tiny_llama

SMALL = dict(recent_window=8, block_size=4)
CONFIGS = {
    "int4": FadeConfig(**SMALL),
    "k3v2": FadeConfig(**SMALL, middle_k_bits=3, middle_v_bits=2),
    "evict": FadeConfig(**SMALL, int4_budget=10),
    "two tiers": FadeConfig(**SMALL, int4_budget=10, int2_budget=6, positions="original"),
    "h2o": FadeConfig(**SMALL, int4_budget=10, eviction_policy="h2o"),
    "snapkv": FadeConfig(**SMALL, int4_budget=10, int2_budget=6, eviction_policy="snapkv"),
    "off": FadeConfig(recent_window=None),
}


def talk(model, cache, ids, new=10):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), **{CACHE_NAME: cache}, max_new_tokens=new, do_sample=False
    )


@pytest.mark.parametrize("name", slow_but(CONFIGS, "two tiers"))
def test_decoding_goes_on_to_the_bit(name, tmp_path):
    model, path = tiny_llama(), tmp_path / "cache.safetensors"
    cache = fade_fast.create_cache(model, CONFIGS[name])
    out = talk(model, cache, prompt(50, batch=2)["input_ids"])
    cache.save(path)
    other = tiny_llama()
    loaded = fade_fast.load_cache(path, other)
    assert name == "off" or compressed_tokens(loaded) == compressed_tokens(cache) > 0
    assert loaded.memory().packed == cache.memory().packed
    for ours, theirs in zip(loaded.tiered, cache.tiered):
        for a, b in zip(ours.decode_all(), theirs.decode_all()):
            assert torch.equal(a, b)
    assert torch.equal(talk(other, loaded, out, new=30), talk(model, cache, out, new=30))


def test_padding_survives(tmp_path):
    model = tiny_llama()
    caches = [fade_fast.create_cache(model, CONFIGS["evict"]) for _ in range(2)]
    inputs = prompt(40, batch=2, pads=(0, 13))
    for cache in caches:
        generate(model, cache, inputs, new=8)
    caches[0].save(tmp_path / "c")
    loaded = fade_fast.load_cache(tmp_path / "c", model)
    assert torch.equal(loaded.token_positions.logical, caches[1].token_positions.logical)
    assert loaded.token_positions.has_padding


@pytest.mark.parametrize("length", slow_but([5, 7, 8, 9, 30], 9))
@pytest.mark.parametrize("kinds", ["on a GPU", "from a GPU", "to a GPU"])
@torch.no_grad()
def test_sliding_windows_of_both_kinds(length, kinds, tmp_path):
    """transformers keeps a window in a fixed buffer where steps are captured, else as it comes."""
    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes)).eval()

    def cache(fixed):
        made = fade_fast.create_cache(model, CONFIGS["evict"])
        assert type(made.layers[0]) is DynamicSlidingWindowLayer
        if fixed:
            made.layers[0] = StaticSlidingWindowLayer(8, 8)
        return made

    def step(cache, first, stop):
        ids = torch.arange(2 * stop).reshape(2, stop)[:, first:] % 61
        return model(input_ids=ids, **{CACHE_NAME: cache}, use_cache=True).logits

    saved, loaded = cache(kinds != "to a GPU"), cache(kinds != "from a GPU")
    step(saved, 0, length)
    saved.save(tmp_path / "c")
    loaded.load_state_dict(*checkpoint.read(tmp_path / "c"))
    for first, stop in ((length, length + 1), (length + 1, length + 4), (length + 4, length + 5)):
        torch.testing.assert_close(step(loaded, first, stop), step(saved, first, stop))
    assert loaded.layers[0].get_seq_length() == saved.layers[0].get_seq_length() == length + 5


def test_size_on_disk(tmp_path):
    model = tiny_llama(layers=4)
    cache = fade_fast.create_cache(model, "safe")
    talk(model, cache, prompt(3000)["input_ids"], new=2)
    cache.save(tmp_path / "c")
    moments = sum(x.nbytes for x in cache.calibration.tensors().values())
    assert (tmp_path / "c").stat().st_size <= 1.02 * cache.memory().packed + moments


def test_an_empty_cache(tmp_path):
    model = tiny_llama()
    fade_fast.create_cache(model).save(tmp_path / "c")
    loaded = fade_fast.load_cache(tmp_path / "c", model)
    assert loaded.get_seq_length() == 0
    talk(model, loaded, prompt(20)["input_ids"])


def test_state_dict_shares_nothing():
    model = tiny_llama()
    cache = fade_fast.create_cache(model, CONFIGS["int4"])
    out = talk(model, cache, prompt(40)["input_ids"])
    tensors, known = cache.state_dict()
    before = {name: x.clone() for name, x in tensors.items()}
    expected = talk(model, cache, out)
    assert all(torch.equal(x, before[name]) for name, x in tensors.items())
    twin = fade_fast.create_cache(model, CONFIGS["int4"])
    twin.load_state_dict(tensors, known)
    assert torch.equal(talk(model, twin, out), expected)
    assert all(torch.equal(x, before[name]) for name, x in tensors.items())
    assert json.loads(json.dumps(known)) == known


@pytest.fixture
def saved(tmp_path):
    model, path = tiny_llama(), tmp_path / "cache.safetensors"
    cache = fade_fast.create_cache(model, CONFIGS["evict"])
    talk(model, cache, prompt(50)["input_ids"])
    cache.save(path)
    return path


def rewritten(path, change) -> None:
    """The file again, with its header and tensors changed."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fade"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(header, tensors)
    save_file(tensors, path, metadata={"fade": json.dumps(header)})


DAMAGE = {
    "newer": lambda h, t: h.update(version=99),
    "flipped": lambda h, t: t["0.tier0.key_codes"].bitwise_xor_(1),
    "missing": lambda h, t: t.pop("1.means"),
    "header changed": lambda h, t: h["layers"][0].update(length=3),
    "header halved": lambda h, t: h.pop("layers"),
    "left over": lambda h, t: t.update({"1.more": torch.ones(1)}),
    "another model": lambda h, t: h["model"].update(num_hidden_layers=7),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_refused(saved, name):
    rewritten(saved, DAMAGE[name])
    with pytest.raises(ValueError, match="version|damaged|another model|fit"):
        fade_fast.load_cache(saved, tiny_llama())


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated(saved, size):
    data = saved.read_bytes()
    saved.write_bytes(data[:size])
    with pytest.raises(ValueError, match="damaged"):
        fade_fast.load_cache(saved, tiny_llama())


def test_another_model_is_named(saved):
    with pytest.raises(ValueError, match="num_hidden_layers"):
        fade_fast.load_cache(saved, tiny_llama(layers=3))
    with pytest.raises(FileNotFoundError):
        fade_fast.load_cache(saved.parent / "none", tiny_llama())


def test_what_does_not_fit_leaves_the_cache_empty():
    model = tiny_llama()
    cache = fade_fast.create_cache(model, CONFIGS["int4"])
    talk(model, cache, prompt(40)["input_ids"])
    tensors, known = cache.state_dict()
    with pytest.raises(ValueError, match="empty"):
        cache.load_state_dict(tensors, known)
    tensors.pop("1.means")
    twin = fade_fast.create_cache(model, CONFIGS["int4"])
    with pytest.raises(ValueError, match="fit"):
        twin.load_state_dict(tensors, known)
    assert twin.get_seq_length() == 0 and not any(layer.is_initialized for layer in twin.tiered)
    with pytest.raises(ValueError, match="configuration"):
        fade_fast.create_cache(model, "safe").load_state_dict(tensors, known)


def test_product_quantized_codes_are_refused(saved):
    """Of a file of an earlier version, and of a state: the reason comes before anything is written."""

    def as_earlier(header, tensors):
        header["config"]["quant_backend"], header["codebooks"] = "product", "0" * 64

    model, before = tiny_llama(), fade_fast.load_cache(saved, tiny_llama())
    rewritten(saved, as_earlier)
    told = "product-quantized codes, which caches no longer have: read the text again into a new cache"
    for read in (
        checkpoint.read_header,
        checkpoint.read_tokens,
        lambda path: fade_fast.load_cache(path, model),
    ):
        with pytest.raises(ValueError, match=told) as refused:
            read(saved)
        assert str(saved) in str(refused.value)
    assert model.config._attn_implementation != "fade"  # nothing was attached
    tensors, known = before.state_dict()
    as_earlier(known, tensors)
    cache = fade_fast.create_cache(model, CONFIGS["evict"])
    with pytest.raises(ValueError, match=told):
        cache.load_state_dict(tensors, known)
    assert cache.get_seq_length() == 0 and not any(layer.is_initialized for layer in cache.tiered)


def test_a_crash_spares_the_old_file(saved, monkeypatch):
    model, before = tiny_llama(), saved.read_bytes()
    cache = fade_fast.load_cache(saved, model)

    def crash(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError):
        cache.save(saved)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("left", [0, 12])
def test_a_cache_of_which_nothing_uncompressed_is_left(left, tmp_path):
    """Cropped to what is compressed, or to nothing: saved, it goes on as it is."""
    model = tiny_llama()
    config = FadeConfig(n_sink=0, recent_window=5, block_size=1)
    cache = fade_fast.create_cache(model, config)
    ids = prompt(17)["input_ids"]
    with torch.no_grad():
        model(input_ids=ids[:, : left + 5], **{CACHE_NAME: cache})
        cache.crop(-5)
        assert all(layer.length == left for layer in cache.tiered)
        assert not left or all(layer.dense.count == 0 for layer in cache.tiered)
        cache.save(tmp_path / "c")
        loaded = fade_fast.load_cache(tmp_path / "c", model)
        outs = [model(input_ids=ids[:, :3], **{CACHE_NAME: c}).logits for c in (cache, loaded)]
    assert torch.equal(*outs) and loaded.get_seq_length() == left + 3


def test_ids_must_be_integers(tmp_path):
    cache = fade_fast.create_cache(tiny_llama())
    with pytest.raises(ValueError, match="tokens are an integer tensor"):
        cache.save(tmp_path / "c", torch.ones(3))
    assert not list(tmp_path.iterdir())
