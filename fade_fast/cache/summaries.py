"""Two numbers of each channel of each page of a store: they score pages without a look at their tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats.base import Field
from ..kernels import summaries
from .buffers import Buffers


class Summaries:
    """The numbers of the pages of one tier.

    Args:
        kind: which numbers; see `kernels.summaries`.
        page: tokens of a page.
        batch, heads, dim, device: of the keys.
    """

    def __init__(self, kind: str, page: int, batch: int, heads: int, dim: int, device):
        self.kind, self.page = kind, page
        field = Field((dim,), torch.float16, heads)
        self.pages = Buffers({"first": field, "second": field}, 1, batch, device)

    @property
    def tokens(self) -> int:
        """How many tokens, the first ones, the pages cover."""
        return self.pages.count * self.page

    def append(self, keys: Tensor, real: Tensor, at: Tensor | None = None) -> None:
        """Add pages: decoded keys [B, H, n, D], and bool [B, 1, n], which of them are tokens. `at` names the
        pages, int64, to a graph being captured."""
        first, second = summaries.summarize(self.kind, keys, real, self.page)
        self.pages.append(at, first=first, second=second)

    def mass(self, query: Tensor, valid: Tensor, num_read: int, **options) -> Tensor:
        """Mass of the pages of the first `num_read` slots, [B, H, q, P]; see `kernels.summaries.page_mass`.

        `valid` is bool [B, 1 or q, S], of all slots.
        """
        parts, count = (self.pages.tensors[name] for name in ("first", "second")), num_read // self.page
        return summaries.page_mass(self.kind, query, *parts, valid, count, self.page, **options)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by `function` of it."""
        self.pages.map(function)
