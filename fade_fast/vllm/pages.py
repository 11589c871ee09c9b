"""How a page of vLLM holds the records of a format.

vLLM's cache of a layer is [P, H, N, C]: P pages of N tokens, H KV heads, C bytes for a token of a head. The
N * C bytes of a head are one run of bytes in a page. They hold the fields of the N records one after another,
each field in the order that the kernels read: value codes with the tokens last, all others with the tokens
first. So a page is in the layout of a buffer of `generate()`, and a field is a view of the cache.

A second run of records follows in the room that is left. A second record encodes what the codes of a token
miss. `generate()` keeps some tokens uncompressed, which a page has no room for; these have second records:

- The first `FIRST` tokens of a request, in the first slots of its first page. All tokens attend to them, and
  their keys are far from the mean of the keys.
- The newest tokens of each page, in the other slots of a first page and in all slots of another page: token t
  takes slot t modulo their number. A query attends most to the tokens right before it. Where it is the first
  query of a page, they are the last tokens of the page before, which stay there for requests that share it.
"""

import torch
from torch import Tensor

from ..formats.base import Field, TierFormat

#: Tokens in a page are a multiple of this. Every field then starts at a multiple of 16 bytes.
GRANULARITY = 32
SPAN = GRANULARITY  # positions that share the mean of their keys: a page begins with a new mean
PREFERRED = 128  # tokens in a page unless the user asks for others: the second run takes 3 % of it
FIRST = 4  # first tokens of a request with a second record
EACH = 128  # a page has `FIRST` more second records for this many tokens, unless codes of 8 bits need none
NEAR = 12  # most tokens right before itself that a query reads with their second records


def room(page: int, fine: bool, drafts: int = 0) -> int:
    """Second records in a page of `page` tokens; see `PageLayout`."""
    return FIRST * (
        1 if fine else 1 + page // EACH + -(-drafts // FIRST)
    )  # a multiple of 4 keeps fields aligned


def cell_bytes(record: int, fine: bool, page: int, drafts: int = 0) -> int:
    """Bytes of a token of a KV head in pages of `page` tokens, given those of its record."""
    return record - (-room(page, fine, drafts) * record // page)


def newest(position: Tensor, page: int, fine: bool, drafts: int = 0) -> tuple[Tensor, Tensor]:
    """How many newest tokens keep a second record in the page of `position`, and the slot of this one.

    Both are int64, and `position` is that of tokens in their requests. The other arguments are as in
    `PageLayout`.
    """
    if fine:
        return torch.zeros_like(position), torch.zeros_like(position)
    whole, early = room(page, fine, drafts), position < page
    slot = torch.where(early, FIRST + position % max(1, whole - FIRST), position % whole)
    return torch.where(early, whole - FIRST, whole), slot.clamp_max(whole - 1)


class PageLayout:
    """Where the fields of a tier's records are in a page.

    Attributes:
        record: bytes of one record: one token of one KV head, keys and values together.
        drafts: most tokens of a request that may be withdrawn. A page has room for their second records, too.
        fine: whether all codes have 8 bits or more. They miss little.
    """

    def __init__(self, tier: TierFormat, drafts: int = 0):
        self.drafts = drafts
        self.fields: dict[str, Field] = tier.fields(1)
        self.record = sum(field.bytes for field in self.fields.values())
        self.fine = min(tier.bits) >= 8

    def cell(self, page: int) -> int:
        """Bytes of a token of a KV head in pages of `page` tokens."""
        return cell_bytes(self.record, self.fine, page, self.drafts)

    def newest(self, position: Tensor, page: int) -> tuple[Tensor, Tensor]:
        """`newest` for these pages."""
        return newest(position, page, self.fine, self.drafts)

    def views(self, cache: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Each field as a view of the cache.

        Args:
            cache: uint8 [P, H, N, C]. The bytes of a head in a page are contiguous; pages and heads may have
                any distance.

        Returns views [P, H, N, *shape] of fields with tokens first and [P, H, *shape, N] of those with tokens
        last, and the same of the second records, with `room` in place of N.

        Raises `ValueError` if the cache is another tensor than this.
        """
        pages, heads, tokens, cell = cache.shape
        least = self.cell(tokens)
        if cache.dtype != torch.uint8 or cell < least or tokens % GRANULARITY:
            raise ValueError(
                f"the cache is {cache.dtype} {list(cache.shape)}; allowed: uint8 [P, H, N, {least} or "
                f"more], N a multiple of {GRANULARITY}. Install vLLM 0.32"
            )
        if cache.stride()[2:] != (cell, 1):
            raise ValueError(
                f"the cache has strides {cache.stride()}; the last two must be {(cell, 1)}. Install vLLM 0.32"
            )
        runs = self.runs(cache)
        return self._cut(runs, tokens), self._cut(
            runs[..., tokens * self.record :], room(tokens, self.fine, self.drafts)
        )

    @staticmethod
    def runs(cache: Tensor) -> Tensor:
        """The bytes of each head in each page, uint8 [P, H, N * C], of a cache that `views` accepts."""
        pages, heads, tokens, cell = cache.shape
        return cache.as_strided((pages, heads, tokens * cell), (*cache.stride()[:2], 1))

    def _cut(self, runs: Tensor, tokens: int) -> dict[str, Tensor]:
        """Views of the fields of `tokens` records in runs of bytes [P, H, n]."""
        views, start = {}, 0
        for name, field in self.fields.items():
            run = runs[..., start : start + tokens * field.bytes].view(field.dtype)
            sizes = (*field.shape, tokens) if field.axis == -1 else (tokens, *field.shape)
            views[name] = run.unflatten(-1, sizes) if len(sizes) > 1 else run
            start += tokens * field.bytes
        return views

    def write(self, views: dict[str, Tensor], records: dict[str, Tensor], page: Tensor, at: Tensor) -> None:
        """Store the records of T tokens, [1, H, T, *shape] or [1, H, *shape, T].

        Token t goes to slot `at[t]` of page `page[t]`; both are int64 [T].
        """
        for name, field in self.fields.items():
            record = records[name][0]
            if field.axis == -1:
                views[name][page, :, ..., at] = record.movedim(-1, 0)
            else:
                views[name][page, :, at] = record.movedim(1, 0)

    def read(self, views: dict[str, Tensor], page: Tensor, at: Tensor) -> dict[str, Tensor]:
        """The records of the tokens in slots `at` of pages `page`, both int64 [B, E]: [B, H, E, *shape] or
        [B, H, *shape, E].
        """
        records = {}
        for name, field in self.fields.items():
            if field.axis == -1:
                records[name] = views[name][page, :, ..., at].movedim(1, -1)
            else:
                records[name] = views[name][page, :, at].movedim(1, 2)
        return records

    def choose(
        self, which: Tensor, records: dict[str, Tensor], others: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Records as `read` gives them: those of `records` where `which`, bool [B, E], and else `others`."""
        chosen = {}
        for name, field in self.fields.items():
            new = [1] * len(field.shape)
            size = (len(which), 1, *new, which.shape[1]) if field.axis == -1 else (*which.shape, *new)
            where = which.view(size) if field.axis == -1 else which.view(size).unsqueeze(1)
            chosen[name] = torch.where(where, records[name], others[name])
        return chosen
