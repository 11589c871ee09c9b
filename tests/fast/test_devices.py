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


def written(model, ids, config):
    """Tokens [1, NEW] that follow `ids` through a cache of `config`, and their logits [NEW, V] on the CPU."""
    cache = fade_fast.create_cache(model, config)
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
    assert compressed_tokens(cache) > ids.shape[1] / 2
    fade_fast.detach(model)
    return out.sequences[0, ids.shape[1] :].cpu(), torch.cat(out.logits).float().cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", ["safe", "lossless"])
def test_tokens_equal_those_of_the_cpu(smollm2, wikitext, preset, dtype):
    """The first 64 at least, or both candidates of the first that differs are nearly as likely."""
    model, tokenizer = smollm2
    ids = tokenizer(wikitext[:8000], return_tensors="pt").input_ids[:, :1500]
    host = copy.deepcopy(model).to(dtype)
    device = copy.deepcopy(host).cuda()
    expected, logits = written(host, ids, preset)
    tokens, ours = written(device, ids, preset)
    differ = (tokens != expected).nonzero()
    first = int(differ[0]) if len(differ) else NEW
    print(f"{preset}, {dtype}: the first {first} of {NEW} tokens are the same")
    if first < SAME:
        margin = logits[first, expected[first]] - logits[first, tokens[first]]
        print(f"there the CPU's logits are {margin:.4f} apart")
        assert margin <= TIE[dtype]
    same = slice(0, first + 1)
    error = (ours[same] - logits[same]).norm() / logits[same].norm()
    print(f"logits until then differ by {error:.2e} of their norm")
    assert error < (1e-3 if dtype == torch.float32 else 3e-2)
