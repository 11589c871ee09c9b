"""How all steps store tokens, and what a layer does in a decode step, in few kernels.

A decode step adds a token to each of its requests. These functions do what a layer does beside the kernels of
`formats/`, and on CUDA each is compiled:

- `writes` and `reads` tell where a step writes and reads. Layers with pages of one kind share the result.
- `store` encodes the new tokens twice and writes both records into their pages. It serves all steps, so that
  the records of a token do not depend on its step.
- `vectors` decodes the tokens that queries read as vectors: the first ones of their requests, those right
  before them and their own.

Shapes do not depend on lengths on the host, and nothing waits for the device. So a CUDA graph can hold a
decode step, and serve other lengths later.

Pages are runs of bytes here, uint8 [P, H, L], because a compiled function must not write into one of several
views of a tensor: it would copy the tensor.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..compile.compiled import Compiled, rounded, use_compiled
from ..compile.replay import Replayed
from ..kernels import matched, rotated
from ..kernels.packed import force_materialize
from ..kernels.rotated import Packed, dequantize
from .batches import sees
from .pages import FIRST, NEAR, SPAN, newest, room

SIDES = ("key", "value")
PLAIN = 4  # bits from which on what a record misses is too little for feedback to matter
SIZES = 8192, 2048, 256  # tokens that are stored at once; two matrices of the largest take 270 MB at 8 heads


class Kind(NamedTuple):
    """What the bytes of a page mean. Equal for all layers with pages of one kind.

    Attributes:
        fields: name, bytes of a token, and whether tokens lie last, of each field of a record in order.
        bits: of keys and values.
        page: tokens in a page.
        fine, drafts: see `PageLayout`.
        means: rows of the table of means.
        window: a query sees this many tokens, up to itself; None: all.
    """

    fields: tuple[tuple[str, int, bool], ...]
    bits: tuple[int, int]
    page: int
    fine: bool
    drafts: int
    means: int
    window: int | None

    @property
    def record(self) -> int:
        """Bytes of a record."""
        return sum(size for _, size, _ in self.fields)

    @property
    def room(self) -> int:
        """Second records in a page."""
        return room(self.page, self.fine, self.drafts)

    @property
    def near(self) -> int:
        """How many tokens before a query may be read from both records, beside the first ones."""
        return 0 if self.fine else min(NEAR, self.room - self.drafts)

    @property
    def second(self) -> int:
        """The first byte of the second records in a page."""
        return self.page * self.record


class Writes(NamedTuple):
    """Where the tokens of a step go, T of them. Page 0 takes what belongs nowhere.

    Attributes:
        real: bool [T], False for padding.
        early: bool [T], the first `FIRST` tokens of their requests.
        mean: int64 [T], rows of the table of means.
        page, second: int64 [T], the pages of both records.
        address: int64 [T, 2 * record], the bytes of both records in their pages.
    """

    real: Tensor
    early: Tensor
    mean: Tensor
    page: Tensor
    second: Tensor
    address: Tensor


class Reads(NamedTuple):
    """Which `FIRST` + `NEAR` tokens the rows of a batch read as vectors, and what they read from pages.

    Attributes:
        page: int64 [B, E], the page of each token. at, second: its slots among both records.
        twice: bool [B, E], whether the second record counts, of keys and of values.
        replaced: bool [B, E], whether the row's new token took the slot of the second record.
        mean: int64 [B, E], rows of the table of means.
        seen: bool [B, 1, E + 1], which of these tokens and of the row's own the query sees.
        table: int32 [B, n], the pages that kernels read; 0 where the row sees nothing, so that these
            kernels read one page again and again.
        valid: bool [B, 1, S], the slots of these pages that the query sees.
        first: int64 [B], the position of the first of these slots.
    """

    page: Tensor
    at: Tensor
    second: Tensor
    twice: tuple[Tensor, Tensor]
    replaced: Tensor
    mean: Tensor
    seen: Tensor
    table: Tensor
    valid: Tensor
    first: Tensor


def mean_row(position: Tensor, rows: int) -> Tensor:
    """The row of a table of means for a key at `position`."""
    return (position // SPAN).clamp(0, rows - 1)


# -- once a step


def parts(count: int, compiled: bool) -> list[tuple[slice, int]]:
    """The parts in which `count` tokens are stored, and how many tokens each has with padding.

    Compiled versions are for powers of two up to the smallest of `SIZES`, and for these sizes. At most half
    of a part is padding, except in parts of the smallest size.
    """
    if not compiled:
        return [(slice(0, count), count)]
    if count <= SIZES[-1]:
        return [(slice(0, count), rounded(count))]
    found, start = [], 0
    while start < count:
        rows = next((n for n in SIZES if count - start > n // 2), SIZES[-1])
        found.append((slice(start, min(start + rows, count)), rows))
        start += rows
    return found


def writes(positions: Tensor, slots: Tensor, after: Tensor, rows: int, kind: Kind) -> Writes:
    """Where a step writes.

    Args:
        positions: int64 [T], of the tokens of a step; negative for padding.
        slots: int [T], slot s is slot s % N of page s // N; negative for padding.
        after: int64 [T], how many new tokens of its request come after a token.
        rows: number of tokens with padding, at least T.
    """
    more = (0, rows - len(positions))
    pad = lambda x, value: torch.nn.functional.pad(x.long(), more, value=value)  # noqa: E731
    return _run("writes", pad(positions, -1), pad(slots, -1), pad(after, 0), kind=kind)


def _writes(dynamic_sizes, positions, slots, after, *, kind) -> Writes:
    real = (slots >= 0) & (positions >= 0)
    slots = slots.masked_fill(~real, 0)
    page, at = slots // kind.page, slots % kind.page
    kept, slot = newest(positions, kind.page, kind.fine, kind.drafts)
    early = positions < FIRST
    # Of the tokens that have the same slot the last one is stored.
    last = (after < kept) | (positions % kind.page + kept >= kind.page)
    second = page.masked_fill(~(early | (last & (kept > 0))), 0)
    slot = torch.where(early, positions.clamp_min(0), slot)
    address = [*_addresses(at, kind, False), *_addresses(slot, kind, True)]
    mean = mean_row(positions, kind.means)
    return Writes(real, early, mean, page, second, torch.cat(address, -1))


def reads(at: Tensor, table: Tensor, capacity: int, kind: Kind) -> Reads:
    """What the rows of a batch read.

    Args:
        at: int64 [B], positions of the queries; negative for padding.
        table: int [B, n], pages of each row.
        capacity: slots that the kernels' view has.
    """
    return _run("reads", at, table, capacity=capacity, kind=kind)


def _reads(dynamic_sizes, at, table, *, capacity, kind) -> Reads:
    page, window, on, column = kind.page, kind.window, at.device, at.unsqueeze(1)
    early = torch.arange(FIRST, device=on).expand(len(at), -1)
    near = column - torch.arange(NEAR, 0, -1, device=on)
    real = near >= FIRST
    near = near.clamp_min(0)
    position = torch.cat((early, near), 1)
    index = (position // page).clamp_max(table.shape[1] - 1)
    kept, slot = newest(near, page, kind.fine, kind.drafts)
    back = column - near
    with_second = real & (back <= (kept - kind.drafts).clamp(0, NEAR))
    replaced = (back == kept) & (near // page == column // page)
    whole, nothing = torch.ones_like(early, dtype=torch.bool), torch.zeros_like(with_second)
    twice = [torch.cat((whole, with_second if bits < 8 else nothing), 1) for bits in kind.bits]
    replaced = torch.cat((~whole, replaced), 1)
    query = at.unsqueeze(1)
    seen = [sees(query, early, window, False), sees(query, near, window, False) & real.unsqueeze(1)]
    seen = torch.cat((*seen, (query >= 0).unsqueeze(2)), 2)

    first = torch.zeros_like(at)
    blocks = torch.arange(-(-capacity // page), device=on)
    which = blocks.expand(len(at), -1)
    if window is not None:
        begin = (at - window + 1).clamp_min(0) // page
        first, which = begin * page, begin.unsqueeze(1) + blocks
    pages = table.gather(1, which.clamp_max(table.shape[1] - 1))
    live = (which * page < column - NEAR) & (which < table.shape[1])
    slots = first.unsqueeze(1) + torch.arange(capacity, device=on)
    valid = sees(query, slots, window, False)
    valid = valid & ((slots >= FIRST) & (slots < column - NEAR)).unsqueeze(1)
    return Reads(
        table.gather(1, index).long(), position % page, torch.cat((early, slot), 1), tuple(twice), replaced,
        mean_row(position, kind.means), seen, pages.masked_fill(~live, 0), valid, first,
    )  # fmt: skip


# -- in each layer


def store(
    keys: Tensor, values: Tensor, means: Tensor, encoders: Tensor, runs: Tensor, bound: Tensor,
    to: Writes, kind: Kind, feedback: Tensor | None = None, keep: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Encode the tokens of a step, and write their records.

    The second record encodes what the first one misses. Both codecs are a matrix and a code of each row, so
    that the rest of a row is the rest of what the code was made of: no product is needed. From `PLAIN` bits
    on, the second records of the `matched` codec are rounded without feedback, which would need as many
    kernels as the first ones.

    Args:
        keys, values: [T, H, D], at most as many as `to` has.
        means: fp16 [H, M, D].
        encoders: float64, [D, D], or [2, H, D, D] of keys and of values: x is encoded as x A^T.
        runs: uint8 [P, H, L], written in place.
        bound: float32 [H], raised in place to a power of two that is at least every new value scale.
        to: from `writes`.
        feedback: float32 [2, H, D, D], the matrices by which the `matched` codec rounds keys and values. It
            has compiled functions of its own. None: the codec is `rotated`.
        keep: None, or the dtype in which the tokens are returned as both records have them.

    Returns what was in the slots of the second records, uint8 [T, H, record], or None if no query reads it;
    and with `keep` the scaled codes of both records, [2, H, T, D] of keys and values. T includes padding.
    """
    rows = len(to.page)
    if len(keys) < rows:
        more = (0, 0, 0, 0, 0, rows - len(keys))
        keys, values = (torch.nn.functional.pad(x, more) for x in (keys, values))
    if feedback is None:
        return _run("store", keys, values, means, encoders, runs, bound, to, kind=kind, keep=keep)
    args = keys, values, means, encoders, to.mean, to.real
    if _many(rows):  # launches, and checks before them, would take the host longer than the device
        sides = _replayed(*args, feedback, kind=kind)
        return _run("write", sides, runs, bound, to, kind=kind, keep=keep)
    turned = _run("turned", *args, kind=kind)
    sides = _with_feedback(turned, feedback, kind=kind)
    return _run("complete_and_write", turned, sides, runs, bound, to, kind=kind, keep=keep)


