"""Events of a cache: to a JSON-lines file, to Python's logging, or to a function.

    with cache.listen("events.jsonl"):
        model.generate(..., **{CACHE_NAME: cache})

Events are dicts of JSON values. All have `event`, one of `KINDS`, and `time`, seconds since 1970. All but
`recompilation` have `layer`, the layer index in the model, and `seen`, tokens per row that the layer has
seen. The other fields:

- `demotion`: tokens left the recent region, from step index `first` on: `columns` per row, `tokens` real
  ones over all `rows`. `bytes_before` is their uncompressed size, `bytes_after` the growth of the middle
  (slots of padding included), and `seconds` the host time. New tokens enter the tier `into`, unless a plan
  decides (`planned`).
- `plan`: the policy's decision: `candidates` per row, `kept` tokens by tier and `evicted` tokens (both over
  all rows; with plan_scope "layer", of one plan), and of their scores `score_min`, `score_mean`,
  `score_max` and `score_kept`, the lowest score that was kept.
- `eviction`: `tokens` dropped by this plan over all rows, and `total` dropped so far.
- `renumbering`: `tokens` that are now read at another position, sinks included, and `shift`, the largest
  change of a position.
- `growth`: `buffer` has room for `after` slots instead of `before`; `bytes` over all rows.
- `selection`: what queries have read until now where they choose: `queries`, once for each KV head;
  `tokens` of the middle that they read in all; chosen pages on the GPU, `hits`, and fetched ones, `misses`.
  The middle has `pages` of `page` tokens. And what the newest token of row 0 read of it: `newest`, ranges
  of step indices with the number of the `heads` KV heads that chose them and for which they were fetched
  (see `chosen.ranges`); none after a step that read everything.
- `recompilation`: torch.compile compiled a graph in this process: its `compile_id`, whether it had been
  compiled before (`again`), and `seconds`.

Without listeners the cost is one attribute check, and captured steps contain nothing for them. With
listeners, numbers on a GPU are copied without waiting. Where queries choose, steps with listeners also keep
what they chose. So the first step after `listen` is captured anew, and the first one after `close`. Events
are delivered in order, each at the end of the first step that finds its numbers on the host.
`Listener.flush()` and `close()` wait for them. A sink that raises is dropped with a warning, and the cache
continues.
"""

import functools
import json
import logging
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.callback import callback_handler

from fade_ref.tiers import Tier

from ..cache.positions import PAD
from . import chosen

KINDS = ("demotion", "plan", "eviction", "renumbering", "growth", "selection", "recompilation")
Sink = Callable[[dict], None]


