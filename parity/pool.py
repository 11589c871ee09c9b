"""Runs cases in this process or in several.

On a GPU most of the time is spent on launches and small copies, one after the other. Several processes wait
in parallel. The cases of a group share their shapes, so one process runs all cases of a group.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from transformers.utils import logging

from . import subjects
from .case import Case, Outcome, perform


def performed(
    cases: list[Case], device: str, seed: int, compiled: str, jobs: int
) -> Iterator[tuple[int, Outcome]]:
    """Yield the index and the outcome of each case when it ends. Use `jobs` processes if `jobs` > 1."""
    if jobs == 1:
        for index, case in enumerate(cases):
            yield index, perform(case, device, seed, compiled)
        return
    groups: dict[tuple[str, str], list[int]] = {}
    for index, case in enumerate(cases):
        groups.setdefault((case.subject, case.group), []).append(index)
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    with ProcessPoolExecutor(min(jobs, len(groups)), context, initializer=_begin) as pool:
        waiting = {}
        for indices in sorted(groups.values(), key=len, reverse=True):
            titles = [cases[index].title for index in indices]
            waiting[pool.submit(_group, titles, device, seed, compiled)] = indices
        for done in as_completed(waiting):
            for index, (checks, raised, ran) in zip(waiting[done], done.result(), strict=True):
                yield index, Outcome(cases[index], checks, raised, ran)


def _begin() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()


def _group(titles: list[str], device: str, seed: int, compiled: str) -> list[tuple]:
    """Run the cases with these titles. Return the picklable parts of each `Outcome`."""
    known = {case.title: case for case in subjects.collect()}
    done = [perform(known[title], device, seed, compiled) for title in titles]
    return [(outcome.checks, outcome.raised, outcome.ran) for outcome in done]
