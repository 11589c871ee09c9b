"""A telemetry file as one page that needs nothing else."""

import base64
import hashlib
import html
import json
import re
from collections import defaultdict
from pathlib import Path

from ..saved.over_time import tokens_over_time

PAGE = Path(__file__).parent / "page"
MAX_EVENTS, MAX_POINTS = 200, 2000


def page_of(events: list[dict], title: str) -> str:
    """The page for the events of a cache, oldest first. Raises `ValueError` if no token was demoted."""
    data = contents(events)
    # In JSON, "<" can only stand in strings. So the data cannot end its element.
    written = json.dumps(data).replace("<", "\\u003c")
    style, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    page = (PAGE / "report.html").read_text(encoding="utf-8")
    parts = dict(POLICY=policy, TITLE=html.escape(title), CSS=style, DATA=written, JS=script)
    return re.sub("@(POLICY|TITLE|CSS|DATA|JS)@", lambda found: parts[found[1]], page)


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def contents(events: list[dict]) -> dict:
    """What a report shows, as JSON values."""
    lengths, series = tokens_over_time(events)
    if not lengths:
        raise ValueError("no token was demoted, so there is nothing to show: record a longer text")
    step = -(-len(lengths) // MAX_POINTS)
    kept = sorted({*range(0, len(lengths), step), len(lengths) - 1})
    points = [dict(x=lengths[i], tokens={name: x[i] for name, x in series.items()}) for i in kept]
    planned = any(event.get("planned") for event in events)
    before = sum(event.get("bytes_before", 0) for event in events)
    after = _bytes_after(events)
    evicted = series.get("EVICTED", [0])[-1]
    spent = events[-1]["time"] - events[0]["time"]
    numbers = [
        ["Tokens seen", str(lengths[-1])],
        ["Layers", str(len({event["layer"] for event in events if "layer" in event}))],
        ["Demotions", str(sum(event["event"] == "demotion" for event in events))],
        ["Evicted, of a layer", f"{evicted:g}"],
        ["Times smaller", f"{before / after:.2f}" if after else "–"],
        ["From first to last event", f"{spent:.2f} s"],
    ]
    note = "tokens of each layer by tier, oldest tier first" if planned else "position across, layer down"
    return dict(
        points=points,
        map=_shares(events, lengths[-1]) if planned else _positions(events, lengths[-1]),
        reads=_newest_reads(events),
        map_note=note + "; grey: not held",
        bytes=[["compressed", after], ["uncompressed", before, "dense"]],
        numbers=numbers,
        events=_counted(events)[-MAX_EVENTS:],
    )


def _newest_reads(events: list[dict]) -> dict | None:
    """What the newest token read that an event tells of; None where nothing was chosen. See `chosen.of`."""
    told = [event for event in events if event["event"] == "selection" and event.get("newest")]
    newest = {event["layer"]: event for event in told}
    if not newest:
        return None
    layers = []
    for layer, event in sorted(newest.items()):
        weights = [((stop - start) // event["page"], *heads) for start, stop, *heads in event["newest"]]
        chosen, fetched = (sum(pages * heads[i] for pages, *heads in weights) for i in range(2))
        far = event["hits"] + event["misses"] > 0
        about = dict(layer=layer, heads=event["heads"], held=event["pages"], read=chosen / event["heads"])
        about |= dict(hits=(chosen - fetched) * far, misses=fetched, ranges=event["newest"])
        layers.append(about)
    return dict(length=max(event["seen"] for event in newest.values()), layers=layers)


def _bytes_after(events: list[dict]) -> int:
    """Bytes of the middle: what all demotions added. Plans that evict make it smaller, which counts too."""
    return max(0, sum(event.get("bytes_after", 0) for event in events))


def _positions(events: list[dict], length: int) -> dict:
    """A map by position. Tokens that no plan moves stay in the tier that they entered."""
    layers: dict[int, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    ends: dict[int, int] = defaultdict(int)
    for event in events:
        if event["event"] != "demotion":
            continue
        ranges, start = layers[event["layer"]][event["into"]], event["first"]
        stop = start + event["columns"]
        if ranges and ranges[-1][1] == start:
            ranges[-1][1] = stop
        else:
            ranges.append([start, stop])
        ends[event["layer"]] = max(ends[event["layer"]], stop)
    rows = []
    for layer, tiers in sorted(layers.items()):
        first = min(start for ranges in tiers.values() for start, _ in ranges)
        rows.append(dict(layer=layer, tiers=dict(tiers, FP16=[[0, first], [ends[layer], length]])))
    return dict(length=length, layers=rows)


def _shares(events: list[dict], length: int) -> dict:
    """How many tokens of each layer each tier has at the end. Telemetry does not say which ones."""
    rows = []
    for layer in sorted({event["layer"] for event in events if "layer" in event}):
        own = [event for event in events if event.get("layer") == layer]
        rowcount = next((event["rows"] for event in reversed(own) if "rows" in event), 1)
        tiers, at = {}, 0.0
        kept = next((event["kept"] for event in reversed(own) if event["event"] == "plan"), {})
        dropped = next((event["total"] for event in reversed(own) if event["event"] == "eviction"), 0)
        at += dropped / rowcount
        for name, n in kept.items():
            tiers[name] = [[at, at + n / rowcount]]
            at += n / rowcount
        tiers["FP16"] = [[at, length]]
        rows.append(dict(layer=layer, tiers=tiers))
    return dict(length=length, layers=rows)


def _counted(events: list[dict]) -> list[dict]:
    """One event for all layers that had it at one length."""
    found: dict[tuple, dict] = {}
    for event in events:
        if event["event"] == "growth":
            continue
        key = event["event"], event.get("seen"), event.get("into"), event.get("compile_id")
        one = found.setdefault(key, dict(event=event["event"], layers=0, tokens=0))
        one["layers"] += 1
        if event["event"] == "selection":
            for name in ("queries", "tokens", "hits", "misses"):
                one[name] = one.get(name, 0) + event[name]
        else:
            one["tokens"] = max(one["tokens"], event.get("tokens", 0) or 0)
        one |= {name: event[name] for name in ("seen", "into") if name in event}
    return list(found.values())
