"""Several devices: heads split between processes, which talk by gloo on a CPU; layers on two devices."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import CompileConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import fade_fast
from fade_fast.cache import cuda_graph
from fade_fast.cache.positions import PositionsElsewhere, TokenPositions
from fade_fast.hf import cache as cache_module
from fade_fast.hf import generate
from fade_fast.hf.attention import attention
from fade_fast.hf.models import CACHE_NAME
from fade_ref.config import PRESETS, FadeConfig

from ..cache.test_cuda_graph import Tapes
from ..cache.test_decode_graph import compiled
from ..models import prompt, tiny_llama

SMALL = dict(recent_window=8, block_size=8)
#: Fields that make a preset compress, evict and choose in a short text.
SHORT = {name: SMALL for name in PRESETS} | {
    "balanced": dict(**SMALL, int4_budget=16),
    "aggressive": dict(recent_window=4, block_size=4, int4_budget=8),
    "recall": dict(**SMALL, select=8, resident=16),
}
CASES = {name: replace(FadeConfig.preset(name), **fields) for name, fields in SHORT.items()}
CASES["h2o, by head"] = replace(CASES["balanced"], eviction_policy="h2o", plan_scope="head")
#: These plan by the mean over heads, those of the other process included.
AVERAGED = ("h2o", "adaptive", "keydiff")
CASES |= {name: replace(CASES["balanced"], eviction_policy=name, int2_budget=8) for name in AVERAGED}
#: Matched codes of few bits, so that matrices of other heads would change the text.
CALIBRATED = replace(CASES["int4"], middle_k_bits=2, middle_v_bits=2)
#: Where steps are captured: demotions without a plan, planned by position, and planned by all heads.
CAPTURED = {name: CASES[name] for name in ("int4", "balanced", "h2o", "adaptive")}
#: Tokens of the prompt, written ones, and those of them that come before the cache is stored: then a block of
#: eight tokens is due.
LENGTH, NEW, FIRST = 60, 24, 9
META = torch.device("meta")

WORKER = """
import json, os, sys
import torch
from transformers import LlamaForCausalLM, Phi3ForCausalLM
import fade_fast
from transformers.distributed import DistributedConfig
from tests.hf.test_parallel import CALIBRATED, CAPTURED, CASES, captured, reason, texts

folder, rank = sys.argv[1], os.environ["RANK"]
split = dict(distributed_config=DistributedConfig(tp_plan="auto"))
model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, **split)
found = {name: texts(model, config, f"{folder}/{rank}") for name, config in CASES.items()}
found["a file"] = texts(model, CALIBRATED, f"{folder}/{rank}", f"{folder}/whole.calibration")
cache = fade_fast.create_cache(model, CALIBRATED)
cache.calibration.save(f"{folder}/{rank}.calibration")
torch.distributed.barrier()
other = f"{folder}/{1 - int(rank)}"
found["refused"] = [
    reason(fade_fast.load_cache, other, model),
    reason(fade_fast.create_cache, model, CALIBRATED, calibration=f"{other}.calibration"),
]
found |= {f"captured, {name}": captured(model, config) for name, config in CAPTURED.items()}
found["captured, one fails"] = captured(model, CASES["int4"], fails=rank == "1")
phi = Phi3ForCausalLM.from_pretrained(f"{folder}/phi", dtype=torch.float64, **split)
found["phi"] = texts(phi, CALIBRATED, f"{folder}/{rank}")
few = LlamaForCausalLM.from_pretrained(f"{folder}/few", dtype=torch.float64, **split)
found["refused"].append(reason(fade_fast.create_cache, few))
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(found, file)
torch.distributed.destroy_process_group()
"""


def tiny_phi3() -> Phi3ForCausalLM:
    """A model whose projections are split, but not its heads: each process computes all of them."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, pad_token_id=0)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    return Phi3ForCausalLM(Phi3Config(**sizes, **heads)).double()


