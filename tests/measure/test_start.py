"""measure.start: what a fresh process waits for, and which texts compile a step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CompileConfig

from fade_fast.measure import generate, start
from fade_fast.measure.start import Process, Text

from ..models import tiny_llama

EVERY = ("greedy", "again", "sampled", "B 2", "B 2 padded", "B 4", "B 8", "beams", "drafted")


@pytest.fixture
def model(monkeypatch):
    """A model whose steps are compiled on a CPU, but without generated code."""
    torch._dynamo.reset()
    made = generate.make_cache

    def make(*args):
        cache = made(*args)
        cache.decode_graph.compileable = True
        return cache

    monkeypatch.setattr(generate, "make_cache", make)
    model = tiny_llama(layers=1, dtype=torch.bfloat16)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    model.generation_config.compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    model.generation_config.compile_config._compile_all_devices = True
    return model


@pytest.mark.parametrize(
    "names", [("greedy", "again", "sampled", "B 2", "B 4"), pytest.param(EVERY, marks=pytest.mark.slow)]
)
def test_which_texts_compile_a_step(model, names):
    """The first one, the first of several rows, and the first with drafts: no other batch size or mode."""
    texts = {name: start.measure(model, name, "safe", 40) for name in names}
    compiled = {name: sum(n for n, _ in text.graphs.values()) for name, text in texts.items()}
    assert compiled == {name: int(name in ("greedy", "B 2", "drafted")) for name in names}
    for text in texts.values():
        assert min(text.cache, text.first, text.second) > 0 and text.whole > text.second
    assert texts["greedy"].whole > texts["again"].whole


def test_what_a_process_says():
    process, said = Process("empty"), Text("greedy", 0.5, 1.0, 2.0, 4.0, {"forward": [1, 1.5]}, 2, 3)
    lines = [dict(imported=1.0), dict(built=2.0), dict(text=vars(said), second_token=5.0)]
    lines.append(dict(text=vars(said) | dict(name="again"), second_token=9.0))
    lines += [dict(next=dict(name="B 2", cache=None, graphs={})), dict(next=dict(name="B 2", cache=0.75))]
    lines.append(dict(next=dict(graphs={"_finish": [2, 3.5]})))
    for line in ("a warning", "[1]", *map(json.dumps, lines)):
        start._read(process, line)
    assert (process.imported, process.built, process.second_token) == (1.0, 2.0, 5.0)
    assert process.texts[0] == said and len(process.texts) == 2
    process.stopped = "stopped after 3 s"
    shown = start.table([process])
    assert "second token after 5.0 s" in shown and "1 forward 1.5 s" in shown
    last = "stopped after 3 s, at B 2: a cache after 0.8 s, compiled: 2 _finish 3.5 s"
    assert last in shown
    shown = start.table([Process("empty", stopped="stopped")])
    assert "at the model: no cache yet, compiled: nothing" in shown


@pytest.mark.slow
def test_a_process_that_is_stopped(tmp_path, monkeypatch):
    """It leaves no process of its group behind."""
    killed, kill = [], os.killpg
    monkeypatch.setattr(os, "killpg", lambda group, sign: killed.append(group) or kill(group, sign))
    asked = ["--only", "greedy", "--layers", "1", "--model", "tiny", "--limit", "0.5", "--caches", "empty"]
    (process,) = [start.watch(start.arguments(asked), "empty", tmp_path)]
    assert process.stopped == "stopped after 0.5 s" and process.texts == [] and process.built is None
    with pytest.raises(ProcessLookupError):
        kill(killed[0], 0)


@pytest.mark.slow
def test_two_processes(tmp_path):
    file, root = tmp_path / "start.json", Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "fade_fast", "bench", "start", "--length", "40"]
    command += ["--only", "greedy", "B 2", "--layers", "1", "--model", "tiny", "--json", str(file)]
    own = dict(PYTHONPATH=str(root), OMP_NUM_THREADS="1")
    options = dict(env=os.environ | own, cwd=root, capture_output=True, text=True)
    done = subprocess.run(command, **options, timeout=300)
    assert done.returncode == 0, done.stderr
    empty, filled = json.loads(file.read_text())["processes"]
    assert (empty["caches"], filled["caches"]) == start.CACHES
    for process in (empty, filled):
        assert [text["name"] for text in process["texts"]] == ["greedy", "B 2"] and process["stopped"] is None
        assert 0 < process["imported"] < process["built"] < process["second_token"]
        first = process["texts"][0]
        waited = process["second_token"] - process["built"]
        assert waited >= first["cache"] + first["first"] + first["second"]


def test_bytecode_is_as_pip_leaves_it(tmp_path, monkeypatch):
    """Where packages have none, it is written once, and processes look there."""
    asked = []
    monkeypatch.setattr(start.subprocess, "run", lambda command, env, **more: asked.append((command, env)))
    monkeypatch.setattr(start.importlib.util, "cache_from_source", lambda path: path)
    assert start.bytecode(tmp_path) == {} and not asked
    monkeypatch.setattr(start.importlib.util, "cache_from_source", lambda path: path + "-missing")
    for _ in range(2):
        found = start.bytecode(tmp_path)
        assert found == dict(PYTHONPYCACHEPREFIX=str(tmp_path / "python"), PYTHONDONTWRITEBYTECODE="")
        (tmp_path / "python").mkdir(exist_ok=True)
    ((command, env),) = asked
    assert "compileall" in command and env["PYTHONPYCACHEPREFIX"] == found["PYTHONPYCACHEPREFIX"]
