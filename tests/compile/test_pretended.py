"""What runs on a GPU compiles for one, also where there is none."""

import json
import subprocess
import sys

import pytest

from . import pretended

MOST_SETS = 3  # of block sizes, of a kernel


@pytest.mark.slow
@pytest.mark.skipif(pretended.missing() is not None, reason=str(pretended.missing()))
def test_kernels_compile_for_a_gpu(tmp_path):
    """All functions of caches and of the vLLM plugin, and hardly a kernel in several sets of block sizes."""
    command = [sys.executable, "-m", "tests.compile.pretended"]
    done = subprocess.run(
        command, env=pretended.environment(tmp_path), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    failed = {x["name"]: x["error"] for x in found if x["error"]}
    assert not failed
    modules = {x["name"].removeprefix("fade_fast.").rpartition(".")[0] for x in found}
    assert modules >= {"kernels.decode", "kernels.matched", "kernels.rotated", "kernels.select"}
    assert modules >= {"kernels.pages", "kernels.summaries", "policies.select", "vllm.single"}
    assert all(x["kernels"] > 0 for x in found)
    tuned = {x["name"]: x["compiled"] for x in found if x["compiled"] > MOST_SETS * x["kernels"]}
    assert not tuned