def _store(dynamic_sizes, keys, values, means, encoders, runs, bound, to: Writes, *, kind, keep):
    turned = _turned([], keys, values, means, encoders, to.mean, to.real, kind=kind)
    if kind.bits[0] == kind.bits[1]:  # as heads of one side, as in `_with_feedback`
        sides = _cut(_twice(turned.flatten(0, 2).unsqueeze(0), kind.bits[0]), turned.shape[2])
    else:
        sides = [_twice(x, bits) for x, bits in zip(turned, kind.bits)]
    return _write([], sides, runs, bound, to, kind=kind, keep=keep)


def _complete_and_write(dynamic_sizes, turned, sides, runs, bound, to: Writes, *, kind, keep):
    return _write([], _complete([], turned, sides, kind=kind), runs, bound, to, kind=kind, keep=keep)


def _both(keys, values, means, encoders, mean, real, feedback, *, kind) -> list[list[Packed]]:
    """Both records of keys, and of values, by the `matched` codec."""
    turned = _run("turned", keys, values, means, encoders, mean, real, kind=kind)
    sides = _with_feedback(turned, feedback, kind=kind)
    return _run("complete", turned, sides, kind=kind)


def _complete(dynamic_sizes, turned, sides: list[list[Packed]], *, kind) -> list[list[Packed]]:
    """`sides` with second records, if these are rounded without feedback."""
    both = []
    for x, (first, *second), bits in zip(turned, sides, kind.bits):
        if not second:
            missed = (x - dequantize(first, bits, x.dtype)).float()
            rest = _apart(matched.quantize_to_nearest(missed, bits), x.shape[-2])
            second = [Packed(rotated.pack(rest.codes, bits), rest.scale, None)]
        both.append([first, *second])
    return both


