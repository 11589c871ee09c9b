"""measure.choose: what choosing and host memory cost."""

import json

import pytest
import torch

from fade_fast.cli.command import main
from fade_fast.errors import InputError
from fade_fast.measure import choose
from fade_fast.measure.methods import method
from fade_fast.measure.models import TINY
from fade_fast.measure.streams import NothingCompressed

COLD = "int4:select=64:cold=host"


@pytest.fixture(scope="module")
def bench():
    return choose.Bench(TINY, "cpu", 1, None, turns=1, new=4)


def test_the_command(tmp_path, capsys):
    """Every part, with counts that the layers of a CPU count as those of a GPU do."""
    file = tmp_path / "out.json"
    asked = ["bench", "choose", "--device", "cpu", "--layers", "1", "--indexes", "k2", "--batches", "1"]
    assert main([*asked, "--cases", "1x320", "--length", "320", "--json", str(file)]) == 0
    said, stored = capsys.readouterr().out, json.loads(file.read_text())
    assert said.rstrip().endswith("ms more.") and "**hits**" in said and "tiny, 1 of 2 layers" in said
    rows = {part: [r for r in stored["rows"] if r["part"] == part] for part in choose.PARTS}
    assert [len(rows[part]) for part in choose.PARTS] == [3, 3, 4, 2, 4]
    assert not any(r["failed"] for r in stored["rows"])
    for r in stored["rows"]:
        if "select" in r["method"] and r["part"] != "prefill":
            assert 0 < r["read"] == 64 < r["held"] and r["ms"] > 0
    for r in rows["hits"]:  # 8 pages of 2 KV heads
        assert r["hits"] == 16 * r["forced"] and r["hits"] + r["misses"] == 16
        assert r["fetched_bytes"] == r["misses"] * 8 * (64 // 4 + 64 // 2 + 2)
        assert r["host_bytes"] > 0 and r["gpu_bytes"] < r["dense_bytes"]
    assert [r["forced"] for r in rows["hits"]] == [1.0, 0.75, 0.5]
    assert all(r["first_token_s"] > 0 for r in rows["prefill"])
    assert all(r["batch"] >= 3 and r["refused"] == [] for r in rows["batch"])
    assert main(["bench", "choose", "--show", str(file)]) == 0
    assert capsys.readouterr().out.strip() in said


def test_a_fetched_page_is_the_one_that_the_window_wants(bench):
    """What a step reads through the window is what the host holds of these pages."""
    text = bench.text(method(COLD), 2, 512).fill(384)
    (store,), windows = text.stores, [choose.Window(store) for store in text.stores]
    seen, fetch = [], store._fetch
    store._fetch = lambda index, *args: seen.append((index, fetch(index, *args))) or seen[-1][1]
    windows[0].force(0.5)
    text.turn()
    assert len(seen) >= 4
    for index, found in seen:
        for name, x in found.items():
            held = store.tiers[0].records.tensors[name].unflatten(2, (-1, store.page))
            for row, head in ((0, 0), (1, 1)):
                expected = held[row, head, index[row, head]].flatten(0, 1)
                assert torch.equal(x[row, head], expected)
    steps = [index[0, 0].tolist() for index, _ in seen]
    assert all(len(set(a) & set(b)) == 4 for a, b in zip(steps, steps[1:]))


def test_what_cannot_be_measured_is_refused(bench, capsys):
    short = bench.text(method(COLD), 1, 320).fill(192)
    with pytest.raises(InputError, match="8 are read and 16 are on the GPU; use a longer text"):
        choose.Window(short.stores[0])
    text = bench.text(method("int4:select=64"), 1, 512).fill(384)
    row = choose.Row("steps", "all", 1, 384, 1)
    with pytest.raises(NothingCompressed, match="all: a query read all 256 tokens"):
        choose.record(text, row, [1.0], [2, 2 * text.held, 0, 0])
    for wrong in (["--parts", "steps,x"], ["--cases", "8"], ["--indexes", "k3"], ["--new", "2"]):
        with pytest.raises(SystemExit):
            choose.main([*wrong, "--device", "cpu"])
    assert "--parts: x: of steps" in capsys.readouterr().err


def test_scaled_to_all_layers(bench):
    """The head is not scaled, and has the vocabulary of the name."""
    head = bench.model.get_output_embeddings().weight.nbytes / bench.bandwidth * 1e3
    assert bench.scaled(head + 3.0) == pytest.approx(head + 6.0)
