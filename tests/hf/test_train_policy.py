"""Training of the `learned` policy: what it learns from, that it learns, and what comes out on real text."""

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

import fade_fast
from fade_fast.hf import train_policy
from fade_fast.policies import scores
from fade_ref.config import FadeConfig

from ..models import prompt, teacher_forced, tiny_llama


def test_examples_are_what_the_cache_sees(monkeypatch):
    """The first plan that has to evict: features as in a real cache, attention as the model pays it."""
    model, ids = tiny_llama(layers=2), prompt(256)["input_ids"]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        paid = model(input_ids=ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    budget, real, seen = 64, scores.features, []
    monkeypatch.setattr(scores, "features", lambda *args: seen.append(real(*args)) or seen[-1])
    config = dict(n_sink=train_policy.SINKS, recent_window=train_policy.RECENT, block_size=train_policy.BLOCK)
    config |= dict(middle_k_bits=8, middle_v_bits=8, int4_budget=budget, eviction_policy="learned")
    cache = fade_fast.create_cache(model, FadeConfig(**config))
    teacher_forced(model, cache, dict(input_ids=ids, attention_mask=torch.ones_like(ids)), [32] * 8)
    assert cache.memory().tokens["EVICTED"] > 0
    inside = [x for x in seen if x.shape[2] == budget + train_policy.BLOCK]
    for layer in range(2):
        shares = paid[layer][0].unflatten(0, (2, 2)).mean(1)
        player = train_policy.Player(shares, float(layer), budget, 0.0, 0)
        ours, later = next(player.plans())
        assert ours.shape == (2, 96, 4) and ours.min() >= 0 and ours.max() <= 1
        torch.testing.assert_close(inside[layer][0], ours, rtol=2e-2, atol=2e-3)
        first = train_policy.SINKS + 96
        stop = 160  # 4 sinks and 96 candidates leave 28 of 128 columns; the next block makes 32 due
        assert stop - first - train_policy.RECENT >= 0
        torch.testing.assert_close(later, shares[:, stop:256, 4:first].mean(1), rtol=1e-4, atol=1e-7)


def test_survivors_of_a_played_eviction():
    """A budget is kept at every plan, and what was evicted never comes back."""
    shares = torch.rand(2, 300, 300, generator=torch.Generator().manual_seed(0)).tril()
    shares /= shares.sum(-1, keepdim=True)
    before = None
    for fade, start in ((0.0, 0), (50.0, 0), (0.0, 200)):
        plans = list(train_policy.Player(shares, 0.5, 40, fade, start).plans())
        assert len(plans) >= 3
        counts = [seen.shape[1] for seen, _ in plans]
        assert counts[1:] == [40 + train_policy.BLOCK] * (len(plans) - 1)
        assert counts[0] == (64 if not start else (224 - 4 - 32) // 32 * 32)
        ages = plans[-1][0][0, :, 3]
        assert before is None or not torch.equal(ages, before)
        before = ages


@pytest.mark.slow
def test_what_is_fitted():
    """The network learns a soft target from its features, and the policy computes what was fitted."""
    x = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(1)).double()
    y = (x[:, 1] * (1 - x[:, 3])).clamp(0, 1)
    weights = train_policy.fit(x, y)
    assert {name: tuple(w.shape) for name, w in weights.items()} == scores.MLP
    w = scores.load(weights)
    out = F.linear(x, w["net.0.weight"], w["net.0.bias"]).relu()
    out = F.linear(out, w["net.2.weight"], w["net.2.bias"]).relu()
    found = F.linear(out, w["net.4.weight"], w["net.4.bias"]).sigmoid().squeeze(-1)
    assert (found - y).abs().mean() < 0.03 < (y - y.mean()).abs().mean() / 4


def test_command(tmp_path, monkeypatch, capsys):
    """From a text to a file that create_cache takes; the model comes back as it was."""

    class Tokenizer:
        def __call__(self, text, **options):
            return type("Encoding", (), dict(input_ids=torch.tensor([[ord(c) % 255 + 1 for c in text]])))

    model = tiny_llama()
    monkeypatch.setattr(train_policy, "load", lambda *args: (model, Tokenizer()))
    monkeypatch.setattr(train_policy, "EPOCHS", 2)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    out = tmp_path / "out" / "weights.safetensors"
    arguments = ["--text", str(text), "--out", str(out), "--length", "320", "--windows", "2"]
    arguments += ["--test", str(text), "--test-windows", "1"]
    assert train_policy.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "geometric mean" in shown and "learned" in shown and "position" in shown
    assert model.config._attn_implementation == "sdpa" and not model.model.layers[0].self_attn._forward_hooks
    with safe_open(out, "pt") as file:
        made = file.metadata()
    assert "text.txt" in made["made by"] and str(tmp_path) not in str(made)
    cache = fade_fast.create_cache(model, train_policy.quarter("learned", 320), policy_weights=out)
    first = load_file(out)["net.0.weight"].double()
    assert torch.equal(cache.tiered[0].observer.weights["net.0.weight"], first)
    assert train_policy.main([*arguments[:4], "--length", "5000"]) == 2
    assert "tokens" in capsys.readouterr().err


@pytest.mark.real_model
@pytest.mark.slow
def test_learned_beats_position(smollm2, wikitext):
    """Perplexity over the first window of the test split, a quarter of its tokens kept, at INT4."""
    torch.set_num_threads(1)  # steps of 32 tokens: two threads would mostly wait for each other
    model, tokenizer = smollm2
    window = tokenizer(wikitext[:12_000], return_tensors="pt").input_ids[0, :768]
    assert len(window) == 768
    found = {}
    try:
        for policy in ("position", "learned"):
            cache = fade_fast.create_cache(model.float(), train_policy.quarter(policy, 768))
            found[policy] = train_policy.perplexity(model, cache, window)
            tokens = cache.memory().tokens
            assert tokens["INT4"] == 768 // 4 - 68 and sum(tokens.values()) == 768
    finally:
        model.bfloat16()
    print(found)
    assert found["learned"] < 0.95 * found["position"]
