"""What a page shows of a cache at work. Unless somebody looks, nothing is computed."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from ..cache.layer import KVLayer
from ..hf.cache import TieredKVCache
from ..saved import chosen, snapshot

log = logging.getLogger(__name__)

#: Seconds between two frames, and between two frames with a map.
FRAME, MAP = 0.2, 0.6
#: Positions of a map are joined to so many columns at most, where it shows attention.
COLUMNS = 256
#: Events between two frames that are told of, those of all layers.
MAX_EVENTS = 4096
#: Ranges of a tier in a layer that a map may have. Beyond, the smallest gaps are closed.
MAX_RANGES = 512


class View:
    """Frames of the engine's work for those who look: dicts of JSON values.

    The thread of the engine calls `begin`, `step` and `end`. `subscribe` and `drop` are for any thread.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._watchers: dict[int, Callable[[dict], None]] = {}
        self._next = 0
        self._cache: TieredKVCache | None = None
        self._listener = None
        self._events: deque[dict] = deque(maxlen=MAX_EVENTS)
        self._last_frame = self._last_map = 0.0
        self._speed: tuple[int, float, int] | None = None  # request, time, tokens of the last frame

    @property
    def watched(self) -> bool:
        """Whether anybody looks."""
        return bool(self._watchers)

    def subscribe(self, deliver: Callable[[dict], None]) -> int:
        """Send all frames to a function from now on. It must not block. Returns a number for `drop`."""
        with self._lock:
            self._next += 1
            self._watchers[self._next] = deliver
            self._last_map = 0.0
            return self._next

    def drop(self, number: int) -> None:
        """Send no more frames to a watcher."""
        with self._lock:
            self._watchers.pop(number, None)

    def note(self, text: str) -> None:
        """Show a message."""
        self._events.append(dict(event="note", text=text, time=time.time()))

    # -- the thread of the engine

    def begin(self, cache: TieredKVCache | None) -> None:
        """The engine works on this cache until `end`."""
        if cache is self._cache and (self._listener is not None) == self.watched:
            return
        self.end()
        self._cache = cache
        if cache is not None and self.watched:
            self._listener = cache.listen(self._events.append)

    def end(self) -> None:
        """The engine turns to something else."""
        if self._listener is not None:
            self._listener.close()
        self._listener = self._cache = None

    def step(self, about: dict) -> None:
        """Send a frame, if somebody looks and the last one is old enough. `about` becomes a part of it."""
        now = time.monotonic()
        if not self._watchers or self._cache is None or now - self._last_frame < FRAME:
            return
        self._last_frame = now
        with_map = now - self._last_map >= MAP
        if with_map:
            self._last_map = now
        try:
            frame = self._frame(about, now, with_map)
        except Exception:  # an answer must not fail because somebody looks
            log.exception("the view has failed")
            return
        with self._lock:
            watchers = list(self._watchers.items())
        for number, deliver in watchers:
            try:
                deliver(frame)
            except Exception:  # a watcher that is gone
                self.drop(number)

    def _frame(self, about: dict, now: float, with_map: bool) -> dict:
        cache = self._cache
        memory = cache.memory(compact=False)
        events = list(self._events)
        self._events.clear()
        frame = dict(
            about,
            type="state",
            time=time.time(),
            length=cache.get_seq_length(),
            tokens=memory.tokens,
            allocated=memory.allocated,
            packed=memory.packed,
            dense=memory.dense,
            host=memory.host,
            tokens_per_s=self._tokens_per_s(about, now),
            events=_counted(events),
        )
        if with_map:
            frame["map"] = tier_map(cache, memory)
            if (reads := newest_reads(cache)) is not None:
                frame["reads"] = reads
        return frame

    def _tokens_per_s(self, about: dict, now: float) -> float | None:
        before = self._speed
        self._speed = about["request"], now, about["generated"]
        if before is None or before[0] != about["request"] or not about["generated"]:
            return None
        return (about["generated"] - before[2]) / (now - before[1])


