"""Which columns a cache has seen, and where in its own row each one stands.

A column is one step of the batch: every row gets a token or padding. Padding is known only from
the attention mask of the step that brings it, so it is written down here once, for all layers.
"""

import torch
from torch import Tensor

from .buffers import take_rows
from .masks import PAD, MaskReader

STEP = 256  # columns allocated at a time


class TokenPositions:
    """Positions of a cache's columns.

    `logical` [B, length] int32: the token's index among the real tokens of its row, or `PAD`.
    `length`: columns seen, the cache's logical length. `buffer`: what `logical` is a view of.
    `cursor`: the length as a tensor, int64 [1], while a graph is captured in which columns must be found
    anew at every replay; `latest` then is what `newest()` gives. None otherwise.
    `masks`: reads those of steps.
    """

    def __init__(self):
        self.cursor: Tensor | None = None
        self.latest: Tensor | None = None
        self.masks = MaskReader()
        self.clear()

    def clear(self) -> None:
        """Forget every column, and the batch size."""
        self.buffer: Tensor | None = None
        self.length = 0
        self.has_padding = False
        self._judged = (-1, False)

    @property
    def logical(self) -> Tensor:
        return self.buffer[:, : self.length]

    def index(self, first: int, count: int) -> Tensor:
        """Columns `first` to `first + count`, by the cursor: int64 [count]."""
        start = first - self.length
        return self.cursor + torch.arange(start, start + count, device=self.cursor.device)

    def at(self, first: int, count: int) -> Tensor:
        """Positions of columns `first` to `first + count`, [B, count]."""
        if self.cursor is None:
            return self.logical[:, first : first + count]
        return self.buffer.index_select(1, self.index(first, count))

    @property
    def batch(self) -> int:
        return self.buffer.shape[0]

    @property
    def room(self) -> int:
        """Further columns there is room for."""
        return self.buffer.shape[1] - self.length

    def extend(self, start: int, valid: Tensor | None, batch: int, count: int, device) -> None:
        """Record `count` columns from column `start` on; nothing happens if they are known already.

        `valid` is bool [B, count], or None if every token is real. Each layer calls this for the
        same columns, so only the first call of a step writes.
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
        """Whether no row has padding in a step from column `start` on; looked at once, for all layers."""
        if self._judged[0] != start:
            self._judged = (start, bool(valid.all()))
        return self._judged[1]

    def real(self) -> Tensor | None:
        """Which columns are no padding, bool [B, length]; None if none is."""
        return self.logical != PAD if self.has_padding else None

    def reserve(self, columns: int) -> None:
        """Make room for `columns` in all, and more if there is too little: on a GPU twice as many."""
        if columns <= self.buffer.shape[1]:
            return
        spare = columns if self.buffer.is_cuda else columns // 64
        capacity = -(-(columns + spare) // STEP) * STEP
        grown = self.buffer.new_full((self.batch, capacity), PAD)
        grown[:, : self.length] = self.logical
        self.buffer = grown

    def newest(self) -> Tensor:
        """Position of each row's newest real token, [B] int32."""
        return self._last(self.buffer.shape[0], self.buffer.device)

    def _last(self, batch: int, device) -> Tensor:
        """Position of each row's newest real token, [B] int32; -1 if it has none yet."""
        if not self.length:
            return torch.full((batch,), -1, dtype=torch.int32, device=device)
        if self.cursor is not None:
            return self.latest
        return self.logical.amax(-1) if self.has_padding else self.logical[:, -1]

    def crop(self, n: int) -> None:
        """Forget the newest `n` columns."""
        self.length -= n
        self._judged = (-1, False)

    def select_rows(self, index: Tensor) -> None:
        """Rows `index` [B'] take the places of the rows there were."""
        if self.buffer is not None:
            self.buffer = take_rows(self.buffer, index)

    def tensors(self) -> list[Tensor]:
        """What this holds in memory."""
        return [] if self.buffer is None else [self.buffer]
