"""A decode step on one GPU, and on several by tensor parallelism: `fade bench parallel`.

OMP_NUM_THREADS=8 torchrun --standalone --nproc-per-node 2 -m fade_fast bench parallel

The model has the shape of Llama-3.1-8B and random bfloat16 weights, which each process draws for its part.
Caches hold random keys and values. First the first process alone measures each method on one GPU. Then all
processes measure the same methods together. The time of a step is the median after compilation and capture,
as in `fade bench generate`, whose code this is.

Before the times, a model of four layers in float64 writes a text with each method of `TOLD`, on one GPU and
on all. Its weights are the same in both, so its tokens must be, too. In float32 they need not be: with random
weights, tokens get nearly the same attention, and the order of a sum may decide which of them a policy keeps.

`--one-shot` lets the compiler sum over GPUs by PyTorch's symmetric memory: each GPU reads the others' parts.
NVLink multicast stays off with either.

`--json FILE` writes the numbers after every measurement, `--show FILE` prints them. An error in any process
ends the run, because the others would wait for it. Without GPUs a tiny model runs through the same code in
float64, with gloo, and its times mean nothing.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist
import transformers
from torch._inductor import config as inductor
from torch.distributed import _symmetric_memory as symmetric_memory

import fade_fast
from fade_fast.compile.record import record
from fade_fast.hf import loading
from fade_fast.hf.models import CACHE_NAME, ranks_of
from fade_fast.saved.files import write_json

from .generate import H2O, OURS, Case, Result, attempt, free, measure
from .models import LLAMA, TINY, build, build_split, redraw
from .parsers.parallel import arguments

TARGET = 1.6  # times the tokens a second of one GPU, with `safe`
#: What the small model writes its text with: every token kept, and tokens that compete by all heads' scores.
TOLD = {"safe": "safe", "h2o": H2O}
LAYERS, PROMPT, WRITTEN = 4, 512, 48  # of that model and of its text
REPEATS = 20  # of the collectives that are timed alone
#: Variables that keep NVLink multicast off: programs that use it can disturb other programs of a shared host.
NO_MULTICAST = dict(NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1", NVSHMEM_DISABLE_NVLS="1")
LONGEST_STEP = timedelta(minutes=5)  # a process that waits longer for another one ends the run


class Processes:
    """The processes that torchrun has started. A context manager: they talk inside the `with` block."""

    def __init__(self, device: str):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.cuda = device == "cuda"
        self.device = (
            torch.device("cuda", int(os.environ["LOCAL_RANK"])) if self.cuda else torch.device("cpu")
        )

    def __enter__(self) -> "Processes":
        for name, value in NO_MULTICAST.items():
            os.environ.setdefault(name, value)
        bound = {}
        if self.cuda:
            torch.cuda.set_device(self.device)
            bound = dict(device_id=self.device)
        dist.init_process_group("nccl" if self.cuda else "gloo", timeout=LONGEST_STEP, **bound)
        #: One process measures alone for minutes. The others wait in a group that is more patient.
        self.patient = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:  # after an error, the others may never come here
            self.wait()
            # A process group waits for the end of CUDA graphs that contain its collectives.
            torch.compiler.reset()
            gc.collect()
            dist.destroy_process_group()

    def wait(self) -> None:
        """Wait for all processes."""
        dist.barrier(group=self.patient)

    def say(self, *lines: str) -> None:
        """Print in the first process."""
        if not self.rank:
            print(*lines, flush=True)


@contextlib.contextmanager
def model_of(make: Callable, *args, **options) -> Iterator:
    """A model, whose memory is free after the block."""
    model = make(*args, **options)
    try:
        yield model
    finally:
        fade_fast.detach(model)
        model.__dict__.pop("_compiled_call", None)
        del model
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# -- tokens


def texts(model, names: dict[str, str]) -> dict[str, dict]:
    """What a model writes with each method: its tokens, and how many steps were captured."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (2, PROMPT), generator=draw).to(model.device)
    found = {}
    for name, method in names.items():
        cache = fade_fast.create_cache(model, OURS[method])
        options = dict(max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE_NAME: cache}, **options)
        graph = cache.decode_graph
        found[name] = dict(
            tokens=out[:, PROMPT:].tolist(), captured=graph.replays, uncaptured=graph.uncaptured
        )
        del cache
    return found


