"""measure.paged_throughput: batches that fit, and their tokens a second, without a GPU."""

import json
from dataclasses import fields, replace

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fade_fast.measure import paged_attention, paged_throughput
from fade_fast.measure.models import LLAMA, TINY, build
from fade_fast.measure.paged_attention import Pool, make_layer
from fade_fast.measure.paged_throughput import (
    EPS,
    Rest,
    Row,
    Workload,
    attention,
    batches,
    compare,
    finished,
    others,
)

#: As `fade bench throughput` without options.
USUAL = Workload(LLAMA, 2048, 1024, 128, 80 * 10**9, 4 * 10**9)
SMALL = Workload(TINY, 300, 60, 32, 2_500_000, 0)


def test_batches_that_fit():
    """By hand: 8,030,261,248 weights, 131,072 bytes of a token in bf16, 32 layers of 8 heads."""
    left = 76 * 10**9 - 2 * 8_030_261_248
    cells = {None: 512, 145: 145, 273: 273}
    for cell, size in cells.items():
        assert USUAL.fits(3072, cell) == left // (3072 * size * 32 * 8)
    assert [USUAL.fits(3072, cell) for cell in cells] == [148, 525, 279]
    assert USUAL.bytes_of(3073, 145) == 25 * 128 * 145 * 256 and USUAL.bytes_of(3073, None) == 3088 * 131072
    assert batches(525) == [525, 512] and batches(512) == [512] and batches(1) == [1]
    with pytest.raises(ValueError, match="no request of 3072 tokens fits"):
        replace(USUAL, gpu=20 * 10**9).fits(3072, None)


@pytest.mark.parametrize("requests", [148, 512, 525])
def test_contexts_are_spread_evenly(requests):
    lengths = torch.tensor(USUAL.lengths(requests))
    assert (
        2048 < lengths.min() and lengths.max() <= 3072 and USUAL.lengths(1024)[:requests] == lengths.tolist()
    )
    even = 2048 + 1024 * (torch.arange(requests) + 0.5) / requests
    assert (lengths.sort().values - even).abs().max() < 25
    assert lengths.float().mean() == pytest.approx(USUAL.mean, abs=5)


@torch.no_grad()
def test_all_of_a_layer_but_attention():
    model = build(TINY, "cpu", dtype=torch.float32, rms_norm_eps=EPS)
    layer, draws = model.model.layers[0], torch.Generator().manual_seed(3)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.normal_(generator=draws)
    x, attended = torch.randn(5, 128, generator=draws), torch.randn(5, 256, generator=draws)
    cos, sin = model.model.rotary_emb(x, 7 * torch.arange(5)[None])
    own, mlp = layer.self_attn, layer.mlp
    normed = layer.input_layernorm(x)
    query, keys, values = (p(normed).unflatten(-1, (-1, 64)) for p in (own.q_proj, own.k_proj, own.v_proj))
    query, keys = apply_rotary_pos_emb(query[None], keys[None], cos, sin, unsqueeze_dim=2)
    wanted = x + own.o_proj(attended)
    wanted = wanted + mlp(layer.post_attention_layernorm(wanted))
    matrices = [torch.cat([p.weight for p in (own.q_proj, own.k_proj, own.v_proj)]), own.o_proj.weight]
    matrices += [torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)), mlp.down_proj.weight]
    norms = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
    found = others(x, attended, cos[0, :, None], sin[0, :, None], norms, matrices)
    for a, b in zip(found, (wanted, query[0], keys[0], values)):
        torch.testing.assert_close(a, b)
    shapes = [x.shape for x in Rest(SMALL.model, "cpu").matrices]
    assert shapes == [x.shape for x in matrices]


@torch.no_grad()
def test_wrong_attention_of_some_requests_is_an_error(monkeypatch):
    pool = Pool(
        SMALL.shape, make_layer(SMALL.shape, 4, "rotated", torch.device("cpu")), [301, 340, 360], "cpu"
    )
    pool.fill()
    fresh = pool.cache.clone()
    found = attention(pool, 2, fresh)
    assert found["tokens"] == 641 and found["slots"] == 2 * 340 and 0 < found["error"] < 5e-3
    split = paged_attention.split
    wrong = lambda a, b, c, table, *more, **options: split(a, b, c, table.flip(0), *more, **options)  # noqa: E731
    monkeypatch.setattr(paged_attention, "split", wrong)
    with pytest.raises(AssertionError, match="the output is off"):
        attention(pool, 2, fresh)


def test_a_step_that_needs_more_than_the_reserve_is_an_error(monkeypatch):
    monkeypatch.setattr(paged_throughput, "needed", lambda call, device: 10)
    found = dict(needed_bytes=5)
    with pytest.raises(ValueError, match="--reserve-gb"):
        finished(SMALL, Rest(SMALL.model, "cpu"), "bf16", None, 2, found, {})


def test_everything_is_measured(tmp_path, capsys):
    file = tmp_path / "out.json"
    assert (
        paged_throughput.main(["--quick", "--only", "INT4 rotated", "--device", "cpu", "--json", str(file)])
        == 0
    )
    stored = json.loads(file.read_text())
    assert stored["failed"] == {} and stored["quick"] and stored["work"]["name"] == TINY
    rows = [Row(**r) for r in stored["rows"]]
    assert [(r.format, r.requests) for r in rows] == [("bf16", 4), ("INT4 rotated", 14), ("INT4 rotated", 8)]
    dense, (prompt,) = stored["prefill"]["dense_ms"], stored["prefill"]["rows"]
    for r in rows:
        assert set(vars(r)) == {f.name for f in fields(Row)}
        step = 2 * (r.attention_us + r.rest_us) + r.once_us + r.head_us
        assert r.step_ms == pytest.approx(step / 1e3) and r.rest_us == min(r.kernels["rest"].values())
        assert r.tokens_per_s == pytest.approx(r.requests / r.step_ms * 1e3)
        assert r.ratio == pytest.approx(r.tokens_per_s / rows[0].tokens_per_s)
        prefill = dense if r.format == "bf16" else prompt["ms"]
        assert r.prefilled_per_s == pytest.approx(60e3 / (prefill + 60 * r.step_ms / r.requests))
        assert r.prefilled_ratio == pytest.approx(r.prefilled_per_s / rows[0].prefilled_per_s)
    shown = capsys.readouterr().out
    assert all(shown.count(f"| {r.format} | {r.requests} |") == 2 for r in rows)
    assert "INT4 rotated: " in shown and "(target +10)" in shown


def test_the_better_batch_in_bf16_is_the_baseline():
    zeros = {f.name: 0 for f in fields(Row)}
    rows = [Row(**zeros | dict(format=name, requests=4, step_ms=2.0, tokens_per_s=speed)) for name, speed in
            (("bf16", 100.0), ("bf16", 200.0), ("INT4 rotated", 300.0))]  # fmt: skip
    compare(SMALL, rows, None)
    assert [r.ratio for r in rows] == [0.5, 1.0, 1.5] and rows[0].prefill_ms is None
