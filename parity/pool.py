"""Performing cases, in this process or in several.

Most of a run on a GPU is launches and copies of a few numbers, one at a time; processes side by side share
the wait. The cases of a group share their shapes, so a group stays in one process.
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
    """Each case's place in `cases` and what became of it, as they end; with `jobs` processes if over 1."""
    if jobs == 1:
        for place, case in enumerate(cases):
            yield place, perform(case, device, seed, compiled)
        return
    groups: dict[tuple[str, str], list[int]] = {}
    for place, case in enumerate(cases):
        groups.setdefault((case.subject, case.group), []).append(place)
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    with ProcessPoolExecutor(min(jobs, len(groups)), context, initializer=_begin) as pool:
        waiting = {}
        for places in sorted(groups.values(), key=len, reverse=True):
            titles = [cases[place].title for place in places]
            waiting[pool.submit(_group, titles, device, seed, compiled)] = places
        for done in as_completed(waiting):
            for place, (checks, raised, ran) in zip(waiting[done], done.result(), strict=True):
                yield place, Outcome(cases[place], checks, raised, ran)


def _begin() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()


def _group(titles: list[str], device: str, seed: int, compiled: str) -> list[tuple]:
    """What became of the cases with these titles: what of an `Outcome` travels between processes."""
    known = {case.title: case for case in subjects.collect()}
    done = [perform(known[title], device, seed, compiled) for title in titles]
    return [(outcome.checks, outcome.raised, outcome.ran) for outcome in done]
