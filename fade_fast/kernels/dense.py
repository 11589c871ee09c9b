"""The FP16 tier: attention over keys and values in the model's own dtype."""

import torch
from torch import Tensor

from ..compile.compiled import TOGETHER, Compiled, more_rows, rounded, use_compiled
from .merge import Partial, empty, merge, soften

TAIL = 1024  # a CUDA graph serves until the FlashAttention prefix has grown by this many tokens


def attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, softcap=None) -> Partial:
    """Partial attention over uncompressed keys.

    Args:
        query: [B, H, R, D], scaled, in the dtype to compute in (float32 or float64).
        keys, values: [B, H, n, D], any floating dtype.
        visible: bool, broadcastable to [B, H, R, n].
        softcap: see `merge.soften`.
    """
    if not keys.shape[2]:
        return empty(query)
    scores = query @ keys.to(query.dtype).mT
    weights, row_max, row_sum = soften(scores, visible, softcap)
    return Partial(weights @ values.to(query.dtype), row_max, row_sum)


def store(keys: Tensor, values: Tensor, slot: Tensor, key: Tensor, value: Tensor) -> None:
    """Write tokens [B, H, q, D] into slots `slot` (int64, [q]) of keys and values [B, H, capacity, D]."""
    if use_compiled(keys) and len(slot) == 1:  # larger steps have too many lengths to compile for each
        _compiled_store([], dict, keys, values, slot, key, value)
    else:
        _store([], keys, values, slot, key, value)


def _store(dynamic_sizes, keys, values, slot, key, value) -> None:
    keys.index_copy_(2, slot, key)
    values.index_copy_(2, slot, value)


@torch.library.custom_op("fade::attend_long", mutates_args=())
def attend_long(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, flash_prefix: int, scaling: float
) -> Tensor:
    """Attention of a short step over many uncompressed tokens, [B, q, Hq, D].

    The first `flash_prefix` tokens, all visible, go to FlashAttention. At most `2 * TAIL` further tokens are
    merged with its result. `seen` [B, 1 or q, capacity] says which of these are visible.

    This is an operator, like everything that is compiled inside another graph. Without its own dispatch, the
    compiled version would see tensors of other dispatch keys at its second call, and be compiled again.

    Args:
        query: [B, Hq, q, D].
        keys, values: [B, H, capacity, D].
    """
    heads, length = keys.shape[1], min(2 * TAIL, keys.shape[2] - flash_prefix)
    first = [x.narrow(2, 0, flash_prefix) for x in (keys, values)]
    last = [x.narrow(2, flash_prefix, length) for x in (keys, values)]
    seen = seen.narrow(2, flash_prefix, length)
    if query.is_cuda and query.dtype.itemsize == 2:  # FlashAttention takes no other tensors
        flash = torch.ops.aten._scaled_dot_product_flash_attention(query, *first, scale=scaling)
        return _tail_operator(query, *flash[:2], *last, seen, scaling)
    rows = query.unflatten(1, (heads, -1)).flatten(2, 3).to(torch.promote_types(query.dtype, torch.float32))
    part = attend(rows * scaling, *first, torch.ones_like(seen[:, :1, None, :1]))
    output, lse = merge([part]), part.row_max + part.row_sum.log()
    return _tail_operator(
        query, output.reshape(query.shape), lse.reshape(query.shape[:3]), *last, seen, scaling
    )


@attend_long.register_fake
def _(query, *args):
    batch, heads, new, dim = query.shape
    return query.new_empty(batch, new, heads, dim)


@torch.library.custom_op("fade::attend_tail", mutates_args=())
def _tail_operator(
    query: Tensor, output: Tensor, lse: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scaling: float
) -> Tensor:
    if use_compiled(query):
        new, tokens = query.shape[2], rounded(query.shape[2])
        if new > 1:  # see `decode.attend`
            query, output, seen = (more_rows(x, tokens).contiguous() for x in (query, output, seen))
            lse = more_rows(lse.unsqueeze(-1), tokens).squeeze(-1).contiguous()
        result = _compiled([], dict, query, output, lse, keys, values, seen, scaling=scaling)
        return result if tokens == new else result.narrow(1, 0, new).contiguous()
    return _with_tail(query, output, lse, keys, values, seen, scaling)


_tail_operator.register_fake(attend_long._abstract_fn)


def _with_tail(query, output, lse, keys, values, seen, scaling: float) -> Tensor:
    """Attention over these keys, merged with known `output` and `lse` [B, Hq, q] over other keys."""
    shape, heads = query.shape, keys.shape[1]
    rows = lambda x: x.unflatten(1, (heads, -1)).flatten(2, 3)  # noqa: E731
    wide = torch.promote_types(query.dtype, torch.float32)
    known = Partial(rows(output).to(wide), rows(lse.unsqueeze(-1))[..., 0].to(wide), 1.0)
    known = known._replace(row_sum=torch.ones_like(known.row_max))
    values = torch.where(values.abs() <= torch.finfo(values.dtype).max, values, 0.0)  # padding may be NaN
    seen = seen if seen.shape[1] == 1 else seen.repeat(1, shape[1] // heads, 1)
    tail = attend(rows(query).to(wide) * scaling, keys, values, seen.unsqueeze(1))
    return merge([known, tail]).reshape(shape).to(query.dtype).transpose(1, 2).contiguous()


def _of_sizes(dynamic_sizes, *args, scaling: float) -> Tensor:
    return _with_tail(*args, scaling)


_compiled_store = Compiled(_store, options=TOGETHER)
# Library products: here they are few and small, and choosing tiles for them would not pay.
_compiled = Compiled(_of_sizes, options={})
