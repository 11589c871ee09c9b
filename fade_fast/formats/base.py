"""A format: what a layer stores of each token in its compressed tiers, and how attention reads it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from fade_ref.tiers import Tier

from ..kernels import decode, rotated
from ..kernels.merge import Partial
from ..kernels.packed import TierView
from ..kernels.rope import RoPE


@dataclass(frozen=True)
class Field:
    """One tensor of a buffer: shape and dtype of one head's record, and the axis that counts slots.

    Axis 2 gives [B, heads, slots, *shape]. Axis -1 gives [B, heads, *shape, slots].
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    heads: int
    axis: int = 2

    def shape_of(self, batch: int, slots: int) -> tuple[int, ...]:
        """Shape of the tensor of `slots` slots."""
        shape = (*self.shape, slots) if self.axis == -1 else (slots, *self.shape)
        return batch, self.heads, *shape

    def empty(self, batch: int, slots: int, device) -> Tensor:
        """The tensor of `slots` slots, all zero."""
        return torch.zeros(self.shape_of(batch, slots), dtype=self.dtype, device=device)

    @property
    def bytes(self) -> int:
        """Bytes of one slot of one row, over all heads."""
        return self.heads * torch.Size(self.shape).numel() * self.dtype.itemsize


class TierFormat(ABC):
    """What one tier stores of a token.

    Attributes:
        tier: the tier's code.
        name: the tier's name in reports: `INT4`, or `K4V2` where the widths differ.
    """

    tier: Tier
    name: str

    @abstractmethod
    def fields(self, heads: int) -> dict[str, Field]:
        """The fields of a record. Each format has the fields `key_codes` and `value_codes`."""

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor, mean: Tensor, recurs: bool) -> dict[str, Tensor]:
        """Records of tokens.

        Args:
            keys, values: [B, H, n, D], any floating dtype.
            mean: [B, H, m, D] fp16, the mean of each n / m keys.
            recurs: whether this number of tokens recurs. Then a compiled version pays.
        """

    def whole(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """Records as the codec defines them, where the fields store them in parts."""
        return fields

    @abstractmethod
    def decode_keys(self, fields: dict[str, Tensor], mean: Tensor, dtype: torch.dtype) -> Tensor:
        """Keys [B, H, n, D] of `dtype`, as they were encoded. `mean` is [B, H, n or 1, D]."""

    @abstractmethod
    def decode_values(self, fields: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Values [B, H, n, D] of `dtype`."""

    @abstractmethod
    def value_bound(self, fields: dict[str, Tensor]) -> Tensor:
        """A bound of all value scales of these records, which kernels need: [B, H] float32."""

    @abstractmethod
    def view(
        self, tensors: dict[str, Tensor], bound, means, valid: Tensor, per_mean: int, read_at
    ) -> TierView:
        """The view that kernels read, over buffers at full capacity; see `TierView`."""


class Format(ABC):
    """What a layer stores of a token in its compressed tiers, and how attention reads it.

    A format without tiers keeps every token in the model's dtype.

    Args:
        tables: `(head_dim, device)` -> the codec's rotation and, below it, the sum of its rows:
            float32 [D + 1, D].

    Attributes:
        table: that tensor, or one for each KV head, [H, D + 1, D], once `allocate` was called.
        value_table: [H, D, D] where values have matrices of their own, else None.
    """

    value_table: Tensor | None = None

    def __init__(self, tables: Callable[[int, torch.device], Tensor]):
        self._tables = tables
        self.table: Tensor | None = None

    @property
    @abstractmethod
    def tiers(self) -> list[TierFormat]:
        """Formats of the tiers, finest first. They exist once `allocate` was called."""

    @property
    @abstractmethod
    def compresses(self) -> bool:
        """Whether there is any tier."""

    @abstractmethod
    def check(self, head_dim: int, layer: int | None, heads: int | None = None) -> None:
        """Raise `ValueError` if `heads` KV heads of `head_dim` channels cannot be stored.

        `layer` is for the message. `heads` is None where another part of the program has checked them.
        """

    def allocate(self, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make the tables for heads of `head_dim` channels; `dtype` and `device` are those of the keys."""
        self.table = self._tables(head_dim, device)

    @property
    def awaits_tables(self) -> bool:
        """Whether the tables do not exist yet, because the first tokens of a text give them."""
        return False

    @property
    def shared(self) -> Hashable | None:
        """What codes depend on beside the vectors and tables: layers of equal values may be encoded together,
        by the format that `joined` makes. None: this layer is encoded alone.
        """
        return None

    @property
    def has_own_tables(self) -> bool:
        """Whether each KV head has tables of its own: layers may be joined as heads, and not as rows."""
        return False

    @staticmethod
    def joined(formats: "list[Format]") -> "Format":
        """The format of one layer that has the KV heads of all layers with these formats, which are equal
        in `shared`. It only encodes.
        """
        return formats[0]

    def tensors(self) -> list[Tensor]:
        """The tables that this format holds or shares."""
        return [] if self.table is None else [self.table]

    def key_means(self, keys: Tensor, position: Tensor, real: Tensor | None) -> Tensor:
        """Means that are subtracted from the keys of some groups of tokens.

        Args:
            keys: [B, H, G, n, D], as they are encoded.
            position: [B, 1, G, n] int, of the tokens.
            real: bool [B, 1, G, n], False at padding. None: all tokens are real.

        Returns fp16 [B, H, G, D]; 0 for a group without a real token.
        """
        return rotated.key_mean(keys, real)

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor,
        tiers: list[TierFormat],
        views: list[TierView],
        slots_read: list[int],
        *,
        rope: RoPE | None,
        **options,
    ) -> Tensor:
        """Attention of a short step over dense tokens and compressed ones, [B, q, Hq, D].

        Args:
            query: [B, Hq, q, D]. keys, values: dense ones, [B, H, E, D].
            visible: bool [B, 1 or q, E], the dense tokens that each query sees.
            tiers, views, slots_read: of the tiers that hold a token.
            rope: where keys were encoded before RoPE, else None.
            options: `scaling`, `softcap`, `s_aux` and `mass`; see `decode.attend`.
        """
        if rope is not None:
            options.update(inv_freq=rope.inv_freq, interleaved=rope.interleaved)
        bits = [tier.bits for tier in tiers]
        return decode.attend(
            query, keys, values, visible, self.table, views, bits=bits, slots_read=slots_read,
            value_matrix=self.value_table, **options,
        )  # fmt: skip

    @abstractmethod
    def attend_tier(
        self,
        tier: TierFormat,
        query: Tensor,
        view: TierView,
        count: int,
        score_reference: Tensor,
        rope: RoPE | None,
        softcap: float | None,
    ) -> Partial:
        """Partial attention of many queries over one tier, tile by tile.

        Args:
            query: [B, H, R, D], scaled, float32 or float64.
            view: the tier, its `valid` [B, 1 or R, capacity].
            count: slots in use.
            score_reference: [B, H, R], a score near the largest of each row.
            rope: where keys were encoded before RoPE, else None.
            softcap: c in c * tanh(s / c), or None.
        """
