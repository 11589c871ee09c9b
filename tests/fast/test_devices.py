"""A model with real weights writes on a GPU what it writes on a CPU."""

import copy

import pytest
import torch

import fade_fast
from benchmarks.methods import compressed_tokens

NEW, SAME = 96, 64
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
        past_key_values=cache,
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
    first = int(differ[0]) if len(differ) else NEW
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
