"""attach() tries a model before it is trusted: what it finds, where, and that it leaves no trace."""

import threading
import time
import warnings

import pytest
import torch
from transformers import (
    AttentionInterface,
    Cache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import fade_fast
from fade_fast.cache.layer import KVLayer
from fade_fast.compile import compiled as compiling
from fade_fast.hf import attention, verify
from fade_fast.hf.attach import verified
from fade_fast.hf.models import CACHE_NAME
from fade_fast.hf.undisturbed import undisturbed

from ..models import OFF, SAFE, dense, generate, prompt, tiny_llama

ODD = "attention with a twist"


def _odd(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Layer 1 scales its scores in a way that only it knows."""
    twist = 1.2 if module.layer_idx == 1 else 1.0
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling * twist, **kwargs
    )


AttentionInterface.register(ODD, _odd)
AttentionMaskInterface.register(ODD, sdpa_mask)


def forwards(model) -> list:
    """Grows by one at each forward pass."""
    calls = []
    model.get_input_embeddings().register_forward_hook(lambda *args: calls.append(1))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_another_kind_is_refused(dtype):
    """The layer is named, the model stays as it was; without the check it is attached regardless."""
    model, inputs = tiny_llama(layers=3, dtype=dtype), prompt(30)
    model.set_attn_implementation(ODD)
    expected = generate(model, dense(model), inputs)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"attention layer 1 of LlamaForCausalLM .* relative error 0\.\d"
        ):
            fade_fast.create_cache(model, OFF)
    assert model.config._attn_implementation == ODD and not [n for n in vars(model) if "fade" in n]
    assert torch.equal(generate(model, dense(model), inputs), expected)
    fade_fast.create_cache(model, OFF, verify=False)
    assert model.config._attn_implementation == attention.NAME


#: When an attention of its own does something else: tokens of the query, and tokens that it sees.
TWISTS = {
    "in prompts": lambda new, seen: new == seen,
    "in steps of several tokens": lambda new, seen: 1 < new < seen,
    "in steps of a token": lambda new, seen: new == 1,
}


@pytest.mark.parametrize("name", TWISTS)
def test_what_the_model_does_at_times_is_found(name):
    """The model's own run has few passes, and among them each kind of pass."""

    def odd(module, query, key, value, mask, scaling=None, **kwargs):
        twist = 1.2 if TWISTS[name](query.shape[2], key.shape[2]) else 1.0
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling * twist, **kwargs)

    AttentionInterface.register(name, odd)
    AttentionMaskInterface.register(name, sdpa_mask)
    model = tiny_llama()
    model.set_attn_implementation(name)
    with pytest.raises(ValueError, match="attention layer 0 of LlamaForCausalLM .* relative error"):
        fade_fast.attach(model)


def test_frequencies_that_change_with_the_text_are_those_of_the_same_chunks():
    """A pass over 64 tokens rotates the first 40 otherwise: then both runs have the same passes."""
    rope = dict(rope_type="longrope", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=48)
    model = tiny_llama(rope_parameters=rope | dict(short_factor=[1.0] * 32, long_factor=[4.0] * 32))
    calls = forwards(model)
    assert fade_fast.attach(model)
    assert len(calls) == len(verify.FEWER) + 3 * len(verify.CHUNKS)


BREAKS = {
    "values are stored twice over": (KVLayer, "append", lambda own: _doubled(own)),
    "decode steps forget the scale": (attention, "sdpa_attention_forward", lambda own: _unscaled(own)),
}


def _doubled(own):
    return lambda self, keys, values, *args, **kwargs: own(self, keys, 2 * values, *args, **kwargs)


def _unscaled(own):
    def sdpa(module, query, keys, values, mask, **kwargs):
        scale = 2.0 if query.shape[2] == 1 else 1.0
        return own(module, query * scale, keys, values, mask, **kwargs)

    return sdpa


@pytest.mark.parametrize("name", BREAKS)
def test_faults_of_ours_are_found(name, monkeypatch):
    owner, attribute, fault = BREAKS[name]
    monkeypatch.setattr(owner, attribute, fault(getattr(owner, attribute)))
    with pytest.raises(ValueError, match="attention layer 0 .* relative error"):
        fade_fast.attach(tiny_llama())


def test_once_for_a_model():
    model = tiny_llama()
    calls = forwards(model)
    fade_fast.create_cache(model, SAFE, verify=False)
    assert not calls
    fade_fast.create_cache(model, SAFE)  # attached already, but not verified
    once = len(verify.FEWER) + len(verify.CHUNKS)
    assert len(calls) == once and model.config._attn_implementation == attention.NAME
    fade_fast.create_cache(model, "lossless")
    fade_fast.detach(model)
    fade_fast.attach(model)
    assert len(calls) == once
    fade_fast.create_cache(model, "balanced")  # a step at two sets of positions shows how keys are rotated
    assert len(calls) == once + 2
    assert sum(verify.CHUNKS[:2]) >= 64 and verify.CHUNKS[-1] == 1
    assert sum(verify.FEWER) == sum(verify.CHUNKS) and verify.FEWER[-1] == 1 < verify.FEWER[-2]


def test_nothing_is_disturbed():
    """Random state, modes, frequencies that grow, hooks of others, and calls that others compiled."""
    rope = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
    model = tiny_llama(rope_parameters=rope)
    model.config.max_position_embeddings = model.model.rotary_emb.max_seq_len_cached = 16
    model.model.rotary_emb.original_max_seq_len = 16
    model.train()
    model.model.layers[1].eval()
    heard, compiled = [], []
    model.register_forward_hook(lambda *_: heard.append("model"))
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: heard.append("attention"))
    model.forward = torch.compile(model.forward, backend=lambda graph, _: compiled.append(graph) or graph)
    before = model.model.rotary_emb.inv_freq, model.model.rotary_emb.max_seq_len_cached
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    fade_fast.attach(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and model.model.layers[0].training and not model.model.layers[1].training
    after = model.model.rotary_emb.inv_freq, model.model.rotary_emb.max_seq_len_cached
    assert before[0] is after[0] and before[1] == after[1]
    assert heard and "model" not in heard and not compiled
    assert len(model.model.layers[0].self_attn._forward_hooks) == 1
    fade_fast.detach(model)
    assert len(model._forward_hooks) == 1
    assert compiling.COMPILED_ON == {"cuda"}


def test_models_that_are_hard_to_try():
    """Few positions, few tokens, no head, a softcap: verified all the same."""
    few = GPT2Config(
        vocab_size=3, n_embd=32, n_layer=1, n_head=2, n_positions=48, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    capped = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, attn_logit_softcapping=0.5, layer_types=["full_attention"],
        initializer_range=1.0,
    )  # fmt: skip
    for model in (GPT2LMHeadModel(few).eval(), tiny_llama().model, Gemma2ForCausalLM(capped).eval()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert fade_fast.attach(model)
        assert verified(model).shapes and not verified(model).untried


class NeedsPixels(LlamaForCausalLM):
    """A model that takes more than token ids."""

    def forward(self, input_ids, pixels=None, cache: Cache | None = None, **kwargs):
        if pixels is None:
            raise TypeError("pixels are needed")
        return super().forward(input_ids, **{CACHE_NAME: cache}, **kwargs)


def test_models_that_cannot_be_tried_are_attached_with_a_warning():
    model = NeedsPixels(tiny_llama().config).eval()
    with pytest.warns(UserWarning, match="could not be verified: .* TypeError: pixels are needed"):
        fade_fast.create_cache(model, SAFE)
    assert model.config._attn_implementation == attention.NAME


def test_threads_that_inspect_models_leave_the_compiler_on():
    """The first to begin is the first to end, so each would restore what the other one set."""
    began, ended, compiled = threading.Event(), [], []

    def first():
        with undisturbed(tiny_llama()):
            began.set()
            time.sleep(0.2)
            ended.append(True)

    thread = threading.Thread(target=first)
    thread.start()
    began.wait()
    with undisturbed(tiny_llama(seed=1)):
        assert ended
    thread.join()
    torch.compile(lambda x: x + 1, backend=lambda graph, inputs: compiled.append(1) or graph)(torch.ones(2))
    assert compiled and compiling.COMPILED_ON == {"cuda"}
