"""Demotes blocks of several layers at once.

A demotion is many small kernels, and a GPU waits longer for their launches than for their work. So layers
whose blocks leave together are computed as one layer: of the KV heads of all, or, where tokens compete for
budgets, of the rows of all. What each layer holds is written layer by layer.
"""

import copy
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ..compile.replay import rehearsal
from ..formats.base import TierFormat
from .append_store import AppendStore
from .budget_store import BudgetStore
from .buffers import concatenated, copy_all
from .layer import KVLayer
from .positions import DeviceCounters

ROWS, HEADS = 0, 1  # axes of all tensors of a token: [B, H, ...]
MOST = 1 << 23  # elements of the keys that are demoted together: it limits the memory that this takes


def compact(layers: list[KVLayer], counters: DeviceCounters | None = None) -> None:
    """Demote what is due in every layer, as `KVLayer.compact` does in one.

    Tokens, slots and codes are those of `KVLayer.compact`. If memory runs out, some layers may have demoted
    their blocks and others not, each of them completely or not at all.
    """
    for group in groups([layer for layer in layers if layer.demotion_due]):
        if len(group) == 1:
            group[0].compact(counters)
        else:
            _compact(group, counters)


def rehearse(layers: list[KVLayer], counters: DeviceCounters) -> None:
    """Compute what `compact` would, and write nothing: what has yet to be compiled is compiled.

    As many tokens must be due as `compact` is going to find. What they contain does not matter.
    """
    with rehearsal():
        for group in groups(layers):
            if group[0].demotes_like is not None:
                _compact(group, counters, writes=False)


def groups(layers: list[KVLayer]) -> list[list[KVLayer]]:
    """Layers whose demotions are computed together, in order."""
    found: dict[Hashable, list[list[KVLayer]]] = {}
    for layer in layers:
        kind = layer.demotes_like
        together = found.setdefault(id(layer) if kind is None else kind, [[]])
        if (len(together[-1]) + 1) * layer.elements_due > MOST and together[-1]:
            together.append([])
        together[-1].append(layer)
    return [group for several in found.values() for group in several]


def encode(layers: list[KVLayer], counters: DeviceCounters) -> list[Tensor]:
    """Write the codes of blocks that are due behind the slots in use, where no step reads them yet.

    Nothing is counted. So a graph may do this some steps before `take_in`. All `layers` are alike (`groups`),
    and their stores write ahead (`CompressedStore.writes_ahead`).

    Returns the bound of the new value scales of each layer, float32 [B, H], for `take_in`.
    """
    first = layers[0]
    start, count = first.dense.count - first.recent, first.num_due
    tokens = _joined(layers, start, count, HEADS)
    found, at = _encoded(layers, tokens, first.length - first.recent, count, counters)
    for layer, (fields, mean, _) in zip(layers, found):
        layer.middle.write_ahead(fields, mean, at)
    return list(torch.stack([bound for *_, bound in found]))  # one kernel reads many without gaps


def take_in(layers: list[KVLayer], bounds: list[Tensor]) -> None:
    """Count blocks that are due, and that `encode` has written; it gave `bounds`. For a captured graph."""
    first = layers[0]
    start, count = first.dense.count - first.recent, first.num_due
    torch._foreach_maximum_([layer.middle.tiers[0].bound for layer in layers], bounds)
    moves = []
    for layer, rest in zip(layers, _fields(_without(layers, start, count), layers, ROWS)):
        layer.middle.count_replayed_demotion(count)
        moves += _close_gap(layer, rest, count)
    copy_all(moves)


def _joined(layers: list[KVLayer], start: int, length: int, axis: int) -> dict[str, Tensor]:
    """So many dense slots of several layers, as rows or heads of one layer: copies."""
    fields = layers[0].dense.fields
    parts = {
        name: [layer.dense.tensors[name].narrow(field.axis, start, length) for layer in layers]
        for name, field in fields.items()
    }
    return {name: concatenated(tensors, axis) for name, tensors in parts.items()}


def _without(layers: list[KVLayer], start: int, count: int) -> dict[str, Tensor]:
    """All dense slots, as rows of one layer, without `count` of them from `start` on. The last ones mean
    nothing.

    They are as many as there were, because one kernel copies many tensors without gaps.
    """
    capacity, closed = layers[0].dense.capacity, {}
    for name, field in layers[0].dense.fields.items():  # one after another: less memory
        joined = concatenated([layer.dense.tensors[name] for layer in layers], ROWS)
        parts = (0, start), (start + count, capacity - start - count), (start, count)
        closed[name] = concatenated([joined.narrow(field.axis, *part) for part in parts], field.axis)
        del joined
    return closed


def _compact(layers: list[KVLayer], counters: DeviceCounters | None, writes: bool = True) -> None:
    first = layers[0]
    count, recent = first.num_due, first.recent
    start = first.dense.count - recent
    planned = isinstance(first.middle, BudgetStore)
    tokens = _joined(layers, start, count, ROWS if planned else HEADS)
    demote = _demote_planned if planned else _demote_appended
    write = demote(layers, tokens, first.length - recent, count, counters)
    if writes:
        write(_without(layers, start, count))


def _close_gap(layer: KVLayer, rest: dict[str, Tensor], count: int) -> list[tuple[Tensor, Tensor]]:
    """Count `count` tokens less in the recent region: the copies of what is left, see `_without`."""
    dense = layer.dense
    dense.count -= count
    layer.version += 1
    return [(dense.tensors[name], x) for name, x in rest.items()]


def _parts(x: Tensor | None, layers: list[KVLayer], axis: int) -> list:
    """The rows or heads of each layer, views; None for each if there is nothing."""
    return [None] * len(layers) if x is None else list(x.tensor_split(len(layers), dim=axis))


