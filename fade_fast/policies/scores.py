"""Attention that tokens received: what the policies that rank by it store, and how queries add to it.

What is stored of a token lies beside its key and value, as further fields of its slot, and so moves
with it: `received`, a dict of tensors, one a field. Policies that need none have no observer, and
cost nothing.

fade_fast takes no numerics from fade_ref, with one exception: the arithmetic of scores and plans
(`fade_ref.scores`, `fade_ref.plan`). A second copy would only repeat it, and prove nothing. How queries
are counted is implemented twice, here and in `fade_ref.importance`, and parity compares the two.

Shapes: B rows, H KV heads, q queries, n slots. A share [B, H, q, n] is the probability that a query
gives to a token, mean over the query heads of the KV head.
"""

import os
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fade_ref.config import FadeConfig
from fade_ref.scores import MLP, features, keep_probability, pool_neighbors

from ..compile.compiled import TOGETHER, Compiled, use_compiled
from ..formats.base import Field

ALPHA = 0.95  # decay of `Decayed` a query: fade-kv 1.1.0, tracker.py
WINDOW = 64  # queries that SnapKV observes
#: What the network of the `learned` policy sees of a token, see `features`.
FEATURES = ("position, scaled", "mean share, scaled", "depth of the layer", "age over that of the first")
#: Its weights, unless others are given; `python -m fade_fast.hf.train_policy` made them.
SHIPPED = Path(__file__).parent / "weights" / "learned.safetensors"
UNSEEN = -1.0  # stands where no query could see the token


class Observer(ABC):
    """What one layer knows of the attention that its tokens received.

    Attributes:
        fields: name -> what a slot holds; set by `start`, which comes before everything else.
        fresh: name -> the value for a token that no query has seen yet.
        horizon: how many of the newest queries of a step can make a difference; None: all.
        additive: whether shares may come summed over the queries of a step.
        by_head: whether the heads of a row hold different tokens.
        compiles: whether `rule` may be compiled, and the fields be kept twice: not where they are large, and
            it writes only a part of them.
        cursor: int64 [1], what `rule` counts by beside the fields; None if nothing.
    """

    fresh: dict[str, float]
    compiles = True
    cursor: Tensor | None = None
    horizon: int | None = None
    additive = False
    by_head = False

    def __init__(self):
        self.fields: dict[str, Field] = {}

    @abstractmethod
    def allocate(self, heads: int, dtype: torch.dtype, device) -> None:
        """Learn the KV heads, and the dtype and device of the keys."""

    @staticmethod
    @abstractmethod
    def update(
        attention_stats: dict[str, Tensor], probs: Tensor, seen: Tensor, cursor: Tensor | None
    ) -> None:
        """Count q queries, the oldest first, in place; every tile of tokens has its own call.

        Args:
            received: the fields of n tokens, views.
            shares: [B, H, q, n], 0 where not seen; [B, H, 1, n], their sum over queries, if `additive`.
            seen: bool [B, 1, q, n], which tokens each query could see.
            cursor: see there.
        """

    def add(self, attention_stats: dict[str, Tensor], probs: Tensor, seen: Tensor) -> None:
        """Count queries by the `rule`."""
        self.update(attention_stats, probs, seen, self.cursor)

    def add_step(
        self,
        buffers: list[dict[str, Tensor]],
        sums: list[Tensor],
        seen: list[Tensor],
        real: Tensor,
        group: int,
        slot: Tensor | None,
    ) -> None:
        """Count a step of one column by its sums over `group` query heads, on CUDA in one kernel.

        Args:
            buffers: of the uncompressed slots and of each tier, the fields.
            sums: [B, H, n] for each of them. seen: bool [B, 1, n], likewise.
            real: bool [B]; a query that is padding counts nowhere.
            slot: int64 [1], which of the uncompressed ones the step's own token took: its fields start
                afresh. None if that was counted already.
        """
        args, options = (buffers, sums, seen, real, self.cursor), dict(update=self.update, group=group)
        if self.compiles and use_compiled(real):
            _compiled([], dict, *args, slot, **options, fresh=tuple(self.fresh.items()))
        else:
            if slot is not None:
                for name, field in self.fields.items():
                    buffers[0][name].index_fill_(field.axis, slot, self.fresh[name])
            _add_step([], *args, **options)
        self.advance(1)

    @abstractmethod
    def score(self, attention_stats: dict[str, Tensor]) -> Tensor:
        """What each token received by itself, float64 [B, H, n], NaN where nothing is known."""

    def score_candidates(self, attention_stats: dict[str, Tensor], position: Tensor, now: Tensor) -> Tensor:
        """What the policy ranks candidates by, as `score`; it may depend on who else is one.

        Args:
            received: the fields of all candidates.
            position: int32 [B, 1 or H, n], negative where there is none. now: [B, 1, 1], of the newest token.
        """
        return self.score(attention_stats)

    def advance(self, queries: int) -> None:
        """Say that all tiles of `queries` queries have been added."""
        return None

    def tensors(self) -> list[Tensor]:
        """What is held beside the fields."""
        return []

    def arrive(self, batch: int, count: int, device) -> dict[str, Tensor]:
        """The fields of `count` new tokens, seen by no query."""
        return {
            name: field.empty(batch, count, device).fill_(self.fresh[name])
            for name, field in self.fields.items()
        }


