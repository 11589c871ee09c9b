"""Models whose weights do not tell a dtype, a shape or a device: quantized, offloaded, of odd modules."""

import itertools

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fade_fast
from fade_fast.hf.models import execution_device
from fade_ref.config import FadeConfig

from ..marks import slow_but
from ..models import OFF, compressed_tokens, dense, generate, new_cache, prompt, tiny_llama
from .test_hooks import equal, state

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
CONFIGS = {
    "safe": FadeConfig(recent_window=16, block_size=8),
    "balanced": FadeConfig(recent_window=16, block_size=8, int4_budget=16),
}


class Packed(nn.Module):
    """As bitsandbytes' Linear4bit: the weight is uint8, [n / 2, 1]."""

    def __init__(self, linear):
        super().__init__()
        self.kept = [linear.weight.data]
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        assert x.is_floating_point()
        return x @ self.kept[0].T.to(x.dtype)


class Buffered(nn.Module):
    """As GPTQ: no parameters, buffers of integers, a scale in float16."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax() / 127
        self.register_buffer("qweight", (linear.weight.data / scale).round().to(torch.int8))
        self.register_buffer("scales", scale.detach().reshape(1, 1).half())

    def forward(self, x):
        assert x.is_floating_point()
        return x @ (self.qweight.to(x.dtype) * self.scales.to(x.dtype)).T


class Float8(nn.Module):
    """Weights stored as float8, cast when they are used."""

    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.data.to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        assert x.is_floating_point() and x.dtype.itemsize > 1
        return x @ self.weight.to(x.dtype).T


class BiasOnly(nn.Module):
    """The only parameter is one-dimensional; the matrix is a plain attribute."""

    def __init__(self, linear):
        super().__init__()
        self.kept = [linear.weight.data]
        self.bias = nn.Parameter(torch.zeros(linear.weight.shape[0]))

    def forward(self, x):
        return x @ self.kept[0].T.to(x.dtype) + self.bias.to(x.dtype)


def replaced(kind, model):
    """The model with every projection of its attention replaced."""
    for layer in model.model.layers:
        for name in PROJECTIONS:
            setattr(layer.self_attn, name, kind(getattr(layer.self_attn, name)))
    return model


def dynamic(model):
    """All linear layers quantized by torch, keyed by packed parameters that are no tensors."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


MODELS = {
    "packed uint8": lambda: replaced(Packed, tiny_llama()),
    "integer buffers": lambda: replaced(Buffered, tiny_llama()),
    "float8": lambda: replaced(Float8, tiny_llama()),
    "bias only": lambda: replaced(BiasOnly, tiny_llama()),
    "quantize_dynamic": lambda: dynamic(tiny_llama()),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("preset", slow_but(CONFIGS, "balanced"))
@pytest.mark.parametrize("name", slow_but(MODELS, "packed uint8", "quantize_dynamic"))
def test_quantized_weights_are_served_and_sized_as_others(name, preset):
    model, plain, inputs = MODELS[name](), tiny_llama(), prompt(60)
    before = state(model)
    check = fade_fast.check_model(model, CONFIGS[preset], length=1000)
    expected = fade_fast.check_model(plain, CONFIGS[preset], length=1000)
    assert check.served and (check.dense, check.packed) == (expected.dense, expected.packed)
    after = state(model)
    assert all(equal(after[key], before[key]) for key in before), "looking leaves the model as it was"
    cache = fade_fast.create_cache(model, CONFIGS[preset])
    generate(model, cache, inputs, new=20)
    assert compressed_tokens(cache) > 0
    assert torch.equal(
        generate(model, fade_fast.create_cache(model, OFF), inputs, new=8),
        generate(model, dense(model), inputs, new=8),
    )


@pytest.mark.parametrize(
    "where, preset",
    slow_but(itertools.product(("cpu", "disk"), CONFIGS), ("cpu", "balanced"), ("disk", "safe")),
)
def test_offloaded_weights(where, preset, tmp_path):
    """Between calls the weights are on meta; keys are where the model computes."""
    accelerate = pytest.importorskip("accelerate")
    model, inputs = tiny_llama(), prompt(60)
    expected = generate(model, new_cache(model, CONFIGS[preset]), inputs, new=12)
    fade_fast.detach(model)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path / "weights"), execution_device="cpu")
    assert all(p.is_meta for p in model.model.layers.parameters())
    assert execution_device(model.model.layers[0].self_attn) == torch.device("cpu")
    check = fade_fast.check_model(model, CONFIGS[preset])
    assert check.served and not check.untried
    cache = fade_fast.create_cache(model, CONFIGS[preset])
    text = generate(model, cache, inputs, new=6)
    cache.save(tmp_path / "text.fade")
    again = fade_fast.load_cache(tmp_path / "text.fade", model)
    assert {x.device.type for layer in again.tiered for x in layer.tensors()} == {"cpu"}
    ids = torch.cat((inputs["input_ids"], text), dim=1)
    more = generate(model, again, dict(input_ids=ids, attention_mask=torch.ones_like(ids)), new=6)
    assert torch.equal(torch.cat((text, more), dim=1), expected)


def test_weights_on_meta_alone_are_not_called_verified():
    """They give no numbers; sizes are known all the same."""
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config()).eval()
    check = fade_fast.check_model(model, "safe")
    assert check.served and "on meta" in check.untried and "not verified" in str(check)


def tiny_config():
    return LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip


class NoRoom(LlamaForCausalLM):
    """A model that runs, but not while its RoPE is probed."""

    def forward(self, input_ids=None, *args, **kwargs):
        if self.config._attn_implementation == "fade probe":
            raise RuntimeError("no room for a probe")
        return super().forward(input_ids, *args, **kwargs)


@pytest.mark.parametrize("preset", CONFIGS)
def test_a_probe_that_fails_leaves_the_model_as_it_was(preset):
    """And the message says that the probe failed, not that the model has no RoPE."""
    model = NoRoom(tiny_llama().config).eval()
    before = state(model)
    if preset == "balanced":
        with pytest.raises(ValueError, match="could not be probed, RuntimeError: no room for a probe"):
            fade_fast.create_cache(model, CONFIGS[preset])
    else:
        fade_fast.create_cache(model, CONFIGS[preset])
        fade_fast.detach(model)
    after = state(model)
    assert all(equal(after[key], before[key]) for key in before)
