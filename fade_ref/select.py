"""Choosing what a query reads, and which pages lie in fast memory. Nothing is forgotten: all tokens stay.

What is dropped cannot be asked for later (SCBench, arXiv 2412.10319). Here every token of the middle is kept,
and each query reads a few pages of it, chosen by the query itself. Three parts:

- **Index.** A 4-bit code of a key is two halves. The upper two bits are a coarser code of the same key. They
  score every token, and no second copy is stored. `summaries.py` has other indexes: numbers of each page
  (Quest, arXiv 2406.10774). At equal bytes a 2-bit code of every key finds the tokens better.
- **Selection.** Scores become probability mass per page. Each query head has its own softmax; the heads of a
  group are averaged, because they read one set of pages. The heaviest pages are read, up to a budget of
  tokens, or until they hold a share of the mass (Twilight, arXiv 2502.02770).
- **Residency.** Of the payload (lower key bits, values), a fixed number of pages lies in fast memory. A
  chosen page that is absent takes the place of the page unused longest (least recently used), or of the page
  that a policy ranks last. So a plan is still there, but what it drops is cold, and not gone.

One batch row at a time. A page is a run of tokens of the middle. Reals are float64.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import attention, quantize
from .attention import Terms
from .importance import Importance
from .matched import MatchedCodec
from .rotation import Record, RotatedCodec

LONGEST = 16  # queries of a step that chooses; a longer one (prefill, a second turn) reads everything
CUT_BITS = 17  # of the 32 bits of a float32 mass: pages are not told apart by these
INDEX_BITS = 2  # upper bits of a key code that form the index "k2"


# -- the index


def split(codes: Tensor, bits: int = 4, kept: int = INDEX_BITS) -> tuple[Tensor, Tensor]:
    """Upper `kept` bits and the lower bits of codes uint8 [..., D] of `bits` bits, one code in each byte.

    >>> [x.tolist() for x in split(torch.tensor([0, 6, 15], dtype=torch.uint8))]
    [[0, 1, 3], [0, 2, 3]]
    """
    shift = bits - kept
    return codes >> shift, codes & (2**shift - 1)


def join(upper: Tensor, lower: Tensor, bits: int = 4, kept: int = INDEX_BITS) -> Tensor:
    """Undo `split`."""
    return (upper << (bits - kept)) | lower


def coarse(upper: Tensor, bits: int = 4, kept: int = INDEX_BITS) -> Tensor:
    """What the upper bits say of a code: the middle of the codes that share them, float64 [..., D].

    For uniform codes and for symmetric codes alike, a decoded number is linear in the code. So the middle of
    the codes decodes to the middle of the cell: it is the level at which the index reads a channel.

    >>> coarse(torch.tensor([0, 1, 2, 3])).tolist(), coarse(torch.tensor([0, 1]), kept=1).tolist()
    ([1.5, 5.5, 9.5, 13.5], [3.5, 11.5])
    """
    cell = 2 ** (bits - kept)
    return upper.double() * cell + (cell - 1) / 2


def index_keys(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int = 4, kept: int = INDEX_BITS
) -> Tensor:
    """Rotated, centered keys [..., n, D] as the index reads them: upper bits, with the key's own scale.

    Args:
        codes: uint8 [..., n, D], one code in each byte.
        scale, zero: [..., n]. `zero` is the zero point of the rotated codec; None in the matched codec, whose
            codes are centered.

    >>> index_keys(torch.tensor([[3, 12]]), torch.tensor([2.0]), torch.tensor([-1.0])).tolist()
    [[2.0, 26.0]]
    """
    level = coarse(split(codes, bits, kept)[0], bits, kept)
    if zero is None:
        return (level - (2**bits - 1) / 2) * scale.double().unsqueeze(-1)
    return level * scale.double().unsqueeze(-1) + zero.double().unsqueeze(-1)


def index_scores(
    query: Tensor,
    keys: Record,
    mean: Tensor,
    codec: RotatedCodec | MatchedCodec,
    terms: Terms,
    kept: int = INDEX_BITS,
) -> Tensor:
    """Scores [Hq, q, n] of keys as the index of their upper `kept` bits reads them, before any mask.

    Args:
        query: [Hq, q, D]. keys: records of [H, n, D], of 4 bits.
        mean: [H, n, D], which was subtracted from the keys.
        codec: of the keys: a query meets their codes rotated.
    """
    y = index_keys(quantize.unpack(keys.codes, codec.bits, codec.head_dim), *keys[1:], codec.bits, kept)
    scores = terms.scaling * (attention.dot(codec.rotate_query(query), y) + attention.dot(query, mean))
    return scores if terms.softcap is None else terms.softcap * torch.tanh(scores / terms.softcap)


# -- the choice


def page_mass(scores: Tensor, page: int, heads: int) -> Tensor:
    """Probability mass of each page, [H, P], of one query: it sums to 1 over the pages of a KV head.

    Args:
        scores: [Hq, n], natural logarithms, scaled and capped as attention does; -inf for padding. n is a
            multiple of `page`.
        heads: KV heads. The Hq / H query heads of one KV head are averaged after their softmax: a head with
            large scores must not outvote the others.

    A query head that sees nothing gives no page any mass.

    >>> s = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    >>> page_mass(s, page=2, heads=1).tolist()
    [[0.75, 0.25]]
    """
    return mass_of(scores.double().unflatten(-1, (-1, page)).logsumexp(-1), heads)


def mass_of(log_mass: Tensor, heads: int) -> Tensor:
    """The same from the logarithm of the mass of each page for each query head, [Hq, P], up to a constant."""
    seen = log_mass.isfinite().any(-1, keepdim=True)
    share = log_mass.masked_fill(~seen, 0.0).softmax(-1).masked_fill(~seen, 0.0)
    return share.unflatten(0, (heads, -1)).mean(1)


def ranked(mass: Tensor) -> Tensor:
    """Pages from the heaviest to the lightest, int64 [H, P]. Of equal pages, the older one comes first.

    Masses are compared as float32 numbers that are cut to seven significant bits. Pages whose masses differ
    by less than about 1 % count as equal.

    >>> ranked(torch.tensor([[0.2, 0.3, 0.2, 0.3]])).tolist()
    [[1, 3, 0, 2]]
    """
    cut = mass.float().view(torch.int32) >> CUT_BITS
    return cut.argsort(dim=-1, descending=True, stable=True)


def choose(mass: Tensor, budget: int, share: float | None = None) -> list[list[int]]:
    """Pages that each KV head reads, heaviest first, at most `budget` of them.

    With `share`, a head stops as soon as its pages hold this share of the mass. The page that reaches the
    share is read. Every head reads at least one page.

    >>> choose(torch.tensor([[0.5, 0.1, 0.4]]), budget=2), choose(torch.tensor([[0.5, 0.1, 0.4]]), 3, 0.45)
    ([[0, 2]], [[0]])
    """
    chosen = []
    for order, weight in zip(ranked(mass), mass):
        before = weight[order].cumsum(0) - weight[order]
        enough = len(order) if share is None else max(1, int((before < share).sum()))
        chosen.append(order[: min(budget, enough)].tolist())
    return chosen


def choose_within(
    mass: Tensor, allowed: list[list[int]], budget: int, share: float | None = None
) -> list[list[int]]:
    """The same, where KV head h chooses among the pages `allowed[h]`.

    >>> choose_within(torch.tensor([[0.5, 0.1, 0.4, 0.0]]), [[1, 2]], budget=1)
    [[2]]
    """
    chosen = []
    for weight, pages in zip(mass, map(sorted, allowed)):
        (found,) = choose(weight[pages].unsqueeze(0), budget, share)
        chosen.append([pages[i] for i in found])
    return chosen


def tokens_read(chosen: list[list[int]], page: int, n: int) -> Tensor:
    """Which of the n tokens of the middle each KV head reads, bool [H, n].

    >>> tokens_read([[1], [0]], page=2, n=4).int().tolist()
    [[0, 0, 1, 1], [1, 1, 0, 0]]
    """
    read = torch.zeros(len(chosen), n // page, dtype=torch.bool)
    for head, pages in enumerate(chosen):
        read[head, pages] = True
    return read.repeat_interleave(page, dim=-1)


# -- residency


@dataclass(frozen=True)
class Residency:
    """Which pages of one KV head lie in the slots of fast memory.

    Attributes:
        pages: the page in each slot.
        last_used: the step that used a slot last; -1: never.
    """

    pages: tuple[int, ...]
    last_used: tuple[int, ...]

    @classmethod
    def first(cls, slots: int) -> "Residency":
        """The first pages lie in the slots: they went there when they were stored."""
        return cls(tuple(range(slots)), (-1,) * slots)


class Touch(NamedTuple):
    """Where the chosen pages of a step lie, and what had to be fetched."""

    state: Residency
    slots: list[int]  # of each chosen page
    fetched: list[bool]  # whether the page came from slow memory


def rank(policy: str, seen: Importance) -> Tensor | None:
    """How much a policy wants each page in fast memory, float64 [H, P]; None: by use alone.

    `seen` is what `importance.observe` counts if the pages are its tokens, and their mass the probabilities.
    "h2o" ranks by the mean share of the queries that saw a page, "ema" by its moving average, "tova" by the
    newest query, "hybrid" by AKV's mixture of decayed mass and recency.

    >>> from .importance import empty, observe
    >>> seen = observe(empty(1), torch.tensor([[[0.25, 0.75]]]), torch.tensor([[True, True]]))
    >>> rank("h2o", seen).tolist(), rank("position", seen)
    ([[0.25, 0.75]], None)
    """
    if policy == "position":
        return None
    if policy == "h2o":
        return seen.mass / seen.queries.clamp_min(1)
    return {"ema": seen.ema, "tova": seen.window[..., -1, :].nan_to_num(0.0), "hybrid": seen.hybrid}[policy]


def touch(state: Residency, chosen: list[int], step: int, wanted: list[float] | None = None) -> Touch:
    """Use some pages in a step; `step` grows. Absent pages replace those unused longest (LRU).

    Pages of this step never replace each other. Of slots unused equally long, the first is taken. The state
    that was given does not change.

    With `wanted`, a number for each page (`rank`), absent pages replace those that are wanted least, and use
    decides between equal ones. A page without a number, which no query has seen, has 0.

    Raises `ValueError` if more pages are chosen than there are slots.

    >>> one = touch(Residency.first(2), [7, 5], step=0)
    >>> two = touch(one.state, [5], step=1)
    >>> touch(two.state, [9], step=2)
    Touch(state=Residency(pages=(9, 5), last_used=(2, 1)), slots=[0], fetched=[True])
    """
    if len(chosen) > len(state.pages):
        raise ValueError(f"{len(chosen)} pages are chosen, but only {len(state.pages)} slots hold pages")
    pages, used = list(state.pages), list(state.last_used)
    held = {page: slot for slot, page in enumerate(pages)}
    for page in chosen:  # those that are here first: they must not be replaced
        if page in held:
            used[held[page]] = step
    want = [wanted[p] if wanted is not None and p < len(wanted) else 0.0 for p in pages]
    unused = (slot for slot in range(len(pages)) if used[slot] < step)
    free = iter(sorted(unused, key=lambda slot: (want[slot], used[slot])))
    slots, fetched = [], []
    for page in chosen:
        fetched.append(page not in held)
        slot = held.get(page)
        if slot is None:
            slot = next(free)
            pages[slot], used[slot] = page, step
        slots.append(slot)
    return Touch(Residency(tuple(pages), tuple(used)), slots, fetched)
