"""Which tokens a cache has seen, and the logical position of each in its row.

Step index i counts the tokens of a batch: at each index, each row gets a token or padding. Padding is known
only from the attention mask of its step. So it is recorded here once, for all layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .buffers import cut, take_rows
from .masks import PAD, MaskReader

GROWTH = 256  # step indices allocated at a time


class DeviceCounters(NamedTuple):
    """How far a cache has come, as tensors. A CUDA graph reads them anew at each replay.

    Attributes:
        length: int64 [1], tokens seen.
        newest: int32 [B], position of the newest real token of each row.
    """

    length: Tensor
    newest: Tensor


class RepeatedPositions:
    """The `TokenPositions` of a batch whose rows are repeated as a whole, for a step of several layers.

    Args:
        positions: of the rows.
        times: how often.
    """

    def __init__(self, positions: "TokenPositions", times: int):
        self._positions, self._times = positions, times

    @property
    def has_padding(self) -> bool:
        """Whether any token was padding."""
        return self._positions.has_padding

    def at(self, first: int, count: int, counters: DeviceCounters | None = None) -> Tensor:
        """See `TokenPositions.at`."""
        return self._positions.at(first, count, counters).repeat(self._times, 1)

    def of(self, index: Tensor) -> Tensor:
        """See `TokenPositions.of`."""
        return self._positions.of(index).repeat(self._times, 1)

    def newest_of(self, seen: int, counters: DeviceCounters | None = None) -> Tensor:
        """See `TokenPositions.newest_of`."""
        return self._positions.newest_of(seen, counters).repeat(self._times)


class TokenPositions:
    """Positions of the tokens of a cache.

    Attributes:
        buffer: int32 [B, capacity]: the token's index among the real tokens of its row, or `PAD`.
        length: tokens seen, the logical length of the cache.
        has_padding: whether any token was padding.
        expected: tokens that the text will have, as far as a generate() under way says; None: not known.
        masks: reads the masks of steps.
    """

    def __init__(self):
        self.masks = MaskReader()
        self.expected: int | None = None
        self.clear()

    def clear(self) -> None:
        """Forget every token, and the batch size."""
        self.buffer: Tensor | None = None
        self.length = 0
        self.has_padding = False
        self._checked = (-1, False)  # start of the newest step that was looked at, and what was found

    @property
    def logical(self) -> Tensor:
        """Positions of all tokens seen, [B, length] int32."""
        return self.buffer[:, : self.length]

    def at(self, first: int, count: int, counters: DeviceCounters | None = None) -> Tensor:
        """Positions of step indices `first` to `first + count`, [B, count] int32.

        With `counters`, the indices are read from the device: they count from its length.
        """
        if counters is None:
            return self.logical[:, first : first + count]
        return self.of(self.index(first, count, counters))

    def of(self, index: Tensor) -> Tensor:
        """Positions of step indices `index` int64 [count], [B, count] int32."""
        return self.buffer.index_select(1, index)

    def index(self, first: int, count: int, counters: DeviceCounters) -> Tensor:
        """Step indices `first` to `first + count` as the device counts them, int64 [count]."""
        offset = first - self.length
        return counters.length + torch.arange(offset, offset + count, device=counters.length.device)

    @property
    def batch(self) -> int:
        """Rows."""
        return self.buffer.shape[0]

    @property
    def room(self) -> int:
        """Further tokens there is room for."""
        return self.buffer.shape[1] - self.length

    def extend(self, start: int, valid: Tensor | None, batch: int, count: int, device) -> None:
        """Record `count` tokens from step index `start` on. Nothing happens if they are known already.

        `valid` is bool [B, count], or None if every token is real. Each layer calls this for the same
        tokens, so only the first call of a step writes.
        """
        if start + count <= self.length:
            return
        last = self._last(batch, device)
        if valid is None:
            new = last[:, None] + torch.arange(1, count + 1, dtype=torch.int32, device=device)
        else:
            new = last[:, None] + valid.to(torch.int32).cumsum(-1, dtype=torch.int32)
            new = new.masked_fill(~valid, PAD)
            self.has_padding = True
        needed = self.length + count
        if self.buffer is None:
            self.buffer = new.new_full((batch, 0), PAD)
        self.reserve(needed)
        self.buffer[:, self.length : needed] = new
        self.length = needed

    def all_real(self, start: int, valid: Tensor) -> bool:
        """Whether no row has padding in the step from `start` on. All layers share one look."""
        if self._checked[0] != start:
            self._checked = (start, bool(valid.all()))
        return self._checked[1]

    def real(self) -> Tensor | None:
        """Which tokens are not padding, bool [B, length]; None if all are real."""
        return self.logical != PAD if self.has_padding else None

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in all. If there is too little, make more: on a GPU twice as much."""
        if length <= self.buffer.shape[1]:
            return
        spare = length if self.buffer.is_cuda else length // 64
        capacity = -(-(length + spare) // GROWTH) * GROWTH
        grown = self.buffer.new_full((self.batch, capacity), PAD)
        grown[:, : self.length] = self.logical
        self.buffer = grown

    def newest(self, counters: DeviceCounters | None = None) -> Tensor:
        """Position of the newest real token of each row, [B] int32."""
        return self._last(self.batch, self.buffer.device) if counters is None else counters.newest

    def newest_of(self, seen: int, counters: DeviceCounters | None = None) -> Tensor:
        """The same for the first `seen` tokens."""
        return self.newest(counters) if seen == self.length else self.logical[:, :seen].amax(-1)

    def _last(self, batch: int, device) -> Tensor:
        """The same; -1 for rows without a real token."""
        if not self.length:
            return torch.full((batch,), -1, dtype=torch.int32, device=device)
        return self.logical.amax(-1) if self.has_padding else self.logical[:, -1]

    def crop(self, n: int) -> None:
        """Forget the newest `n` tokens."""
        self.length -= n
        self._checked = (-1, False)

    def select_rows(self, index: Tensor, steps: range | None = None) -> None:
        """Rows `index` [B'] take the places of the present rows. With `steps`, rows differ only there."""
        if self.buffer is None:
            return
        found = take_rows(self.buffer if steps is None else cut(self.buffer, 1, steps), index)
        if steps is None:
            self.buffer = found

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [] if self.buffer is None else [self.buffer]


class PositionsElsewhere(TokenPositions):
    """The `TokenPositions` of a cache for its layers on another device, with a copy of the buffer there.

    What is recorded is recorded in the original. The copy is made anew after a change, so once a step.

    Args:
        original: of the cache.
        device: of the layers.
    """

    def __init__(self, original: TokenPositions, device: torch.device):
        self.original, self.device = original, device
        self.masks = MaskReader()  # each device gets a mask of its own
        self._copy: Tensor | None = None
        self._copied: tuple[Tensor, int] | None = None  # buffer of the original, and its version

    @property
    def buffer(self) -> Tensor | None:  # type: ignore[override]
        now = self.original.buffer
        if now is None or now.is_inference():  # the latter count no versions
            self._copied = None
            return None if now is None else now.to(self.device)
        if self._copied is None or self._copied[0] is not now or self._copied[1] != now._version:
            self._copy, self._copied = now.to(self.device, copy=True), (now, now._version)
        return self._copy

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.original.length

    @property
    def has_padding(self) -> bool:  # type: ignore[override]
        return self.original.has_padding

    @property
    def expected(self) -> int | None:  # type: ignore[override]
        return self.original.expected

    def extend(self, start: int, valid: Tensor | None, batch: int, count: int, device) -> None:
        if start + count > self.length:
            held = self.original.buffer
            home = device if held is None else held.device
            self.original.extend(start, None if valid is None else valid.to(home), batch, count, home)

    def all_real(self, start: int, valid: Tensor) -> bool:
        return self.original.all_real(start, valid)

    def tensors(self) -> list[Tensor]:
        return [] if self._copy is None else [self._copy]
