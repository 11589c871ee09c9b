"""Compile what runs on a GPU, on a machine without one: `python -m tests.compile.pretended PART PARTS`.

A run on a CPU records with which arguments each function is compiled. Then the process pretends that an H200
is there. Arguments are fake tensors. Inductor generates Triton code, and Triton and `ptxas` make machine code
of it. Nothing is launched. This finds what Inductor or Triton refuses. It says nothing about results or time.

It needs a build of torch for CUDA, which asks a driver about the device. A library with a few of the driver's
functions answers. `environment` builds it with a C compiler. The patches below fit torch 2.11. The process
prints a line of JSON for each function. With PARTS processes, each compiles a part of the functions.
"""

import contextlib
import copy
import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch.utils._pytree import tree_flatten, tree_map

TORCH = "2.11."
SHORT = "step, float16", "3 bits holes"  # group and name of a parity case
LITTLE = 8  # bytes that a thread may keep in memory instead of registers: two numbers
MANY = 64  # times the tokens of a recorded call, for functions that serve any number
#: Functions of the driver and of the runtime that torch calls before it would launch anything.
DRIVER = """
int cuDevicePrimaryCtxGetState(int i, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
"""
RUNTIME = """
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -3; return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int order) { return *stream = (void *)8, 0; }
int cudaStreamQuery(void *stream) { return 0; }
"""
H200 = types.SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    total_memory=140 << 30, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, L2_cache_size=60 << 20,
)  # fmt: skip


def missing() -> str | None:
    """Why this machine cannot do that; None if it can."""
    if torch.cuda.is_available():
        return "there is a GPU"
    if not torch.version.cuda or not torch.__version__.startswith(TORCH):
        return f"only torch {TORCH}* for CUDA can pretend that there is a GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None if shutil.which("cc") else "there is no C compiler"


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that pretends, with libraries in `folder`."""
    for name, source in (("libcuda.so.1", DRIVER), ("runtime.so", RUNTIME)):
        (folder / "source.c").write_text(source)
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, folder / "source.c"]
        subprocess.run(command, check=True)
    found = dict(LD_LIBRARY_PATH=str(folder), LD_PRELOAD=str(folder / "runtime.so"), OMP_NUM_THREADS="1")
    found |= dict(TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"), TRITON_CACHE_DIR=str(folder / "triton"))
    return os.environ | found


# -- what is compiled


class Like:
    """What a tensor is like: a leaf of recorded arguments."""

    def __init__(self, x: torch.Tensor):
        self.size, self.stride, self.dtype = tuple(x.shape), x.stride(), x.dtype
        self.dynamic = sorted(getattr(x, "_dynamo_dynamic_indices", ()))

    def of_more_tokens(self, tokens: int) -> "Like":
        """The same with `MANY` times as many tokens, if they are its last axis."""
        if len(self.size) < 2 or self.size[-1] != tokens:
            return self
        more = copy.copy(self)
        more.size = (*self.size[:-1], tokens * MANY)
        more.stride = tuple(x * MANY if x >= tokens else x for x in self.stride)
        return more

    def fake(self, device: str = "cuda") -> torch.Tensor:
        x = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=device)
        for axis in self.dynamic:
            torch._dynamo.mark_dynamic(x, axis)
        return x


def likes(tree):
    return tree_map(lambda x: Like(x) if isinstance(x, torch.Tensor) else x, tree)


def fakes(tree):
    return tree_map(lambda x: x.fake() if isinstance(x, Like) else x, tree)


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple]]:
    """Functions that are compiled in this context on a GPU run eagerly, and their arguments are listed."""
    from fade_fast.compile import compiled

    calls: list[tuple] = []

    def first_call(self, key, dynamic_sizes, pinned, args, constants):
        tiles = pinned()  # which may mark dynamic sizes
        calls.append((self, likes(dynamic_sizes), tiles, likes(args), constants))
        bound = compiled.bind(self.function, constants)
        self.graphs[key] = compiled.Traced(bound, bound.__code__)
        return bound(dynamic_sizes, *args)

    kind = compiled.Compiled
    before = kind._first_call, kind._knows
    compiled.COMPILED_ON.add("cpu")
    kind._first_call = first_call
    kind._knows = lambda self, key, *call: key in self.graphs
    try:
        yield calls
    finally:
        kind._first_call, kind._knows = before
        compiled.COMPILED_ON.discard("cpu")
        for function in {call[0] for call in calls}:
            function.graphs.clear()


def run() -> None:
    """On a CPU: texts with several caches, and steps of the vLLM plugin; heads as of an 8B model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fade_fast import FadeConfig, create_cache
    from fade_fast.cache import sharing
    from fade_fast.kernels import packed, rotated, summaries
    from fade_fast.measure import paged_attention
    from parity.case import Found
    from parity.subjects import attention

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=32, vocab_size=128,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    recall = replace(FadeConfig.recall(), select=256)
    texts = [
        (FadeConfig.int4(), 600),
        (recall, 1100),
        (replace(recall, cold=None, index="deviation+k2", select=0.9, select_max=256), 1100),
    ]
    for config, length in texts:
        cache = create_cache(model, config)
        ids = torch.randint(128, (2, length))
        model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False, pad_token_id=0)
    keys, values = (torch.randn(1, 8, 512, 128, dtype=torch.bfloat16) for _ in range(2))
    rotated.encode_both(keys, values, keys[:, :, ::64].half(), torch.eye(128), (4, 4))
    # Beams share a short prompt, and slots are read in small steps: both are larger on a GPU.
    small = dict(_best_step=lambda heads: 128, coarsest=lambda heads: 64)
    with mock.patch.multiple(packed, **small), mock.patch.object(sharing, "LEAST_COMPILED", 1):
        cache = create_cache(model, FadeConfig.int4(), max_length=1200)
        ids = torch.randint(128, (2, 600))
        model.generate(ids, past_key_values=cache, max_new_tokens=3, num_beams=4, pad_token_id=0)
    shape = replace(paged_attention.Shape(), most=1024)
    for bits, codec in ((4, "rotated"), (4, "matched")):
        paged_attention.measure(paged_attention.Case(2, 400, bits, codec), shape, "cpu")
    # Of a tier with few tokens, the sums over its parts have one summand, and are no sums to the compiler.
    (short,) = (case for case in attention.collect() if case.group == SHORT[0] and case.name == SHORT[1])
    short.run(Found("cpu", fused=True), 0)
    # As many pages as channels: the sum over pages is as long as those of the products.
    half, page, pages = torch.float16, 64, 128
    summary = torch.zeros(8, 8, pages, 128, dtype=half)
    valid = torch.ones(8, 1, pages * page, dtype=torch.bool)
    asked = torch.zeros(8, 32, 1, 128, dtype=half)
    summaries.page_mass("deviation", asked, summary, summary, valid, pages, page, scaling=0.1, softcap=None)
    prefill()


