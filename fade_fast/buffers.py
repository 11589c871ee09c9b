"""Static buffers: named tensors that hold one record a slot and move together."""

from collections.abc import Callable

import torch
from torch import Tensor

#: A full buffer grows by this fraction of itself, in whole steps. So to append a token costs a constant,
#: at most that of copying 256, little beside reading all of them at every step; and hardly a slot is spare.
GROWTH = 256


class Buffers:
    """Records of one tier, slot by slot, in tensors [B, H, capacity, ...].

    Args:
        fields: name -> (shape of one record of one head, dtype).
        step: capacities are multiples of this many slots.
        device: where the tensors live.

    `count` slots, the first ones, are in use. What the others hold means nothing.
    """

    def __init__(self, fields: dict[str, tuple[tuple[int, ...], torch.dtype]], step: int, device):
        self.fields, self.step, self.device = fields, step, device
        self.count = 0
        self.tensors: dict[str, Tensor] = {}

    @property
    def capacity(self) -> int:
        return next(iter(self.tensors.values())).shape[2] if self.tensors else 0

    @property
    def record_bytes(self) -> int:
        """Bytes of one slot of one row, over its heads and fields."""
        return sum(x.shape[1] * x.shape[3:].numel() * x.element_size() for x in self.tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def __getitem__(self, name: str) -> Tensor:
        """The slots in use of one field: a view [B, H, count, ...]."""
        return self.tensors[name][:, :, : self.count]

    def reserve(self, batch: int, heads: dict[str, int], capacity: int) -> None:
        """Make room for `capacity` slots in all; what is stored stays. `heads`: field -> heads."""
        capacity = -(-capacity // self.step) * self.step
        if self.tensors and capacity <= self.capacity:
            return
        grown = {}
        for name, (shape, dtype) in self.fields.items():
            new = torch.zeros(batch, heads[name], capacity, *shape, dtype=dtype, device=self.device)
            if self.tensors:
                new[:, :, : self.count] = self[name]
            grown[name] = new
        self.tensors = grown

    def append(self, **records: Tensor) -> None:
        """Write records [B, H, n, ...], one tensor a field, after those in use."""
        sample = next(iter(records.values()))
        needed = self.count + sample.shape[2]
        if not self.tensors or needed > self.capacity:
            slack = self.count // GROWTH // self.step * self.step
            heads = {name: x.shape[1] for name, x in records.items()}
            self.reserve(sample.shape[0], heads, needed + slack)
        for name, x in records.items():
            self.tensors[name][:, :, self.count : needed] = x
        self.count = needed

    def replace(self, **records: Tensor) -> None:
        """Hold exactly these records, in the memory there is if they fit."""
        self.count = 0
        self.append(**records)

    def drop_first(self, n: int, start: int = 0) -> None:
        """Remove `n` slots from `start` on; later ones move up."""
        for x in self.tensors.values():
            x[:, :, start : self.count - n] = x[:, :, start + n : self.count].clone()
        self.count -= n

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by `function` of it: rows reordered, moved to a device, ..."""
        self.tensors = {name: function(x) for name, x in self.tensors.items()}
