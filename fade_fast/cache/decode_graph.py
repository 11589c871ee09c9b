"""The decode step as generate() compiles and captures it: one operator a layer, over fixed buffers.

A compiled graph must not look at lengths, or it would be compiled anew at every token; a captured one
runs no Python at all. So the operator `fade::step` takes tensors of the step alone, and a number that
says where the cache stands, its epoch. Whatever a captured graph has baked in (addresses, spans) is
fixed for an epoch; counters live in tensors that the graph itself advances. The epoch is a dimension
of a tensor marked dynamic: a new one captures again, but compiles nothing.

Around each call, `begin` does what is due outside the graph (demotion, room, a new epoch), and `end`
keeps the counts that Python has. Between calls, a beam search reorders rows, and assisted decoding, whose
steps have a column for each drafted token, crops those that were refused.
"""

import itertools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import dense
from .buffers import copy_all, take_rows
from .cuda_graph import record
from .guard import without_autocast
from .positions import PAD

MAX_DECODE_TOKENS = 16  # most columns of a step that are stored before they are attended
MIN_SPARE_SLOTS = 1024  # columns a buffer that grows with the text has free when it is made
AHEAD_ON = {"cuda"}  # types of devices for which generate() need not wait before it prepares the next step
MIN_FLASH_PREFIX = (
    4096  # from this many uncompressed columns on, all but the newest are left to FlashAttention
)

_graph_ids = itertools.count(2)  # the compiler makes constants of 0 and 1
_graphs: "weakref.WeakValueDictionary[int, DecodeGraph]" = weakref.WeakValueDictionary()


