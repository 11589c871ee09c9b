"""`fade bench parallel`: two processes measure as on two GPUs, and what their report says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fade_fast.measure import parallel

ROOT = Path(__file__).parents[2]


def run(file: Path, *asked: str, **environment: str) -> tuple[str, dict]:
    """What two processes of the command print, and the report that they write into `file`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fade_fast"]
    own = dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1") | environment
    options = dict(cwd=ROOT, capture_output=True, text=True, timeout=400, env=os.environ | own)
    asked = ["bench", "parallel", *asked, "--json", str(file)]
    done = subprocess.run([sys.executable, "-W", "ignore", *launcher, *asked], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_write_by_captured_steps_what_one_writes(tmp_path):
    _, report = run(tmp_path / "parallel.json", "--tiny", "--parts", "tokens")
    assert report["equal"] == dict.fromkeys(parallel.TOLD, parallel.WRITTEN)
    for name, told in report["texts"]["split"].items():
        assert told["captured"] > parallel.WRITTEN / 2 and not told["uncaptured"], name


@pytest.mark.slow
def test_two_processes_measure(tmp_path):
    """The table comes last, and tokens equal those of one process."""
    asked = "--device", "cpu", "--methods", "safe,static"
    printed, report = run(tmp_path / "parallel.json", *asked, CUDA_VISIBLE_DEVICES="")
    assert report["processes"] == 2 and report["equal"] == dict.fromkeys(parallel.TOLD, parallel.WRITTEN)
    assert (
        [r["method"] for r in report["one"]] == [r["method"] for r in report["split"]] == ["safe", "static"]
    )
    assert all(r["ms"] > 0 and not r["failed"] for r in report["one"] + report["split"])
    one, split = (report[name][0]["cache_bytes"] for name in ("one", "split"))
    assert split < 0.7 * one, "a process holds its heads only"
    assert report["collectives_ms"] > 0
    assert printed.endswith(parallel.show(report) + "\n")


def result(method: str, ms: float | None, **fields) -> dict:
    """A stored result of 8 rows."""
    speed = None if ms is None else 8e3 / ms
    about = dict(case="x", method=method, batch=8, length=32768, new=128, fill="random", ms=ms)
    return about | dict(tokens_per_s=speed) | fields


REPORT = dict(
    model="Llama-3.1-8B", device="H200", processes=2, torch="2", transformers="5", batch=8, length=32768,
    methods=["safe", "static"], written=48, small="4 layers, float32", equal=dict(safe=47),
    texts={name: dict(safe=dict(captured=46)) for name in ("one", "split")},
    collectives_ms=0.5, one_shot=False,
    one=[result("safe", 8.0), result("static", 16.0)],
    split=[result("safe", 5.0, captured=126), result("static", None, failed="out of memory")],
)  # fmt: skip


def test_a_report_says_whether_the_target_is_reached(tmp_path, capsys):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(REPORT))
    assert parallel.main(["--show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "safe has 1.60 times the tokens/s of one GPU; the target, 1.6, is reached" in shown
    assert "safe: 47 of 48 tokens equal those of one GPU" in shown
    assert "| safe | 8.00 | 1000.0 | 5.00 | 1600.0 | 1.60 | 126 of 127 |" in shown
    assert "| static | 16.00 | 500.0 | out of memory | - | - |" in shown
    slower = REPORT | dict(split=[result("safe", 5.1)])
    assert "**not reached**" in parallel.show(
        slower
    ) and "| static | 16.00 | 500.0 | not measured" in parallel.show(slower)


def test_one_process_alone_is_refused(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        parallel.main([])
    assert "torchrun --standalone --nproc-per-node 2" in capsys.readouterr().err


def test_the_first_token_that_differs():
    rows = [[1, 2, 3], [4, 5, 6]]
    one, split = dict(safe=dict(tokens=rows)), dict(safe=dict(tokens=[[1, 2, 3], [4, 9, 6]]))
    assert parallel.equal_tokens(one, split) == dict(safe=1)
    assert parallel.equal_tokens(one, one) == dict(safe=parallel.WRITTEN)