def _turned(dynamic_sizes, keys, values, means, encoders, mean, real, *, kind) -> Tensor:
    """Keys less their mean and values, as they are quantized: float64 [2, 1, H, T, D].

    In float64, or the rounding of the product, which depends on the number of tokens, would move codes.
    """
    keys, values = (
        torch.where(real[:, None, None], x[: len(real)], 0).transpose(0, 1).double() for x in (keys, values)
    )
    both = torch.stack((keys - means[:, mean].double(), values))
    size = both.shape
    if encoders.dim() == 2:
        return (both.flatten(0, 2) @ encoders.mT).view(size).unsqueeze(1)
    return (both.flatten(0, 1) @ encoders.flatten(0, 1).mT).view(size).unsqueeze(1)


def _with_feedback(turned: Tensor, feedback: Tensor, *, kind: Kind) -> list[list[Packed]]:
    """Records of keys, and of values, by the `matched` codec, [1, H, T, ...]: the first ones, and below
    `PLAIN` bits the second ones.

    Both sides are encoded together where they can be (`matched.as_heads_of_one_side`).
    """
    found, together = [], matched.as_heads_of_one_side(kind.bits)
    of_both = [(turned.flatten(0, 2).unsqueeze(0), feedback.flatten(0, 1), kind.bits[0], False)]
    sides = zip(turned, feedback, kind.bits, (False, True))
    for x, matrices, bits, of_values in of_both if together else sides:
        records = [matched.quantize(x.float(), matrices, bits, of_values)]
        if bits < PLAIN:
            missed = x - dequantize(records[0], bits, x.dtype)
            records.append(matched.quantize(missed.float(), matrices, bits, of_values))
        found.append(records)
    return _cut(found[0], turned.shape[2]) if together else found


