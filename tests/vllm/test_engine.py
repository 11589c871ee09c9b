"""SmolLM2 through vLLM: tokens, pages and quality. One engine serves all tests of a configuration."""

from pathlib import Path

import pytest
import torch

from . import engines
from .engines import ask, beams, calibration_file, engine, forget, preemptions, ranked, smollm2

pytestmark = [pytest.mark.slow, pytest.mark.real_model]

TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea,",
    "1, 2, 3, 5, 8,",
    "Question: why is the sky blue? Answer:",
    "The recipe needs flour, sugar and",
    "Dear Professor, thank you for",
)


@pytest.fixture(scope="module")
def prompts():
    """Eleven prompts of 5 to 260 tokens. Four share a prefix of 96 tokens, three pages."""
    from transformers import AutoTokenizer

    from fade_fast.hf.calibration_text import KINDS, PROSE

    read = AutoTokenizer.from_pretrained(smollm2())
    long = read(f"{PROSE}\n{KINDS}").input_ids
    made = [read(text).input_ids for text in TEXTS]
    return made + [long[:100], long[:96] + made[0], long[:96] + long[300:340], long[:260]]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    return calibration_file(str(tmp_path_factory.mktemp("calibration")))


@pytest.fixture(scope="module")
def text(prompts):
    """512 tokens that are not those of the calibration."""
    from transformers import AutoTokenizer

    words = (Path(__file__).parents[2] / "docs/guide.md").read_text(encoding="utf-8")[:8000]
    return AutoTokenizer.from_pretrained(smollm2())(words).input_ids[:512]


def distributions(llm, ids):
    """Log-probabilities [n, V] that the model gives after each token but the last, as vLLM computes them."""
    model, kept = engines.runner(llm).model, []
    compute = model.compute_logits

    def record(hidden, *args, **kwargs):
        logits = compute(hidden, *args, **kwargs)
        if len(logits) > 1:  # not those of sampling
            kept.append(logits.log_softmax(-1))
        return logits

    model.compute_logits = record
    try:
        ask(llm, [ids], tokens=1, prompt_logprobs=0)
    finally:
        del model.compute_logits
    whole = torch.cat(kept)
    assert len(whole) == len(ids) - 1
    return whole


def kl(base, other):
    return float((base.exp() * (base - other)).sum(-1).mean())


@pytest.fixture(scope="module")
def default(prompts, text):
    """Tokens and distributions of vLLM's own backend, its bytes per page, and beams of some prompts."""
    with engine(smollm2()) as llm:
        assert all(layer.backend.name == "CPU_ATTN" for layer in engines.layers(llm).values())
        count, held = engines.pages(llm)
        return *ranked(llm, prompts), distributions(llm, text), held / count, beams(llm, prompts[5:8])


def bfloat16(default):
    """Bytes of a page of vLLM in bfloat16: its engine ran in float32."""
    return default[3] / 2


def agree(found, expected, likely, gap, least):
    """At least `least` continuations are as expected. Others differ first where two tokens are nearly equally
    likely by `likely`: within `gap` nats.
    """
    same = 0
    for ours, theirs, steps in zip(found, expected, likely):
        i = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
        same += i is None
        if i is not None:
            assert steps[i].get(ours[i], -99.0) >= steps[i][theirs[i]] - gap, (ours, theirs)
    assert same >= least


def everywhere(llm, prompts, gap, others=0):
    """Together, in another order, with prefix hits, and alone: the same tokens. Returns them.

    Steps hold `CHUNK` tokens of all requests, so a prompt is cut differently each time. vLLM's own products
    round differently in other batches, and then a number at the boundary of two codes may get the other one,
    which moves codes of later layers. So `others` continuations in a run may leave the first ones where two
    tokens are equally likely up to the noise of the codes, `gap` nats. The same batches again give the same
    tokens, whatever free pages held before, and without codes (`gap` 0) nothing may differ.
    """
    forget(llm, 60)
    together, likely = ranked(llm, prompts)
    least = len(prompts) - others
    forget(llm, 255)
    assert ask(llm, prompts)[0] == together
    again, hits = ask(llm, prompts)
    assert max(hits) >= 3 * engines.BLOCK
    agree(again, together, likely, gap, least)
    llm.reset_prefix_cache()
    agree(ask(llm, prompts[::-1])[0][::-1], together, likely, gap, least)
    chosen = (0, 7, 9, 10)
    alone = []
    for i in chosen:
        llm.reset_prefix_cache()
        (tokens,), hits = ask(llm, [prompts[i]])
        assert not any(hits)
        alone.append(tokens)
    least = len(chosen) - min(others, 2)
    agree(alone, [together[i] for i in chosen], [likely[i] for i in chosen], gap, least)
    return together


