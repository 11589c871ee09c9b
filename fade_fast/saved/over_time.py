"""Tokens by tier over time, from the events of a cache."""

from collections import defaultdict

COLOURS = dict(
    FP16="#1f4e79", INT8="#2e86ab", INT4="#58b09c", INT3="#a8c256", INT2="#f3a712", EVICTED="#d9d9d9"
)
OTHER = "#8f6593"  # keys and values of different widths


def tokens_over_time(events: list[dict]) -> tuple[list[int], dict[str, list[float]]]:
    """Tokens seen at each demotion, and tokens in each tier after it, mean over layers."""
    held: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    rows, points = 1, {}
    for event in events:
        tiers = held[event["layer"]] if "layer" in event else None
        if event["event"] == "plan":
            tiers.update(event["kept"])
        elif event["event"] == "eviction":
            tiers["EVICTED"] = event["total"]
        elif event["event"] == "demotion":
            rows = event["rows"]
            if not event["planned"]:
                tiers[event["into"]] += event["tokens"]
        if event["event"] in ("demotion", "eviction"):
            points[event["seen"]] = [dict(x) for x in held.values()], rows
    names = dict.fromkeys(name for layers, _ in points.values() for x in layers for name in x)
    order = [name for name in ("INT8", "INT4", "INT3", "INT2") if name in names]
    order = ["FP16", *(n for n in names if n not in COLOURS), *order] + ["EVICTED"] * ("EVICTED" in names)
    lengths, series = sorted(points), {name: [] for name in order}
    for seen in lengths:
        layers, rows = points[seen]
        mean = {name: sum(x.get(name, 0) for x in layers) / len(layers) for name in order[1:]}
        series["FP16"].append(max(0.0, rows * seen - sum(mean.values())))
        for name, n in mean.items():
            series[name].append(n)
    return lengths, series