def equal_tokens(one: dict, split: dict) -> dict[str, int]:
    """By method, how many tokens of a text are the same before the first that differs, in the worst row."""
    found = {}
    for name, theirs in one.items():
        rows = zip(theirs["tokens"], split[name]["tokens"])
        found[name] = min(next((i for i, (a, b) in enumerate(zip(*row)) if a != b), WRITTEN) for row in rows)
    return found


# -- times


@contextlib.contextmanager
def one_shot(model, wanted: bool) -> Iterator[None]:
    """Inside this context, compiled steps of a split model sum by symmetric memory, if that is wanted."""
    if not wanted:
        yield
        return
    with warnings.catch_warnings():  # torch says that no call is needed, but its compiler asks for it
        warnings.simplefilter("ignore", FutureWarning)
        symmetric_memory.enable_symm_mem_for_group(ranks_of(model).group.group_name)
    with inductor.patch({"_collective.auto_select": True}):
        yield


def collectives_ms(processes: Processes, hidden: int, layers: int, batch: int, dtype: torch.dtype) -> float:
    """Milliseconds of the sums over processes that a step needs, alone: two of each layer, [B, hidden]."""
    x = torch.zeros(batch, hidden, dtype=dtype, device=processes.device)

    def sums() -> None:
        for _ in range(2 * layers):
            dist.all_reduce(x)

    sums()
    replay = record(sums)[0].replay if processes.cuda else sums
    times = []
    for _ in range(REPEATS):
        processes.wait()
        if processes.cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        replay()
        if processes.cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def timed(processes: Processes, model, case: Case, new: int) -> Iterator[Result]:
    """The result of each method of a case. With a model that is split, an error ends the run."""
    for method in case.methods:
        started = time.perf_counter()
        if ranks_of(model) is not None:
            result = measure(model, case, method, new, "random")
            free(model, method)
        else:
            result = attempt(model, case, method, new, "random")
        told = result.failed or f"{result.ms:.2f} ms a step"
        processes.say(f"  {method}: {told}, {time.perf_counter() - started:.0f} s")
        yield result


# -- what is shown


def rows(report: dict) -> list[tuple[str, Result | None, Result | None]]:
    """(method, result of one GPU, result of all) of a report."""
    one, split = ({r["method"]: Result(**r) for r in report[name]} for name in ("one", "split"))
    return [(name, one.get(name), split.get(name)) for name in report["methods"]]


def faster(one: Result | None, split: Result | None) -> float | None:
    """How many times the tokens a second of one GPU all have; None if one of them was not measured."""
    both = one and split and one.tokens_per_s and split.tokens_per_s
    return split.tokens_per_s / one.tokens_per_s if both else None


