"""Compile what a deployment needs before it is needed, and keep it in one file for other processes.

A fresh process spends most of the time before its second token on compilation. `warm` runs short texts of the
kinds that a deployment will see. Everything that they compile can be stored, and a process that loads it
compiles nothing again.
"""

import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch
import transformers
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from fade_ref.config import FadeConfig

from ..compile import stored
from ..errors import known_keywords
from ..saved.files import whole
from .create import FIELDS, create_cache
from .models import CACHE_NAME, text_config
from .names import MODES

MAGIC = b"fade warm 1\n"
NEW = 16  # tokens of a text: enough for steps to be captured, and for a demotion to be compiled


@dataclasses.dataclass(frozen=True)
class Warmed:
    """What `warm` did.

    Attributes:
        seconds: in all. loaded: how many of the artifacts of the file could be used; 0 without a file.
        compiled, found: graphs that were compiled, and graphs that caches on disk had.
        file_bytes: size of the file; 0 without one.
    """

    seconds: float
    loaded: int
    compiled: int
    found: int
    file_bytes: int

    def __str__(self) -> str:
        return (
            f"warm in {self.seconds:.1f} s: {self.compiled} graphs compiled, {self.found} found"
            + (f" ({self.loaded} artifacts loaded)" if self.loaded else "")
            + (f"; {self.file_bytes / 1e6:.1f} MB stored" if self.file_bytes else "")
        )


@known_keywords(FIELDS)
def warm(
    model: PreTrainedModel,
    config: str | FadeConfig | Sequence[str | FadeConfig] = "safe",
    *,
    batches: Iterable[int] = (1,),
    lengths: Iterable[int] = (1024,),
    modes: Iterable[str] = ("greedy",),
    max_length: int | None = None,
    file: str | os.PathLike | None = None,
) -> Warmed:
    """Run texts of each kind once, so that later ones of the kind find everything compiled.

    Args:
        model: the model, on the device that will serve it.
        config: one or several presets or configurations.
        batches: numbers of rows. With beams, a row is a text.
        lengths: tokens of the prompts. Kernels are compiled for the size of the buffers that a prompt of
            such a length gets.
        modes: of `MODES`. A draft is of one text, so "drafted" runs with one row.
        max_length: as in `create_cache`.
        file: if it exists, it is loaded first. In the end, it is written if anything was compiled that it
            did not hold. It is of use on machines with the same GPU, torch and Triton. It contains code:
            load only files that you trust.

    Raises:
        ValueError: an unknown mode, a number below 1, or a file that `warm` did not write or that is damaged.
        OSError: the file cannot be read or written.
    """
    batches, lengths, modes = tuple(batches), tuple(lengths), tuple(modes)
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"mode {mode!r}: one of {', '.join(MODES)} is allowed")
    if min((*batches, *lengths), default=1) < 1:
        raise ValueError(f"batches {batches} and lengths {lengths}: numbers of at least 1 are allowed")
    started, before = time.perf_counter(), compiled_graphs()
    path = None if file is None else Path(file)
    loaded = load_compiled(path) if path and path.exists() else 0
    configs = [config] if isinstance(config, str | FadeConfig) else list(config)
    for each in configs:
        for batch, length, mode in _texts(batches, lengths, modes):
            _run(model, each, batch, length, mode, max_length)
    compiled, found = (now - then for now, then in zip(compiled_graphs(), before))
    size = 0
    if path:
        if compiled or not loaded:
            save_compiled(path)
        size = path.stat().st_size if path.exists() else 0
    return Warmed(time.perf_counter() - started, loaded, compiled, found, size)


def _texts(batches, lengths, modes) -> list[tuple[int, int, str]]:
    """Batch, length and mode of each text, none of them twice."""
    texts = [(1 if mode == "drafted" else b, n, mode) for mode in modes for n in lengths for b in batches]
    return list(dict.fromkeys(texts))


@torch.no_grad()
def _run(model, config, batch: int, length: int, mode: str, max_length: int | None) -> None:
    cache = create_cache(model, config, max_length=max_length)
    generator = torch.Generator().manual_seed(0)
    size = (batch, length)
    ids = torch.randint(text_config(model).vocab_size, size, generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    if mode == "padded":
        mask[-1, : length // 4] = 0
    options = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0) | MODES[mode]
    model.generate(ids, attention_mask=mask, **{CACHE_NAME: cache}, **options)


def compiled_graphs() -> tuple[int, int]:
    """Graphs that Inductor compiled so far, and those that were found on disk."""
    found = counters["inductor"]["fxgraph_cache_hit"] + stored.counts["loaded"]
    compiled = counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_bypass"]
    return compiled + stored.counts["compiled"], found  # Inductor counts none that is compiled ahead of time


# -- the file


def _kind() -> dict[str, str]:
    """What compiled code depends on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    kind = dict(torch=torch.__version__, transformers=transformers.__version__, device=device)
    with suppress(metadata.PackageNotFoundError):  # Inductor's compiler for GPUs
        kind["triton"] = metadata.version("triton")
    return kind


def save_compiled(path: str | os.PathLike) -> int:
    """Store all that this process has compiled so far. Returns the bytes; 0 if there is nothing to store.

    Raises `OSError` if the file cannot be written.
    """
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        return 0
    artifacts, _ = saved
    head = _kind() | dict(sha256=hashlib.sha256(artifacts).hexdigest())
    with whole(path) as written:
        written.write_bytes(MAGIC + json.dumps(head).encode() + b"\n" + artifacts)
    return len(artifacts)


def load_compiled(path: str | os.PathLike) -> int:
    """Load what `save_compiled` stored. Returns the number of artifacts that are now in the caches.

    What was compiled with other versions, or for another device, is of no use and is left out: 0.

    Raises `ValueError` if the file is of another kind or damaged, `OSError` if it cannot be read.
    """
    data = Path(path).read_bytes()
    line, _, artifacts = data.removeprefix(MAGIC).partition(b"\n")
    if not data.startswith(MAGIC):
        raise ValueError(
            f"{path} holds no compiled code of `fade warm`: give a file that it wrote, or a path without a "
            "file"
        )
    try:
        head = json.loads(line)
        whole_file = head.pop("sha256") == hashlib.sha256(artifacts).hexdigest()
    except (ValueError, KeyError, AttributeError):
        whole_file = False
    if not whole_file:
        raise ValueError(f"{path}: this file of `fade warm` is damaged: delete it, and it is made again")
    if head != _kind():
        return 0
    info = torch.compiler.load_cache_artifacts(artifacts)
    return 0 if info is None else sum(map(len, info.artifacts.values()))
