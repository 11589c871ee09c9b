"""measure.paged_prefill: prefill steps of the plugin, without vLLM and without a GPU."""

import json
from dataclasses import fields

import pytest
import torch

from fade_fast.measure import paged_prefill
from fade_fast.measure.paged_attention import SMALL, TOLERANCE
from fade_fast.measure.paged_prefill import CASES, Case, Result, Step, small


def test_everything_is_measured(tmp_path, capsys):
    file = tmp_path / "out.json"
    options = ["--quick", "--device", "cpu", "--only", "1 x 150 ", "--json", str(file)]
    assert paged_prefill.main(options) == 0
    stored = json.loads(file.read_text())
    assert stored["failed"] == {} and stored["quick"]
    names = [r["name"] for r in stored["results"]]
    assert set(names) == {"1 x 150 after 90, INT4 rotated", "1 x 150 beside 3 x 1, INT4 rotated"}
    for r in stored["results"]:
        assert set(r) == {f.name for f in fields(Result)} and 0 < r["error"] < TOLERANCE
        base = r["layers"] * (r["dense_us"] + r["dense_store_us"] + r["rest_us"]) / 1e3
        assert r["dense_prefill_ms"] == pytest.approx(base)
        assert r["percent"] == pytest.approx((r["prefill_ms"] / base - 1) * 100)
        assert r["dense_us"] == pytest.approx(
            min(x for name, x in r["dense_kernels"].items() if not name.startswith("decode"))
            + min((x for name, x in r["dense_kernels"].items() if name.startswith("decode")), default=0)
        )
    shown = capsys.readouterr().out
    assert all(f"| {name} |" in shown for name in names)


def test_cases_of_a_gpu():
    """Steps of vLLM have at most as many tokens as `--max-num-batched-tokens`."""
    assert len({case.name for case in CASES}) == len(CASES)
    assert [case.tokens for case in CASES][-3] == 2048 and all(case.chunk % 64 == 0 for case in CASES)


@torch.no_grad()
@pytest.mark.parametrize("case", [small(CASES[0]), small(CASES[3]), small(CASES[5])], ids=str)
def test_wrong_outputs_are_seen(case):
    made = Step(case, SMALL, "cpu")
    made.layer.forward(made.pool.cache, *made.args)
    assert made.error() < TOLERANCE
    made.args[-1][-made.starts[0][1] % SMALL.page or SMALL.page] *= 1.3  # of three queries
    assert made.error() > 2 * TOLERANCE


@torch.no_grad()
def test_the_kernels_of_a_gpu(uncompiled_kernels):
    """Codes are decoded in float16, uncompiled."""
    made = Step(Case(2, 150, past=70, decodes=1, context=40), SMALL, "cpu")
    made.layer.forward(made.pool.cache, *made.args)
    assert made.error() < TOLERANCE
