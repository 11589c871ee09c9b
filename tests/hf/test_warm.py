"""What a process compiles, kept in a file for others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fade_fast
from fade_fast.hf import warm as warming
from fade_ref.config import FadeConfig

from ..models import SAFE, tiny_llama

#: A process that compiles its steps on a CPU, as they are compiled on a GPU.
PROCESS = """
import json, sys, time
import torch
from transformers import CompileConfig
import fade_fast
from fade_fast.hf import cache
from fade_ref.config import FadeConfig
from tests.models import SMALL, tiny_llama

made = cache.DecodeGraph
cache.DecodeGraph = lambda positions, layers, compileable: made(positions, layers, True)
model = tiny_llama(layers=1, dtype=torch.bfloat16)
model.generation_config.compile_config = CompileConfig(fullgraph=True, mode=None, dynamic=None)
model.generation_config.compile_config._compile_all_devices = True
started = time.perf_counter()
found = fade_fast.warm(model, FadeConfig(**SMALL), batches=(2,), lengths=(40,), file=sys.argv[1])
print(json.dumps([found.compiled, found.found, found.loaded, found.file_bytes]))
"""


def process(file, caches) -> list:
    """What a fresh process with its own caches on disk does."""
    root = Path(__file__).parents[2]
    own = dict(TORCHINDUCTOR_CACHE_DIR=str(caches), PYTHONPATH=str(root), OMP_NUM_THREADS="1")
    command = [sys.executable, "-W", "ignore", "-c", PROCESS, str(file)]
    done = subprocess.run(
        command, env=os.environ | own, cwd=root, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_fresh_process_with_the_file_compiles_nothing(tmp_path):
    file = tmp_path / "model.warm"
    compiled, found, loaded, size = process(file, tmp_path / "one")
    assert compiled > 0 and not loaded and size == file.stat().st_size > 1000
    written = file.stat().st_mtime_ns
    again, found, loaded, _ = process(file, tmp_path / "two")
    assert again == 0 and found >= compiled and loaded > 0
    assert file.stat().st_mtime_ns == written


def test_texts_of_each_kind_are_run(monkeypatch):
    """Rows, padding, beams and drafts as they were asked for; a draft is of one text."""
    model, seen = tiny_llama(), []

    monkeypatch.setattr(warming, "CACHE_NAME", "cache")
    monkeypatch.setattr(warming, "create_cache", lambda model, config, max_length: config)
    model.generate = lambda ids, **options: seen.append(
        (tuple(ids.shape), int((options["attention_mask"] == 0).sum()), options.get("num_beams"))
    )
    modes = ("greedy", "padded", "beams", "drafted")
    done = fade_fast.warm(model, [SAFE, FadeConfig()], batches=[1, 3], lengths=[20], modes=modes)
    greedy = [((1, 20), 0, None), ((3, 20), 0, None)]
    padded = [((1, 20), 5, None), ((3, 20), 5, None)]
    beams = [((1, 20), 0, 4), ((3, 20), 0, 4)]
    assert seen == 2 * [*greedy, *padded, *beams, ((1, 20), 0, None)]
    assert done.compiled == done.loaded == done.file_bytes == 0


def test_a_model_goes_on_as_before():
    model = tiny_llama()
    done = fade_fast.warm(model, SAFE, batches=(2,), lengths=(40,), modes=("sampled", "beams"))
    assert done.seconds > 0 and "0 graphs compiled" in str(done)


def test_what_cannot_be_warmed_is_refused(tmp_path):
    model, file = tiny_llama(), tmp_path / "x.warm"
    with pytest.raises(ValueError, match="mode 'greed': one of greedy"):
        fade_fast.warm(model, modes=("greed",))
    with pytest.raises(ValueError, match="at least 1"):
        fade_fast.warm(model, batches=(0,))
    with pytest.raises(TypeError, match="field of FadeConfig"):
        fade_fast.warm(model, n_sink=4)
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="no compiled code"):
        fade_fast.warm(model, file=file)


def test_a_file_that_is_damaged_or_of_another_machine(tmp_path, monkeypatch):
    file, taken = tmp_path / "x.warm", []
    monkeypatch.setattr(warming.torch.compiler, "save_cache_artifacts", lambda: (b"code", None))
    monkeypatch.setattr(warming.torch.compiler, "load_cache_artifacts", taken.append)
    assert warming.save_compiled(file) == 4
    assert warming.load_compiled(file) == 0 and taken == [b"code"]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged"):
        warming.load_compiled(file)
    warming.save_compiled(file)
    monkeypatch.setattr(warming, "_kind", lambda: dict(torch="1.0"))
    assert warming.load_compiled(file) == 0 and len(taken) == 1
