"""The PQ tier: attention over product-quantized keys and values, by look-ups and histograms of codes.

A vector of D elements is m subvectors of w elements. Each subspace has a codebook of k centroids, and one
byte per subvector names a centroid (Jegou, Douze, Schmid: Product quantization for nearest neighbor search,
TPAMI 2011). A key's score is a sum of m look-ups in a table of the query (asymmetric distance computation,
section III.A, for inner products). Values are summed by adding up the weight on each centroid.

A codebook is [m, k, w] for all KV heads or [H, m, k, w] for each, of any floating dtype, k <= 256. Shapes do
not depend on data. Slots without a token may contain any byte, also one >= k.
"""

import torch
from torch import Tensor

from .merge import Partial, combine, empty, soften

ELEMENTS = 1 << 21  # distances or table entries in memory at a time: a few times 8 MiB in float32


def encode(x: Tensor, codebook: Tensor) -> Tensor:
    """Codes uint8 [B, H, n, m] of x [B, H, n, D]: the nearest centroid; in a tie, the lowest index.

    Computed in float32, or in float64 if x is float64. The code of NaN is some byte below k. Raises
    ValueError if the codebook does not fit x.
    """
    book = _book(codebook, x.shape[1], torch.promote_types(x.dtype, torch.float32))
    parts = _cut(x, book)
    norms = book.square().sum(-1).unsqueeze(1)
    tile = _tile(norms[0].numel() * x.shape[0] * x.shape[1])
    # |x - c|^2 minus |x|^2, which is the same for all centroids
    codes = [
        (norms - 2 * torch.einsum("bhnmw,hmkw->bhnmk", part.to(book.dtype), book)).argmin(-1).to(torch.uint8)
        for part in parts.split(tile, dim=2)
    ]
    return torch.cat(codes, dim=2)


def decode(codes: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors [B, H, n, D] of `dtype`: the centroids that codes [B, H, n, m] name, concatenated.

    Raises ValueError if the codes are not uint8 or do not fit the codebook.
    """
    book = _book(codebook, codes.shape[1], dtype)
    _check(codes, book, codes.shape[:3])
    head, part = (torch.arange(n, device=codes.device) for n in book.shape[:2])
    return book[head[:, None, None], part, _index(codes, book)].flatten(-2)


def attend(
    query: Tensor,
    key_codes: Tensor,
    key_codebook: Tensor,
    value_codes: Tensor,
    value_codebook: Tensor,
    visible: Tensor,
    softcap: float | None = None,
) -> Partial:
    """Partial attention over product-quantized keys and values.

    Args:
        query: [B, H, R, D], scaled, in the dtype to compute in (float32 or float64).
        key_codes, value_codes: [B, H, n, m] uint8; keys and values may differ in m.
        key_codebook, value_codebook: codebooks as above, each of a floating dtype.
        visible: bool, broadcastable to [B, H, R, n].
        softcap: see `merge.soften`.

    Besides the result, memory holds tables of R m k numbers for each of the B H heads, and tiles of tokens.
    On devices where histograms depend on the order of atomic additions, values are decoded tile by tile
    instead. Raises ValueError if query, codes and codebooks do not fit each other.
    """
    batch, heads, rows, _ = query.shape
    length = key_codes.shape[2]
    key_book, value_book = (_book(x, heads, query.dtype) for x in (key_codebook, value_codebook))
    for codes, book in ((key_codes, key_book), (value_codes, value_book)):
        _check(codes, book, (batch, heads, length))
    table = torch.einsum("bhrmw,hmkw->bhrmk", _cut(query, key_book), key_book)
    counts = query.new_empty(batch, heads, rows, *value_book.shape[1:3])  # only its shape is used
    counting, values_dim = counts_repeatably(query), value_book.shape[1] * value_book.shape[3]
    whole = empty(counts.flatten(-2) if counting else query.new_empty(*query.shape[:3], values_dim))
    visible = visible.expand(batch, heads, rows, length)
    parts = max(key_book.shape[1], value_book.shape[1])
    if counting:  # each tile reads tables and writes histograms: a tile shorter than k would not pay
        tile = max(counts.shape[-1], _tile(batch * heads * rows * parts))
    else:
        tile = _tile(batch * heads * max(rows * parts, values_dim))
    for start in range(0, length, tile):
        s = slice(start, min(start + tile, length))
        scores = table.gather(-1, _by_part(key_codes[:, :, s], key_book, rows)).sum(-2)
        weights, row_max, row_sum = soften(scores, visible[..., s], softcap)
        if counting:
            index = _by_part(value_codes[:, :, s], value_book, rows)
            weights = weights.unsqueeze(-2).expand(index.shape)
            sums = torch.zeros_like(counts).scatter_add(-1, index, weights).flatten(-2)
        else:
            sums = weights @ decode(value_codes[:, :, s], value_codebook, query.dtype)
        whole = combine(whole, Partial(sums, row_max, row_sum))
    if not counting:
        return whole
    histogram = whole.acc.view_as(counts)
    acc = torch.einsum("bhrmk,hmkw->bhrmw", histogram, value_book).flatten(-2)
    return Partial(acc, whole.row_max, whole.row_sum)


def counts_repeatably(x: Tensor) -> bool:
    """Whether histograms on the device of `x` repeat bit for bit. Atomic additions do not."""
    return x.device.type == "cpu"


def _tile(elements: int) -> int:
    """Number of tokens per tile, if each token takes `elements` numbers."""
    return max(1, ELEMENTS // max(1, elements))


def _index(codes: Tensor, book: Tensor) -> Tensor:
    """Codes as an index. Bytes that name no centroid, in slots without a token, are clamped."""
    return codes.long().clamp_max(book.shape[2] - 1)


def _by_part(codes: Tensor, book: Tensor, rows: int) -> Tensor:
    """Codes [B, H, n, m] as an index [B, H, rows, m, n]."""
    return _index(codes, book).mT.unsqueeze(2).expand(-1, -1, rows, -1, -1)


def _book(codebook: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """The codebook as [H or 1, m, k, w] of `dtype`. Raises ValueError if it is invalid or for other heads."""
    if not codebook.is_floating_point():
        raise ValueError(f"codebook of {codebook.dtype}: centroids have a floating dtype")
    shape = tuple(codebook.shape)
    if len(shape) not in (3, 4) or 0 in shape or shape[-2] > 256:
        raise ValueError(f"codebook of shape {shape}: [m, k, w] or [H, m, k, w], k <= 256, is allowed")
    if len(shape) == 4 and shape[0] not in (1, heads):
        raise ValueError(f"the codebook is for {shape[0]} heads, not {heads}")
    return (codebook if len(shape) == 4 else codebook.unsqueeze(0)).to(dtype)


def _cut(x: Tensor, book: Tensor) -> Tensor:
    """x [..., D] as subvectors [..., m, w]."""
    (parts, _, width), dim = book.shape[1:], x.shape[-1]
    if dim % width:
        raise ValueError(f"subspaces of {width} do not divide {dim} elements")
    if dim != parts * width:
        raise ValueError(f"the codebook has {parts} subspaces of {width}, {dim} elements have {dim // width}")
    return x.unflatten(-1, (parts, width))


def _check(codes: Tensor, book: Tensor, shape) -> None:
    """Raise ValueError unless codes are uint8 [*shape, m]."""
    expected = (*shape, book.shape[1])
    if codes.dtype != torch.uint8 or codes.shape != expected:
        raise ValueError(
            f"codes of shape {tuple(codes.shape)} and {codes.dtype}: "
            f"uint8 {expected}, the codebook having {book.shape[1]} subspaces, is expected"
        )
