"""Decode steps that a compiler captures: one operator per layer, over buffers of fixed addresses.

A compiled graph must not look at lengths, or it would be compiled anew for each token. A CUDA graph runs no
Python at all. So the operator `fade::step` takes tensors of the step alone, and a number, the graph id.
Addresses and slots read are fixed for one graph id. Counters are tensors, which the graph itself advances.
The graph id is a dimension of a tensor marked dynamic: a new id captures again, but compiles nothing.

Around each call, `begin` prepares the layers outside the graph (demotion, room, a new graph id), and `end`
counts in Python. Between calls, a beam search reorders rows. Assisted decoding, whose steps have a token for
each draft, crops the tokens that were refused.
"""

import contextlib
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

from ..compile.record import record
from ..kernels import dense
from . import together
from .beams import Beams, Written
from .buffers import Buffers, copy_all, cut, take_rows
from .demotion import RecordedDemotion
from .guard import without_autocast
from .layer import MAX_DECODE_TOKENS, KVLayer, ScoreOptions, Visible
from .positions import PAD, DeviceCounters, TokenPositions

CAPTURES_ON = {"cuda"}  # types of devices on which demotions and reorderings are captured, too
SETTLED = 8  # steps of a graph id after which what comes later is captured ahead
AHEAD_ON = {"cuda"}  # types of devices for which generate() need not wait before it prepares the next step

_graph_ids = itertools.count(2)  # the compiler makes constants of 0 and 1
_graphs: "weakref.WeakValueDictionary[int, DecodeGraph]" = weakref.WeakValueDictionary()


def no_step() -> bool:
    """See `DecodeGraph.one_too_many`: no step did."""
    return False


class DenseGroup:
    """Layers whose dense tokens fill the same slots, and the tensors by which their steps find them.

    Layers that compress hold sinks and recent tokens; layers that do not hold every token.

    Attributes:
        slot: int64 [1], the next dense slot.
        held: bool [B, 1, capacity], dense slots that hold a real token.
        flash_prefix: dense tokens left to FlashAttention.
        slots, visible: within a step, the slots of its tokens, and the dense slots that its queries see.
    """

    def __init__(self, layers: list[KVLayer], batch: int, flashes: bool):
        self.layers, first = layers, layers[0]
        self.slot = torch.zeros(1, dtype=torch.int64, device=first.device)
        self.held = torch.zeros(batch, 1, first.dense.capacity, dtype=torch.bool, device=first.device)
        self.flash_prefix = first.flash_prefix_len if flashes else 0
        self.close()

    def close(self) -> None:
        """Forget what only a step needs."""
        self.slots: Tensor | None = None
        self.visible: Tensor | None = None

    def refresh(self, counters: DeviceCounters | None) -> None:
        """Bring the tensors up to date."""
        first = self.layers[0]
        self.slot.fill_(first.dense.count)
        held = first.dense_positions(counters) != PAD
        self.held.zero_()
        self.held[:, :, : held.shape[-1]] = held

    def outgrown(self, flashes: bool) -> bool:
        """Whether tokens have gone, or too many have come, since the flash prefix was fixed."""
        now = self.layers[0].flash_prefix_len if flashes else 0
        if bool(now) != bool(self.flash_prefix):
            return True
        return not self.flash_prefix <= now < self.flash_prefix + dense.TAIL

    def advance(self, real: Tensor, new: int) -> None:
        """Let the tokens of a step be seen. `real` is bool [B, q]. Inside a step."""
        if new == 1:
            self.slots, self.visible = self.slot, self.held
            self.held.index_copy_(2, self.slot, real[:, None])
            return
        device = self.slot.device
        self.slots = self.slot + torch.arange(new, device=device)
        self.held.index_copy_(2, self.slots, real[:, None])
        causal = torch.arange(self.held.shape[2], device=device) <= self.slots[:, None]
        self.visible = self.held & causal

    def crop(self, n: int) -> None:
        """Let the newest `n` tokens, which the layers have cropped, be seen no longer."""
        self.slot.sub_(n)
        self.held.narrow(2, self.layers[0].dense.count, n).zero_()