def _fields(fields: dict[str, Tensor], layers: list[KVLayer], axis: int) -> list[dict[str, Tensor]]:
    parts = {name: _parts(x, layers, axis) for name, x in fields.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(layers))]


def _bound(tier: TierFormat, records: dict[str, Tensor]) -> Tensor | None:
    """The bound of the value scales of `records`; None where there is no record."""
    return tier.value_bound(records) if records["key_codes"].shape[2] else None


# -- every token is kept


def _demote_appended(layers, tokens, first, count, counters) -> Callable[[dict[str, Tensor]], None]:
    """What is demoted, computed. The result writes it, given the dense slots that are left (`_without`)."""
    found, at = _encoded(layers, tokens, first, count, counters)

    def write(dense) -> None:
        parts = zip(layers, found, _fields(dense, layers, ROWS))
        moves = []
        try:
            for layer, (fields, mean, bound), rest in parts:
                layer.middle.write(fields, mean, at, bound=bound)
                moves += _close_gap(layer, rest, count)
        finally:  # memory may run out in a later layer
            copy_all(moves)

    return write


def _encoded(
    layers, tokens, first, count, counters
) -> tuple[list[tuple[dict[str, Tensor], Tensor, Tensor | None]], Tensor | None]:
    """Records, means of blocks and bound of each layer; and their slots, for a captured graph."""
    store: AppendStore = layers[0].middle
    position = store.middle_positions(first, count, counters)
    at = None if counters is None else store.slots(first, count, counters)
    format = store.format.joined([layer.middle.format for layer in layers])
    records, means = store.encoded(tokens["key"], tokens["value"], position, format)
    (tier,) = format.tiers
    bounds = _parts(_bound(tier, records), layers, HEADS)
    return list(zip(_fields(records, layers, HEADS), _parts(means, layers, HEADS), bounds)), at


# -- tokens compete for budgets


def _demote_planned(layers, tokens, first, count, counters) -> Callable[[dict[str, Tensor]], None]:
    """What is demoted, computed. The result writes it, given the dense slots that are left (`_without`)."""
    stores: list[BudgetStore] = [layer.middle for layer in layers]
    joined = BudgetStore.joined(stores)
    stats = {name: x for name, x in tokens.items() if name not in ("key", "value")}
    found = joined.planned(tokens["key"], tokens["value"], first, layers[0].length, stats, counters)
    bounds = [
        _parts(_bound(tier.format, fields), layers, ROWS)
        for tier, fields in zip(stores[0].tiers, found.records)
    ]
    fixes_mean = not stores[0].means.count or joined.token_positions.has_padding
    means = _parts(joined.means["mean"] if fixes_mean else None, layers, ROWS)
    counts = list(zip(_parts(found.demoted, layers, ROWS), _parts(found.evicted, layers, ROWS)))
    if stores[0].evicted is None:  # each layer gets tensors of its own, whose addresses captured steps know
        counts = [tuple(x.clone() for x in pair) for pair in counts]

    def write(dense) -> None:
        parts = [_fields(fields, layers, ROWS) for fields in found.records]
        for i, store in enumerate(stores):  # all memory is allocated before anything is counted
            for tier, fields in zip(store.tiers, parts):
                tier.make_room(fields[i], 0)
            store.means.make_room(1, 0)
        raised = [
            (tier.bound, bound[i])
            for i, store in enumerate(stores)
            for tier, bound in zip(store.tiers, bounds)
            if bound[i] is not None
        ]
        if raised:
            torch._foreach_maximum_(*map(list, zip(*raised)))
        sinks = _turn_sinks(layers, dense, stores[0].evicted, found.evicted)
        sizes = [fields["key_codes"].shape[2] for fields in found.records]
        parts = [
            _fields(tier.records.filled_up(fields), layers, ROWS)
            for tier, fields in zip(stores[0].tiers, found.records)
        ]
        copies = []
        for i, (layer, store) in enumerate(zip(layers, stores)):
            if means[i] is not None:
                copies += store.means.rewritten(1, store.means.filled_up({"mean": means[i]}))
            for tier, size, fields in zip(store.tiers, sizes, parts):
                copies += tier.records.rewritten(size, fields[i])
            if store.evicted is None:
                store.count_tokens(*counts[i])
            else:
                copies += zip((store._demoted, store.evicted), counts[i])
            if sinks and layer.dense.sink_keys is None:
                layer.dense.sink_keys = sinks[i]
            elif sinks:
                copies.append((layer.dense.sink_keys, sinks[i]))
        for layer, rest in zip(layers, _fields(dense, layers, ROWS)):
            copies += _close_gap(layer, rest, count)
        copy_all(copies)

    return write


def _turn_sinks(layers, dense, before, evicted) -> list[Tensor]:
    """Rotate the keys of the sinks in `dense` on by the tokens evicted; see `DenseStore.rotate_sinks`.

    `dense` is what `_without` made. Nothing else is written. Returns the keys of the sinks of each layer as
    they came. The list is empty where no token is renumbered.
    """
    if not layers[0].config.contiguous:
        return []
    twin = copy.copy(layers[0].dense)
    twin.count = layers[0].config.n_sink
    twin.tensors = {"key": dense["key"]}
    if before is not None:
        before = torch.cat([layer.middle.evicted for layer in layers])
        twin.sink_keys = torch.cat([layer.dense.sink_keys for layer in layers])
    twin.rotate_sinks(before, evicted, layers[0].rope())
    came = _parts(twin.sink_keys, layers, ROWS)
    return [x.clone() for x in came] if before is None else came
