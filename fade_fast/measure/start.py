"""What a fresh process waits for: `fade bench start`.

Two processes run one after the other, with a folder of their own for compiled code: the first one finds it
empty, the second one finds what the first one left. Both find the bytecode of packages, as pip writes it.
Each one makes a model of a named shape with random weights, and then runs texts of several batch sizes and
modes. For each text the table has the seconds to make its cache (the first one calibrates and verifies the
model), to the first token, from there to the second one, in all without the cache, and the graphs that were
compiled for it, with their seconds. `--layers N` makes a model of N layers. Without a GPU a tiny model runs.
Its steps are not compiled, and its times mean nothing.

A process that has not ended after `--limit` seconds is stopped. The texts that it has finished are shown, and
of the next one the seconds until there was a cache, and what was compiled for it.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

STARTED = time.perf_counter()  # before torch is imported
NEW = 16  # tokens of a text: enough for steps to be captured
LENGTH = 512  # tokens of a prompt
#: Texts by name: batch and mode. A draft is of one text.
TEXTS = {
    "greedy": (1, "greedy"),
    "again": (1, "greedy"),
    "sampled": (1, "sampled"),
    "B 2": (2, "greedy"),
    "B 2 padded": (2, "padded"),
    "B 4": (4, "greedy"),
    "B 8": (8, "greedy"),
    "beams": (2, "beams"),
    "drafted": (1, "drafted"),
}
CACHES = ("empty", "filled")  # what a process finds on disk


@dataclass
class Text:
    """What one text took, in seconds.

    Attributes:
        name: of `TEXTS`.
        cache: until there was a cache.
        first, second: to the first token, and from there to the second one.
        whole: of the whole call of `generate()`.
        graphs: seconds of compilation by the name of a function, and how many graphs: `{name: [n, seconds]}`.
        found: graphs that were found on disk. compiled: graphs that Inductor compiled.
    """

    name: str
    cache: float
    first: float
    second: float
    whole: float
    graphs: dict[str, list[float]] = field(default_factory=dict)
    found: int = 0
    compiled: int = 0


@dataclass
class Process:
    """What one process took.

    Attributes:
        caches: of `CACHES`.
        imported, built: seconds from its start until modules were imported, and until the model was there.
        second_token: seconds from its start to the second token of the first text.
        texts: those that it finished. stopped: why the others are missing.
        next: name, and `cache` and `graphs` as in `Text`, as far as known, of the text that it was at.
    """

    caches: str
    imported: float | None = None
    built: float | None = None
    second_token: float | None = None
    texts: list[Text] = field(default_factory=list)
    stopped: str | None = None
    next: dict = field(default_factory=dict)


# -- the measured process


def measure(
    model, name: str, config: str, length: int, say: Callable[..., None] = lambda **line: None
) -> Text:
    """Run one text of `TEXTS`. It is compiled where that was not done before.

    `say` is told when there is a cache.
    """
    import torch
    from torch._dynamo.utils import clear_compilation_metrics

    from fade_fast.compile import stored
    from fade_fast.hf.warm import compiled_graphs

    from . import generate

    batch, mode = TEXTS[name]
    generator = torch.Generator(model.device).manual_seed(1)
    size = (batch, length)
    ids = torch.randint(model.config.vocab_size, size, generator=generator, device=model.device)
    started = time.perf_counter()
    cache = generate.make_cache(model, config, None, length)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    made = time.perf_counter() - started
    say(next=dict(name=name, cache=made))
    clear_compilation_metrics()
    stored.seconds.clear()
    before, started = compiled_graphs(), time.perf_counter()
    first, second, *_ = generate.run(model, cache, ids, NEW, "once", mode).seconds()
    whole = time.perf_counter() - started
    compiled, found = (now - then for now, then in zip(compiled_graphs(), before))
    return Text(name, made, first, second, whole, _graphs(), found, compiled)


def _graphs() -> dict[str, list[float]]:
    """`Text.graphs` of what was compiled since the metrics of Dynamo were cleared."""
    from torch._dynamo.utils import get_compilation_metrics

    from fade_fast.compile import stored

    each = [(name, seconds) for name, times in [*stored.seconds.items()] for seconds in [*times]]
    # Dynamo does not name what is compiled ahead of time.
    each += [(one.co_name, (one.duration_us or 0) / 1e6) for one in get_compilation_metrics() if one.co_name]
    graphs: dict[str, list[float]] = {}
    for name, seconds in each:
        entry = graphs.setdefault(name, [0, 0.0])
        entry[0] += 1
        entry[1] += seconds
    return graphs


def run(args: argparse.Namespace) -> None:
    """Run all texts in this process, and print a line of JSON for each."""
    import torch

    from . import models

    lock = threading.Lock()

    def say(**line) -> None:
        with lock:
            print(json.dumps(line), flush=True)

    def tell() -> None:
        """Say each second what was compiled: a process that is stopped cannot say it at its end."""
        while True:
            time.sleep(1)
            say(next=dict(graphs=_graphs()))

    since = lambda: time.perf_counter() - STARTED  # noqa: E731
    say(imported=since())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = args.model or (models.LLAMA if device == "cuda" else models.TINY)
    model = models.build(name, device, args.layers)
    if device == "cuda":
        torch.cuda.synchronize()
    say(built=since())
    threading.Thread(target=tell, daemon=True).start()
    for name in args.only:
        begun = since()
        say(next=dict(name=name, cache=None, graphs={}))
        text = measure(model, name, args.config, args.length, say)
        say(text=asdict(text), second_token=begun + text.cache + text.first + text.second)


# -- the measuring process


def watch(args: argparse.Namespace, caches: str, folder: Path) -> Process:
    """Start a process with its compiled code in `folder`, and read what it says."""
    process = Process(caches)
    own = dict(TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"), TRITON_CACHE_DIR=str(folder / "triton"))
    own |= bytecode(folder)
    command = [sys.executable, "-m", __spec__.name, "--child", "--config", args.config]
    command += ["--length", str(args.length), "--only", *args.only]
    command += ["--model", args.model] if args.model else []
    command += ["--layers", str(args.layers)] if args.layers else []
    options = dict(env=os.environ | own, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with subprocess.Popen(command, **options) as child:

        def kill() -> None:
            """Kill the process and those in which it compiles."""
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(args.limit, kill)
        timer.start()
        try:
            for line in child.stdout:
                _read(process, line)
            code = child.wait()
        finally:
            timer.cancel()
            kill()
    if code:
        late = not timer.is_alive() and code < 0
        process.stopped = f"stopped after {args.limit:g} s" if late else f"ended with exit code {code}"
    return process


def bytecode(folder: Path) -> dict[str, str]:
    """Environment in which Python finds the bytecode of packages; empty if it lies where pip writes it.

    Otherwise each process would compile the source of torch and transformers again, which takes seconds. It
    is written to `folder` as pip would have written it.
    """
    import torch

    if Path(importlib.util.cache_from_source(torch.__file__)).exists():
        return {}
    found = dict(PYTHONPYCACHEPREFIX=str(folder / "python"), PYTHONDONTWRITEBYTECODE="")
    if not (folder / "python").exists():
        command = [sys.executable, "-m", "compileall", "-q", "-j", "0", str(Path(torch.__file__).parents[1])]
        subprocess.run(command, env=os.environ | found, stdout=subprocess.DEVNULL, check=False)
    return found


def _read(process: Process, line: str) -> None:
    """Take in what a process says. Other lines, of libraries, are passed over."""
    try:
        said = json.loads(line)
    except ValueError:
        return
    if not isinstance(said, dict):
        return
    process.imported = said.get("imported", process.imported)
    process.built = said.get("built", process.built)
    process.next |= said.get("next", {})
    if "text" in said:
        process.texts.append(Text(**said["text"]))
        if process.second_token is None:
            process.second_token = said["second_token"]


def table(processes: list[Process]) -> str:
    """The times of each process, text by text."""
    lines = []
    for process in processes:
        parts = [f"caches on disk: {process.caches}"]
        for name in ("imported", "built", "second_token"):
            seconds = getattr(process, name)
            parts.append(f"{name.replace('_', ' ')} after {'-' if seconds is None else f'{seconds:.1f} s'}")
        lines += [", ".join(parts), "text         cache   first  second   whole  compiled  found  graphs"]
        for text in process.texts:
            shown = _shown(text.graphs)
            times = " ".join(f"{x:>7.2f}" for x in (text.cache, text.first, text.second, text.whole))
            lines.append(f"{text.name:<11}{times} {text.compiled:>9} {text.found:>6}  {shown}")
        if process.stopped:
            name, made = process.next.get("name", "the model"), process.next.get("cache")
            until = "no cache yet" if made is None else f"a cache after {made:.1f} s"
            compiled = _shown(process.next.get("graphs", {})) or "nothing"
            lines.append(f"the other texts: {process.stopped}, at {name}: {until}, compiled: {compiled}")
        lines.append("")
    return "\n".join(lines)


def _shown(graphs: dict[str, list[float]]) -> str:
    each = sorted(graphs.items(), key=lambda item: -item[1][1])
    return ", ".join(f"{n:g} {name} {seconds:.1f} s" for name, (n, seconds) in each)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--model", help="name of a shape (default: Llama-3.1-8B, without a GPU tiny)")
    parser.add_argument("--layers", type=int, help="layers of the model (default: those of the shape)")
    parser.add_argument("--config", default="safe", help="name of a method of `fade bench generate`")
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens of a prompt ({LENGTH})")
    parser.add_argument("--only", nargs="+", choices=tuple(TEXTS), default=list(TEXTS), metavar="TEXT")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES), metavar="empty|filled")
    parser.add_argument("--folder", type=Path, help="keeps compiled code for later (default: a new folder)")
    parser.add_argument("--limit", type=float, default=70.0, help="seconds of one process (70)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the numbers")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, and print the table. Returns 1 if a process did not finish its texts."""
    args = arguments(argv)
    if args.child:
        run(args)
        return 0
    from fade_fast.saved.files import write_json

    processes = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        for caches in args.caches:
            processes.append(watch(args, caches, args.folder or Path(made)))
            print(table(processes[-1:]), flush=True)
            if args.json:
                write_json(args.json, dict(layers=args.layers, processes=[asdict(p) for p in processes]))
    return int(any(process.stopped for process in processes))


if __name__ == "__main__":
    raise SystemExit(main())
