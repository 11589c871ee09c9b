"""Snapshots: what they say of a live cache is in its tensors, and a saved one says the same."""

import json

import pytest
import torch

import fade_fast
from fade_fast.saved import checkpoint, snapshot
from fade_ref.config import FadeConfig

from ..marks import slow_but
from ..models import compressed_tokens, generate, new_cache, prompt, tiny_llama

SMALL = dict(recent_window=8, block_size=4)
CONFIGS = {
    "int4": FadeConfig(**SMALL),
    "k4v2": FadeConfig(**SMALL, middle_v_bits=2),
    "evict": FadeConfig(**SMALL, int4_budget=10, eviction_policy="knorm"),
    "two tiers": FadeConfig(**SMALL, int4_budget=10, int2_budget=6, positions="original"),
    "off": FadeConfig(recent_window=None),
}


def filled(name, pads=(0, 7)):
    model = tiny_llama()
    cache = new_cache(model, CONFIGS[name])
    generate(model, cache, prompt(40, batch=len(pads), pads=pads), new=20)
    assert name == "off" or compressed_tokens(cache) > 0
    return model, cache


def members(tier) -> list[set[int]]:
    return [{p for start, stop in row for p in range(start, stop)} for row in tier["positions"]]


@pytest.mark.parametrize("name", slow_but(CONFIGS, "evict"))
def test_positions_and_counts(name):
    """Every token of a row is in one tier or evicted, and counts and bytes are the cache's own."""
    _, cache = filled(name)
    found, memory = cache.snapshot(), cache.memory()
    assert json.loads(json.dumps(found)) == found
    assert (found["length"], found["batch"], found["tokens"]) == (59, 2, 59 + 52)
    assert sum(layer["bytes"] for layer in found["layers"]) == found["packed"] == memory.packed
    for layer in found["layers"]:
        rows = [set(), set()]
        for tier in layer["tiers"].values():
            for row, held in zip(rows, members(tier)):
                assert not row & held
                row |= held
            assert sum(map(len, members(tier))) == tier["tokens"]
        assert rows[0] <= set(range(59)) and rows[1] <= set(range(52))
        assert layer["evicted"] == 59 + 52 - sum(map(len, rows))
        assert {0, 1, 2, 3, 58} <= rows[0] and {0, 1, 2, 3, 51} <= rows[1]
    for tier in cache.tiered[0].middle.tiers if cache.tiered[0].middle else ():
        position = cache.tiered[0].middle.position(tier)[:, 0].tolist()
        here = members(found["layers"][0]["tiers"][tier.name])
        assert here == [{p for p in row if p >= 0} for row in position]


@pytest.mark.parametrize("pads", [(0, 0), (0, 7)], ids=["whole", "padded"])
@pytest.mark.parametrize("name", slow_but(CONFIGS, "evict"))
def test_a_saved_cache_says_the_same(name, pads, tmp_path, monkeypatch):
    _, cache = filled(name, pads)
    cache.save(tmp_path / "c", torch.arange(59))
    live, stored = cache.snapshot(), snapshot.of_file(tmp_path / "c", positions=True)
    assert (stored["length"], stored["batch"], stored["config"]) == (59, 2, live["config"])
    for ours, theirs in zip(live["layers"], stored["layers"]):
        assert {n: members(x) for n, x in ours["tiers"].items()} == {
            n: members(x) for n, x in theirs["tiers"].items()
        }
    monkeypatch.setattr(checkpoint, "read_tensors", lambda *args: pytest.fail("tensors are read"))
    header = snapshot.of_file(tmp_path / "c")
    slots = [(n, x["slots"]) for n, x in header["layers"][0]["tiers"].items()]
    assert sum(n for _, n in slots) >= live["layers"][0]["tiers"]["FP16"]["tokens"]
    assert f"{slots[-1][1]} {slots[-1][0]}" in snapshot.text(header)


def test_text():
    model, cache = filled("evict")
    text = cache.describe().splitlines()
    tokens = cache.memory().tokens
    assert "59 tokens seen" in text[0] and "times smaller" in text[1]
    assert "of tables that all caches of the model share" in text[2]
    (line,) = text[3:]  # both layers hold the same
    assert line.startswith(f"layers 0 to 1: tiered: {tokens['FP16']} FP16, {tokens['INT4']} INT4, ")
    assert f"{tokens['EVICTED']} EVICTED" in line
    memory = str(cache.memory())
    assert "times smaller" in memory and f"{tokens['INT4']} INT4" in memory and "KiB allocated" in memory
    assert memory.startswith(text[1].partition(" allocated")[0])  # both leave the tables out
    empty = fade_fast.create_cache(model, "safe")
    assert (
        empty.describe().splitlines()[-1]
        == "layers 0 to 1: tiered: empty; 0 bytes instead of 0 bytes a layer"
    )
    assert json.loads(json.dumps(empty.snapshot()))["layers"][1]["tiers"] == {}


def test_the_ids_that_were_fed_travel_along(tmp_path):
    model, cache = filled("int4")
    ids = torch.randint(0, 256, (2, 59))
    cache.save(tmp_path / "c", ids)
    assert torch.equal(checkpoint.read_tokens(tmp_path / "c"), ids)
    assert fade_fast.load_cache(tmp_path / "c", model).get_seq_length() == 59
    cache.save(tmp_path / "c")
    assert checkpoint.read_tokens(tmp_path / "c") is None
