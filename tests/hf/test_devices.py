"""A model with real weights writes on a GPU what it writes on a CPU."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import fade_fast
from fade_fast.hf.models import CACHE_NAME
from fade_ref.config import FadeConfig

from ..models import compressed_tokens, prompt, tiny_llama

NEW, SAME = 96, 64
KINDS = "demotion", "plan", "eviction", "renumbering"
ALIKE = "event", "layer", "seen", "tokens", "columns", "kept", "evicted", "total"  # of them, on any device
#: Logits this near are a tie, in the model's dtype: bfloat16's last bit of a logit near 20 is 0.125.
TIE = {torch.float32: 0.01, torch.bfloat16: 0.25}

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def written(model, ids, preset=None):
    """Tokens [NEW] that follow `ids` [1, n], and their logits, float32 [NEW, V]; both on the CPU.

    The cache is an uncompressed one by default.
    """
    cache = fade_fast.create_cache(model, preset) if preset else None
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=torch.ones_like(ids).to(model.device),
        **{CACHE_NAME: cache},
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    if preset:
        assert compressed_tokens(cache) > ids.shape[1] / 2
        fade_fast.detach(model)
    return out.sequences[0, ids.shape[1] :].cpu(), torch.cat(out.logits).float().cpu()


def agreement(ours, expected) -> tuple[int, float]:
    """How many tokens are the same, and the relative error of the logits until then."""
    (tokens, logits), (others, exact) = ours, expected
    differ = (tokens != others).nonzero()
    first = int(differ[0]) if len(differ) else len(tokens)
    same = slice(0, first + 1)
    return first, float((logits[same] - exact[same]).norm() / exact[same].norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_equal_those_of_the_cpu(smollm2, wikitext, dtype):
    """The first 64 at least, or both candidates of the first that differs are nearly as likely.

    Devices differ already without compression, in bfloat16 by some percent of a logit; a cache adds little.
    """
    model, tokenizer = smollm2
    ids = tokenizer(wikitext[:8000], return_tensors="pt").input_ids[:, :1500]
    host = copy.deepcopy(model).to(dtype)
    device = copy.deepcopy(host).cuda()
    first, plain = agreement(written(device, ids), written(host, ids))
    print(f"{dtype}, uncompressed: {first} of {NEW} tokens are the same, logits differ by {plain:.2e}")
    for preset in ("lossless", "safe"):
        expected, ours = written(host, ids, preset), written(device, ids, preset)
        first, error = agreement(ours, expected)
        print(f"{dtype}, {preset}: {first} of {NEW} tokens are the same, logits differ by {error:.2e}")
        if first < SAME:
            exact = expected[1][first]
            margin = float(exact[expected[0][first]] - exact[ours[0][first]])
            print(f"there the CPU's logits are {margin:.4f} apart")
            assert margin <= TIE[dtype]
        assert error < 2 * plain + 1e-3


@pytest.mark.parametrize("name", ["int4", "evict"])
def test_a_demotion_that_runs_out_of_memory_can_be_repeated(name):
    """With more memory than before, up to 46 MiB; afterwards the bits are those of a cache without limits.

    By FlashAttention where nothing is compressed yet: cuDNN's, which PyTorch prefers on some GPUs, does not
    give the same bits every time, to a `DynamicCache` neither.
    """
    model = tiny_llama(heads=8, head_dim=128, layers=3, dtype=torch.bfloat16).cuda()
    config = FadeConfig(recent_window=64, block_size=64, int4_budget=None if name == "int4" else 64)
    ids, most = prompt(140, batch=16)["input_ids"].cuda(), torch.cuda.mem_get_info()[1]
    start = fade_fast.create_cache(model, config)

    def step(cache, column, new=1):
        with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return model(input_ids=ids[:, column : column + new], **{CACHE_NAME: cache}).logits

    first = 4 + 64 + 64 - 2  # two tokens less than make a block due
    step(start, 0, first)
    columns = range(first, first + 5)
    smooth = copy.deepcopy(start)
    expected = [step(smooth, column) for column in columns]
    assert compressed_tokens(smooth) > 0
    failures = 0
    for extra in range(0, 48, 2):
        cache, failed = copy.deepcopy(start), False
        for column, logits in zip(columns, expected):
            torch.cuda.empty_cache()
            limit = torch.cuda.memory_reserved() + (extra << 20)
            try:
                torch.cuda.set_per_process_memory_fraction(limit / most)
                found = step(cache, column)
            except torch.OutOfMemoryError:
                failed = True
                torch.cuda.set_per_process_memory_fraction(1.0)
                assert {layer.length for layer in cache.tiered} == {column}
                found = step(cache, column)
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
            error = float((found - logits).norm() / logits.norm())
            assert torch.equal(found, logits), (extra, column, failed, error)
        assert cache.memory() == smooth.memory()
        failures += failed  # a higher limit may fail again: memory is in pieces
    print(f"{name}: {failures} limits were too low")
    assert failures >= 2


@pytest.mark.parametrize("policy", ["position", "h2o"])
def test_events_are_those_of_the_cpu(policy):
    """Numbers that travel from the GPU while steps go on: the same events, in the same order."""
    told = []
    for device in ("cpu", "cuda"):
        model = tiny_llama(dtype=torch.float64).to(device)
        inputs = {k: v.to(device) for k, v in prompt(90, batch=2, pads=(0, 11)).items()}
        config = FadeConfig(recent_window=8, block_size=4, int4_budget=20, eviction_policy=policy)
        cache, events = fade_fast.create_cache(model, config), []
        with cache.listen(events.append):
            model.generate(
                **inputs, **{CACHE_NAME: cache}, max_new_tokens=40, min_new_tokens=40, do_sample=False
            )
        told.append([{k: e.get(k) for k in ALIKE} for e in events if e["event"] in KINDS])
    assert len(told[0]) > 20 and told[0] == told[1]