def _cut(both: list[Packed], heads: int) -> list[list[Packed]]:
    """Records of keys, and of values, from those of the heads of both."""
    of = lambda x, side: None if x is None else x[:, side * heads : (side + 1) * heads]  # noqa: E731
    return [[Packed(*(of(x, side) for x in one)) for one in both] for side in (0, 1)]


MOST_REPLAYED = 1 << 21  # elements of the keys: 2,048 tokens of 8 heads of 128; a graph holds .3 GB for them
_replayed = Replayed(_both, MOST_REPLAYED)


def _twice(turned: Tensor, bits: int) -> list[Packed]:
    """Codes of `turned` [1, H, T, D] by the `rotated` codec, and of what these miss."""
    tokens = turned.shape[-2]
    first = _apart(rotated.quantize_apart(turned.float(), bits), tokens)
    missed = (turned - rotated.scaled(first, bits, turned.dtype)).float()
    second = _apart(rotated.quantize_apart(missed, bits), tokens)
    return [x._replace(codes=rotated.pack(x.codes, bits)) for x in (first, second)]


def _apart(found: Packed, tokens: int) -> Packed:
    """Codes in bytes of their own. Of many tokens they are computed once, and not for each byte written."""
    return found._replace(codes=force_materialize(found.codes)) if _many(tokens) else found


def _many(tokens: int) -> bool:
    """Whether a step of so many tokens, with padding, is one for which launches matter less than work."""
    return tokens > SIZES[-1]