def show(report: dict) -> str:
    """Circumstances, tokens and times."""
    size = report["processes"]
    head = (
        "method", "ms, one GPU", "tokens/s, one GPU", f"ms, {size} GPUs", f"tokens/s, {size} GPUs", "times",
        "captured steps", "cache GB of a GPU", "peak GB of a GPU",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    number = lambda x, digits=2: "-" if x is None else f"{x:.{digits}f}"  # noqa: E731
    for name, one, split in rows(report):
        cells = [name]
        for r in (one, split):
            failed = r.failed if r is not None else "not measured"
            cells += [failed, "-"] if failed else [number(r.ms), number(r.tokens_per_s, 1)]
        cells.append(number(faster(one, split)))
        r = split or Result(name, name, 0, 0, 0, "")
        cells.append("-" if r.captured is None else f"{r.captured} of {r.new - 1}")
        cells += [number(r.cache_bytes and r.cache_bytes / 1e9), number(r.decode_gb, 1)]
        lines.append("| " + " | ".join(cells) + " |")
    said = [
        "{model}, B {batch} x {length}, {device}, torch {torch}, transformers {transformers}".format(**report)
    ]
    if report["equal"]:
        for name, n in report["equal"].items():
            one, split = (report["texts"][where][name]["captured"] for where in ("one", "split"))
            said.append(
                f"{name}: {n} of {report['written']} tokens equal those of one GPU ({report['small']}); "
                f"captured steps {one} and {split}"
            )
    if report["collectives_ms"] is not None:
        how = "; steps sum by symmetric memory instead" if report["one_shot"] else ""
        said.append(
            f"The sums over GPUs of a step take {report['collectives_ms']:.2f} ms alone, by all_reduce{how}"
        )
    found = faster(*next((r[1:] for r in rows(report) if r[0] == "safe"), (None, None)))
    if found is not None and report["device"] != "cpu":
        yes = "reached" if found >= TARGET else "**not reached**"
        said.append(f"safe has {found:.2f} times the tokens/s of one GPU; the target, {TARGET}, is {yes}")
    return "\n\n".join([*said, "\n".join(lines)] if report["one"] or report["split"] else said)


# -- the command


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.show:
        print(show(json.loads(args.show.read_text(encoding="utf-8"))))
        return 0
    loading.quiet()
    transformers.logging.set_verbosity_error()
    with Processes(args.device) as processes:
        report = measured(args, processes)
    processes.say("\n" + show(report))
    failed = any(r["failed"] for r in report["one"] + report["split"])
    return int(failed or any(n < WRITTEN for n in report["equal"].values()))


def measured(args: argparse.Namespace, processes: Processes) -> dict:
    """Run everything. The report of the first process is the whole one."""
    name, cuda = TINY if args.tiny else LLAMA, processes.cuda
    #: Two KV heads a process: a head alone has no mean to agree on.
    wide = dict(num_attention_heads=8, num_key_value_heads=4) if args.tiny else {}
    exact = dict(dtype=torch.float64, layers=2 if args.tiny else LAYERS)
    report = dict(
        kind="parallel",
        model=name,
        device=torch.cuda.get_device_name() if cuda else "cpu",
        processes=processes.size,
        torch=torch.__version__,
        transformers=transformers.__version__,
        batch=args.batch,
        length=args.length,
        methods=args.methods,
        written=WRITTEN,
        one_shot=args.one_shot,
        small=f"{exact['layers']} layers, {str(exact['dtype']).removeprefix('torch.')}",
        equal={},
        texts={},
        collectives_ms=None,
        one=[],
        split=[],
    )

    def keep() -> None:
        if args.json and not processes.rank:
            write_json(args.json, report, indent=1)

    def alone(work: Callable[[], None]) -> None:
        if not processes.rank:
            work()
        processes.wait()

    def write_alone() -> None:
        with model_of(build, name, str(processes.device), **exact, **wide) as model:
            redraw(model)
            report["texts"]["one"] = texts(model, TOLD)

    def time_alone() -> None:
        with model_of(build, name, str(processes.device), **wide) as model:
            for result in timed(processes, model, case, args.new):
                report["one"].append(asdict(result))
                keep()

    case = Case(name, args.batch, args.length, args.methods)
    if "tokens" in args.parts:
        processes.say("tokens:")
        alone(write_alone)
        with model_of(build_split, name, **exact, **wide) as model, one_shot(model, args.one_shot):
            redraw(model)
            report["texts"]["split"] = texts(model, TOLD)
        if not processes.rank:
            report["equal"] = equal_tokens(report["texts"]["one"], report["texts"]["split"])
            processes.say(f"  equal: {report['equal']} of {WRITTEN}")
        keep()
    if "times" in args.parts:
        processes.say("one GPU:")
        alone(time_alone)
        processes.say(f"{processes.size} GPUs:")
        with model_of(build_split, name, **wide) as model, one_shot(model, args.one_shot):
            config = model.config
            for result in timed(processes, model, case, args.new):
                report["split"].append(asdict(result))
                keep()
        try:
            report["collectives_ms"] = collectives_ms(
                processes, config.hidden_size, config.num_hidden_layers, args.batch, torch.bfloat16
            )
        except RuntimeError as error:  # the times of the steps stand without it
            processes.say(f"  sums alone: {error}")
        keep()
    return report


if __name__ == "__main__":
    raise SystemExit(main())
