"""What runs on a GPU compiles for one, also where there is none."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from . import pretended

PARTS = 2  # processes
MOST_SETS = 4  # of block sizes, of a kernel; Inductor has six for a kernel of two axes without sums


@pytest.mark.slow
@pytest.mark.skipif(pretended.missing() is not None, reason=str(pretended.missing()))
def test_kernels_compile_for_a_gpu(tmp_path):
    """All functions of caches and of the vLLM plugin, and hardly a kernel in several sets of block sizes."""
    command, environment = [sys.executable, "-m", "tests.compile.pretended"], pretended.environment(tmp_path)
    with ThreadPoolExecutor(PARTS) as pool:
        done = pool.map(
            lambda part: subprocess.run(
                [*command, str(part), str(PARTS)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=500,
            ),
            range(PARTS),
        )
    found = []
    for process in done:
        assert process.returncode == 0, process.stderr[-3000:]
        found += [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    failed = {x["name"]: x["error"] for x in found if x["error"]}
    assert not failed
    modules = {x["name"].removeprefix("fade_fast.").rpartition(".")[0] for x in found}
    assert modules >= {"kernels.decode", "kernels.matched", "kernels.rotated", "kernels.select"}
    assert modules >= {"kernels.pages", "kernels.summaries", "policies.select", "vllm.single", "vllm.prefill"}
    assert all(x["kernels"] > 0 for x in found)
    tuned = {x["name"]: x["compiled"] for x in found if x["compiled"] > MOST_SETS * x["kernels"]}
    assert not tuned
    spilled = {x["name"]: x["spilled"] for x in found if x["spilled"]}
    assert not spilled
