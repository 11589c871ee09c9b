"""Scores of pages from a few numbers of each page: indexes that cost less to read than a code of every key.

- "bounds": minimum and maximum of each channel. No key of the page has a larger score than the bound that
  they give (Quest, arXiv 2406.10774).
- "deviation": mean and standard deviation of each channel. A page scores as a key that lies `DEVIATIONS`
  standard deviations from the mean, along the query (after arXiv 2605.27740).

Keys are taken as attention reads them: decoded, after RoPE. So what is stored of a page follows from its
records, and a bound holds for the scores that attention computes.

As a first level, the numbers of a block of tokens leave some blocks to a finer index. Then the cost of
choosing grows slower than the text.
"""

import torch
from torch import Tensor

from . import attention
from .attention import Terms
from .quantize import stored

DEVIATIONS = 2.0


def summarize(kind: str, keys: Tensor, real: Tensor, page: int) -> Tensor:
    """Two numbers of each channel of each page, rounded to float16: float64 [H, P, 2, D].

    Args:
        kind: "bounds": minimum and maximum. "deviation": mean and standard deviation.
        keys: [H, n, D], n a multiple of `page`.
        real: bool [n], False where there is no token. A page without a token has zeros.

    >>> keys = torch.tensor([[[1.0], [3.0], [9.0], [9.0]]])
    >>> real = torch.tensor([True, True, True, False])
    >>> [summarize(kind, keys, real, page=2).flatten(1).tolist() for kind in ("bounds", "deviation")]
    [[[1.0, 3.0, 9.0, 9.0]], [[2.0, 1.0, 9.0, 0.0]]]
    """
    pages = []
    for some, here in zip(keys.double().split(page, dim=1), real.split(page)):
        some = some[:, here]
        if not some.shape[1]:
            pages.append(torch.zeros(keys.shape[0], 2, keys.shape[2], dtype=torch.float64))
        elif kind == "bounds":
            pages.append(torch.stack((some.amin(1), some.amax(1)), dim=1))
        else:
            pages.append(torch.stack((some.mean(1), some.std(1, correction=0)), dim=1))
    return stored(torch.stack(pages, dim=1))


def scores(kind: str, query: Tensor, summary: Tensor, terms: Terms) -> Tensor:
    """Scores [Hq, q, P] of pages, scaled and capped as attention does.

    Args:
        query: [Hq, q, D].
        summary: [H, P, 2, D], from `summarize`.

    >>> query, summary = torch.tensor([[[2.0, -1.0]]]), torch.tensor([[[[0.0, 1.0], [3.0, 5.0]]]])
    >>> scores("bounds", query.double(), summary.double(), Terms(1.0)).item()  # 2 * 3 - 1 * 1
    5.0
    """
    first, second = summary.unbind(2)
    if kind == "bounds":
        found = attention.dot(query.clamp_min(0), second) + attention.dot(query.clamp_max(0), first)
    else:
        along = attention.dot(query.square(), second.square()).sqrt()
        found = attention.dot(query, first) + DEVIATIONS * along
    found = terms.scaling * found
    return found if terms.softcap is None else terms.softcap * torch.tanh(found / terms.softcap)


def log_mass(kind: str, query: Tensor, summary: Tensor, seen: Tensor, page: int, terms: Terms) -> Tensor:
    """Logarithm of the mass of each page, [Hq, P], for one query [Hq, 1, D]: every token it sees has the
    score of the page.

    `seen`: bool [n], the tokens that the query sees. A page without one has -inf.
    """
    count = seen.reshape(-1, page).sum(-1).double()
    return scores(kind, query, summary, terms)[:, 0] + count.log()
