"""What the rows of a text share in a beam search. A reordering moves only the rest.

generate() reads the prompt once for each beam. Then the best tokens of a text all come from one of its rows,
because the other beams start with a score of -1e9. So the first reordering, which moves everything, makes all
rows of a text copies of one row. From there on they differ only in what is written later: new tokens, and
blocks that leave the recent region. Later reorderings keep each row within its text. So they need to move
only the slots that were written since. How long the prompt is does not matter.

The rows of a text are equal to the bit when they part. This does not depend on how a prefill rounds.
"""

from typing import NamedTuple

from torch import Tensor

from .buffers import copy_all, take_rows
from .layer import KVLayer
from .positions import TokenPositions

MIN_REACH = 256  # tokens for which a reordering is recorded at least; when more have come, for twice as many


class Slots(NamedTuple):
    """The slots of a layer in which rows of one text may differ."""

    dense: range
    middle: range


class Written(NamedTuple):
    """All in which rows of one text may differ.

    Attributes:
        positions: step indices.
        layers: the slots of each tiered layer; None: any slot.
    """

    positions: range
    layers: list[Slots | None]


class Fork(NamedTuple):
    """How far a layer had come when the rows of each text were equal.

    Attributes:
        recent, dense, middle: tokens in the recent region, and slots in use.
        placed: whether no later token can come to a sink slot.
    """

    recent: int
    dense: int
    middle: int
    placed: bool

    @classmethod
    def of(cls, layer: KVLayer) -> "Fork | None":
        """That of a layer as it is now; None where tokens change slots, or statistics follow the row."""
        if not layer.is_initialized or layer.observer is not None:
            return None
        if layer.middle is not None and not layer.middle.keeps_slots:
            return None
        placed = layer.dense.sinks_placed or not layer.token_positions.has_padding
        middle = 0 if layer.middle is None else layer.middle.count
        return cls(layer.recent, layer.dense.count, middle, placed)

    def slots(self, layer: KVLayer, new: int, static: bool) -> Slots:
        """The slots of `layer` that differ now, after `new` further tokens. If `static`: those that may
        differ as long as no more than `new` tokens have come.
        """
        if static:
            left = layer.num_overflow(self.recent + new)
        else:
            left = 0 if layer.middle is None else layer.middle.count - self.middle
        # The recent tokens move up when some have left.
        first = min(self.dense, max(layer.config.n_sink, self.dense - left)) if self.placed else 0
        return Slots(range(first, self.dense + new), range(self.middle, self.middle + left))


class Beams:
    """Follows the rows of one cache through a beam search.

    Args:
        positions, layers: of the cache; `layers` are the tiered ones.
    """

    def __init__(self, positions: TokenPositions, layers: list[KVLayer]):
        self._positions, self._layers = positions, layers
        self.close()

    def open(self, texts: int | None) -> None:
        """A generate() of so many texts begins; None: not known."""
        self.close()
        self._texts = texts or 0

    def close(self) -> None:
        """Everything moves from now on, until another generate() begins."""
        self._texts = 0
        self._first: Tensor | None = None  # rows of the first reordering
        self._length = 0  # tokens of the cache at that time
        self._forks: list[Fork | None] = []  # of the layers
        self._beams = 0  # rows of a text; 0: not known to have been equal
        for layer in self._layers:
            layer.share(1, 0)

    def moved_all(self, index: Tensor) -> bool:
        """Rows `index` have taken all places, in a generate(). Returns whether that was the first time."""
        if not self._texts or self._first is not None:
            self.close()
            return False
        self._first, self._length = index.clone(), self._positions.length
        self._forks = [Fork.of(layer) for layer in self._layers]
        return True

    def continue_search(self) -> None:
        """The next step belongs to a beam search. Look once whether the rows of each text became equal, and
        whether any layer shares what they hold.

        The host waits for the first reordering.
        """
        if self._first is None or self._beams:
            return
        rows = self._first.tolist()
        beams = len(rows) // self._texts
        sources = [set(rows[i : i + beams]) for i in range(0, len(rows), beams)] if beams > 1 else []
        equal = len(sources) == self._texts and all(len(x) == 1 for x in sources)
        if not equal or not any(self._forks):
            self.close()
            return
        self._beams = beams
        for fork, layer in zip(self._forks, self._layers):
            if fork is not None:
                layer.share(beams, fork.middle)

    def reach(self, index: Tensor, static: bool) -> int | None:
        """How many tokens have come since the rows of a text were equal. None: everything has to move.

        If `static`, a larger number, which stays the same for many steps. A search keeps rows within their
        text. On a CPU this is checked. On a GPU the host would have to wait.
        """
        if not self._beams:
            return None
        if not index.is_cuda:
            strays = [i // self._beams != row // self._beams for row, i in enumerate(index.tolist())]
            if any(strays):
                self.close()
                return None
        new = self._positions.length - self._length
        return max(MIN_REACH, 1 << (new - 1).bit_length()) if static else new

    def written(self, reach: int | None, static: bool) -> Written | None:
        """What may differ in the rows of a text; None: everything. The arguments are those of `reach`, and
        what it returned.
        """
        if reach is None:
            return None
        pairs = zip(self._forks, self._layers)
        slots = [None if fork is None else fork.slots(layer, reach, static) for fork, layer in pairs]
        return Written(range(self._length, self._length + reach), slots)


def move(layer: KVLayer, index: Tensor, slots: Slots | None) -> None:
    """Rows `index` int64 [B] take the places of the present rows of a layer, in `slots`. None: in all."""
    if slots is None:
        layer.select_rows(index)
        return
    layer.version += 1
    parts = layer.dense.between(slots.dense)
    if layer.middle is not None:
        parts += layer.middle.written(slots.middle)
    pending: list[tuple[Tensor, Tensor]] = []
    for x in parts:
        take_rows(x, index, pending)
    copy_all(pending)
