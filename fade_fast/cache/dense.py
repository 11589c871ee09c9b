"""The dense tokens of a layer, in the model's dtype: sinks first, then recent tokens."""

import torch
from torch import Tensor

from fade_ref.config import FadeConfig

from ..formats.base import Field
from ..kernels.rope import RoPE, rotate
from .buffers import Buffers, take
from .positions import PAD, DeviceCounters, TokenPositions


class DenseStore(Buffers):
    """Keys and values of sinks and recent tokens, `key` and `value` [B, H, capacity, D].

    Keys are held as they are read. So the keys of sinks are rotated on when tokens are evicted.

    Args:
        config: says how many tokens are sinks.
        positions: positions of the tokens of the cache.
        extra: further fields of each slot.
        heads, dim, dtype, batch, device: of the keys.

    Attributes:
        sinks_placed: whether each row has its first real tokens in the sink slots; padding may delay them.
        sink_keys: keys of the sinks as they came, once tokens were evicted; else None.
    """

    def __init__(
        self,
        config: FadeConfig,
        positions: TokenPositions,
        extra: dict[str, Field],
        heads: int,
        dim: int,
        dtype: torch.dtype,
        batch: int,
        device,
    ):
        fields = dict.fromkeys(("key", "value"), Field((dim,), dtype, heads))
        super().__init__(fields | extra, 1, batch, device)
        self.n_sink, self.token_positions = config.n_sink, positions
        self.sinks_placed = False
        self.sink_keys: Tensor | None = None

    def num_recent(self, length: int) -> int:
        """Recent tokens, after `length` tokens were stored."""
        return self.count - min(length, self.n_sink)

    def place_sinks(self, keys: Tensor, values: Tensor, start: int, length: int) -> None:
        """Put each row's first real tokens into its sink slots, from which padding shifted them.

        The tokens [B, H, q, D] are those of step indices `start` to `length`.
        """
        new = self.token_positions.logical[:, start:length]
        for slot in range(min(length, self.n_sink)):
            hit = new == slot
            here, index = hit.any(-1)[:, None, None], hit.int().argmax(-1)[:, None, None]
            for name, x in (("key", keys), ("value", values)):
                stored = self[name][:, :, slot]
                stored.copy_(torch.where(here, take(x, index)[:, :, 0], stored))
        self.sinks_placed = bool((self.token_positions.newest() >= self.n_sink - 1).all())

    def rotate_sinks(self, before: Tensor | None, evicted: Tensor, rope: RoPE) -> None:
        """Rewrite the keys of sinks as they are read now: rotated on by the tokens evicted.

        The rotation starts from the keys as they came. So rounding does not add up.

        Args:
            before: tokens evicted before this plan, int32 [B, 1]; None if no plan was made yet.
            evicted: tokens evicted by now.
        """
        keys = self["key"][:, :, : self.n_sink]
        if before is None:
            self.sink_keys = keys.clone()
        else:  # a row without evictions holds its sinks as they came, late ones included
            self.sink_keys.copy_(torch.where((before == 0)[..., None, None], keys, self.sink_keys))
        delta = evicted[..., None].expand(-1, -1, keys.shape[2])
        wide = self.sink_keys.to(torch.promote_types(keys.dtype, torch.float32))
        rotated = rotate(wide, delta, *rope)
        keys.copy_(torch.where((delta == 0)[..., None], self.sink_keys, rotated.to(keys.dtype)))

    def positions(self, length: int, counters: DeviceCounters | None = None) -> Tensor:
        """Logical positions of the slots in use, [B, 1, n] int32, or `PAD`, after `length` tokens."""
        num_sinks = min(length, self.n_sink)
        slots = torch.arange(num_sinks, dtype=torch.int32, device=self.tensors["key"].device)
        # A long step has positions before its tokens are stored: none of them is in a sink slot yet.
        seen = self.token_positions.length if length == 0 else length
        newest = self.token_positions.newest_of(seen, counters)
        recent = self.num_recent(length)
        position = self.token_positions.at(length - recent, recent, counters)
        position = position.masked_fill(position < self.n_sink, PAD)
        return torch.cat((torch.where(slots <= newest[:, None], slots, PAD), position), dim=-1)[:, None]

    def read_at(self, length: int, evicted: Tensor | None) -> Tensor:
        """Positions [B, 1, n] at which these keys are read: sinks move on by the tokens evicted."""
        position = self.positions(length)
        if evicted is None:
            return position
        sinks = position[..., : self.n_sink]
        moved = torch.where(sinks == PAD, PAD, sinks + evicted[..., None])
        return torch.cat((moved, position[..., sinks.shape[-1] :]), dim=-1)

    def map(self, function) -> None:
        super().map(function)
        if self.sink_keys is not None:
            self.sink_keys = function(self.sink_keys)

    def all_tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [*self.tensors.values()] + ([] if self.sink_keys is None else [self.sink_keys])