def _counted(events: list[dict]) -> list[dict]:
    """Events of all layers at once, as one event each: its kind, the number of layers, and the tokens."""
    found: dict[tuple, dict] = {}
    for event in events:
        if event["event"] == "note":
            found[("note", event["text"])] = dict(event="note", text=event["text"])
            continue
        if event["event"] == "growth":  # of buffers, which says nothing about tokens
            continue
        key = event["event"], event.get("seen"), event.get("into")
        one = found.setdefault(key, dict(event=event["event"], layers=0, tokens=0))
        one["layers"] += 1
        if event["event"] == "selection":
            for name in ("queries", "tokens", "hits", "misses"):
                one[name] = one.get(name, 0) + event[name]
        else:
            one["tokens"] = max(one["tokens"], event.get("tokens", 0))
        for name in ("seen", "into"):
            if event.get(name) is not None:
                one[name] = event[name]
    return list(found.values())


def tier_map(cache: TieredKVCache, memory) -> dict:
    """Where each tier's tokens are, in row 0: `length`, and for each tiered layer its ranges by tier.

    If the policy counts attention, a layer also has `attention`: the share of the layer's largest value, for
    equal parts of the positions. The cache is not changed.
    """
    held = snapshot.of(cache, memory=memory)
    tiered = {i: layer for i, layer in enumerate(cache.stored_layers()) if isinstance(layer, KVLayer)}
    layers = []
    for about in held["layers"]:
        if about["kind"] != snapshot.TIERED or not about["tiers"]:
            continue
        ranges = {name: _joined(tier["positions"][0]) for name, tier in about["tiers"].items()}
        one = dict(layer=about["layer"], tiers=ranges)
        attention = attention_received(tiered[about["layer"]], held["length"])
        layers.append(one if attention is None else one | dict(attention=attention))
    return dict(length=held["length"], layers=layers)


def newest_reads(cache: TieredKVCache) -> dict | None:
    """What the newest token read of the middle: `length`, `page` (tokens), and `layers` as in `chosen.of`.

    None if the cache chooses nothing, or nobody listened during the newest step.
    """
    layers = [found for layer in cache.tiered if (found := chosen.of(layer)) is not None]
    if not layers:
        return None
    return dict(length=cache.get_seq_length(), page=cache.fade_config.select_page, layers=layers)


def _joined(ranges: list[list[int]]) -> list[list[int]]:
    """Ranges, joined over their smallest gaps until there are at most `MAX_RANGES`."""
    if len(ranges) <= MAX_RANGES:
        return ranges
    gaps = sorted(after[0] - before[1] for before, after in zip(ranges, ranges[1:]))
    largest_closed = gaps[len(ranges) - MAX_RANGES - 1]
    joined = [list(ranges[0])]
    for start, stop in ranges[1:]:
        if start - joined[-1][1] <= largest_closed:
            joined[-1][1] = stop
        else:
            joined.append([start, stop])
    return joined


@torch.no_grad()
def attention_received(layer: KVLayer, length: int) -> list[float] | None:
    """How much attention the tokens received, by the statistics of the layer's policy: 0 to 1 for each part.

    The positions 0 to `length` are cut into at most `COLUMNS` equal parts. A part has the largest value of
    its tokens, in row 0. None if the policy keeps no statistics.
    """
    if layer.observer is None or not layer.is_initialized or not length:
        return None
    parts = [(layer.dense, layer.dense_positions())]
    parts += [(tier.records, layer.middle.position(tier)) for tier in layer.held_tiers()]
    columns = min(COLUMNS, length)
    found = torch.zeros(columns, dtype=torch.float64)
    for store, position in parts:
        stats = store.narrow(0, store.count)
        stats = {name: stats[name] for name in layer.observer.fields}
        score = layer.observer.score(stats)[0].double().nan_to_num(0.0).clamp_min(0.0)  # [H, n]
        at = position[0].long().expand(score.shape)
        real = at >= 0
        index = (at * columns // length).clamp(0, columns - 1)
        found.scatter_reduce_(0, index[real].cpu(), score[real].cpu(), "amax")
    most = float(found.max())
    return [round(float(x) / most, 3) if most else 0.0 for x in found]