def _write(dynamic_sizes, sides: list[list[Packed]], runs, bound, to: Writes, *, kind, keep):
    """Write both records of keys, and of values."""
    head = torch.arange(runs.shape[1], device=runs.device).view(1, -1, 1)
    page, second = to.page.view(-1, 1, 1), to.second.view(-1, 1, 1)
    address, record = to.address.unsqueeze(1), kind.record
    old = None if kind.fine else runs[page, head, address[..., record:]]
    # Dynamo of torch 2.11 may take an index 0 or 1 for a bool.
    parts = [_bytes(list(both), kind) for both in zip(*sides)]
    if _many(len(to.page)):
        for i, (owner, fields) in enumerate(zip((page, second), parts)):
            for columns, found in _groups(fields, kind):
                at = torch.cat(
                    [address[..., i * record + x.start : i * record + x.stop] for x in columns], -1
                )
                runs.index_put_((owner, head, at), torch.cat(found, -1))
    else:
        first = torch.arange(2 * record, device=runs.device) < record
        records = torch.cat([torch.cat(fields, -1) for fields in parts], -1)
        runs.index_put_((torch.where(first, page, second), head, address), records)
    most = sides[1][0].scale[0].float().amax(-1)
    # 2^e with most < 2^e, by the bits of the exponent.
    power = (((most.view(torch.int32) >> 23) + 1) << 23).view(torch.float32)
    bound.copy_(torch.maximum(bound, power))
    return old, None if keep is None else _whole(sides, to.early, kind, keep)


def _groups(fields: list[Tensor], kind: Kind) -> list[tuple[list[slice], list[Tensor]]]:
    """Fields of a record that are written together, and which bytes of the record each of them is.

    Codes are written alone, so that the kernel does not ask for each byte which field it is in.
    """
    groups, others, start = [], ([], []), 0
    for (name, size, _), found in zip(kind.fields, fields):
        columns = slice(start, start + size)
        if name.endswith("codes"):
            groups.append(([columns], [found]))
        else:
            others[0].append(columns)
            others[1].append(found)
        start += size
    return [*groups, others]


def _whole(sides: list[list[Packed]], early: Tensor, kind: Kind, dtype: torch.dtype) -> Tensor:
    """Tokens as both records have them: scaled codes [2, H, T, D] of keys and values.

    Of codes of 8 bits the second records count for tokens that are `early`, bool [T].
    """
    middle, found = torch.promote_types(dtype, torch.float32), None
    for i, (records, bits) in enumerate(zip(sides, kind.bits)):
        once, more = (dequantize(x, bits, middle)[0] for x in records)
        whole = once + (more if bits < 8 else torch.where(early.unsqueeze(-1), more, 0.0))
        if found is None:
            found = whole.new_empty((2, *whole.shape), dtype=dtype)
        found[i] = whole.to(dtype)
    return found


