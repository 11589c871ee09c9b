"""Static buffers: named tensors with one record per slot, which grow and move together."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..compile.compiled import use_compiled
from ..formats.base import Field

#: A full buffer grows by 1 / GROWTH of its size, in whole steps. So appending a token costs at most as much
#: as copying 256 tokens, which is little beside reading all tokens at every step, and few slots are unused.
GROWTH = 256


def take_rows(x: Tensor, index: Tensor, pending: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
    """Rows `index` [B'] int64 of `x` [B, ...]. In place if B' = B, because CUDA graphs keep addresses.

    `x` may be a view of some slots; then only these move.
    `pending` is a list that gets the copies to be made in place, for `copy_all`; if None, they are made here.
    """
    index, words = index.to(x.device), _words(x)
    chosen = words[index]  # `index_select` would take one thread through all rows
    if len(index) == len(x):
        if pending is None:
            words.copy_(chosen)
        else:
            pending.append((words, chosen))
        return x
    return chosen.view(x.dtype).view(len(index), *x.shape[1:])


def _words(x: Tensor) -> Tensor:
    """A view of `x` [B, ...] as numbers of eight bytes, or `x` where its layout does not allow that."""
    if x.dim() < 2 or not x.numel():
        return x
    if x.is_contiguous():
        x = x.flatten(1)
    elif x.dim() > 3 and x[0, 0].is_contiguous():  # some slots of all heads
        x = x.flatten(2)
    return as_words(x)


def as_words(x: Tensor) -> Tensor:
    """A view of `x` whose last axis has numbers of eight bytes, or `x` where its layout does not allow that.

    A GPU moves bytes no faster than words.
    """
    if not x.dim() or x.stride(-1) != 1:
        return x
    steps = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    return x.view(torch.int64) if all(n * x.element_size() % 8 == 0 for n in steps) else x


def concatenated(tensors: list[Tensor], axis: int) -> Tensor:
    """`torch.cat`, which copies words where the layouts of all tensors allow that."""
    words = [as_words(x) for x in tensors]
    if any(x.dtype != torch.int64 for x in words):
        return torch.cat(tensors, axis)
    return torch.cat(words, axis).view(tensors[0].dtype)


def copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first. On CUDA one kernel copies many of one dtype."""
    kinds = {}
    for pair in pairs:
        kinds.setdefault((pair[0].dtype, pair[0].is_contiguous()), []).append(pair)
    for alike in kinds.values():  # a mixture, and views with gaps, need one kernel per pair
        torch._foreach_copy_(*map(list, zip(*alike)))


def shared_by(slots: range, per: int) -> range:
    """The groups of `per` slots that some slots belong to."""
    return range(slots.start // per, -(-slots.stop // per))


class Buffers:
    """Records of one tier, slot by slot, in one tensor per field.

    Args:
        fields: what a slot holds, by name.
        step: slots are appended in multiples of this number, and the buffer grows in multiples of it.
        batch, device: of the tensors.

    The first `count` slots are in use. The content of the other slots has no meaning.
    """

    def __init__(self, fields: dict[str, Field], step: int, batch: int, device):
        self.fields, self.step, self.count = fields, step, 0
        self.tensors = {name: self._empty(name, batch, 0, device) for name in fields}

    def _empty(self, name: str, batch: int, slots: int, device) -> Tensor:
        """A tensor of one field, all zero."""
        return self.fields[name].empty(batch, slots, device)

    @classmethod
    def joined(cls, parts: list["Buffers"]) -> "Buffers":
        """The slots in use of all `parts`, whose rows follow one another: a copy, for reading."""
        twin = cls.__new__(cls)
        twin.fields, twin.step, twin.count = parts[0].fields, parts[0].step, parts[0].count
        twin.tensors = {name: concatenated([part[name] for part in parts], 0) for name in parts[0].fields}
        return twin

    @property
    def capacity(self) -> int:
        """Number of allocated slots."""
        name, field = next(iter(self.fields.items()))
        return self.tensors[name].shape[field.axis]

    @property
    def compiled(self) -> bool:
        """Whether compiled kernels read this, for which a capacity should last."""
        return use_compiled(next(iter(self.tensors.values())))

    @property
    def record_bytes(self) -> int:
        """Bytes of one slot of one row, over its heads and fields."""
        return sum(field.bytes for field in self.fields.values())

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def __getitem__(self, name: str) -> Tensor:
        """The slots in use of one field, a view."""
        return self.tensors[name].narrow(self.fields[name].axis, 0, self.count)

    def narrow(self, start: int, stop: int) -> dict[str, Tensor]:
        """Slots `start` to `stop` of every field, views."""
        return {
            name: x.narrow(self.fields[name].axis, start, stop - start) for name, x in self.tensors.items()
        }

    def between(self, slots: range) -> list[Tensor]:
        """Views of some slots of every field, as far as these exist; see `cut`."""
        return [cut(x, self.fields[name].axis, slots) for name, x in self.tensors.items()]

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` slots in all. Stored records stay.

        Nothing changes if memory runs out.
        """
        before = self.capacity
        if capacity <= before:
            return
        try:
            for name, field in self.fields.items():
                old = self.tensors[name]
                new = self._empty(name, old.shape[0], capacity, old.device)
                new.narrow(field.axis, 0, self.count).copy_(self[name])
                self.tensors[name] = new
        except BaseException:  # tensors that have grown already are cut to their old size
            self.tensors = {n: x.narrow(self.fields[n].axis, 0, before) for n, x in self.tensors.items()}
            raise

    def make_room(self, new: int, held: int) -> None:
        """Make room for `new` slots after the first `held`."""
        if held + new > self.capacity:
            self.reserve(held + new + held // GROWTH // self.step * self.step)

    def append(self, at: Tensor | None = None, **records: Tensor) -> None:
        """Write records, one tensor of n slots per field, after the slots in use.

        `at`, int64 [n], gives these slots to a CUDA graph that is being captured: a replay writes other
        slots.
        """
        name = next(iter(records))
        new = records[name].shape[self.fields[name].axis]
        self.make_room(new, self.count)
        if at is None:
            for name, x in records.items():
                self.tensors[name].narrow(self.fields[name].axis, self.count, new).copy_(x)
        else:
            self.write(at, **records)
        self.count += new

    def write(self, at: Tensor, **records: Tensor) -> None:
        """Write records into slots `at`, int64 [n], for which there is room. None of them is counted."""
        for name, x in records.items():
            self.tensors[name].index_copy_(self.fields[name].axis, at, x)

    def rewritten(self, count: int, records: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Hold `count` records, given all slots of each field: the copies to be made, for `copy_all`."""
        self.count = count
        return [(self.tensors[name], x) for name, x in records.items()]

    def filled_up(self, records: dict[str, Tensor]) -> dict[str, Tensor]:
        """Records with zeros behind them, as many as there are slots."""
        found = {}
        for name, x in records.items():
            axis = self.fields[name].axis % x.dim()
            missing = self.capacity - x.shape[axis]
            behind = [0, 0] * (x.dim() - 1 - axis) + [0, missing]
            found[name] = torch.nn.functional.pad(x, behind) if missing else x
        return found

    def replace(self, **records: Tensor) -> None:
        """Hold exactly these records, in the existing memory if they fit."""
        self.count = 0
        self.append(**records)

    def removal(self, start: int, n: int, whole: bool = False) -> Callable[[], None]:
        """A function that removes `n` slots from `start` on. Later slots move up. It allocates no memory.

        `whole`: slots that are not in use move, too, for a CUDA graph that is replayed when more are in use.
        """
        rest = (self.capacity if whole else self.count) - start - n
        axes, held = {name: field.axis for name, field in self.fields.items()}, self.tensors
        later = {name: held[name].narrow(axis, start + n, rest).clone() for name, axis in axes.items()}

        def remove() -> None:
            for name, x in later.items():
                held[name].narrow(axes[name], start, rest).copy_(x)
            self.count -= n

        return remove

    def take(self, name: str, index: Tensor) -> Tensor:
        """Slots `index` [B, 1 or H, m] of a field, gathered into a new tensor."""
        return take(self[name], index, self.fields[name].axis)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by `function(tensor)`: rows reordered, moved to a device, ..."""
        self.tensors = {name: function(x) for name, x in self.tensors.items()}


def cut(x: Tensor, axis: int, slots: range) -> Tensor:
    """A view of some slots of `x`, as far as these exist. All of `x` if they are most of it: one kernel
    copies many tensors without gaps."""
    held = x.shape[axis]
    first, stop = min(slots.start, held), min(slots.stop, held)
    return x if 2 * (stop - first) >= held else x.narrow(axis, first, stop - first)


def along(x: Tensor, like: Tensor, axis: int = 2) -> Tensor:
    """`x` [B, 1 or H, m], one number per slot, in a shape that broadcasts with a field's tensor `like`."""
    extra = like.dim() - x.dim()
    return x.reshape(*x.shape[:2], *[1] * extra, -1) if axis == -1 else x.reshape(*x.shape, *[1] * extra)


def take(x: Tensor, index: Tensor, axis: int = 2) -> Tensor:
    """Slots `index` [B, 1 or H, m] of `x`, gathered along the slot axis `axis`."""
    words = as_words(x) if axis % x.dim() < x.dim() - 1 else x
    shape = list(words.shape)
    shape[axis] = index.shape[-1]
    return words.gather(axis, along(index, words, axis).expand(shape)).view(x.dtype)
