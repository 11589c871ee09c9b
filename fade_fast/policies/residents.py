"""Which pages a policy wants on the GPU, by the mass that queries give to pages (`fade_ref.select.rank`).

The observers of `scores.py` count it, with pages for tokens. AKV's mixture looks at all tokens at once, so it
is here: an observer of tokens is called for each tile of them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats.base import Field
from .scores import Decayed, Observer, Summed, Windowed

DECAY, SHARE = 0.95, 0.7  # of the mixture, from akv-cache 1.0.0, importance.py


class Mixed(Observer):
    """AKV's mixture of decayed mass and recency, fed back into itself (`fade_ref.baselines.hybrid`)."""

    fresh = dict(hybrid=0.0)

    def allocate(self, heads, dtype, device):
        self.fields = dict(hybrid=Field((), torch.promote_types(dtype, torch.float32), heads))

    @staticmethod
    def update(attention_stats, probs, seen, cursor):
        score = attention_stats["hybrid"]
        for p, sees in zip(probs.unbind(2), seen.unbind(2)):
            decayed = torch.where(sees, DECAY * score + p, 0.0)
            share = decayed / decayed.amax(-1, keepdim=True).clamp_min(1e-10)
            count = sees.sum(-1, keepdim=True)
            recency = (sees.to(score.dtype).cumsum(-1) - 1) / (count - 1).clamp_min(1)
            score.copy_(torch.where(sees, SHARE * share + (1 - SHARE) * recency, score))

    def score(self, attention_stats):
        return attention_stats["hybrid"].double()


#: The observer of each of `RESIDENT_POLICIES` but "position", which ranks by use.
OBSERVERS: dict[str, Callable[[], Observer]] = {
    "h2o": Summed, "ema": Decayed, "tova": lambda: Windowed(1), "hybrid": Mixed,
}  # fmt: skip


class Wanted:
    """How much a policy wants each page, for each row and KV head.

    Args:
        policy: a name in `OBSERVERS`.
        batch, heads: rows and KV heads.
        dtype: of the masses, float32 or float64.
        device: of the tensors.
    """

    def __init__(self, policy: str, batch: int, heads: int, dtype: torch.dtype, device):
        self.observer, self.batch, self.device = OBSERVERS[policy](), batch, torch.device(device)
        self.observer.allocate(heads, dtype, device)
        self.stats = self.observer.arrive(batch, 0, device)

    @property
    def count(self) -> int:
        """Pages there is room for."""
        return next(iter(self.stats.values())).shape[-1]

    def reserve(self, pages: int) -> None:
        """Make room for `pages` pages in all; new ones are seen by no query."""
        if (more := pages - self.count) > 0:
            new = self.observer.arrive(next(iter(self.stats.values())).shape[0], more, self.device)
            self.stats = {name: torch.cat((x, new[name]), dim=-1) for name, x in self.stats.items()}

    def observe(self, mass: Tensor, seen: Tensor) -> None:
        """Count one query.

        Args:
            mass: [B, H, P], of the first pages.
            seen: bool [B, 1, P], which of them have a token that the query sees.
        """
        stats = {name: x.narrow(-1, 0, mass.shape[-1]) for name, x in self.stats.items()}
        self.observer.add(stats, mass.unsqueeze(2), seen.unsqueeze(2))
        self.observer.advance(1)

    def ranks(self) -> Tensor:
        """How much each page is wanted, float64 [B, H, pages]; 0 for pages that no query has seen."""
        return self.observer.score(self.stats).nan_to_num(0.0)

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [*self.stats.values(), *self.observer.tensors()]

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor that has rows by `function` of it."""
        self.stats = {name: function(x) for name, x in self.stats.items()}
        self.device = next(iter(self.stats.values())).device
        if self.observer.cursor is not None:
            self.observer.cursor = self.observer.cursor.to(self.device)
