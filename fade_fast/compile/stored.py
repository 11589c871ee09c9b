"""Compiled functions on disk, so that a later process neither traces nor compiles them.

Inductor keeps the code of kernels on disk. To find it, a process traces a function again, which takes one to
two seconds. A stored function is found by its name and its key, and is loaded in some hundredths of a second.
The files lie beside those of Inductor, and hold code as those do. They are read and written by
`torch.compiler`'s compilation ahead of time.

The name of a file is a hash of all that a function depends on, our source included. So a file is never out of
date. What a process changes in our functions after their import is not in the source: such a process must not
store, or load, see `parity/mutation.py`.
"""

import contextlib
import functools
import hashlib
import io
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch._C._dynamo.guards import GlobalStateGuard
from torch._inductor import config as inductor
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.compiler._cache import CacheArtifact, CacheArtifactFactory, CacheArtifactManager

from fade_ref import config

PACKAGE = __name__.partition(".")[0]
FOLDER = PACKAGE  # beside those of Inductor; also the kind of these files among its artifacts
UNSUITABLE = b"cannot be loaded"  # instead of a function for which that is so
#: What this process did, for measurements.
counts: Counter[str] = Counter()  # functions "compiled" ahead of time, "stored", and "loaded"
seconds: dict[str, list[float]] = {}  # of each compilation, by the name of the function


class Stored:
    """A function of `*args` that was compiled ahead of time, by this process or by another one."""

    def __init__(self, function):
        self._function = function.fn  # without its checks, of which `serves` has the expensive part prepared
        self._guards = function._artifacts.guard_manager
        self._locals = function.prepare_f_locals()

    def serves(self, *args) -> bool:
        """Whether the code is right for these arguments and the state of the process, as Dynamo would ask."""
        return self._guards.check(self._locals | dict(args=args))

    def __call__(self, *args):
        return self._function(*args)


def name_of(function: Callable, device: torch.device, options: dict, *key) -> str | None:
    """The name under which a function compiled for `device` is stored; None if it cannot be stored.

    `key` is all that the compiled function depends on besides our source, the versions of libraries, the
    GPU, the state of the process, and the settings of Inductor, which `options` changes.
    """
    if not inductor.fx_graph_cache or inductor.force_disable_caches or not _is_ours(function):
        return None
    settings = inductor.save_config_portable() | options
    which = function.__module__, function.__qualname__
    state = GlobalStateGuard().__getstate__()  # a graph serves no other: gradients, autocast, threads, ...
    known = repr((which, _surroundings(device), state, sorted(settings.items(), key=repr), key))
    if " at 0x" in known:  # an object that says nothing of itself but its address
        return None
    return hashlib.sha256(known.encode()).hexdigest()


def found(name: str, function: Callable, options: dict, args: tuple, marked: tuple) -> Stored | None:
    """The function of that name, loaded, or compiled now and stored; None if it is not for `args`.

    `marked` are the same arguments with marks of dynamic dimensions.
    """
    data = _read(name)
    if data == UNSUITABLE:
        return None
    graph = _loaded(data) if data else None
    if graph is not None:
        counts["loaded"] += 1
        CacheArtifactManager.record_artifact(StoredArtifact.type(), name, data)
    else:
        graph = _compiled_and_stored(name, function, options, *marked)
    return graph if graph and graph.serves(*args) else None


def _loaded(data: bytes) -> Stored | None:
    """The function in a file; None if it cannot be loaded."""
    try:
        return Stored(torch.compiler.load_compiled_function(io.BytesIO(data)))
    except Exception:  # noqa: BLE001 - whatever is wrong: the function is compiled
        return None


def _compiled_and_stored(name: str, function: Callable, options: dict, *args) -> Stored | None:
    """Compile a function for arguments like these, and store it; None if that fails.

    The function is not called. If it cannot be written to a file, it is compiled all the same. If its file
    could not be loaded, the file says so. Later processes then leave it to Dynamo, and find what Inductor has
    stored.
    """
    started = time.perf_counter()
    ahead = torch._dynamo.config.patch(enable_aot_compile=True)
    with ahead, torch._functorch.config.patch(bundled_autograd_cache=True):
        try:
            graph = torch.compile(function, fullgraph=True, options=options)
            compiled = graph.aot_compile((args, {}))
        except Exception:  # noqa: BLE001 - the interface is new, and the caller knows another way
            return None
    counts["compiled"] += 1
    seconds.setdefault(function.__code__.co_name, []).append(time.perf_counter() - started)
    data = UNSUITABLE
    with contextlib.suppress(Exception):  # something that cannot be pickled
        written = type(compiled).serialize(compiled).serialized_data
        data = written if _loaded(written) else UNSUITABLE
    with contextlib.suppress(Exception):  # a full disk
        _write(name, data)
        counts["stored"] += data != UNSUITABLE
        CacheArtifactManager.record_artifact(StoredArtifact.type(), name, data)
    return Stored(compiled)


def _path(name: str) -> Path:
    return Path(cache_dir()) / FOLDER / name


def _read(name: str) -> bytes | None:
    try:
        return _path(name).read_bytes()
    except OSError:
        return None


def _write(name: str, data: bytes) -> None:
    from torch._inductor.codecache import write_atomic

    write_atomic(str(_path(name)), data, make_dirs=True)


def _is_ours(function: Callable) -> bool:
    """Whether `function` belongs to this package, and a file can name it."""
    module, name = function.__module__ or "", function.__qualname__
    ours = module.partition(".")[0] == PACKAGE
    return ours and getattr(sys.modules.get(module), name, None) is function


@functools.cache
def _surroundings(device: torch.device) -> tuple:
    """What compiled code depends on besides the function."""
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    else:
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        kind = platform.machine(), str(pick_vec_isa())
    versions = [torch.__version__, platform.python_version()]
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions.append(metadata.version("triton"))
    return kind, *versions, _source()


@functools.cache
def _source() -> str:
    """A hash of our source: a compiled function may contain any part of it."""
    digest = hashlib.sha256()
    for root in (Path(__file__).parents[1], Path(config.__file__).parent):
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@CacheArtifactFactory.register
class StoredArtifact(CacheArtifact):
    """A stored function in what `torch.compiler.save_cache_artifacts` returns."""

    @staticmethod
    def type() -> str:
        """Its name among the kinds of artifacts."""
        return FOLDER

    def populate_cache(self) -> None:
        """Write it to the disk of this machine."""
        _write(self.key, self.content)
