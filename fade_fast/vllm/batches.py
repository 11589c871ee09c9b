"""What the requests of a step read, as a few rectangular batches.

A step of vLLM is a flat list of tokens of several requests, each with some new tokens and a context of its
own length. `split` cuts it into batches, with index arithmetic over all requests at once:

- Requests with few new tokens (decode, verification of drafts) form batches of similar lengths (`_parts`).
  Their number is a compromise: rows of a batch are padded to its longest context, and each batch costs
  launches.
- Requests with many new tokens (prefill) form groups, whose contexts are decoded together (`prefill.py`).
- Layers that `prefill.py` does not serve get these requests as rows of `ROWS` queries. All these rows form
  one batch, longest context first. While attention walks over the keys, finished rows leave at the end of the
  batch.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .pages import FIRST

SHORT = 8  # most new tokens of a request in a batch of short rows
ROWS = 128  # queries of a row of a long batch
TOGETHER = 1 << 14  # most tokens that the contexts of a group have, unless it is a single request
LEAST = 512  # contexts up to this length are one length
#: What another batch costs, in slots that are read in that time: some 60 us in each layer of an H200, in
#: graphs; and where nothing is compiled, 2 ms of a CPU.
BATCH, EAGER_BATCH = 1 << 17, 1 << 11
PLACES = 32  # places at most where requests in order of their lengths are cut
NOWHERE = -1  # position of padding queries, which see nothing


@dataclass
class Batch:
    """Rows of queries, each of one request.

    Attributes:
        tokens: int64 [B, q], which token of the step each query is. Padding repeats the last query.
        at: int64 [B, q], positions of the queries; `NOWHERE` for padding.
        table: [B, n], pages of each row.
        reach: on the host, int64 [B]: no query of a row is at this position or behind it. Longest first.
        wanted: int64 [m], index of each real query among the B * q queries; None: the first m.
        targets: int64 [m], the token of each real query.
        before: int64 [B], how many new tokens of the request are before the first query of a row.
        in_order: whether the m real queries are the first m tokens of the step, in rows of one query.
        shared: what layers compute once and share during a step.
    """

    tokens: Tensor
    at: Tensor
    table: Tensor
    reach: np.ndarray
    wanted: Tensor | None
    targets: Tensor
    before: Tensor
    in_order: bool = False
    shared: dict = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Longest context of a row."""
        return int(self.reach.max())

    def rows(self, x: Tensor) -> Tensor:
        """The tokens `x` [T, H, D] of the step as queries of this batch, [B, H, q, D]."""
        if self.in_order and len(self.tokens) == len(self.targets):
            return x[: len(self.tokens)].unsqueeze(2)
        return x[self.tokens].transpose(1, 2)

    def store(self, result: Tensor, output: Tensor) -> None:
        """Write the result [B, q, H, D] to the tokens `output` [T, H, D]. Padding is dropped."""
        flat, count = result.flatten(0, 1), len(self.targets)
        flat = flat[:count] if self.wanted is None else flat[self.wanted]
        if self.in_order:
            output[:count].copy_(flat)
        else:
            output.index_copy_(0, self.targets, flat.to(output.dtype))

    def pages(self, window: int | None, page: int) -> tuple[Tensor, Tensor, np.ndarray]:
        """The part of the table that a layer reads, and where it begins.

        Args:
            window: a query sees this many tokens, up to itself; None: all tokens up to itself.
            page: tokens in a page.

        Returns the table [B, m], the position of its first slot, int64 [B], and on the host an upper bound of
        the slots in use, int64 [B].
        """
        key = window, page
        if key not in self.shared:
            self.shared[key] = self._pages(window, page)
        return self.shared[key]

    def _pages(self, window, page):
        if window is None:
            blocks = min(-(-self.length // page), self.table.shape[1])
            return self.table[:, :blocks], torch.zeros_like(self.at[:, 0]), self.reach
        # The oldest token that a row sees is in its first page, and the row's last query is behind its first
        # query by at most q - 1 tokens.
        most = self.at.shape[1] + window + page - 2
        slots = np.minimum(self.reach, most)
        blocks = min(-(-int(slots.max()) // page), self.table.shape[1])
        first = (self.at[:, 0] - window + 1).clamp_min(0) // page
        column = first[:, None] + torch.arange(blocks, device=first.device)
        table = self.table.gather(1, column.clamp_max(self.table.shape[1] - 1))
        return table, first * page, slots


class FirstTokens(NamedTuple):
    """The tokens of a step at the first `FIRST` positions of their requests.

    Attributes:
        tokens: int64 [m], which tokens of the step.
        page: int64 [m], the first page of their request; 0, which no request owns, for padding.
        at: int64 [m], their positions.
    """

    tokens: Tensor
    page: Tensor
    at: Tensor


@dataclass
class Prefill:
    """Requests with many new tokens whose contexts are decoded together, R of them, in the order of the step.

    Attributes:
        starts: on the host, int64 [R], the first new token of each request in the step.
        counts: on the host, int64 [R], how many new tokens each has: T in all.
        reach: on the host, int64 [R], an upper bound of the length of each request after the step.
        slack: by how many tokens `reach` may exceed the lengths.
        lengths: int64 [R], these lengths: on the host if `slack` is 0, otherwise on the device.
        table: [R, n], pages of each request.
        shared: what layers compute once and share during a step.
    """

    starts: np.ndarray
    counts: np.ndarray
    reach: np.ndarray
    slack: int
    lengths: Tensor
    table: Tensor
    shared: dict = field(default_factory=dict)

    @functools.cached_property
    def index(self) -> np.ndarray:
        """The tokens of the step that belong to these requests, on the host, int64 [T]."""
        offset = np.cumsum(self.counts) - self.counts
        return np.arange(self.counts.sum()) + np.repeat(self.starts - offset, self.counts)

    @functools.cached_property
    def tokens(self) -> Tensor:
        """`index` on the device."""
        return torch.from_numpy(self.index).to(self.table.device, non_blocking=True)

    @functools.cached_property
    def in_order(self) -> slice | None:
        """These tokens as a slice; None if others are between them."""
        stop = self.starts[-1] + self.counts[-1]
        return slice(self.starts[0], stop) if stop - self.starts[0] == self.counts.sum() else None

    def of(self, x: Tensor) -> Tensor:
        """These tokens of the step `x` [n, ...], [T, ...]: a view, if no others are between them."""
        return x[self.tokens] if self.in_order is None else x[self.in_order]

    def store(self, result: Tensor, output: Tensor) -> None:
        """Write the result [T, ...] to the tokens `output` [n, ...] of the step, unless it is `of(output)`
        itself.
        """
        if self.in_order is None:
            output.index_copy_(0, self.tokens, result)


@dataclass
class Step:
    """A step.

    Attributes:
        short: batches of requests with few new tokens.
        prefill: groups of requests with many new tokens.
        rows: makes `long`, or None.
        early: makes `first`.
        positions: int64 [T], of the tokens of the step in their requests. Padding of vLLM is not among them,
            except in a step of `uniform`, where its positions are negative.
        after: int64 [T], how many new tokens of its request come after a token.
        single: whether each request of `short` has one new token.
        shared: what layers compute once and share during the step.
    """

    short: list[Batch]
    prefill: list[Prefill]
    rows: Callable[[], Batch] | None
    early: Callable[[], FirstTokens | None]
    positions: Tensor
    after: Tensor
    single: bool = False
    shared: dict = field(default_factory=dict)

    @functools.cached_property
    def long(self) -> Batch | None:
        """The requests of `prefill` as rows of one batch; None if there are none."""
        return None if self.rows is None else self.rows()

    @functools.cached_property
    def first(self) -> FirstTokens | None:
        """The tokens at the first positions; None if there are none."""
        return self.early()

    @property
    def batches(self) -> list[Batch]:
        """All batches, the long one last."""
        return self.short + [self.long] * (self.long is not None)


def sees(at: Tensor, position: Tensor, window: int | None, itself: bool = True) -> Tensor:
    """Which tokens at `position` [B, n] each query at `at` [B, q] sees: bool [B, q, n].

    With `itself`, a query sees the token at its own position.
    """
    at, position = at.unsqueeze(2), position.unsqueeze(1)
    seen = (position <= at if itself else position < at) & (position >= 0)
    return seen if window is None else seen & (position > at - window)


def split(
    starts: np.ndarray,
    reach: np.ndarray,
    lengths: Tensor,
    table: Tensor,
    rounded: bool = False,
    slack: int = 0,
    most: int = SHORT,
) -> Step:
    """Cut a step into batches.

    Args:
        starts: int64 [R + 1], on the host: the first token of each request, and the number of tokens.
        reach: int64 [R], on the host: an upper bound of the length of each request after this step.
        lengths: int [R], on the device: these lengths.
        table: [R, n], pages of each request.
        rounded: whether batches of short rows are padded to powers of two, so that compiled kernels meet few
            shapes.
        slack: by how many tokens `reach` may exceed the lengths. If it is 0, the host computes what it can: a
            GPU needs longer to start a kernel than the host to compute a few numbers.
        most: most new tokens of a request in a batch of short rows.

    Requests without new tokens are left out.
    """
    count = np.diff(starts)
    short = np.flatnonzero((count > 0) & (count <= most))
    short = short[np.argsort(-reach[short], kind="stable")]
    batches = []
    for of in _parts(reach[short], rounded):
        part = short[of]
        batches.append(_batch(part, starts[part], count[part], 0 * part, lengths, starts, reach, table))
    if rounded:
        batches = [_rounded(batch) for batch in batches]
    single = bool((count[short] == 1).all())
    if single and len(batches) == 1:
        batches[0].in_order = np.array_equal(short, np.arange(len(short)))
    first = functools.partial(_first, starts, count, reach, lengths, table, slack)
    known = lengths if slack else torch.from_numpy(reach)
    positions = _positions(starts, count, known).to(table.device, non_blocking=True)
    long = np.flatnonzero(count > most)
    if not len(long):
        return Step(batches, [], None, first, *positions, single)
    groups = []
    for part in _together(reach[long]):
        of = starts[long[part]], count[long[part]], reach[long[part]], slack
        groups.append(Prefill(*of, _rows(known, long[part]).long(), _rows(table, long[part])))
    rows = functools.partial(_long, long, starts, count, lengths, reach, table)
    return Step(batches, groups, rows, first, *positions, single)


def _parts(reach: np.ndarray, rounded: bool) -> list[slice]:
    """Which requests of these lengths, longest first, form batches, so that few slots are read in vain.

    The cheapest way to cut them: a batch costs its rows times its longest context, and `BATCH`. Its rows are
    a power of two, or padded to one if they are `rounded`; those of the last one may be any number. Where
    requests are many, they are cut at `PLACES` places only.
    """
    if not len(reach):
        return []
    lengths = np.maximum(reach, LEAST)
    unit = 1 << max(0, (len(reach) - 1) // PLACES).bit_length()
    least, cuts, each = {len(reach): 0}, {}, BATCH if rounded else EAGER_BATCH
    for start in reversed(range(0, len(reach), unit)):
        left, longest, ways = len(reach) - start, int(lengths[start]), []
        for used in _powers(unit, left):
            rows = 1 << (used - 1).bit_length() if rounded else used
            ways.append((rows * longest + each + least[start + used], used))
        least[start], cuts[start] = min(ways)
    parts, start = [], 0
    while start < len(reach):
        parts.append(slice(start, start + cuts[start]))
        start += cuts[start]
    return parts


def _powers(first: int, last: int) -> list[int]:
    """Numbers below `last`, each twice the one before, and `last`."""
    found = []
    while first < last:
        found.append(first)
        first *= 2
    return [*found, last]


def _together(reach: np.ndarray) -> list[slice]:
    """Runs of requests of these lengths, each of `TOGETHER` tokens at most or a single request."""
    runs, start = [], 0
    for stop in range(1, len(reach) + 1):
        if stop == len(reach) or reach[start : stop + 1].sum() > TOGETHER:
            runs.append(slice(start, stop))
            start = stop
    return runs


def _long(long, starts, count, lengths: Tensor, reach, table: Tensor) -> Batch:
    """The requests `long` as rows of `ROWS` queries."""
    tiles = -(-count[long] // ROWS)
    request = np.repeat(long, tiles)
    before = (np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * ROWS
    size = np.minimum(ROWS, count[request] - before)
    after = count[request] - before - size
    order = np.argsort(-(reach[request] - after), kind="stable")
    request, before, size = request[order], before[order], size[order]
    return _batch(request, starts[request] + before, size, before, lengths, starts, reach, table)


def uniform(lengths: Tensor, table: Tensor, longest: int, rounded: bool = False) -> Step:
    """A step in which request b has one new token, token b, by operations on the device alone.

    So a CUDA graph can hold it.

    Args:
        lengths: int [R], length of each request after this step; 0 for padding.
        table: [R, n], pages of each request.
        longest: an upper bound of all lengths that there may be.
        rounded: see `split`.
    """
    count = len(lengths)
    index = torch.arange(count, device=lengths.device)
    at = lengths.long() - 1
    reach = np.full(count, longest, dtype=np.int64)
    none = torch.zeros_like(at)
    batch = Batch(index.unsqueeze(1), at.unsqueeze(1), table, reach, None, index, none)
    batch = _rounded(batch) if rounded else batch
    batch.in_order = True
    page = table[:, 0].long().masked_fill((at < 0) | (at >= FIRST), 0)
    first = FirstTokens(index, page, at.clamp(0, FIRST - 1))
    return Step([batch], [], None, lambda: first, at, none, True)


def _rows(x: Tensor, index: np.ndarray) -> Tensor:
    """Rows of `x`, `index` on the host in ascending order: a view, if no others are between them."""
    if index[-1] - index[0] == len(index) - 1:
        return x[index[0] : index[-1] + 1]
    return x[torch.from_numpy(index).to(x.device, non_blocking=True)]


def _positions(starts, count, lengths: Tensor) -> Tensor:
    """Positions of all tokens of a step, and how many new tokens of the request follow each: int64 [2, T].

    The last new token of a request is its last token. The result is on the device of `lengths`.
    """
    put = lambda x: torch.from_numpy(x).to(lengths.device, non_blocking=True)  # noqa: E731
    request = np.repeat(np.arange(len(count)), count)
    after = put(starts[1:][request] - np.arange(len(request)) - 1)
    return torch.stack((lengths[put(request)].long() - 1 - after, after))


def _first(starts, count, reach, lengths: Tensor, table: Tensor, slack: int) -> FirstTokens | None:
    rows = np.flatnonzero((count > 0) & (reach - count < FIRST + slack))
    if not len(rows):
        return None
    put = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(table.device)  # noqa: E731
    column, index = np.arange(FIRST), put(rows)
    tokens = starts[rows][:, None] + np.minimum(column, count[rows][:, None] - 1)
    at = (lengths[index].long() - put(count[rows]))[:, None] + put(column)
    real = put(column < count[rows][:, None]) & (at < FIRST)
    page = table[index, :1].long().expand_as(at).masked_fill(~real, 0)
    return FirstTokens(put(tokens).flatten(), page.flatten(), at.clamp_max(FIRST - 1).flatten())


def _batch(request, first, size, before, lengths, starts, reach, table: Tensor) -> Batch:
    """Rows of requests: `size` queries from token `first` of the step, `before` of the request's new ones."""
    width, device = int(size.max()), table.device
    put = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)  # noqa: E731
    column = np.arange(width)
    real = column < size[:, None]
    tokens = first[:, None] + np.minimum(column, size[:, None] - 1)
    count = np.diff(starts)[request]
    index = put(request)
    # Lengths on the host may be upper bounds. Positions come from the lengths on the device.
    begin = lengths[index].long() - put(count - before)
    at = begin[:, None] + put(column)
    wanted = None
    if not real.all():
        at = at.masked_fill(~put(real), NOWHERE)
        wanted = put(np.flatnonzero(real))
    after = count - before - size
    behind = reach[request] - after
    return Batch(put(tokens), at, table[index], behind, wanted, put(tokens[real]), put(before))


def _rounded(batch: Batch) -> Batch:
    """The batch with rows and queries up to powers of two. What is added sees nothing."""
    rows, width = batch.tokens.shape
    more, wider = (1 << (n - 1).bit_length() for n in (rows, width))
    wanted = batch.wanted
    if wider > width:
        index = torch.arange(rows * width, device=batch.at.device) if wanted is None else wanted
        wanted = index // width * wider + index % width
    pad, added = torch.nn.functional.pad, (0, wider - width, 0, more - rows)
    return Batch(
        pad(batch.tokens, added),
        pad(batch.at, added, value=NOWHERE),
        pad(batch.table, (0, 0, 0, more - rows)),
        np.pad(batch.reach, (0, more - rows), constant_values=1),
        wanted,
        batch.targets,
        pad(batch.before, (0, more - rows)),
    )