class Summed(Observer):
    """Sum of shares, and the number of queries that could see the token.

    H2O ranks by the sum (arXiv 2306.14048, algorithm 1). Divided by the number of queries, all that
    merely came early no longer beats a late heavy hitter.
    """

    fresh = dict(mass=0.0, queries=0.0)
    additive = True

    def allocate(self, heads, dtype, device):
        wide = torch.promote_types(dtype, torch.float32)
        counts = Field((), torch.int32, heads if self.by_head else 1)
        self.fields = dict(mass=Field((), wide, heads), queries=counts)

    @staticmethod
    def update(attention_stats, probs, seen, cursor):
        attention_stats["mass"].add_(probs.sum(2))
        attention_stats["queries"].add_(seen.sum(2, dtype=torch.int32))

    def score(self, attention_stats):
        return attention_stats["mass"].double() / attention_stats["queries"].clamp_min(1)


class Decayed(Observer):
    """Moving average of shares: s <- alpha s + (1 - alpha) p at each query that sees the token; the
    first p starts it (fade-kv 1.1.0)."""

    fresh = dict(ema=UNSEEN)
    horizon = 1024  # earlier queries weigh less than 0.95^1024 = 2e-23

    def allocate(self, heads, dtype, device):
        self.fields = dict(ema=Field((), torch.promote_types(dtype, torch.float32), heads))

    @staticmethod
    def update(attention_stats, probs, seen, cursor):
        ema = attention_stats["ema"]
        if probs.shape[2] == 1:
            p, seen = probs[:, :, 0], seen[:, :, 0]
            later = ALPHA * ema + (1 - ALPHA) * p
            ema.copy_(torch.where(seen, torch.where(ema < 0, p, later), ema))
            return
        count = seen.cumsum(2)  # of the queries that saw it so far
        last = count[:, :, -1:]
        first = (count == 1) & (ema < 0).unsqueeze(2)
        factor = ALPHA ** (last - count).to(probs.dtype) * torch.where(first, 1.0, 1 - ALPHA)
        found = (probs * factor).masked_fill(~seen, 0.0).sum(2)
        last = last[:, :, 0]
        ema.copy_(torch.where(last > 0, ema.clamp_min(0) * ALPHA ** last.to(ema.dtype) + found, ema))

    def score(self, attention_stats):
        return attention_stats["ema"].double().clamp_min(0)


