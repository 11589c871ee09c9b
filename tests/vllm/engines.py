"""Engines of vLLM in this process, one at a time, and what the tests ask of them.

vLLM reads its environment when it is imported, so a test module imports this one first.
"""

import contextlib
import functools
import gc
import importlib.util
import os
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: .ci/run makes an environment for it", allow_module_level=True)

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine runs in this process, where tests can look into it
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from fade_fast.hf import calibration, loading  # noqa: E402

from ..conftest import unavailable  # noqa: E402

BLOCK = 32  # tokens in a page
CHUNK = 96  # most tokens of a step: longer prompts are cut


@functools.cache
def smollm2() -> str:
    """The folder or hub id of SmolLM2-135M-Instruct."""
    try:
        model, _ = loading.load(device="cpu")
    except loading.LoadError as error:
        unavailable(str(error))
    name = model.name_or_path
    if name == loading.WHEEL:
        return str(loading.cache_folder() / loading.WHEEL.replace("==", "-"))
    return str(Path(name)) if os.path.isdir(name) else name


@functools.cache
def calibration_file(folder: str) -> str:
    """A calibration of SmolLM2 in `folder`, measured as by `fade vllm-calibrate`."""
    model, _ = loading.load(device="cpu", dtype="fp32")
    ids = calibration.built_in(model)
    path = os.path.join(folder, "smollm2.safetensors")
    calibration.calibrate(model, ids, list(range(model.config.num_hidden_layers))).save(path)
    return path


@contextlib.contextmanager
def engine(model: str, fade: dict | None = None, **options):
    """An engine in float32, with our backend if `fade` are its options. It ends with the block."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.platforms.cpu import CpuPlatform

    if fade is not None:
        options |= dict(attention_backend="CUSTOM", additional_config={"fade": fade})
    settings = dict(
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        block_size=BLOCK,
        max_num_batched_tokens=CHUNK,
        enable_chunked_prefill=True,
        kv_cache_memory_bytes=1 << 27,
        disable_log_stats=False,
        seed=0,
    )
    llm = LLM(model, **(settings | options))
    # The next engine of this process would register kernels again, which fails once numba is loaded.
    CpuPlatform.register_triton_kernel_overrides = classmethod(lambda *args, **kwargs: None)
    try:
        yield llm
    finally:
        with contextlib.suppress(Exception):
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def runner(llm):
    """The model runner of an engine in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def layers(llm) -> dict:
    """The attention layers by name."""
    return runner(llm).compilation_config.static_forward_context


def pages(llm) -> tuple[int, int]:
    """Number of pages, and bytes of the caches of all layers, each storage once."""
    caches = [layer.kv_cache for layer in layers(llm).values()]
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in caches}
    return len(caches[0]), sum(held.values())


def forget(llm, byte: int) -> None:
    """Forget all prefixes, and fill the pages with `byte`: 255 is NaN, 60 in each byte of fp16 is 1.06.

    What a request reads before it was written then differs from engine state to engine state.
    """
    assert llm.reset_prefix_cache()
    for layer in layers(llm).values():
        storage = layer.kv_cache.untyped_storage()
        torch.empty(0, dtype=torch.uint8).set_(storage).fill_(byte)


def ask(llm, prompts, tokens=16, **options):
    """Greedy continuations, as lists of token ids, and the number of prompt tokens that were prefix hits."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, **options)
    outputs = llm.generate([dict(prompt_token_ids=p) for p in prompts], params, use_tqdm=False)
    return [list(x.outputs[0].token_ids) for x in outputs], [x.num_cached_tokens for x in outputs]


def ranked(llm, prompts, tokens=16):
    """Greedy continuations as `ask`, and for each new token the log-probabilities of the five likeliest."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=5)
    outputs = [
        x.outputs[0]
        for x in llm.generate([dict(prompt_token_ids=p) for p in prompts], params, use_tqdm=False)
    ]
    likely = [[{i: x.logprob for i, x in step.items()} for step in out.logprobs] for out in outputs]
    return [list(x.token_ids) for x in outputs], likely


def beams(llm, prompts, tokens=6, width=3):
    """Token ids of the beams of each prompt, best first."""
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=width, max_tokens=tokens, ignore_eos=True)
    found = llm.beam_search([dict(prompt_token_ids=p) for p in prompts], params)
    return [[list(x.tokens) for x in out.sequences] for out in found]


def preemptions(llm) -> int:
    """How many requests lost their pages so far."""
    return sum(int(m.value) for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