class JsonLines:
    """A sink that appends each event to the file `path` as one line of JSON. Only whole lines reach the file.

    Raises `OSError` if the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike):
        self.file = open(path, "ab", buffering=0)

    def __call__(self, event: dict) -> None:
        self.file.write(json.dumps(event).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class Logged:
    """A sink that logs each event to `logger` at `level`.

    The message is the kind of the event and its fields. `record.fade` is the event.
    """

    def __init__(self, logger: logging.Logger, level: int = logging.INFO):
        self.logger, self.level = logger, level

    def __call__(self, event: dict) -> None:
        rest = {name: x for name, x in event.items() if name not in ("event", "time")}
        said = " ".join(f"{name}={x}" for name, x in rest.items())
        self.logger.log(self.level, "%s %s", event["event"], said, extra={"fade": event})


def read(path: str | os.PathLike) -> list[dict]:
    """The events of a file at `path`, which `JsonLines` wrote. An incomplete last line is left out.

    Raises `ValueError` for a file of another kind, `OSError` if it cannot be read.
    """
    events = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            event = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: no JSON ({error}); give a file that cache.listen() wrote"
            ) from error
        if not isinstance(event, dict) or event.get("event") not in KINDS:
            raise ValueError(
                f"{path}, line {number}: no event of a cache; give a file that cache.listen() wrote"
            )
        events.append(event)
    return events


class Listener:
    """The result of `cache.listen`: `close()` it, or use it in a `with` block. `hub` serves the `sink`."""

    def __init__(self, hub: "Telemetry", sink: Sink):
        self.hub, self.sink = hub, sink

    def flush(self) -> None:
        """Deliver all events. Waits for numbers that are still on a GPU."""
        self.hub.deliver(wait=True)

    def close(self) -> None:
        """Deliver the remaining events and stop listening."""
        self.flush()
        self.hub.drop(self.sink)

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def listen(layers, hub: "Telemetry | None", sink) -> Listener:
    """Send the events of tiered `layers` to `sink`.

    Args:
        layers: the layers.
        hub: the `Telemetry` of the layers, if there is one already.
        sink: a path, to which `JsonLines` writes; a `logging.Logger`; or a function of an event.

    Raises `TypeError` for another sink, `OSError` if its file cannot be opened.
    """
    if isinstance(sink, (str, os.PathLike)):
        sink = JsonLines(sink)
    elif isinstance(sink, logging.Logger):
        sink = Logged(sink)
    elif not callable(sink):
        raise TypeError(
            f"a sink is a path, a Logger or a function, not {type(sink).__name__}: pass one of these to "
            "listen()"
        )
    hub = Telemetry(layers) if hub is None else hub
    hub.add(sink)
    return Listener(hub, sink)


class Telemetry:
    """Queue of events between the layers of one cache and the sinks. Layers hold it while there are sinks."""

    def __init__(self, layers):
        self.layers, self.sinks = layers, []
        self._waiting: deque[tuple[dict, Callable[[bool], bool], str, Callable | None]] = deque()
        self._capacity: dict[tuple, tuple[int, int]] = {}
        self._compiling = 0.0

    # -- sinks

    def add(self, sink: Sink) -> None:
        """Send all events from now on to a sink."""
        if not self.sinks:
            for layer in self.layers:
                layer.telemetry = self
                _steps_change(layer)
                self._grown(layer)
            callback_handler.register_start_callback(self._compile_starts)
            callback_handler.register_end_callback(self._compile_ends)
        self.sinks.append(sink)

    def drop(self, sink: Sink) -> None:
        """Send no more events to a sink. After the last sink, the layers drop this object."""
        if sink not in self.sinks:
            return
        self.sinks.remove(sink)
        if isinstance(sink, JsonLines):
            sink.close()
        if not self.sinks:
            for layer in self.layers:
                layer.telemetry = None
                _steps_change(layer)
            callback_handler.remove_start_callback(self._compile_starts)
            callback_handler.remove_end_callback(self._compile_ends)

    def emit(
        self,
        kind: str,
        counts: dict,
        later: dict[str, Tensor] | None = None,
        nonzero: str = "",
        then: Callable[[dict], None] | None = None,
    ) -> None:
        """Queue an event of known `counts` and of numbers `later`, which may be on a device.

        The event is left out if the number that `nonzero` names is 0. `then` changes it on its way out.
        """
        event = dict(event=kind, time=time.time()) | counts
        arrived = _fetch(event, later) if later else lambda wait: True
        self._waiting.append((event, arrived, nonzero, then))

    def deliver(self, wait: bool = False) -> None:
        """Deliver the oldest events whose numbers have arrived; with `wait`, all events."""
        while self._waiting and self._waiting[0][1](wait):
            event, _, nonzero, then = self._waiting.popleft()
            if nonzero and not event[nonzero]:
                continue
            if then:
                then(event)
            for sink in list(self.sinks):
                try:
                    sink(event)
                except Exception as error:
                    warnings.warn(
                        f"{sink} is told no more of a cache: {error!r}; correct it, and call cache.listen() "
                        "again",
                        stacklevel=2,
                    )
                    self.drop(sink)

    # -- reports of the layers

    def stored(self, layer) -> None:
        """Called after a layer has stored tokens, demoted some, or grown a buffer."""
        for buffer, before, after, size in self._grown(layer):
            self.emit("growth", _of(layer) | dict(buffer=buffer, before=before, after=after, bytes=size))
        self.deliver()

    def demotion(self, layer, count: int, first: int) -> Callable[[], None]:
        """Called before a layer demotes `count` tokens per row, from step index `first` on.

        The caller calls the result after the demotion.
        """
        middle, start = layer.middle, time.perf_counter()
        size, evicted = _bytes(middle), middle.evicted
        evicted = evicted if evicted is None else evicted.clone()  # it is updated in place
        moves = layer.config.contiguous and layer.config.evicts
        places = _places(layer, seen=layer.token_positions.length) if moves else None
        middle.on_plan = functools.partial(self._plan, layer)

        def done() -> None:
            seconds, middle.on_plan = time.perf_counter() - start, None
            batch = layer.token_positions.batch
            counts = dict(first=first, columns=count, tokens=batch * count)
            counts |= dict(rows=batch, into=middle.tiers[0].name, planned=layer.config.relocatable)
            counts |= dict(bytes_before=counts["tokens"] * layer.dense.record_bytes)
            counts |= dict(bytes_after=_bytes(middle) - size, seconds=seconds)
            later = {}
            if layer.token_positions.has_padding:
                later["tokens"] = (middle.middle_positions(first, count) != PAD).sum()
            self.emit("demotion", _of(layer) | counts, later)
            if layer.config.select is not None:
                self._chosen(layer)
            if middle.evicted is not None and layer.config.evicts:
                self._dropped(layer, evicted, places)

        return done

    def _plan(self, layer, scores: Tensor, position: Tensor, tiers: Tensor) -> None:
        """Report a plan: its candidates' scores, positions and tiers, [B or 1, P, n] of P plans per row.

        All plans of a row keep equally many tokens. A token counts once, not once per plan.
        """
        real, plans = (position >= 0).expand(tiers.shape), tiers.shape[1]
        kept = real & (tiers != Tier.EVICTED)
        names = {tier.tier: tier.name for tier in layer.middle.tiers}
        later = {f"kept {name}": (tiers == tier).sum() // plans for tier, name in names.items()}
        known = real & scores.isfinite()
        later |= dict(
            evicted=(real & ~kept).sum() // plans,
            score_min=scores.masked_fill(~known, torch.inf).amin(),
            score_mean=scores.masked_fill(~known, 0).sum() / known.sum(),
            score_max=scores.masked_fill(~known, -torch.inf).amax(),
            score_kept=scores.masked_fill(~(known & kept), torch.inf).amin(),
        )
        self.emit("plan", _of(layer) | dict(candidates=position.shape[-1]), later)

    def _chosen(self, layer) -> None:
        """Report what queries have read until now, and which pages the newest one did."""
        middle = layer.middle
        later = dict(zip(("queries", "tokens", "hits", "misses"), middle.counted.clone()))
        if chosen.keeps(layer):
            later |= dict(zip(("newest chosen", "newest fetched"), chosen.counts(layer)))

        def name_pages(event: dict) -> None:
            pages = event.pop("newest", dict(chosen=[], fetched=[]))
            first, page = layer.config.n_sink, middle.page
            event["newest"] = chosen.ranges(pages["chosen"], pages["fetched"], first, page)

        about = dict(heads=layer.heads, page=middle.page, pages=middle.count // middle.page)
        self.emit("selection", _of(layer) | about, later, "queries", name_pages)

    def _dropped(self, layer, before: Tensor | None, places: Tensor | None) -> None:
        """Report the results of a plan that evicts."""
        evicted = layer.middle.evicted
        new = evicted if before is None else evicted - before
        self.emit("eviction", _of(layer), dict(tokens=new.sum(), total=evicted.sum()), nonzero="tokens")
        if places is None:
            return
        after = _places(layer, seen=places.shape[-1])
        moved = torch.where((after < 0) | (places < 0), 0, (after - places).abs())
        later = dict(tokens=(moved > 0).sum(), shift=moved.amax())
        self.emit("renumbering", _of(layer), later, nonzero="tokens")

    def _grown(self, layer) -> list[tuple[str, int, int, int]]:
        """Buffers that have grown since the last call: (name, slots before, slots after, bytes)."""
        grown = []
        for name, held, capacity, slot in _buffers(layer):
            key = None if name == "timeline" else layer.index
            owner, before = self._capacity.get((key, name), (0, 0))
            before = before if owner == id(held) and before <= capacity else 0
            self._capacity[key, name] = id(held), capacity
            if capacity > before:
                grown.append((name, before, capacity, capacity * slot))
        return grown

    # -- compilation: events of the process, not of one cache

    def _compile_starts(self, args) -> None:
        self._compiling = time.perf_counter()

    def _compile_ends(self, args) -> None:
        again = not str(args.compile_id).endswith("/0")
        seconds = time.perf_counter() - self._compiling
        self.emit("recompilation", dict(compile_id=str(args.compile_id), again=again, seconds=seconds))


def _steps_change(layer) -> None:
    """Let captured steps learn that they keep choices from now on, or no longer."""
    if layer.config.select is not None:
        layer.version += 1


def _of(layer) -> dict:
    return dict(layer=layer.index if layer.layer_idx is None else layer.layer_idx, seen=layer.length)


def _bytes(middle) -> int:
    """Bytes of the slots in use."""
    rows = middle.tiers[0].records.tensors["key_codes"].shape[0]
    return sum(x.count * x.record_bytes for x in middle.buffers().values()) * rows


def _buffers(layer) -> list[tuple[str, object, int, int]]:
    """(name, owner, capacity in slots, bytes per slot over all rows) of each buffer of a layer."""
    token_positions = layer.token_positions
    buffers = []
    if token_positions.buffer is not None:
        buffers.append(
            ("timeline", token_positions, token_positions.buffer.shape[1], token_positions.batch * 4)
        )
    if not layer.is_initialized:
        return buffers
    held = {"exact": layer.dense}
    if layer.middle is not None:
        held |= layer.middle.buffers()
    rows = layer.dense["key"].shape[0]
    return buffers + [(name, x, x.capacity, rows * x.record_bytes) for name, x in held.items()]


def _places(layer, seen: int) -> Tensor:
    """Where each token is read, [B, seen] by logical position; -1 for a dropped token.

    Uncompressed tokens after the sinks are read at their logical position.
    """
    middle, sinks = layer.middle, layer.config.n_sink
    rows, device = layer.token_positions.batch, layer.token_positions.buffer.device
    demoted = middle._demoted if middle.evicted is not None else torch.zeros(rows, 1, device=device)
    shift = middle.evicted if middle.evicted is not None else demoted
    logical = torch.arange(seen, device=device).expand(rows, seen)
    at = torch.where(logical < sinks, logical + shift.long(), logical)
    at = at.masked_fill((logical >= sinks) & (logical < sinks + demoted), -1)
    at = torch.nn.functional.pad(at, (0, 1))  # one extra entry for slots that hold no token
    for tier in middle.tiers:
        if tier.records.count:
            position = middle.position(tier)[:, 0].long()
            index = torch.where(position == PAD, seen, position)
            at.scatter_(1, index, middle.read_at(tier)[:, 0].long())
    return at[:, :seen]


def _fetch(event: dict, later: dict[str, Tensor]) -> Callable[[bool], bool]:
    """Copy numbers to the host without waiting. Call the result to ask whether they are in the event."""
    numbers = torch.cat([x.double().flatten() for x in later.values()])
    kinds = [(name, x.numel(), x.dim() > 0, x.is_floating_point()) for name, x in later.items()]

    def fill(values: list[float]) -> bool:
        start = 0
        for name, count, several, real in kinds:
            part = [(x if math.isfinite(x) else None) if real else int(x) for x in values[start:][:count]]
            start += count
            group, _, member = name.partition(" ")
            found = part if several else part[0]
            if member:
                event.setdefault(group, {})[member] = found
            else:
                event[group] = found
        return True

    if not numbers.is_cuda:
        fill(numbers.tolist())
        return lambda wait: True
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()

    def arrived(wait: bool) -> bool:
        if wait:
            ready.synchronize()
        return (wait or ready.query()) and fill(host.tolist())

    return arrived