class Windowed(Observer):
    """Shares of the last `window` queries, in a ring.

    A query is a column: padding takes its turn, too, and sees nothing. For models of two-byte dtypes
    the shares are kept in bfloat16, 2 * window bytes a token and KV head, as little bounds their size.
    """

    fresh = dict(window=UNSEEN)
    compiles = False

    def __init__(self, window: int):
        super().__init__()
        self.window = self.horizon = window  # `cursor` is the ring's oldest place

    def allocate(self, heads, dtype, device):
        dtype = torch.bfloat16 if dtype.itemsize == 2 else dtype
        self.fields = dict(window=Field((self.window,), dtype, heads, axis=-1))
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)

    @staticmethod
    def update(attention_stats, probs, seen, cursor):
        window, queries = attention_stats["window"], probs.shape[2]
        skip = max(0, queries - window.shape[2])
        place = torch.arange(skip, queries, device=cursor.device)
        place = (cursor + place).remainder(window.shape[2])
        rows = torch.where(seen, probs, UNSEEN)[:, :, skip:]
        window.index_copy_(2, place, rows.to(window.dtype))

    def advance(self, queries):
        self.cursor.add_(queries).remainder_(self.window)

    def score(self, attention_stats):
        window = attention_stats["window"]
        seen = window >= 0
        return window.masked_fill(~seen, 0.0).sum(2, dtype=torch.float64) / seen.sum(2)

    def tensors(self):
        return [] if self.cursor is None else [self.cursor]


class Pooled(Windowed):
    """SnapKV (arXiv 2404.14469): the mean over the window, pooled over neighbours."""

    def score_candidates(self, attention_stats, position, now):
        return pool_neighbors(self.score(attention_stats), position)


class Learned(Summed):
    """The probability of a small network that a token is worth keeping (fade-kv 1.1.0), from its `features`.

    Args:
        weights: float64 tensors named and shaped as `MLP` says; `ValueError` if they are not.
        layer, layers: index of this layer, and their number.
    """

    def __init__(self, weights: dict[str, Tensor], layer: int, layers: int):
        super().__init__()
        found = {name: tuple(x.shape) for name, x in weights.items()}
        if found != MLP:
            raise ValueError(f"policy_weights have names and shapes {found}: {MLP} are needed")
        self.weights, self.depth = weights, layer / max(layers - 1, 1)

    def allocate(self, heads, dtype, device):
        super().allocate(heads, dtype, device)
        self.weights = {name: x.to(device) for name, x in self.weights.items()}

    def score_candidates(self, attention_stats, position, now):
        x = features(self.score(attention_stats), position, now, self.depth)
        return keep_probability(x, self.weights)

    def tensors(self):
        return list(self.weights.values())


#: The observer that a policy needs. TOVA: arXiv 2401.06104.
OBSERVERS = {
    "h2o": Summed,
    "ema": Decayed,
    "adaptive": Decayed,
    "snapkv": lambda: Pooled(WINDOW),
    "tova": lambda: Windowed(1),
    "learned": Learned,
}


def observer(config: FadeConfig, weights: dict[str, Tensor] | None = None, layer: int = 0, layers: int = 1):
    """An `Observer` of what a layer's tokens receive under `config`; None if nothing ever asks.

    `weights`, `layer` and `layers` are for the `learned` policy, see `Learned`.
    """
    make = OBSERVERS.get(config.eviction_policy)
    if make is None or not config.relocatable:
        return None
    made = make(weights, layer, layers) if make is Learned else make()
    made.by_head = config.plan_scope == "head"
    return made


def load(weights: str | os.PathLike | dict[str, Tensor]) -> dict[str, Tensor]:
    """A float64 copy of weights of the `learned` policy, from a safetensors file or from tensors."""
    found = weights if isinstance(weights, dict) else load_file(weights)
    return {name: x.detach().to(torch.float64, copy=True) for name, x in found.items()}


def _add_step(
    dynamic_sizes, buffers, sums, seen, real, cursor, slot=None, *, update, group, fresh=()
) -> None:
    real = real[:, None, None]
    if slot is not None:
        for name, value in fresh:
            own = buffers[0][name]  # not by `index_fill_`: that would be a kernel of its own
            own.copy_(torch.where(torch.arange(own.shape[-1], device=own.device) == slot, value, own))
    for attention_stats, each, sees in zip(buffers, sums, seen):
        update(attention_stats, (each * real / group).unsqueeze(2), (sees & real).unsqueeze(1), cursor)


_compiled = Compiled(_add_step, options=TOGETHER)