def prefill() -> None:
    """On a CPU: prefill steps of the vLLM plugin, with contexts in one part and in several."""
    from fade_fast.measure import paged_attention, paged_prefill
    from fade_fast.vllm import batches

    shape, most = replace(paged_attention.Shape(), most=1024), batches.TOGETHER
    try:
        for bits, codec, tokens in ((4, "rotated", 256), (8, "rotated", most), (4, "matched", most)):
            batches.TOGETHER = tokens
            case = paged_prefill.Case(1, 300, past=700, decodes=1, context=90, bits=bits, codec=codec)
            made = paged_prefill.Step(case, shape, "cpu")
            made.layer.forward(made.pool.cache, *made.args)
    finally:
        batches.TOGETHER = most


# -- the pretended GPU


def pretend() -> tuple[contextlib.AbstractContextManager, list[tuple[str, int]]]:
    """From here on there seems to be an H200.

    Returns the mode of fake tensors, and the kernels compiled, each with `stack_bytes`.
    """
    from torch._dynamo import device_interface
    from torch._inductor import config
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    cuda, nothing = torch.cuda, lambda *args: None
    guard = lambda *args: contextlib.nullcontext()  # noqa: E731
    for place in (cuda, device_interface.CudaInterface):
        place.is_available, place.device_count = lambda: True, lambda: 1
        place.current_device, place.synchronize = lambda: 0, nothing
        place.get_device_properties, place.get_device_capability = lambda *args: H200, lambda *args: (9, 0)
    cuda.is_initialized, cuda._lazy_init, cuda.device, cuda._DeviceGuard = lambda: True, nothing, guard, guard
    cuda.get_rng_state, cuda.set_rng_state = lambda *args: torch.zeros(16, dtype=torch.uint8), nothing
    interface = device_interface.CudaInterface
    interface.get_compute_capability = interface.get_raw_stream = staticmethod(lambda *args: 90)
    interface.exchange_device = interface.maybe_exchange_device = staticmethod(lambda *args: 0)
    interface.raise_if_triton_unavailable, interface.is_triton_capable = nothing, lambda *args: True
    interface.device = guard
    interface.Worker.get_device_properties = staticmethod(lambda *args: H200)
    interface.Worker.current_device = staticmethod(lambda: 0)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch._C._dynamo.guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )

    limits = dict(max_shared_mem=H200.shared_memory_per_block_optin, max_num_regs=65536)
    limits |= dict(multiprocessor_count=132, warpSize=32)
    driver.set_active(
        types.SimpleNamespace(
            utils=types.SimpleNamespace(get_device_properties=lambda device: limits),
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
            get_device_interface=lambda: cuda,
        )
    )
    triton_helpers.set_driver_to_gpu = nothing
    # These passes need tensors on the device.
    fuse_attention._sfdp_init = pad_mm._pad_mm_init = misc_patterns._misc_patterns_init = nothing
    config.joint_graph_constant_folding = False
    config.compile_threads, config.force_disable_caches = 1, True
    config.use_static_cuda_launcher = False  # which keeps no machine code

    kernels: list[tuple[str, int]] = []
    tuner = triton_heuristics.CachingAutotuner
    precompile = tuner._precompile_config

    def counted(self, config):
        made = precompile(self, config)
        kernels.append((self.fn.__name__, stack_bytes(made.kernel.asm["cubin"])))
        return made

    tuner._precompile_config, tuner.run = counted, lambda self, *args, **kwargs: None
    tuner._make_launchers = lambda self: setattr(self, "launchers", [nothing])
    fake_tensor.init_gpu_context = nothing
    return fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), kernels


