"""measure.memory: bytes are those that are really held."""

import pytest
import torch

from fade_fast.hf.models import CACHE_NAME
from fade_fast.measure import memory
from fade_fast.measure.methods import allocated, method

from ..models import prompt, tiny_llama
from . import models


@pytest.fixture(scope="module")
def model():
    return tiny_llama(dtype=torch.bfloat16)


def test_a_filled_cache_weighs_what_a_used_one_does(model):
    """Ours, filled with random tokens, against the same after the model's own prefill."""
    ids = prompt(700)["input_ids"]
    for name in ("int4", "balanced", "h2o:int4_budget=100", "snapkv:int4_budget=50"):
        cache = method(name)(model, 700)
        with torch.no_grad():
            model(input_ids=ids, **{CACHE_NAME: cache})
        assert allocated(cache) == cache.memory().allocated, name
        assert allocated(cache) == memory.filled_bytes(model, method(name), 700), name
    assert memory.filled_bytes(model, method("dynamic"), 700) == 700 * 2 * 2 * 2 * 64 * 2


def test_ratios_rise_as_bits_fall(model):
    weights = [
        memory.filled_bytes(model, method(n), 4096) for n in ("dynamic", "int8", "int4", "int3", "int2")
    ]
    assert weights == sorted(weights, reverse=True)
    reserved = memory.filled_bytes(model, method("int4"), 4096, reserved=True)
    assert weights[0] / 4 < reserved <= weights[2] * 1.02


def test_the_meter():
    with memory.StorageMeter() as meter:
        a = torch.zeros(1000, dtype=torch.uint8)
        b = a + 1
        a.add_(1), b.view(10, 100)  # nothing new
        assert meter.now == meter.peak == 2000
        del b
        assert (meter.now, meter.peak) == (1000, 2000)
        del a
    assert meter.now == 0 and not meter.known


def test_peaks_include_the_cache_and_leave_nothing_behind(model):
    attention = model.config._attn_implementation
    dense, ours = (memory.peaks(model, method(name), 512) for name in ("dynamic", "int4"))
    held = memory.filled_bytes(model, method("dynamic"), 512)
    assert dense[0] > held and dense[1] > 2 * held - held // 8  # the old and the new copy of a layer each
    assert ours[1] < dense[1]
    assert model.config._attn_implementation == attention


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    file = tmp_path / "out.json"
    options = ["--model", models.save(tmp_path / "model"), "--lengths", "1024", "--device", "cpu", "--peak"]
    assert memory.main([*options, "--configs", "k4v4", "h2o", "--json", str(file)]) == 0
    report, results = memory.stored(file)
    rows = {r.method: r for r in results}
    assert rows["dynamic"].grown / rows["k4v4"].grown > 2.4 and rows["dynamic"].grown / rows["h2o"].grown > 5
    assert all(r.prefill > 0 and r.step > 0 and r.length == 1024 for r in results)
    assert report["kind"] == "memory"
    assert memory.table(results).count("| dynamic |") == 3  # held; in use during prefill, and in a step
    assert f"| k4v4 | {rows['k4v4'].grown / 2**20:.1f}, 1/" in memory.table(results)
    shown = capsys.readouterr().out
    assert memory.main(["--show", str(file)]) == 0
    assert capsys.readouterr().out.strip() in shown