def vectors(
    runs: Tensor, keys: Tensor, values: Tensor, tokens: Tensor, old: Tensor | None, means: Tensor,
    decoders: Tensor, of: Reads, kind: Kind,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Keys and values that the rows of a batch read as vectors, [B, H, E + 1, D], in float32 or float64.

    Args:
        runs: uint8 [P, H, L].
        keys, values: [T, H, D], those of the step as they came; row b reads token `tokens[b]`.
        old: from `store`.
        means: fp16 [H, M, D].
        decoders: [D, D], or [2, H, D, D] of keys and of values: a row y of scaled codes decodes to y B. Its
            dtype is that of the product.
        of: from `reads`.
    """
    return _run("vectors", runs, keys, values, tokens, old, means, decoders, of, kind=kind)


def _vectors(dynamic_sizes, runs, keys, values, tokens, old, means, decoders, of: Reads, *, kind):
    dtype, wide = decoders.dtype, torch.promote_types(keys.dtype, torch.float32)
    middle = torch.promote_types(dtype, torch.float32)
    first, rest = (
        _read(runs, of.page, at, kind, second) for at, second in ((of.at, False), (of.second, True))
    )
    before = None
    if old is not None:
        before = _sides(old[tokens].unsqueeze(1).split([size for _, size, _ in kind.fields], -1), kind)
    turned = []
    for i, bits in enumerate(kind.bits):
        more = dequantize(rest[i], bits, middle)
        if before is not None:
            more = torch.where(of.replaced[..., None, None], dequantize(before[i], bits, middle), more)
        more = torch.where(of.twice[i][..., None, None], more, 0.0)
        whole = (dequantize(first[i], bits, middle) + more).to(dtype)  # [B, E, H, D]
        turned.append(whole.permute(2, 0, 1, 3))
    turned = torch.stack(turned)  # [2, H, B, E, D]
    size = turned.shape
    if decoders.dim() == 2:
        found = turned.reshape(-1, size[-1]) @ decoders
    else:
        found = turned.reshape(2 * size[1], -1, size[-1]) @ decoders.flatten(0, 1)
    found = found.view(size).to(wide).unbind()
    mean = means[:, of.mean].to(wide)
    own = (x[tokens].transpose(0, 1).unsqueeze(2).to(wide) for x in (keys, values))
    return tuple(
        torch.cat((x, y), 2).transpose(0, 1).contiguous() for x, y in zip((found[0] + mean, found[1]), own)
    )


# -- bytes


def _addresses(at: Tensor, kind: Kind, second: bool) -> list[Tensor]:
    """The bytes of each field of the records in slots `at` of a page: int64 [*at.shape, bytes] each."""
    start, slots = (kind.second, kind.room) if second else (0, kind.page)
    found, at = [], at.unsqueeze(-1)
    for _, size, last in kind.fields:
        byte = torch.arange(size, device=at.device)
        found.append(start + (byte * slots + at if last else at * size + byte))
        start += size * slots
    return found


def _read(runs: Tensor, page: Tensor, at: Tensor, kind: Kind, second: bool) -> list[Packed]:
    """Keys and values of records, with tokens [B, E] before heads. Rows of padding may name any page."""
    head = torch.arange(runs.shape[1], device=runs.device).unsqueeze(-1)
    page = page.clamp(0, len(runs) - 1)[..., None, None]
    return _sides([runs[page, head, x.unsqueeze(-2)] for x in _addresses(at, kind, second)], kind)


def _sides(parts: list[Tensor], kind: Kind) -> list[Packed]:
    """Keys and values whose fields have these bytes."""
    named = {}
    for (name, _, _), x in zip(kind.fields, parts):
        if not name.endswith("codes"):
            low, high = x.to(torch.int16).unbind(-1)
            x = (low | (high << 8)).view(torch.float16)
        named[name] = x
    return [Packed(*(named.get(f"{side}_{name}") for name in Packed._fields)) for side in SIDES]


def _bytes(sides: list[Packed], kind: Kind) -> list[Tensor]:
    """The bytes of each field of records whose sides are [1, H, T, ...]: [T, H, bytes]."""
    parts = []
    for name, _, _ in kind.fields:
        side, _, field = name.partition("_")
        x = getattr(sides[SIDES.index(side)], field)[0].transpose(0, 1)
        if field != "codes":
            # Shifts are constants: a kernel that writes several fields computes each byte of all of them, and
            # no byte of another field may be shifted by a negative number.
            x = x.contiguous().view(torch.int16)
            x = torch.stack([(x >> shift) & 255 for shift in (0, 8)], -1).to(torch.uint8)
        parts.append(x)
    return parts


def _run(name: str, *args, **constants):
    """A function of this module, compiled where compiled versions run."""
    if use_compiled(next(x for x in args if isinstance(x, Tensor))):
        return _compiled[name]([], dict, *args, **constants)
    return globals()[f"_{name}"]([], *args, **constants)


#: One kernel reads both records of a token, and writes their sum.
_FUSED = {f"realize_{what}_threshold": 1000 for what in ("opcount", "acc_reads", "reads")}
# Codes are defined by the stored scales and zero points, which are rounded.
_ROUNDED = _FUSED | {"emulate_precision_casts": True}
_compiled = {
    name: Compiled(function, options=options)
    for name, function, options in (
        ("writes", _writes, _FUSED), ("reads", _reads, _FUSED), ("vectors", _vectors, _FUSED),
        ("store", _store, _ROUNDED), ("turned", _turned, {}), ("complete", _complete, _ROUNDED),
        ("write", _write, _ROUNDED), ("complete_and_write", _complete_and_write, _ROUNDED),
    )
}  # fmt: skip
