"""measure.bench: bytes and times with a model and a text of the user's."""

import json

import pytest
import torch

from fade_fast.cli.command import main
from fade_fast.hf.models import CACHE_NAME
from fade_fast.measure import bench, memory
from fade_fast.measure.methods import allocated, made_for, method
from fade_fast.measure.streams import NothingCompressed

from ..models import prompt, tiny_llama
from . import models

LENGTH, NEW = 200, 6


@pytest.fixture(scope="module")
def model():
    return tiny_llama(dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(models.words(400))
    return str(path)


def test_every_method_takes_as_many_steps_and_its_bytes_are_held(model):
    ids = prompt(LENGTH)["input_ids"]
    before = model.generation_config.eos_token_id
    with torch.no_grad():  # a token that would end the text at once
        model.generation_config.eos_token_id = int(model(ids).logits[0, -1].argmax())
    ended = model.generation_config.eos_token_id
    names = ("dynamic", "int8", "int4", "position:int4_budget=40")
    found = {r.method: r for r in bench.run(model, [method(n) for n in names], ids, NEW, say=lambda _: None)}
    assert model.generation_config.eos_token_id == ended  # given back
    model.generation_config.eos_token_id = before
    assert all(r.failed is None and r.ms > 0 and r.first_token_s > 0 for r in found.values())
    held = LENGTH + NEW - 1  # the last new token is not fed
    assert found["dynamic"].bytes == held * 2 * 2 * 2 * 64 * 2 and found["dynamic"].read == 0
    cache = made_for(model, method("int4"), LENGTH + NEW)
    with torch.no_grad():
        model(torch.cat((ids, ids[:, : NEW - 1]), 1), **{CACHE_NAME: cache})
    assert found["int4"].bytes == allocated(cache)
    assert allocated(cache) - cache.memory().tables < found["int8"].bytes
    assert found["int4"].read == cache.memory().tokens["INT4"] > 0 and found["int4"].evicted == 0
    evicting = found["position:int4_budget=40"]
    assert evicting.read == 40 and evicting.evicted > 0


def test_a_cache_that_compressed_nothing_is_no_row(model):
    with pytest.raises(NothingCompressed, match="int4: no query read a compressed token"):
        bench.run(model, [method("int4")], prompt(80)["input_ids"], 4, say=lambda _: None)


def test_bytes_are_those_of_bfloat16_tokens():
    """A float32 model would hold twice as many uncompressed bytes, and look better than it is."""
    model, ids = tiny_llama(), prompt(LENGTH)["input_ids"]
    r = bench.run(model, [method("int4")], ids, 4, say=lambda _: None)[0]
    assert r.bytes == memory.filled_bytes(model, method("int4"), LENGTH + 4, reserved=True)


def test_the_command(folder, text, tmp_path, capsys):
    file = tmp_path / "out.json"
    asked = ["bench", "--model", folder, "--text", text, "--length", "256", "--new", "4", "--device", "cpu"]
    assert main([*asked, "--configs", "int4", "balanced:int4_budget=50", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert "256 tokens of mine.txt, then 4 new ones" in said and "On a CPU" in said
    report = json.loads(file.read_text())
    assert report["kind"] == "bench" and str(tmp_path) not in file.read_text()
    rows = {r["method"]: r for r in report["results"]}
    assert rows["int4"]["read"] > 100 and rows["balanced:int4_budget=50"]["evicted"] > 50
    line = next(x for x in said.splitlines() if x.startswith("| `int4` |"))
    own = rows["int4"]["bytes"] - rows["int4"]["tables"]
    mib = f"{own / 2**20:.1f} + {rows['int4']['tables'] / 2**20:.1f} tables"
    assert f"| {mib} | {rows['dynamic']['bytes'] / own:.2f} |" in line and "share its tables" in said
    assert "tables" not in next(x for x in said.splitlines() if x.startswith("| uncompressed"))
    assert main(["bench", "--show", str(file)]) == 0
    assert capsys.readouterr().out.strip() in said
    for more, why in (
        (["--length", "900"], "the text has 400 tokens: 1 window of 900 need 900; give a longer one with"),
        (["--length", "16383"], "--length 16383 and 4 new tokens: the model has 16384 positions"),
    ):
        assert main([*asked, *more]) == 2
        assert why in capsys.readouterr().err
