"""A run of methods: one that fails does not end the run, and its report is written as it grows."""

import argparse
import gc
import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch

import fade_fast
from fade_fast.hf import loading

from . import texts
from .methods import Method, Unavailable, eager
from .streams import NothingCompressed


def attempt(model, work: Callable, compiled: bool = False) -> tuple[object, str | None]:
    """What `work` returns, and None; or None, and the reason for which it failed.

    `NothingCompressed` is raised, since it ends a run. `compiled`: whether kernels run compiled on a GPU. The
    model is detached at the end.
    """
    try:
        with eager(not compiled):
            return work(), None
    except Unavailable as error:
        return None, str(error)
    except NothingCompressed:
        raise
    except Exception as error:  # one failed method must not end the run
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}"[:300]
    finally:
        fade_fast.detach(model)
        gc.collect()


def each(
    model, methods: list[Method], results: dict, work: Callable, compiled: bool = False
) -> Iterator[tuple[Method, object, object]]:
    """`(method, result, work(method))` of every method that has not failed.

    `results` by name have `seconds`, to which the time is added, and `failed`, where the reason is kept.
    """
    for m in methods:
        r = results[m.name]
        if r.failed is not None:
            continue
        started = time.perf_counter()
        found, r.failed = attempt(model, lambda m=m: work(m), compiled)
        if r.failed is None:
            r.seconds += time.perf_counter() - started
            yield m, r, found


def quiet() -> None:
    """Hide bars and warnings of transformers, and the warning of a cache that evicts: tables say how much."""
    loading.quiet()
    warnings.filterwarnings("ignore", category=fade_fast.EvictionWarning)


def say(line: str) -> None:
    """Show a line of progress at once."""
    print(line, flush=True)


class Record:
    """A model and a text, loaded as options say, and the report about what is measured with them.

    The report has the circumstances and `more`. `keep` adds results, and writes the file of `--json`, if any.
    """

    def __init__(self, kind: str, args: argparse.Namespace, indent: int | None = 1, **more):
        self.started, self.file, self.indent = time.perf_counter(), args.json, indent
        quiet()
        torch.backends.cuda.matmul.allow_tf32 = False
        self.text, source = texts.read_or_default(args.text)
        self.model, self.tokenizer, name = texts.load_model(args.model, args.device, args.dtype)
        self.report = texts.circumstances(kind, self.model, name, source, args.dtype) | more

    def seconds(self) -> float:
        """Since the start of the run."""
        return time.perf_counter() - self.started

    def keep(self, results: list, where: str = "results") -> None:
        """Put results into the report, and the report into the file."""
        self.report.update({"seconds": self.seconds(), where: [asdict(r) for r in results]})
        if self.file:
            self.file.write_text(json.dumps(self.report, indent=self.indent) + "\n", encoding="utf-8")
