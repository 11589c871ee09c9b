"""Compiled functions on disk: what is found again, what is not, and that both compute the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor

from fade_fast.compile import compiled as compiling
from fade_fast.compile import stored
from fade_fast.compile.compiled import Ahead, Compiled, CompiledForSizes, Traced
from parity.mutation import binary, changed


def scaled(dynamic_sizes, x, more=None, *, factor):
    """`x` times a factor plus the length of a marker: a function that a file can name."""
    added = x if more is None else x + more[0]
    return added * factor + len(dynamic_sizes[0])


def summed(dynamic_sizes, x):
    """Sums over heads of `x` [heads, D, tokens]."""
    return x.sum(0)


def dynamic_size(n: int) -> Tensor:
    x = torch.empty(1).expand(n)
    torch._dynamo.mark_dynamic(x, 0)
    return x


@pytest.fixture
def disk(compiled_on, monkeypatch, tmp_path):
    """Compiled functions of a CPU are stored, in a folder of this test. Those of this file belong to us."""
    compiled_on("cpu")
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "STORED_ON", {"cpu"})
    monkeypatch.setattr(stored, "PACKAGE", __name__.partition(".")[0])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    stored.counts.clear()
    stored.seconds.clear()
    cached = stored._surroundings
    yield tmp_path / stored.FOLDER
    cached.cache_clear()
    stored.counts.clear()
    stored.seconds.clear()
    torch._dynamo.reset()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*")}


def call(kernel: Compiled, n: int, *args, factor: int = 2) -> Tensor:
    return kernel([dynamic_size(n)], dict, *args, factor=factor)


def only(kernel: Compiled):
    (graph,) = kernel.graphs.values()
    return graph


def test_another_process_loads_what_one_has_compiled(disk):
    """A new `Compiled` is to this module what a new process is: it knows no graph."""
    x, found = torch.randn(3, 5), []
    for _ in range(2):
        kernel = Compiled(scaled)
        found.append([call(kernel, n, x) for n in (5, 9, 2)])
        assert isinstance(only(kernel), Ahead)
    assert stored.counts == dict(compiled=1, stored=1, loaded=1) and len(files(disk)) == 1
    for one, other, n in zip(*found, (5, 9, 2)):
        assert torch.equal(one, other) and torch.equal(one, x * 2 + n)


def test_a_file_is_for_one_kind_of_call(disk, monkeypatch):
    x = torch.randn(3, 5)
    kinds = [
        lambda: call(Compiled(scaled), 5, x),
        lambda: call(Compiled(scaled), 5, x, factor=3),
        lambda: call(Compiled(scaled), 5, x.double()),
        lambda: call(Compiled(scaled), 5, torch.randn(5, 3).T),
        lambda: call(Compiled(scaled), 5, torch.randn(4, 5)),
        lambda: call(Compiled(scaled), 5, x, [x]),
        lambda: call(Compiled(scaled, {"max_fusion_size": 3}), 5, x),
        lambda: Compiled(scaled)([dynamic_size(5)], lambda: {(None, 5): {"XBLOCK": 8}}, x, factor=2),
    ]
    for number, kind in enumerate(kinds, 1):
        kind()
        assert len(files(disk)) == number
    for kind in kinds:
        kind()
    assert len(files(disk)) == len(kinds) and stored.counts["loaded"] == len(kinds)
    for name, other in (("_source", lambda: "other code"), ("_surroundings", lambda device: "other GPU")):
        stored._surroundings.cache_clear()
        monkeypatch.setattr(stored, name, other)
        kinds[0]()
    with inductor.patch(max_fusion_size=5):
        kinds[0]()
    with torch.no_grad():
        kinds[0]()
    assert len(files(disk)) == len(kinds) + 4 and stored.counts["loaded"] == len(kinds)


def test_inference_tensors_and_the_mode_have_files_of_their_own(disk):
    """vLLM runs steps in inference mode, on tensors of both kinds. Each kind finds its file again."""
    with torch.inference_mode():
        given = torch.ones(3, 5)
    for again in (False, True):
        for inside in (False, True):
            for x in (given, torch.ones(3, 5)):
                kernel = Compiled(scaled)
                with torch.inference_mode(inside):
                    for _ in range(2):
                        assert torch.equal(call(kernel, 4, x), 2 * x + 4)
                assert isinstance(only(kernel), Ahead)
        assert stored.counts["compiled"] == 4 and stored.counts["loaded"] == 4 * again
    assert len(files(disk)) == 4


def test_a_name_says_all_and_only_what_matters(disk):
    """It is equal in another process, and within the compilation of a step, which changes settings."""
    name = lambda: stored.name_of(scaled, torch.device("cpu"), compiling.APART, 1)  # noqa: E731
    plain = name()
    with inductor.patch({"triton.native_matmul": True, "post_grad_custom_pre_pass": lambda graph: None}):
        assert name() == plain is not None
    code = "\n".join(
        [
            "import torch",
            "from fade_fast.compile import compiled, stored",
            f"from {__name__} import scaled",
            "stored.PACKAGE = 'tests'",
            "print(stored.name_of(scaled, torch.device('cpu'), compiled.APART, 1))",
        ]
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(
        command, env=os.environ | dict(PYTHONPATH=str(root)), cwd=root, capture_output=True, text=True
    )
    assert done.stdout.split()[-1:] == [plain], done.stderr


def test_what_cannot_be_stored_is_compiled_as_before(disk, monkeypatch):
    x = torch.randn(3, 5)

    def inner(dynamic_sizes, x, more=None, *, factor):
        return scaled(dynamic_sizes, x, more, factor=factor)

    def check(function=scaled, factor=2):
        kernel = Compiled(function)
        assert torch.equal(call(kernel, 5, x, factor=factor), x * 2 + 5) and isinstance(only(kernel), Traced)

    check(inner)  # no file can name it
    with inductor.patch(fx_graph_cache=False):
        check()
    with monkeypatch.context() as without:
        without.setattr(compiling, "STORED_ON", {"cuda"})
        check()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(stored, "PACKAGE", "fade_fast")
        check()
    assert stored.name_of(scaled, torch.device("cpu"), {}, object()) is None  # only its address is known
    with monkeypatch.context() as broken:
        broken.setattr(torch._dynamo.aot_compile, "aot_compile_fullgraph", None)
        check()
    assert not disk.exists() and not stored.counts


def test_a_function_that_no_file_can_hold_is_compiled_once(disk, monkeypatch):
    """A full disk is no error, and nothing is left behind."""

    def full(name, data):
        raise OSError("no space left on device")

    monkeypatch.setattr(stored, "_write", full)
    kernel, x = Compiled(scaled), torch.randn(3, 5)
    assert all(torch.equal(call(kernel, n, x), x * 2 + n) for n in (5, 6))
    assert stored.counts == dict(compiled=1) and not files(disk) and isinstance(only(kernel), Ahead)


def test_a_file_that_could_not_be_loaded(disk, monkeypatch):
    """It says so, and later processes leave the function to Dynamo."""
    x = torch.randn(3, 5)
    with monkeypatch.context() as refused:
        refused.setattr(torch.compiler, "load_compiled_function", None)
        kernel = Compiled(scaled)
        assert torch.equal(call(kernel, 5, x), x * 2 + 5) and isinstance(only(kernel), Ahead)
    kernel = Compiled(scaled)
    assert torch.equal(call(kernel, 6, x), x * 2 + 6) and isinstance(only(kernel), Traced)
    (path,) = disk.glob("*")
    assert path.read_bytes() == stored.UNSUITABLE and stored.counts == dict(compiled=1, stored=0)


def test_a_mutant_is_neither_stored_nor_replaced_by_what_is(disk):
    """Its name would be that of our source, which has not changed."""
    x = torch.randn(3, 5)
    call(Compiled(scaled), 5, x)
    with changed(scaled, binary("*").to("+")):
        kernel = Compiled(scaled)
        assert torch.equal(call(kernel, 5, x), x + 2 + 5) and isinstance(only(kernel), Traced)
    kernel = Compiled(scaled)
    assert torch.equal(call(kernel, 5, x), x * 2 + 5) and isinstance(only(kernel), Ahead)
    assert len(files(disk)) == 1


@pytest.mark.parametrize("data", [b"", b"something else", None], ids=["empty", "other", "cut"])
def test_a_damaged_file_is_written_anew(disk, data):
    x = torch.randn(3, 5)
    call(Compiled(scaled), 5, x)
    (path,) = disk.glob("*")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if data is None else data)
    assert torch.equal(call(Compiled(scaled), 6, x), x * 2 + 6)
    assert stored.counts == dict(compiled=2, stored=2) and path.stat().st_size > len(whole) // 2
    call(Compiled(scaled), 7, x)
    assert stored.counts["loaded"] == 1


@pytest.mark.parametrize("again", [False, True], ids=["compiled", "loaded"])
def test_a_call_that_a_graph_does_not_serve(disk, again):
    """What Dynamo would compile anew, it does: gradients are wanted, and sizes fall together."""
    x = torch.randn(3, 5)
    with torch.no_grad():
        kernel = Compiled(scaled)
        call(kernel, 5, x)
        if again:
            kernel = Compiled(scaled)
            call(kernel, 5, x)
    assert isinstance(only(kernel), Ahead)
    wanted = x.clone().requires_grad_()
    result = call(kernel, 5, wanted)
    result.sum().backward()
    assert torch.equal(wanted.grad, torch.full_like(x, 2)) and isinstance(only(kernel), Traced)
    with torch.no_grad():
        assert torch.equal(call(kernel, 9, x), x * 2 + 9)


@pytest.mark.parametrize("again", [False, True], ids=["compiled", "loaded"])
def test_one_file_for_all_numbers_of_heads_and_tokens(disk, again):
    kernel = CompiledForSizes(summed)
    run = lambda x: kernel([], dict, x)  # noqa: E731
    run(torch.randn(3, 8, 5))
    if again:
        kernel = CompiledForSizes(summed)
    for heads, tokens in ((2, 7), (9, 64), (3, 5), (64, 2)):
        x = torch.randn(heads, 8, tokens)
        torch.testing.assert_close(run(x), x.sum(0))
        assert not hasattr(x, "_dynamo_weak_dynamic_indices")  # marks would stay on tensors of others
    assert isinstance(only(kernel), Ahead)
    assert [stored.counts[name] for name in ("compiled", "stored", "loaded")] == [1, 1, again]
    x = torch.randn(3, 5, 8).mT  # other strides
    torch.testing.assert_close(run(x), x.sum(0))


def test_files_travel_with_those_of_inductor(disk, monkeypatch, tmp_path):
    """`torch.compiler.save_cache_artifacts` holds them, of a process that compiled or loaded them."""
    from torch.compiler._cache import CacheArtifactManager

    x, other = torch.randn(3, 5), tmp_path / "another machine"
    call(Compiled(scaled), 5, x)
    for _ in range(2):
        artifacts, _ = torch.compiler.save_cache_artifacts()
        CacheArtifactManager.clear()
        other = other / "x"
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(other))
        torch.compiler.load_cache_artifacts(artifacts)
        before = stored.counts["loaded"]
        assert torch.equal(call(Compiled(scaled), 6, x), x * 2 + 6)
        assert stored.counts["loaded"] == before + 1 and stored.counts["compiled"] == 1


PROCESS = """
import sys, torch
from fade_fast.compile import compiled, stored
from fade_fast.kernels import matched, rotated
compiled.COMPILED_ON.add("cpu"), compiled.STORED_ON.add("cpu")
torch.manual_seed(0)
found = []
for heads, tokens in ((2, 3), (4, 65)):
    y = torch.randn(2, heads, tokens, 16)
    found.append(matched.quantize(y, torch.eye(16).expand(heads, 16, 16).contiguous(), 4))
torch.save([list(x[:2]) for x in found], sys.argv[1])
print(*(stored.counts[name] for name in ("compiled", "stored", "loaded")))
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    """The encoder of `safe`: the second process compiles nothing, and its codes are those of the first."""
    found, root = [], Path(__file__).parents[2]
    for number in range(2):
        command = [sys.executable, "-W", "ignore", "-c", PROCESS, str(tmp_path / str(number))]
        own = dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path), PYTHONPATH=str(root), OMP_NUM_THREADS="1")
        done = subprocess.run(command, env=os.environ | own, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == (["3", "3", "0"] if number == 0 else ["0", "0", "3"])
        found.append(torch.load(tmp_path / str(number)))
    for one, other in zip(*found):
        assert all(torch.equal(x, y) for x, y in zip(one, other))
