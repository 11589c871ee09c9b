"""Which pages of the middle the newest token read, where queries choose: as JSON values.

A layer keeps its newest choice only while something listens to the cache (`cache.listen`). The choices of
row 0 are told. Tokens are named by step index, as in the events of telemetry. In rows without padding that
is their position.
"""

import torch
from torch import Tensor

from ..cache.layer import KVLayer

#: Ranges of a layer that `of` gives at most. If there are more, neighbors are joined.
MAX_RANGES = 512


def keeps(layer: KVLayer) -> bool:
    """Whether a layer holds the choice of its newest step."""
    return layer.config.select is not None and layer.has_middle and bool(layer.middle.newest)


def counts(layer: KVLayer) -> Tensor:
    """How many KV heads chose each page, and for how many it was fetched: int64 [2, pages], on the device.

    All are 0 if the newest step read everything. The layer must `keeps` its choice. Nothing waits for the
    device.
    """
    store = layer.middle
    page, fetched = (store.newest[name][0].flatten() for name in ("page", "fetched"))
    pages = store.count // store.page
    found = torch.zeros(2, pages + 1, dtype=torch.int64, device=page.device)
    at = torch.where(page < 0, pages, page)  # the last entry takes what is no page
    found[0].scatter_add_(0, at, torch.ones_like(at))
    found[1].scatter_add_(0, at, fetched.to(torch.int64))
    return found[:, :pages]


def ranges(chosen: list[int], fetched: list[int], first: int, page: int) -> list[list[int]]:
    """The chosen pages as [first step index, last + 1, KV heads that chose them, heads that fetched them].

    Neighbors with equal numbers are one range.

    Args:
        chosen, fetched: for each page, as in `counts`.
        first: step index of the first token of page 0.
        page: tokens of a page.

    >>> ranges([0, 2, 2, 1], [0, 0, 0, 1], first=4, page=8)
    [[12, 28, 2, 0], [28, 36, 1, 1]]
    """
    runs: list[list[int]] = []
    for i, numbers in enumerate(zip(chosen, fetched)):
        start = first + i * page
        if not numbers[0]:
            continue
        if runs and runs[-1][1] == start and runs[-1][2:] == list(numbers):
            runs[-1][1] = start + page
        else:
            runs.append([start, start + page, *numbers])
    return runs


def of(layer: KVLayer) -> dict | None:
    """What the newest token read of the middle of a layer; None if the layer does not keep that.

    The result has `layer`; `heads`, its KV heads; `held`, pages of the middle; `read`, pages that a KV head
    read, mean over the heads; `hits` and `misses`, chosen pages that were on the GPU and pages that were
    fetched, over all heads; and `ranges`, as `ranges` gives them. `ranges` is None if the step read
    everything. Beyond `MAX_RANGES`, a range has the largest numbers of the pages that it joins. Waits for
    the device.
    """
    if not keeps(layer):
        return None
    store, found = layer.middle, counts(layer).cpu()
    pages, chosen = found.shape[1], int(found[0].sum())
    about = dict(layer=layer.layer_idx, heads=layer.heads, held=pages)
    if not chosen:
        return about | dict(read=pages, hits=0, misses=0, ranges=None)
    misses = int(found[1].sum()) if store.residency else 0
    hits = chosen - misses if store.residency else 0
    runs, page = ranges(*found.tolist(), layer.config.n_sink, store.page), store.page
    while len(runs) > MAX_RANGES:
        found = torch.nn.functional.pad(found, (0, found.shape[1] % 2)).unflatten(1, (-1, 2)).amax(-1)
        page *= 2
        runs = ranges(*found.tolist(), layer.config.n_sink, page)
    stop = layer.config.n_sink + store.count
    runs = [[start, min(end, stop), *rest] for start, end, *rest in runs]
    return about | dict(read=chosen / layer.heads, hits=hits, misses=misses, ranges=runs)