class DecodeGraph:
    """What the captured steps of one cache share.

    Attributes:
        layers: the cache's tiered layers, in order.
        compileable: whether generate() may compile steps.
        compiled: whether the last generate() does so.
        captures: whether compiled steps may be captured here instead of by Inductor: if all layers are
            tiered, for others count in Python.
        active: whether a step is under way, so that attention goes through `fade::step`.
        epoch: see above. marker: a tensor of that length.
        demotion, order: the epoch's graphs of a demotion and of a reordering, or None.
        search: what runs the steps of a beam search or of assisted decoding; None before the first.
        drafts: gives what drafts tokens, while assisted decoding goes on, else None.
        asked: options of the newest generate() (`prompts.OPTIONS`).
        undrafted: whether it has had a step without drafts.
        within: whether a generate() is under way. hooked: whether it asks our hooks before it compiles.
        reached: what of them this text came by: "step", "search", "drafts", "ahead", or "declined".
        steps, eager_steps: decode steps of this text by the graph, and outside of it.
        replays: how many of the former were replayed from a CUDA graph of ours.
        reordered: whether rows changed places in it.
        kept: what policies had counted before the newest step, if that may be taken back.
    """

    def __init__(self, token_positions, compileable: bool):
        self.token_positions, self.layers, self.active = token_positions, [], False
        self.compileable, self.compiled, self.captures = compileable, False, False
        self.drafts, self.asked, self.undrafted = (lambda: None), {}, False
        self.open_text(hooked=False)
        self.close_text()
        self.clear()

    def open_text(self, hooked: bool) -> None:
        """Count anew, for another generate()."""
        self.within, self.hooked, self.reached = True, hooked, set()
        self.steps, self.eager_steps, self.replays, self.reordered = 0, 0, 0, False

    def clear(self) -> None:
        """Forget the epoch, and with it every tensor that only a captured graph needs."""
        self.dynamic_size: Tensor | None = None
        self.flash_prefix = 0  # columns left to FlashAttention
        self._held: list[Tensor] = []
        self._spans: list[list[int]] = []
        self._frequencies: Tensor | None = None
        self.graph_id, self._stale = 0, True
        self._demotions, self.demotion, self.order = 0, None, None
        self.search: Callable | None = None
        self.kept: list[Tensor] = []
        self._counts: list[Tensor] = []  # what those are copies of
        self._counted = 0  # columns there were when `kept` was right; 0 if it is not
        self._at: Tensor | None = None  # within a step: the slots of its columns
        self._sees: Tensor | None = None  # and what its queries see, bool [B, 1 or q, capacity]

    def close_text(self) -> None:
        """A generate() has ended."""
        self.within = self.hooked = False

    @property
    def runs_ahead(self) -> bool:
        """Whether generate() may run a step before it knows that there is one, and crop it."""
        first = self.layers[0]
        undoes = first.observer is None or first.observer.compiles
        return self.captures and self.compiled and first.device.type in AHEAD_ON and undoes

    # -- around a step

    def begin(self, new: int, batch: int) -> bool:
        """Prepare for a step of `new` columns; False if it has to run outside the graph."""
        first = self.layers[0]
        most = 1 if first.observer or self.drafts() is None else MAX_DECODE_TOKENS
        if not 1 <= new <= most or not first.can_step or self.token_positions.batch != batch:
            return False
        if first.demotion_due:
            self._demote()
        room = 1 if new == 1 else MAX_DECODE_TOKENS  # the next draft may be longer
        if first.exact.count + room > first.exact.capacity:
            for layer in self.layers:
                layer.make_room(room)
            self.touch()
        if self.token_positions.room < room:
            self.token_positions.reserve(self.token_positions.length + room)
            self.touch()
        if self._stale or self._outgrown() or first.frequencies is not self._frequencies:
            self._renew()
        self._stale, self.active = False, True
        return True

    def end(self, new: int) -> None:
        """Count the `new` columns that the step has stored."""
        self._shift(new)
        self._counted = self.token_positions.length
        self._at = self._sees = None
        self.steps += 1
        self.active = False

    def _shift(self, columns: int) -> None:
        """Count so many columns more, in Python."""
        for layer in self.layers:
            layer.exact.count += columns
            layer.length += columns
        self.token_positions.length += columns

    def _demote(self) -> None:
        """Demote what is due in every layer: a few hundred small kernels a layer, which wait for Python.

        So they are replayed from a graph of the epoch, where only slots differ; but the first with these
        buffers is an ordinary one, for what has yet to be compiled. Columns beyond the block that is due
        (drafts are several) are not there for the graph, which moves all there is room for.
        """
        if self._stale or not self._demotions or not all(layer.can_replay_demotion for layer in self.layers):
            for layer in self.layers:
                layer.demote_due_blocks()
            self._demotions += 1
            return
        beyond = self.layers[0].num_past_threshold
        self.column.sub_(beyond)
        self._shift(-beyond)
        try:
            if not self.slot.is_cuda:
                self._demote_by_cursor()
            else:
                if self.demotion:
                    for layer in self.layers:
                        layer.count_replayed_demotion()
                else:
                    self.demotion, _ = record(self._demote_by_cursor)
                self.demotion.replay()
        except BaseException:
            self._stale = True
            raise
        finally:
            self._shift(beyond)
        if beyond:
            self.column.add_(beyond)
            self.slot.add_(beyond)
            real = self.token_positions.logical[:, -beyond:] != PAD
            self.seen.narrow(2, self.layers[0].exact.count - beyond, beyond).copy_(real[:, None])

    def _demote_by_cursor(self) -> None:
        """The same by tensors of fixed addresses, and all that graphs read brought up to date."""
        self.token_positions.cursor, self.token_positions.latest = self.column, self.newest
        try:
            for layer in self.layers:
                layer.demote_due_blocks()
            self._refresh()
        finally:
            self.token_positions.cursor = self.token_positions.latest = None
        self._stale = False

    def _outgrown(self) -> bool:
        """Whether columns have gone, or too many come, since FlashAttention's part was settled."""
        first = self.layers[0]
        now = 0 if self.token_positions.has_padding else first.flash_prefix_len()
        return (
            bool(now) != bool(self.flash_prefix)
            or not self.flash_prefix <= now < self.flash_prefix + dense.TAIL
        )

    def touch(self, stored: bool = False) -> None:
        """Say that columns changed other than by a step, or (`stored`) came so, which ends a search."""
        self._stale, self._counted = True, 0
        if stored:
            self.search = None

    # -- between steps

    def uncount(self) -> None:
        """Take back what the newest step counted, if that is known."""
        if self.kept and self._counted == self.token_positions.length:
            copy_all(zip(self._counts, self.kept))

    def crop(self, n: int) -> None:
        """Go on before the newest `n` columns, which the cache has cropped."""
        self._counted = 0
        if self._stale or self.token_positions.has_padding:
            self.touch()
            return
        for counter in (self.slot, self.column, self.newest):
            counter.sub_(n)
        self.seen.narrow(2, self.layers[0].exact.count, n).zero_()

    def reorder(self, index: Tensor, select: Callable[[Tensor], None]) -> None:
        """Reorder rows by `select(index)`, in place: a few small kernels for each of many tensors.

        So from the second time in an epoch on they are replayed from a graph.
        """
        self._counted, self.reordered = 0, True
        if self._stale or not self.captures:
            select(index)
            return
        if not self.slot.is_cuda:
            self._reorder(index.to(torch.int64), select)
        elif self.order:
            self._index.copy_(index)
            self.order.replay()
        else:
            self._index = index.to(self.slot.device, torch.int64, copy=True)  # or each gather would cast it
            self.order, _ = record(self._reorder, index=self._index, select=select)
            self.order.replay()
        self._stale = False

    def _reorder(self, index: Tensor, select: Callable[[Tensor], None]) -> None:
        """The same, and all that graphs read brought up to date."""
        select(index)
        own = [self.newest, self.real, self.seen]
        own += [
            x for layer in self.layers for slots in layer.static_views for x in (slots.valid, slots.read_at)
        ]
        pending = []
        for x in own:
            if x is not None:
                take_rows(x, index, pending)
        copy_all(pending)

    def _renew(self) -> None:
        """Bring what graphs read up to date, in a new epoch if anything that they have baked in changed."""
        held = [x for layer in self.layers for x in layer.static_inputs()] + self.token_positions.tensors()
        slots_read = [layer.slots_read() for layer in self.layers]
        stayed = len(held) == len(self._held) and all(a is b for a, b in zip(held, self._held))
        if stayed and slots_read == self._spans and not self._outgrown():
            self._refresh()
        else:
            self._demotions = self._demotions if stayed else 0
            self._held, self._spans, self._frequencies = held, slots_read, self.layers[0].frequencies
            self._open()

    def _open(self) -> None:
        """Begin a new epoch."""
        first = self.layers[0]
        device, capacity = first.device, first.exact.capacity
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.newest = torch.zeros(self.token_positions.batch, dtype=torch.int32, device=device)
        self.real = torch.ones(self.token_positions.batch, dtype=torch.bool, device=device)
        self.seen = torch.zeros(self.token_positions.batch, 1, capacity, dtype=torch.bool, device=device)
        for layer in self.layers:
            layer.allocate_static_inputs()
        self.flash_prefix = first.flash_prefix_len() if not self.token_positions.has_padding else 0
        ahead = self.layers if first.observer and self.runs_ahead else []
        self._counts = [x for layer in ahead for fields in layer.observed() for x in fields.values()]
        self.kept = [torch.empty_like(x) for x in self._counts]
        self._refresh()
        self.demotion, self.order = None, None
        _graphs.pop(self.graph_id, None)
        self.graph_id = next(_graph_ids)
        _graphs[self.graph_id] = self
        self.dynamic_size = torch.empty(1, dtype=torch.uint8, device=device).expand(self.graph_id)
        torch._dynamo.mark_dynamic(self.dynamic_size, 0)

    def _refresh(self) -> None:
        """Bring the tensors that graphs read up to date."""
        first, token_positions = self.layers[0], self.token_positions
        self.slot.fill_(first.exact.count)
        if token_positions.cursor is None:
            self.column.fill_(token_positions.length)
            self.newest.copy_(token_positions.logical.amax(-1))  # the newest column may be padding
        held = first.exact_positions() != PAD
        self.seen.zero_()
        self.seen[:, :, : held.shape[-1]] = held
        for layer in self.layers:
            layer.refresh_static_inputs()

    # -- inside a step

    def run(self, index: int, query, key, value, mask, scaling, softcap, s_aux) -> Tensor:
        """Store a layer's columns and attend: everything by tensors of fixed addresses.

        A negative `index`, -1 less the layer's, is of a layer that reads what that one has stored.
        """
        layer = self.layers[index if index >= 0 else -1 - index]
        if index == 0:
            self._advance(mask, query.shape[2])
            if self.kept:
                copy_all(zip(self.kept, self._counts))
        keys, values = layer.exact.tensors["key"], layer.exact.tensors["value"]
        if index >= 0:
            dense.store(keys, values, self._at, key, value)
        attention_sums = layer.attention_sums()
        if self.flash_prefix and softcap is None and s_aux is None:
            output = dense.attend_long(query, keys, values, self._sees, self.flash_prefix, scaling)
        else:
            output = layer.attend(
                query, keys, values, self._sees, layer.static_views,
                scaling=scaling, softcap=softcap, s_aux=s_aux, mass=attention_sums,
            )  # fmt: skip
        if attention_sums:
            sees = [self.seen, *(slots.valid for slots in layer.static_views)]
            slot = self.slot if index >= 0 else None
            group = query.shape[1] // key.shape[1]
            layer.observer.add_step(layer.observed(), attention_sums, sees, self.real, group, slot)
        if index == len(self.layers) - 1:
            self.slot.add_(query.shape[2])
            self.column.add_(query.shape[2])
        return output

    def _advance(self, mask: Tensor | None, new: int) -> None:
        """Give the columns their positions in each row, and let them be seen."""
        if new > 1:
            self._advance_by(mask, new)
            return
        self._at, self._sees = self.slot, self.seen
        self.real.fill_(True) if mask is None else self.real.copy_(mask[:, 0, -1, -1])
        self.newest.add_(self.real)
        place = torch.where(self.real, self.newest, PAD)
        self.token_positions.buffer.index_copy_(1, self.column, place[:, None])
        self.seen.index_copy_(2, self.slot, self.real[:, None, None])

    def _advance_by(self, mask: Tensor | None, new: int) -> None:
        """The same for several columns, of which each sees no later one."""
        batch, device = self.token_positions.batch, self.slot.device
        real = torch.ones(batch, new, dtype=torch.bool, device=device)
        if mask is not None:
            real = mask.diagonal(dim1=-2, dim2=-1)[:, 0]
        steps = torch.arange(new, device=device)
        place = self.newest[:, None] + real.cumsum(-1, dtype=torch.int32)
        self.token_positions.buffer.index_copy_(1, self.column + steps, place.masked_fill(~real, PAD))
        self.newest.add_(real.sum(-1, dtype=torch.int32))
        self._at = self.slot + steps
        self.seen.index_copy_(2, self._at, real[:, None])
        self._sees = self.seen & (torch.arange(self.seen.shape[2], device=device) <= self._at[:, None])


@torch.library.custom_op("fade::step", mutates_args=())
def step_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    graph_id: int,
    index: int,
    scaling: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention of one layer in a decode step, [B, 1, Hq, D]; see `DecodeGraph.run`.

    What it changes, the cache's own buffers, is hidden from the compiler, for which an epoch's operator
    is a function of its arguments; the layers' order follows from their data.
    """
    with without_autocast():
        return _graphs[graph_id].run(index, query, key, value, mask, scaling, softcap, s_aux)


@step_operator.register_fake
def _(query, *args):
    batch, heads, new, dim = query.shape
    return query.new_empty(batch, new, heads, dim)
