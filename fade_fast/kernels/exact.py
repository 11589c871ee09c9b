"""The FP16 tier: attention over keys and values kept in the model's own dtype."""

from torch import Tensor

from .merge import Partial, soften


def attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, softcap=None) -> Partial:
    """Partial attention over uncompressed keys.

    Args:
        query: [B, H, R, D], scaled, in the dtype to compute in (float32 or float64).
        keys, values: [B, H, n, D], any floating dtype.
        visible: bool, broadcastable to [B, H, R, n].
        softcap: see `merge.soften`.
    """
    scores = query @ keys.to(query.dtype).mT
    weights, top, total = soften(scores, visible, softcap)
    return Partial(weights @ values.to(query.dtype), top, total)