def captured(model, config: FadeConfig, fails: bool = False) -> dict:
    """Tokens of the same text by steps that are compiled and captured, by tapes for CUDA graphs.

    With `fails`, a capture raises an error in this process.
    """
    tapes, plain = Tapes(), CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    tapes.error = RuntimeError("no stream") if fails else None
    cache = fade_fast.create_cache(model, config)
    with (
        mock.patch.object(cuda_graph, "record", tapes.record),
        mock.patch.object(generate, "uncaptured", lambda config, device: plain),
    ):
        cache.decode_graph.captures = True  # gloo stands for NCCL
        options = dict(new=NEW, min_new_tokens=NEW)
        written = compiled(model, cache, prompt(LENGTH, batch=2, seed=1), **options)[:, LENGTH:].tolist()
    graph = cache.decode_graph
    return dict(written=written, replays=graph.replays, counts=graph.counts, about=cache.describe())


def reason(call, *args, **kwargs) -> str:
    """Why a call is refused."""
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "not refused"


def texts(model, config: FadeConfig, path: str, calibration: str | None = None) -> dict:
    """Tokens of a text, those of its second half from a stored cache, and what the cache held."""
    ids = prompt(LENGTH, batch=2, seed=1)["input_ids"]

    def go_on(ids, cache, new):
        options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE_NAME: cache}, **options)

    whole = go_on(ids, fade_fast.create_cache(model, config, calibration=calibration), NEW)
    cache = fade_fast.create_cache(model, config, calibration=calibration)
    half = go_on(ids, cache, FIRST)
    assert config.block_size != 8 or cache.tiered[0].demotion_due
    if torch.distributed.is_initialized():
        if torch.distributed.get_rank() == 0:  # one process alone may ask
            cache.describe()
        torch.distributed.barrier()
    cache.save(path)
    cache = fade_fast.load_cache(path, model)
    again = go_on(half, cache, NEW - FIRST)
    layer = cache.tiered[0]
    held = dict(heads=layer.dense["key"].shape[1], compressed=layer.middle.count, evicted=layer.num_evicted)
    return dict(whole=whole[:, LENGTH:].tolist(), again=again[:, LENGTH:].tolist(), **held)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fade_fast.EvictionWarning")
def test_two_processes_write_the_text_of_one(tmp_path):
    """With every preset; each process stores its heads, and goes on with them in the file of its rank."""
    tiny_llama(heads=4, group=2, head_dim=16).save_pretrained(tmp_path)
    tiny_llama(heads=1, group=2, head_dim=16).save_pretrained(tmp_path / "few")
    phi = tiny_phi3().eval()
    phi.save_pretrained(tmp_path / "phi")
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    file = tmp_path / "whole.calibration"
    fade_fast.create_cache(model, CALIBRATED).calibration.save(file)
    ranks = in_two_processes(WORKER, tmp_path)
    for found in ranks:
        assert "was filled by another model: part differ; load it with" in found["refused"][0]
        assert "measured on the heads of one process" in found["refused"][1]
        assert (
            "cannot be split between 2 processes, each of which would have 0.5 heads" in found["refused"][2]
        )
    with pytest.raises(ValueError, match="part differ"):
        fade_fast.load_cache(tmp_path / "1", model)
    with pytest.raises(ValueError, match="measured on the heads of one process"):
        fade_fast.create_cache(model, CALIBRATED, calibration=tmp_path / "1.calibration")
    written = {}
    for name, config in [*CASES.items(), ("a file", CALIBRATED)]:
        expected, one, two = texts(model, config, str(tmp_path / "one")), *(found[name] for found in ranks)
        assert one["whole"] == one["again"] == two["whole"] == two["again"]
        assert expected["heads"] == 4 and one["heads"] == two["heads"] == 2
        assert min(one["compressed"], two["compressed"]) > 0, name
        assert expected["evicted"] == one["evicted"] == two["evicted"]
        assert (expected["evicted"] > 0) == config.evicts
        assert one["whole"] == expected["whole"] == expected["again"], name
        written[name] = expected["whole"]
    expected, one, two = texts(phi, CALIBRATED, str(tmp_path / "one")), *(found["phi"] for found in ranks)
    assert one["whole"] == two["whole"] == one["again"] == expected["whole"] and one["heads"] == 2
    for name in CAPTURED:
        one, two = (found[f"captured, {name}"] for found in ranks)
        assert one["written"] == two["written"] == written[name]
        assert one["counts"] == two["counts"] and one["replays"] == two["replays"] > NEW / 2
        assert "not captured" not in one["about"] and "part [1] of [2]" in two["about"]
    one, two = (found["captured, one fails"] for found in ranks)
    assert one["written"] == two["written"] == written["int4"] and not one["replays"] and not two["replays"]
    assert "decode steps are not captured: another process could not capture it" in one["about"]
    assert "decode steps are not captured: no stream" in two["about"]