def stack_bytes(cubin: bytes) -> int:
    """Bytes of memory that a thread of a compiled kernel uses besides registers, by a tool of Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", told).group(1))


class NotRun(Exception):
    """The function is compiled, and would be launched now."""


def compile_all(calls: list[tuple]) -> Iterator[dict]:
    """Compile the recorded calls.

    What was found of each: the number of kernels, and of sets of block sizes; kernels that do not fit into
    registers with any set; and the error.
    """
    from torch._inductor.output_code import CompiledFxGraph

    mode, kernels = pretend()

    def not_run(self, inputs):
        raise NotRun

    CompiledFxGraph.__call__ = not_run
    for function, sizes, tiles, args, constants in calls:
        kernels.clear()
        error = None
        with mode:
            # A marker, of which Python only reads the length, lies on the CPU.
            given = [x.fake("cpu" if x.dtype == torch.uint8 and len(x.size) == 1 else "cuda") for x in sizes]
            try:
                function(given, lambda tiles=tiles: tiles, *fakes(args), **constants)
            except NotRun:
                pass
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"[:2000]
        name = f"{function.function.__module__}.{function.function.__name__}"
        names = {kernel for kernel, _ in kernels}
        spilled = sorted(names - {kernel for kernel, stack in kernels if stack <= LITTLE})
        yield dict(name=name, kernels=len(names), compiled=len(kernels), spilled=spilled, error=error)


def distinct(calls: list[tuple]) -> list[tuple]:
    """One call of those that differ in sizes alone."""
    found: dict[tuple, tuple] = {}
    for call in calls:
        function, _, _, args, constants = call
        leaves, structure = tree_flatten(args)
        dtypes = tuple(x.dtype if isinstance(x, Like) else x for x in leaves)
        found.setdefault((function, structure, dtypes, *constants.items()), call)
    return list(found.values())


def longer(calls: list[tuple]) -> Iterator[tuple]:
    """Calls of functions for any size, with many tokens: Inductor then gives more elements to a thread."""
    from fade_fast.compile.compiled import CompiledForSizes

    for function, sizes, tiles, args, constants in calls:
        if isinstance(function, CompiledForSizes):
            tokens = args[0].size[-1]
            more = tree_map(lambda x: x.of_more_tokens(tokens) if isinstance(x, Like) else x, args)  # noqa: B023
            yield function, sizes, tiles, more, constants


def main() -> None:
    part, parts = map(int, sys.argv[1:])
    logging.disable(logging.CRITICAL)
    with recorded() as calls:
        run()
    calls = distinct(calls)
    for found in compile_all([*longer(calls), *calls][part::parts]):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