def test_dense_pages_give_the_tokens_of_the_default_backend(default, prompts):
    with engine(smollm2(), dict(preset="dense")) as llm:
        assert {type(x.impl.layer).__name__ for x in engines.layers(llm).values()} == {"DenseLayer"}
        assert everywhere(llm, prompts, gap=0) == default[0]
        assert beams(llm, prompts[5:8]) == default[4]


def test_8_bits_give_the_tokens_of_the_default_backend(default, prompts, calibrated):
    """With so few pages that some requests lose theirs and are computed again."""
    options = dict(num_gpu_blocks_override=12, max_num_seqs=8, max_model_len=320)
    with engine(smollm2(), dict(preset="lossless", calibration=calibrated), **options) as llm:
        count, held = engines.pages(llm)
        short = [p for p in prompts if len(p) <= engines.BLOCK][:6]
        alone = [ranked(llm, [p], tokens=40) for p in short]
        assert preemptions(llm) == 0
        llm.reset_prefix_cache()
        together, _ = ask(llm, short, tokens=40)
        assert preemptions(llm) > 0
        agree(together, *([x[i][0] for x in alone] for i in (0, 1)), gap=0.05, least=len(short) - 2)
        assert bfloat16(default) / (held / count) >= 1.6  # pages of 32 tokens; test_tiny.py has larger ones
        agree(everywhere(llm, prompts, gap=0.03, others=1), *default[:2], gap=0.03, least=8)


def test_4_bits(default, prompts, calibrated, text):
    """4 bits may say something else, but always the same."""
    with engine(smollm2(), dict(calibration=calibrated), num_gpu_blocks_override=64) as llm:
        count, held = engines.pages(llm)
        assert count == 64 and {x.kv_cache.dtype for x in engines.layers(llm).values()} == {torch.uint8}
        found = everywhere(llm, prompts, gap=1.0, others=3)
        searched = beams(llm, prompts[5:8])
        forget(llm, 60)
        assert beams(llm, prompts[5:8]) == searched
        agree(
            found, *default[:2], gap=1.0, least=0
        )  # how often they are the same is a matter of the KL below
        quality = distributions(llm, text)
    ours, theirs = kl(default[2], quality), kl(*through_generate(text))
    report("vLLM, 4 bits", default[2], quality, text)
    print(f"generate(), 4 bits without recent tokens: KL {theirs:.5f}")
    # generate() reads the sinks and up to 15 tokens before a query uncompressed, and its means are the text's
    # own. Here it is 4 tokens on pages of 32, with two records each (docs/vllm.md).
    assert ours < min(0.02, 3 * theirs)


def test_4_bits_of_the_matched_codec(default, prompts, calibrated, text):
    with engine(smollm2(), dict(calibration=calibrated, quant_backend="matched")) as llm:
        quality = distributions(llm, text)
        assert ask(llm, prompts[:5], tokens=6)[0] == [ask(llm, [p], tokens=6)[0][0] for p in prompts[:5]]
    report("vLLM, matched, 4 bits", default[2], quality, text)
    assert kl(default[2], quality) < 0.012


@torch.no_grad()
def through_generate(text):
    """Distributions of transformers, without a cache and with ours in chunks of 16 tokens.

    Only sinks and the chunk itself are read uncompressed, which is the nearest to pages.
    """
    import fade_fast
    from fade_fast.hf import loading
    from fade_fast.hf.models import CACHE_NAME

    model, _ = loading.load(device="cpu", dtype="fp32")
    ids = torch.tensor([text])
    base = model(ids, use_cache=False).logits[0].log_softmax(-1)
    cache = fade_fast.create_cache(model, fade_fast.FadeConfig(recent_window=0, block_size=16))
    parts = [model(part, **{CACHE_NAME: cache}).logits[0] for part in ids.split(16, dim=1)]
    assert cache.memory().tokens["INT4"] >= len(text) - 32
    fade_fast.detach(model)
    return base[:-1], torch.cat(parts).log_softmax(-1)[:-1]


def report(name, base, found, text):
    target = torch.tensor(text[1:])[:, None]
    ratio = (base - found).gather(-1, target).mean().exp()
    print(f"\n{name}: KL {kl(base, found):.5f}, perplexity ratio {float(ratio):.4f}")