def in_two_processes(script: str, folder: Path) -> list[dict]:
    """Run a script by torchrun, given a folder. Returns what both wrote into `{rank}.json` there."""
    root, file = Path(__file__).parents[2], folder / "worker.py"
    file.write_text(script)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-W", "ignore", *launcher, str(file), str(folder)]
    own = dict(PYTHONPATH=str(root), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    options = dict(cwd=root, capture_output=True, text=True, timeout=300)
    done = subprocess.run(command, env=os.environ | own, **options)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


# -- device_map: layers on two devices, of which the second is meta here, where tensors have no numbers

TWO_DEVICES = CASES | {"learned": replace(CASES["h2o"], eviction_policy="learned")}
del TWO_DEVICES["safe"]  # it is `int4` once its widths are chosen
del TWO_DEVICES["adaptive"]  # its plans say how many tokens stay, which meta cannot


@pytest.fixture
def second_layer_on_meta(monkeypatch):
    """Layers of a model are on the CPU, but the second one is on meta. A product of both is an error."""
    home, autocast = cache_module.execution_device, torch.is_autocast_enabled
    of = lambda m: META if getattr(m, "layer_idx", None) == 1 else home(m)  # noqa: E731
    monkeypatch.setattr(cache_module, "execution_device", of)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and autocast(kind))


@pytest.mark.filterwarnings("ignore::fade_fast.EvictionWarning")
@pytest.mark.parametrize("name", TWO_DEVICES)
def test_a_layer_computes_on_its_own_device(name, second_layer_on_meta):
    model = tiny_llama()
    cache = fade_fast.create_cache(model, TWO_DEVICES[name], verify=False)
    modules = [layer.self_attn for layer in model.model.layers]
    for new in (60, 1, 1, 20, *[1] * 12):
        for module, layer, device in zip(modules, cache.layers, ("cpu", "meta")):
            query, keys, values = (torch.randn(2, heads, new, 64, device=device) for heads in (4, 2, 2))
            output, _ = attention(module, query, *layer.update(keys, values), None, 0.0, 0.125)
            assert output.device.type == device and output.shape == (2, new, 4, 64)
    here, there = cache.tiered
    assert there.token_positions is not here.token_positions and here.middle.count == there.middle.count > 0
    assert {x.device.type for x in there.middle.tensors() + there.dense.all_tensors()} == {"meta"}


def test_positions_elsewhere_are_those_of_the_cache():
    """After every kind of change, also where padding has come in the place of a token that was cropped."""
    here = TokenPositions()
    there = PositionsElsewhere(here, torch.device("cpu"))
    assert there.buffer is None and there.tensors() == []
    real = torch.ones(2, 3, dtype=torch.bool)
    changes = [
        lambda: there.extend(0, None, 2, 5, "cpu"),
        lambda: here.extend(5, real, 2, 3, "cpu"),
        lambda: here.crop(2),
        lambda: there.extend(6, real.tril()[:2, :2], 2, 2, "cpu"),
        lambda: here.select_rows(torch.tensor([1, 0])),
        lambda: here.select_rows(torch.tensor([0, 0, 1])),
    ]
    for change in changes:
        change()
        assert torch.equal(there.logical, here.logical) and there.has_padding == here.has_padding
        assert there.buffer is not here.buffer and there.buffer is there.tensors()[0]
    assert there.batch == 3 and there.length == 8


def test_describe_says_why_steps_on_two_devices_are_not_captured():
    cache = fade_fast.create_cache(tiny_llama(), CASES["int4"])
    assert "not captured" not in cache.describe()
    cache.homes[1] = torch.device("cuda:1")
    cache.decode_graph.uncaptured = cache._why_uncaptured(tiny_llama(), False, None)
    said = "decode steps are not captured: weights are on cpu, and a captured step is of one GPU"
    assert said in cache.describe() and cache.snapshot()["uncaptured"] in said
