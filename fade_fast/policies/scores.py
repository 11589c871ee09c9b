"""Statistics of the attention that tokens received. Some policies rank tokens by these statistics.

The statistics of a token are additional fields of its slot, next to its key and value. They move together
with the token. `attention_stats` is a dict of tensors with one tensor per field. Policies that need no
statistics have no observer and no extra cost.

fade_fast takes no numerics from fade_ref, with one exception: the arithmetic of scores and plans
(`fade_ref.scores`, `fade_ref.plan`). A second copy would only repeat this arithmetic and prove nothing. The
counting of queries is implemented twice, here and in `fade_ref.importance`. The parity tests compare both.

Shapes: B rows, H KV heads, q queries, n slots. `probs` [B, H, q, n] are the probabilities that a query
gives to a token, averaged over the query heads of the KV head.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Hashable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fade_ref.config import FadeConfig
from fade_ref.scores import MLP, features, keep_probability, pool_neighbors

from ..compile.compiled import TOGETHER, Compiled, use_compiled
from ..formats.base import Field

ALPHA = 0.95  # decay of `Decayed` per query, from fade-kv 1.1.0, tracker.py
WINDOW = 64  # number of queries that SnapKV observes
#: The inputs of the network of the `learned` policy for each token. See `features`.
FEATURES = ("position, scaled", "mean share, scaled", "depth of the layer", "age over that of the first")
#: The default weights of this network. `fade train-policy` produced them.
SHIPPED = Path(__file__).parent / "weights" / "learned.safetensors"
UNSEEN = -1.0  # marks a token that no query could see


class Observer(ABC):
    """Counts the attention that the tokens of one layer received.

    Attributes:
        fields: name -> the field that a slot holds. `allocate` sets it, and must be called first.
        fresh: name -> the value for a token that no query has seen yet.
        horizon: how many of the newest queries of a step can change the statistics. None means all queries.
        additive: whether `probs` may be summed over the queries of a step.
        by_head: whether the heads of a row hold different tokens.
        compiles: whether `update` may be compiled, and whether the cache may keep the fields twice. False if
            the fields are large and `update` writes only a part of them.
        cursor: int64 [1], the counter that `update` uses in addition to the fields. None if there is none.
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
        """Set `fields` for this number of KV heads, and for the dtype and device of the keys."""

    @staticmethod
    @abstractmethod
    def update(
        attention_stats: dict[str, Tensor], probs: Tensor, seen: Tensor, cursor: Tensor | None
    ) -> None:
        """Count q queries in place, the oldest query first. Each tile of tokens has its own call.

        Args:
            attention_stats: the fields of n tokens, as views.
            probs: [B, H, q, n], 0 where a query does not see a token. If `additive`, it may be their sum over
                queries, [B, H, 1, n].
            seen: bool [B, 1, q, n], True where a query could see a token.
            cursor: see the attribute `cursor`.
        """

    def add(self, attention_stats: dict[str, Tensor], probs: Tensor, seen: Tensor) -> None:
        """Count queries with `update`."""
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
        """Count a step of one token from its sums over `group` query heads. On CUDA this is one kernel.

        Args:
            buffers: the fields of the uncompressed slots, followed by the fields of each tier.
            sums: [B, H, n] for each buffer.
            seen: bool [B, 1, n] for each buffer.
            real: bool [B]. A padding query is not counted.
            slot: int64 [1], the uncompressed slot of the step's own token. Its fields are first set to
                `fresh`. None if the token was already counted.
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
        """Return the score of each token alone, float64 [B, H, n]. It is NaN if nothing is known."""

    def score_candidates(self, attention_stats: dict[str, Tensor], position: Tensor, now: Tensor) -> Tensor:
        """Return the scores by which the policy ranks candidates, in the same form as `score`.

        The score of a candidate may depend on the other candidates.

        Args:
            attention_stats: the fields of all candidates.
            position: int32 [B, 1 or H, n], negative where there is no token.
            now: [B, 1, 1], the position of the newest token.
        """
        return self.score(attention_stats)

    @property
    def shared(self) -> Hashable | None:
        """What scores depend on beside the statistics: layers of equal values may be ranked in one call."""
        return type(self), self.horizon, self.by_head

    def advance(self, queries: int) -> None:
        """Advance the cursor after all tiles of `queries` queries have been counted."""
        return None

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the observer holds in addition to the fields."""
        return []

    def arrive(self, batch: int, count: int, device) -> dict[str, Tensor]:
        """Return the fields of `count` new tokens that no query has seen."""
        return {
            name: field.empty(batch, count, device).fill_(self.fresh[name])
            for name, field in self.fields.items()
        }


