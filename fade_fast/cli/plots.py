"""Plots of a cache: tokens by tier over time, and the tier of each token. Needs matplotlib."""

import json
import os
from pathlib import Path

from matplotlib.figure import Figure

from ..saved import snapshot, telemetry
from ..saved.over_time import COLOURS, OTHER, tokens_over_time


def of_file(path: str | os.PathLike, row: int = 0) -> Figure:
    """The plot for a file: events, a saved cache, or a snapshot as JSON.

    Raises `ValueError` for any other file, and if the batch has no row `row`.
    """
    start = Path(path).open("rb").read(4096)
    if b'"event"' in start.partition(b"\n")[0]:
        return over_time(telemetry.read(path))
    if start.lstrip().startswith(b"{"):
        contents = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(contents, dict) or "layers" not in contents:
            raise ValueError(
                f"{path} is JSON, but no snapshot of a cache: write cache.snapshot() to a file, and give "
                "this file"
            )
    else:
        contents = snapshot.of_file(path, positions=True)
    return tier_map(contents, row)


def over_time(events: list[dict]) -> Figure:
    """Tokens in each tier by tokens seen, over all rows, mean over layers.

    FP16 is the rest of the tokens seen, padding included.
    """
    lengths, series = tokens_over_time(events)
    if not lengths:
        raise ValueError("these events hold no demotion: nothing was compressed; record a longer text")
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    colors = [COLOURS.get(name, OTHER) for name in series]
    heights = [[0.0, *counts] for counts in series.values()]
    axes.stackplot([0, *lengths], *heights, labels=series, colors=colors)
    axes.set(xlabel="tokens seen", ylabel="tokens of a layer", xlim=(0, lengths[-1]), ylim=(0, None))
    axes.legend(loc="upper left", frameon=False)
    return figure


def tier_map(found: dict, row: int = 0) -> Figure:
    """The tier of each position, one line per layer, for one row of the batch."""
    tiered = [layer for layer in found["layers"] if layer["kind"] == snapshot.TIERED and layer["tiers"]]
    if not tiered or any("positions" not in tier for layer in tiered for tier in layer["tiers"].values()):
        raise ValueError(
            "there are no positions to draw: the cache is empty, or they were left out; give "
            "cache.snapshot() of a cache that holds a text"
        )
    if not 0 <= row < found["batch"]:
        raise ValueError(f"row {row}: from 0 to {found['batch'] - 1} is possible")
    figure = Figure(figsize=(8, 1.2 + 0.18 * len(tiered)))
    axes = figure.subplots()
    labelled = set()
    for y, layer in enumerate(tiered):
        axes.broken_barh([(0, found["length"])], (y, 0.9), color=COLOURS["EVICTED"])
        for name, tier in layer["tiers"].items():
            spans = [(start, stop - start) for start, stop in tier["positions"][row]]
            label = None if name in labelled else name
            labelled.add(name)
            axes.broken_barh(spans, (y, 0.9), color=COLOURS.get(name, OTHER), label=label)
    axes.set(xlabel="position", ylabel="layer", xlim=(0, found["length"]), ylim=(len(tiered), 0))
    axes.set_yticks([0.45, len(tiered) - 0.55], [tiered[0]["layer"], tiered[-1]["layer"]])
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=6, frameon=False, title="grey: not held")
    return figure