class DecodeGraph:
    """Captured decode steps of one cache.

    Attributes:
        layers: the tiered layers of the cache, in order.
        compileable: whether generate() may compile steps.
        compiled: whether the last generate() does so.
        captures: whether compiled steps may be captured here instead of by Inductor. They may if all layers
            are tiered, because other layers count in Python. With a tensor-parallel model, they also need
            processes that talk by NCCL.
        uncaptured: why steps are not captured, although the model runs on a GPU; empty if they are.
        active: whether a step is under way, so that attention goes through `fade::step`.
        graph_id: see above. dynamic_size: a tensor of that length.
        demotion, order: what replays a demotion and a reordering, or None.
        search: runs the steps of a beam search or of assisted decoding; None before the first.
        drafts: gives the drafter while assisted decoding goes on, else None.
        asked: options of the newest generate() (`prompts.OPTIONS`).
        undrafted: whether it has had a step without drafts.
        beams: knows what the rows of a text share in a beam search.
        one_too_many: says whether the newest step came after the end of a search.
        within: whether a generate() is under way. hooked: whether it asks our hooks before it compiles.
        reached: hooks that this text came by: "step", "search", "drafts", "ahead", or "declined".
        steps, eager_steps: decode steps of this text by the graph, and outside of it.
        replays: how many of the former were replayed from a CUDA graph of ours.
        reordered: whether rows changed places in it.
        kept: what policies had counted before the newest step, if that step may be taken back.
        failed: whether a step stopped halfway, and could not be taken back.
        counts: what steps did besides a replay, by name, since the cache was made; for measurements.
    """

    def __init__(self, positions: TokenPositions, layers: list[KVLayer], compileable: bool):
        self.counts: Counter[str] = Counter()
        self.token_positions, self.layers, self.active = positions, layers, False
        self.compileable, self.compiled, self.captures = compileable, False, False
        self.uncaptured = ""
        self.drafts, self.asked, self.undrafted = (lambda: None), {}, False
        self.beams = Beams(positions, layers)
        self.open_text(hooked=False)
        self.close_text()
        self.clear()

    def open_text(self, hooked: bool, texts: int | None = None) -> None:
        """Count anew, for another generate() of so many `texts`; None: not known."""
        self.within, self.hooked, self.reached = True, hooked, set()
        self.beams.open(texts)
        self.steps, self.eager_steps, self.replays, self.reordered = 0, 0, 0, False

    def close_text(self) -> None:
        """A generate() has ended."""
        self.beams.close()
        self.one_too_many: Callable[[], bool] = no_step
        self.within = self.hooked = False

    def clear(self) -> None:
        """Forget the graph id, and with it every tensor that only a captured graph needs."""
        self.graph_id, self.dynamic_size = 0, None
        self.groups: list[DenseGroup] = []
        self._static_inputs: list[Tensor] = []
        self._slots_read: list[list[int]] = []
        self._frequencies: list[Tensor] = []
        self._versions: tuple[int, ...] | None = None  # of the layers, when graphs were last right
        self._appends = 0  # of the layers, when `search` was made
        self._demotions, self.demotion, self.order = 0, None, None
        self._order_reach: int | None = None  # what `beams.reach` was when `order` was recorded
        self._settling = 0  # steps until the next demotion is recorded ahead; 0: it is not
        self._search: Callable | None = None
        self.kept: list[Tensor] = []
        self._counted: list[Tensor] = []  # the tensors that `kept` has copies of
        self._kept_at = 0  # tokens seen when `kept` was right; 0 if it is not
        self.failed = False
        self.beams.close()

    @property
    def runs_ahead(self) -> bool:
        """Whether generate() may run a step before it knows that there is one, and crop it."""
        device = self.layers[0].device
        undoes = all(layer.observer is None or layer.observer.compiles for layer in self.layers)
        return self.captures and self.compiled and device.type in AHEAD_ON and undoes

    @property
    def flash_prefix(self) -> int:
        """Most dense tokens of a layer that FlashAttention attends."""
        return max((group.flash_prefix for group in self.groups), default=0)

    @property
    def search(self) -> Callable | None:
        """What runs the steps of a search; None after tokens came by another way."""
        return self._search if self._appends == sum(layer.appends for layer in self.layers) else None

    @search.setter
    def search(self, step: Callable) -> None:
        self._search, self._appends = step, sum(layer.appends for layer in self.layers)

    def check_whole(self) -> None:
        """Raise `RuntimeError` if a step has not ended: the layers have seen different numbers of tokens."""
        first, last = self.layers[0].length, self.layers[-1].length
        if self.failed or first != last:
            raise RuntimeError(
                f"a step has not ended: the first layer has seen {first} tokens, the last {last}"
                "; another thread is at it, or it failed halfway: reset() the cache, or load it again"
            )

    # -- what is stale

    @property
    def _stale(self) -> bool:
        """Whether tokens changed other than by a captured step."""
        return self._versions != tuple(layer.version for layer in self.layers)

    def _set_fresh(self) -> None:
        self._versions = tuple(layer.version for layer in self.layers)

    def touch(self) -> None:
        """Say that tokens changed other than by a captured step."""
        self._versions, self._kept_at = None, 0
        self._forget_parts()

    # -- around a step

    @torch.no_grad()
    def compact(self) -> None:
        """Demote what is due in every layer, before an eager step."""
        together.compact(self.layers)

    def begin(self, new: int, batch: int) -> bool:
        """Prepare for a step of `new` tokens; False if it has to run outside the graph."""
        observes = any(layer.observer for layer in self.layers)
        most = 1 if observes or self.drafts() is None else MAX_DECODE_TOKENS
        if not 1 <= new <= most or not self._can_step() or self.token_positions.batch != batch:
            return False
        if any(layer.demotion_due for layer in self.layers):
            self._demote()
        room = 1 if new == 1 else MAX_DECODE_TOKENS  # the next draft may be longer
        for layer in self.layers:
            layer.prepare(room)
        if self.token_positions.room < room:
            self.token_positions.reserve(self.token_positions.length + room)
            self.counts["positions grow"] += 1
            self.touch()
        if self._stale or self._outgrown() or self._frequencies_changed():
            self._renew()
        self._set_fresh()
        if self._settling:
            self._settling -= 1
            if not self._settling:
                self._record_demotion()
        if self.demotion and new == 1:
            self._demote_a_part()
        self.active = True
        return True

    def _can_step(self) -> bool:
        """Whether a token can come by a captured step: the sinks are in their places."""
        for layer in self.layers:
            if not layer.is_initialized or layer.length < max(1, layer.config.n_sink):
                return False
            if self.token_positions.has_padding and not layer.dense.sinks_placed:
                return False
        return True

    def end(self, new: int) -> None:
        """Count the `new` tokens that the step has stored."""
        self._count(new)
        self._kept_at = self.token_positions.length
        for group in self.groups:
            group.close()
        self.steps += 1
        self.active = False

    def _count(self, tokens: int) -> None:
        """Count so many tokens more, in Python."""
        for layer in self.layers:
            layer.dense.count += tokens
            layer.length += tokens
        self.token_positions.length += tokens

    def _frequencies_changed(self) -> bool:
        """Whether dynamic RoPE has replaced the frequencies of a layer."""
        now = self._current_frequencies()
        return len(now) != len(self._frequencies) or any(a is not b for a, b in zip(now, self._frequencies))

    def _current_frequencies(self) -> list[Tensor]:
        return [layer.rope().inv_freq for layer in self.layers if layer.config.contiguous]

    @property
    def _flashes(self) -> bool:
        """Whether FlashAttention can take a prefix of dense tokens: none of them is padding."""
        return not self.token_positions.has_padding

    def _outgrown(self) -> bool:
        return any(group.outgrown(self._flashes) for group in self.groups)

    # -- demotion

    def _demote(self) -> None:
        """Demote due blocks in every layer: a few hundred small kernels per layer, which wait for Python.

        So a CUDA graph is replayed, in which only slots differ. The first demotion with these buffers is an
        ordinary one, for what has yet to be compiled. Tokens past the threshold (drafts are several) are not
        there for the graph, which moves all there is room for.
        """
        compressing = [layer for layer in self.layers if layer.compresses]
        replayable = all(layer.can_replay_demotion for layer in compressing)
        if self._stale or not (self._demotions or self.demotion) or not replayable:
            self._demote_uncaptured()
            return
        past, captured = compressing[0].num_past_threshold, True
        self.step_index.sub_(past)
        self._count(-past)
        try:
            if self.step_index.device.type not in CAPTURES_ON:
                self._demote_on_device()
            elif self.demotion:
                for layer in compressing:
                    layer.count_replayed_demotion()
                self.counts["demotion, replayed"] += 1
                self.demotion.replay()
            elif captured := self._capture_demotion(compressing):
                self.counts["demotion, captured"] += 1
                self.demotion.replay()
        except BaseException:
            self.touch()
            raise
        finally:
            self._count(past)
        if not captured:
            self._demote_uncaptured()
            return
        if past:
            self.step_index.add_(past)
            real = self.token_positions.logical[:, -past:] != PAD
            for group in self.groups:
                group.slot.add_(past)
                group.held.narrow(2, group.layers[0].dense.count - past, past).copy_(real[:, None])
        if self._now_read() != self._slots_read:
            self.touch()

    def _demote_uncaptured(self) -> None:
        """The same as an eager step does it."""
        together.compact(self.layers)
        self.touch()
        self._demotions += 1
        self._settling = 0 if self.demotion else SETTLED
        self.counts["demotion, not captured"] += 1

    def _record_demotion(self) -> None:
        """Record the next demotion before it is due, and compile what it needs: no step then waits for that.

        A recording runs nothing. So tokens that are still to come are counted as if they had come.
        """
        compressing = [layer for layer in self.layers if layer.compresses]
        if self.demotion or not self.captures or self.step_index.device.type not in CAPTURES_ON:
            return
        missing = -compressing[0].num_past_threshold if compressing else 0
        if missing <= 0:
            return
        self._count(missing)
        held = self._held(compressing)
        try:
            if all(layer.can_record_demotion for layer in compressing) and self._capture_demotion(
                compressing
            ):
                self.counts["demotion, captured ahead"] += 1
        finally:
            self._hold(held)
            self._count(-missing)
            self._set_fresh()

    def _capture_demotion(self, layers: list[KVLayer]) -> bool:
        """Capture a demotion of blocks that are due in `layers`, or counted as due, and count it as done.

        A capture does not allow compilation. So the demotion runs once before, and writes nothing.

        Returns False, and counts nothing, if the capture did not allow an operation, or memory ran out.
        """
        held = self._held(layers)
        counters = DeviceCounters(self.step_index, self.newest)
        try:
            together.rehearse(layers, counters)
            self.demotion = RecordedDemotion(layers, counters, self._refresh)
        except RuntimeError:
            self.demotion = None
            self._hold(held)
            return False
        self._set_fresh()
        return True

    @staticmethod
    def _held(layers: list[KVLayer]) -> list[tuple[Buffers, int]]:
        """The buffers of layers, and their slots in use."""
        buffers = [layer.dense for layer in layers]
        buffers += [x for layer in layers if layer.middle for x in layer.middle.buffers().values()]
        return [(x, x.count) for x in buffers]

    @staticmethod
    def _hold(held: list[tuple[Buffers, int]]) -> None:
        """Count again what was counted when `held` was made."""
        for buffers, count in held:
            buffers.count = count

    def _demote_on_device(self) -> None:
        """The same by tensors of fixed addresses. All that graphs read is brought up to date."""
        counters = DeviceCounters(self.step_index, self.newest)
        together.compact(self.layers, counters)
        self._refresh(counters)
        self._set_fresh()

    def _demote_a_part(self) -> None:
        """Do a part of the next demotion, if that is due within a few steps of one token.

        Where tokens are taken back or rows reordered at each step, that work would be lost.
        """
        if not self.demotion.left or self.reordered or self.drafts() is not None:
            return
        missing = -next(layer for layer in self.layers if layer.compresses).num_past_threshold
        if 0 < missing <= self.demotion.left:
            self.step_index.add_(missing)
            self.demotion.run_part()
            self.step_index.sub_(missing)
            self.counts["demotion, a part ahead"] += 1

    def _forget_parts(self) -> None:
        """Tokens changed. The next demotion is done as a whole."""
        if self.demotion:
            self.demotion.done = 0

    # -- between steps

    def uncount(self) -> None:
        """Take back what the newest step counted, if that is known."""
        if self.kept and self._kept_at == self.token_positions.length:
            copy_all(zip(self._counted, self.kept))

    def crop(self, n: int) -> None:
        """Go on before the newest `n` tokens, which the cache has cropped."""
        self._kept_at = 0
        self._forget_parts()
        self.beams.close()
        if self._stale or self.token_positions.has_padding:
            self.touch()
            return
        self.step_index.sub_(n)
        self.newest.sub_(n)
        for group in self.groups:
            group.crop(n)

    def reorder(self, index: Tensor, select: Callable[[Tensor, Written | None], None]) -> None:
        """Reorder rows by `select`, in place: a few small kernels for each of many tensors.

        Within a beam search, `select` is told what the beams of a text do not share. From the second time
        with one graph id on, a CUDA graph replays the kernels.
        """
        self._kept_at, self.reordered = 0, True
        self._forget_parts()
        graphed = not self._stale and self.captures
        reach = self.beams.reach(index, static=graphed)
        graphed = graphed and not self._stale  # rows that leave their text share nothing any more
        if not graphed:
            select(index, self.beams.written(reach, static=False))
        elif self.step_index.device.type not in CAPTURES_ON:
            self._reorder(index.to(torch.int64), select, self.beams.written(reach, static=True))
        elif self.order and self._order_reach == reach:
            self._index.copy_(index)
            self.order.replay()
        else:
            device = self.step_index.device
            self._index = index.to(device, torch.int64, copy=True)  # or each gather would cast it
            what = dict(select=select, written=self.beams.written(reach, static=True))
            self.order, _ = record(self._reorder, index=self._index, **what)
            self._order_reach = reach
            self.counts["reordering, captured"] += 1
            self.order.replay()
        if graphed:
            self._set_fresh()
        if reach is None and self.within and self.beams.moved_all(index):
            self.order = None  # it may be of another beam search

    def _reorder(
        self, index: Tensor, select: Callable[[Tensor, Written | None], None], written: Written | None
    ) -> None:
        """The same, and all that graphs read brought up to date."""
        select(index, written)
        held = [self.newest, self.real]
        every = [None] * len(self.layers) if written is None else written.layers
        for group in self.groups:
            slots = every[self.layers.index(group.layers[0])]
            held.append(group.held if slots is None else cut(group.held, 2, slots.dense))
        for layer, slots in zip(self.layers, every):
            views = [view for view in layer.static_views if view.beams == 1]  # others hold no rows of beams
            of_slots = [x for view in views for x in (view.valid, view.read_at) if x is not None]
            held += of_slots if slots is None else [cut(x, -1, slots.middle) for x in of_slots]
        pending = []
        for x in held:
            take_rows(x, index, pending)
        copy_all(pending)

    # -- graph ids

    def _renew(self) -> None:
        """Bring what graphs read up to date; under a new graph id if anything that is fixed has changed."""
        self._forget_parts()
        for layer in self.layers:
            layer.follow_choices()
        inputs = [x for layer in self.layers for x in layer.static_inputs()] + self.token_positions.tensors()
        slots_read = self._now_read()
        known = self._static_inputs
        stayed = len(inputs) == len(known) and all(a is b for a, b in zip(inputs, known))
        same = stayed and slots_read == self._slots_read
        if stayed and not self._outgrown() and (same or self.captures and self._reads_alike(slots_read)):
            self.counts["views refreshed" if same else "more slots"] += 1
            self._slots_read = slots_read
            self._refresh()
            return
        reason = "longer prefix" if same else "more slots" if stayed else "other tensors"
        self.counts[f"new graph id: {reason}"] += 1
        self._demotions = self._demotions if stayed else 0
        self._static_inputs, self._slots_read = inputs, slots_read
        self._frequencies = self._current_frequencies()
        self._open()

    def _now_read(self) -> list[list[int]]:
        return [layer.slots_read() for layer in self.layers]

    def _reads_alike(self, slots_read: list[list[int]]) -> bool:
        """Whether steps that read so many slots differ from the last ones by these numbers alone."""
        return all(len(a) == len(b) and a[-1] == b[-1] for a, b in zip(slots_read, self._slots_read))

    @property
    def variant(self) -> tuple:
        """What distinguishes the graphs of one graph id: the slots that each layer reads."""
        return tuple(map(tuple, self._slots_read))

    @contextlib.contextmanager
    def reading_more(self, within: int) -> Iterator[tuple | None]:
        """Inside this context, layers read the slots that they will when the text outgrows those of now.

        Yields the `variant` of such steps. It is None if that will not be within so many tokens, or if it
        takes other buffers or kernels; then nothing changes.
        """
        layers = [layer for layer in self.layers if layer.compresses]
        later = [layer.reads_more_at for layer in layers]
        if not layers or None in later:
            yield None
            return
        records = [layer.middle.tiers[0].records for layer in layers]
        held = [x.count for x in records]
        if any(at - 1 - count > within for at, count in zip(later, held)):
            yield None
            return
        try:
            for x, at in zip(records, later):
                x.count = at
            yield tuple(map(tuple, self._now_read()))
        finally:
            for x, count in zip(records, held):
                x.count = count

    def _open(self) -> None:
        """Begin a new graph id."""
        device, batch = self.layers[0].device, self.token_positions.batch
        self.step_index = torch.zeros(1, dtype=torch.int64, device=device)
        self.newest = torch.zeros(batch, dtype=torch.int32, device=device)
        self.real = torch.ones(batch, dtype=torch.bool, device=device)
        kinds: dict[bool, list[KVLayer]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.compresses, []).append(layer)
            layer.allocate_static_views()
        self.groups = [DenseGroup(layers, batch, self._flashes) for layers in kinds.values()]
        self._group_of = [next(g for g in self.groups if layer in g.layers) for layer in self.layers]
        observed = [layer for layer in self.layers if layer.observer and self.runs_ahead]
        self._counted = [x for layer in observed for fields in layer.observed() for x in fields.values()]
        self.kept = [torch.empty_like(x) for x in self._counted]
        self._refresh()
        self.demotion, self.order, self._settling = None, None, SETTLED
        _graphs.pop(self.graph_id, None)
        self.graph_id = next(_graph_ids)
        _graphs[self.graph_id] = self
        self.dynamic_size = torch.empty(1, dtype=torch.uint8, device=device).expand(self.graph_id)
        torch._dynamo.mark_dynamic(self.dynamic_size, 0)

    def _refresh(self, counters: DeviceCounters | None = None) -> None:
        """Bring the tensors that graphs read up to date."""
        if counters is None:
            self.step_index.fill_(self.token_positions.length)
            self.newest.copy_(self.token_positions.logical.amax(-1))  # the newest token may be padding
        for group in self.groups:
            group.refresh(counters)
        firsts: dict[Hashable, KVLayer] = {}
        copies = []
        for layer in self.layers:
            like = layer.views_like
            first = layer if like is None else firsts.setdefault(like, layer)
            if first is layer:
                copies += layer.refresh_static_views(counters)
            else:
                for own, other in zip(layer.static_views, first.static_views):
                    pairs = (own.valid, other.valid), (own.read_at, other.read_at)
                    copies += [pair for pair in pairs if pair[0] is not None]
        copy_all(copies)

    # -- inside a step

    def run(self, index: int, query, key, value, mask, options: ScoreOptions) -> Tensor:
        """Append a layer's tokens and attend, by tensors of fixed addresses.

        A negative `index` is -1 less the index of a layer: it reads again what that layer has stored.
        """
        reads_again = index < 0
        index = -1 - index if reads_again else index
        layer, group, new = self.layers[index], self._group_of[index], query.shape[2]
        if index == 0 and not reads_again:
            self._advance(mask, new)
            if self.kept:
                copy_all(zip(self.kept, self._counted))
        slot = None
        if not reads_again:
            layer.append(key, value, slots=group.slots)
            slot = group.slot
        visible = Visible(group.visible, layer.static_views, group.flash_prefix, self.real, slot)
        output = layer.attend(query, visible, options)
        if index == len(self.layers) - 1 and not reads_again:
            self.step_index.add_(new)
            for group in self.groups:
                group.slot.add_(new)
        return output

    def _advance(self, mask: Tensor | None, new: int) -> None:
        """Give the tokens of a step their positions in each row, and let them be seen."""
        batch, device = self.token_positions.batch, self.step_index.device
        if new == 1:
            self.real.fill_(True) if mask is None else self.real.copy_(mask[:, 0, -1, -1])
            self.newest.add_(self.real)
            place = torch.where(self.real, self.newest, PAD)[:, None]
            self.token_positions.buffer.index_copy_(1, self.step_index, place)
            real = self.real[:, None]
        else:
            real = torch.ones(batch, new, dtype=torch.bool, device=device)
            if mask is not None:
                real = mask.diagonal(dim1=-2, dim2=-1)[:, 0]
            place = self.newest[:, None] + real.cumsum(-1, dtype=torch.int32)
            at = self.step_index + torch.arange(new, device=device)
            self.token_positions.buffer.index_copy_(1, at, place.masked_fill(~real, PAD))
            self.newest.add_(real.sum(-1, dtype=torch.int32))
        for group in self.groups:
            group.advance(real, new)


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
    """Attention of one layer in a decode step, [B, q, Hq, D]; see `DecodeGraph.run`.

    The operator changes the buffers of the cache, which the compiler does not know. For the compiler, the
    operators of one graph id are functions of their arguments. The order of layers follows from their data.
    """
    with without_autocast():
        options = ScoreOptions(scaling, softcap, None, s_aux)
        return _graphs[graph_id].run(index, query, key, value, mask, options)


@step_operator.register_fake
def _(query, *args):
    batch, heads, new, dim = query.shape
    return query.new_empty(batch, new, heads, dim)