class Summed(Observer):
    """The sum of the probabilities of a token, and the number of queries that could see the token.

    H2O ranks by the sum (arXiv 2306.14048, algorithm 1). This class divides the sum by the number of queries.
    An early token then no longer beats a late heavy hitter only because more queries saw it.
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
    """The moving average of the probabilities of a token (fade-kv 1.1.0).

    Each query that sees the token updates it: s <- alpha s + (1 - alpha) p. The first p is the start value.
    """

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
        count = seen.cumsum(2)  # number of queries that saw the token so far
        last = count[:, :, -1:]
        first = (count == 1) & (ema < 0).unsqueeze(2)
        factor = ALPHA ** (last - count).to(probs.dtype) * torch.where(first, 1.0, 1 - ALPHA)
        found = (probs * factor).masked_fill(~seen, 0.0).sum(2)
        last = last[:, :, 0]
        ema.copy_(torch.where(last > 0, ema.clamp_min(0) * ALPHA ** last.to(ema.dtype) + found, ema))

    def score(self, attention_stats):
        return attention_stats["ema"].double().clamp_min(0)


class Windowed(Observer):
    """The probabilities from the last `window` queries, in a ring buffer.

    Each step index is one query. Padding queries also take a place in the ring, but they see no token. For
    models of two-byte dtypes the probabilities are stored in bfloat16. They need 2 * window bytes per token
    and KV head. bfloat16 is used because little else limits this size.
    """

    fresh = dict(window=UNSEEN)
    compiles = False

    def __init__(self, window: int):
        super().__init__()
        self.window = self.horizon = window  # `cursor` is the oldest place in the ring

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
    """SnapKV (arXiv 2404.14469): the mean over the window, pooled over neighboring tokens."""

    def score_candidates(self, attention_stats, position, now):
        return pool_neighbors(self.score(attention_stats), position)


class Learned(Summed):
    """A small network that computes the probability that a token is worth keeping (fade-kv 1.1.0).

    The inputs of the network are the `features` of the token.

    Args:
        weights: float64 tensors with the names and shapes of `MLP`. Other names or shapes raise `ValueError`.
        layer, layers: the index of this layer, and the number of layers.
    """

    def __init__(self, weights: dict[str, Tensor], layer: int, layers: int):
        super().__init__()
        found = {name: tuple(x.shape) for name, x in weights.items()}
        if found != MLP:
            raise ValueError(
                f"policy_weights have names and shapes {found}: {MLP} are needed; `fade train-policy` writes "
                "them"
            )
        self.weights, self.depth = weights, layer / max(layers - 1, 1)

    @property
    def shared(self):
        return *super().shared, self.depth, *(id(x) for x in self.weights.values())

    def allocate(self, heads, dtype, device):
        super().allocate(heads, dtype, device)
        self.weights = {name: x.to(device) for name, x in self.weights.items()}

    def score_candidates(self, attention_stats, position, now):
        x = features(self.score(attention_stats), position, now, self.depth)
        return keep_probability(x, self.weights)

    def tensors(self):
        return list(self.weights.values())


#: The observer of each policy. TOVA is described in arXiv 2401.06104.
OBSERVERS = {
    "h2o": Summed,
    "ema": Decayed,
    "adaptive": Decayed,
    "snapkv": lambda: Pooled(WINDOW),
    "tova": lambda: Windowed(1),
    "learned": Learned,
}


def observer(config: FadeConfig, weights: dict[str, Tensor] | None = None, layer: int = 0, layers: int = 1):
    """Return the `Observer` of a layer under `config`. None if no policy reads the statistics.

    `weights`, `layer` and `layers` are for the `learned` policy. See `Learned`.
    """
    make = OBSERVERS.get(config.eviction_policy)
    if make is None or not config.relocatable:
        return None
    made = make(weights, layer, layers) if make is Learned else make()
    made.by_head = config.plan_scope == "head"
    return made


def load(weights: str | os.PathLike | dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a float64 copy of the `learned` weights, from a safetensors file or from tensors."""
    found = weights if isinstance(weights, dict) else load_file(weights)
    return {name: x.detach().to(torch.float64, copy=True) for name, x in found.items()}


def _add_step(
    dynamic_sizes, buffers, sums, seen, real, cursor, slot=None, *, update, group, fresh=()
) -> None:
    real = real[:, None, None]
    if slot is not None:
        for name, value in fresh:
            own = buffers[0][name]  # `index_fill_` is avoided, because it would be a separate kernel
            own.copy_(torch.where(torch.arange(own.shape[-1], device=own.device) == slot, value, own))
    for attention_stats, each, sees in zip(buffers, sums, seen):
        update(attention_stats, (each * real / group).unsqueeze(2), (sees & real).unsqueeze(1), cursor)


_compiled = Compiled(_add_step, options=TOGETHER)
