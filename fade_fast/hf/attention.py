"""The attention function and the mask function that are registered with transformers.

A mask covers the tokens of the step only: the cache knows the position and the validity of all it stores.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..cache import step
from ..cache.guard import without_autocast
from ..cache.layer import MAX_DECODE_TOKENS, ScoreOptions
from .gradient import REASON, without_gradient
from .layer import PendingKV, by_number

NAME = "fade"  # name of our attention and mask functions in transformers
ANOTHER = "this cache was made for another model: create_cache(model) makes one for it"


def attention(
    module,
    query: Tensor,
    key,
    value,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it. Positional arguments are in the order of its own functions.

    Args:
        query: [B, Hq, q, D].
        key, value: a `PendingKV` from a tiered layer, or tensors [B, H, n, D] from any other.
        attention_mask: for a `PendingKV`, as `masks.MaskReader` reads it; for tensors, as `sdpa` takes it.
        dropout: probability; only over tensors.
        scaling: of the scores; None is D ** -0.5.
        softcap, sliding_window, s_aux: as Gemma 2, Mistral and gpt-oss pass them.

    Returns the output [B, q, Hq, D], and None: attention weights are never formed.

    Raises `ValueError` if the cache belongs to another model, for a mask that cannot be obeyed, for dropout
    over cached tokens, and for a window in a captured step.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(key, PendingKV):
        options = ScoreOptions(scaling, softcap, sliding_window, s_aux)
        kwargs["dropout"] = dropout
        plain = _plain_attention(module, options, kwargs)
        return step.attend_tensors(query, key, value, attention_mask, options, plain), None
    if dropout:
        raise ValueError(
            f"dropout={dropout} in attention over a tiered cache: call model.eval(), or set "
            "attention_dropout of the configuration to 0"
        )
    if torch.is_autocast_enabled(query.device.type):
        query = query.to(key.dtype)
    graph = key.layer.graph
    if graph.active:
        if sliding_window is not None:  # what a captured step sees is fixed, but for the newest token
            raise ValueError(
                f"sliding_window={sliding_window} for a layer with full attention, in a captured step: "
                "generate(..., disable_compile=True) takes ordinary ones"
            )
        index = key.layer.kv.index
        output = torch.ops.fade.step(
            query, key.keys, key.values, attention_mask, graph.dynamic_size.shape[0],
            -1 - index if key.of_another(module) else index, scaling, softcap, s_aux,
        )  # fmt: skip
        return output, None
    if torch.compiler.is_compiling():  # by the user: one operator, into which no graph looks
        if key.layer.model_config is not module.config:
            raise ValueError(ANOTHER)
        layer_idx = getattr(module, "layer_idx", key.layer.layer_idx)
        output = torch.ops.fade.eager_step(
            query, key.keys, key.values, attention_mask, key.layer.number, layer_idx,
            scaling, softcap, sliding_window, s_aux,
        )  # fmt: skip
        return output, None
    return _attend(module, query, key, attention_mask, scaling, softcap, sliding_window, s_aux, **kwargs)


@dataclass(frozen=True)
class _Module:
    """What attention asks of a module, where the module itself is not at hand."""

    config: object
    layer_idx: int | None
    num_key_value_groups: int
    is_causal: bool = True


@torch.library.custom_op("fade::eager_step", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def eager_step(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    number: int,
    layer_idx: int,
    scaling: float,
    softcap: float | None,
    window: int | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention of one layer in a model that its user compiles, [B, q, Hq, D]: an ordinary step inside.

    It looks at lengths and writes the cache, so that no CUDA graph may hold it.
    """
    layer = by_number[number]
    if layer_idx == layer.layer_idx:
        layer.kv.check(keys, values)
        layer.check_whole()
    module = _Module(layer.model_config, layer_idx, query.shape[1] // keys.shape[1])
    pending = PendingKV(layer, keys, values)
    return _attend(module, query, pending, mask, scaling, softcap, window, s_aux)[0].contiguous()


@eager_step.register_fake
def _(query, *args):
    batch, heads, new, dim = query.shape
    return query.new_empty(batch, new, heads, dim)


def _refuse_gradient(ctx, gradient):
    raise RuntimeError(REASON)


eager_step.register_autograd(_refuse_gradient)


def _all_or_nothing(attend):
    """Attention that lets one thread in, and takes its step back from all layers if it fails."""

    @functools.wraps(attend)
    def inside(module, query: Tensor, pending: PendingKV, *args, **kwargs):
        layer = pending.layer
        start = layer.kv.length - (pending.keys.shape[2] if pending.of_another(module) else 0)
        with layer.guard, without_autocast():
            try:
                return attend(module, query, pending, *args, **kwargs)
            except BaseException:
                layer.rollback_step(start)
                raise

    return inside


@torch.compiler.disable
@_all_or_nothing
def _attend(
    module, query, pending: PendingKV, attention_mask, scaling, softcap, sliding_window, s_aux, **kwargs
):
    """Attention outside captured steps; it stores the keys and values that are pending."""
    options = ScoreOptions(scaling, softcap, sliding_window, s_aux)
    layer, keys, values, new = pending.layer, pending.keys, pending.values, query.shape[2]
    if layer.model_config is not module.config:
        raise ValueError(ANOTHER)
    plain = _plain_attention(module, options, kwargs)
    if pending.of_another(module):
        past = layer.kv.length > keys.shape[2]
        output = step.read_again(layer.kv, query, keys, values, attention_mask, options, plain)
        return without_gradient(output, query, keys, values) if past else output, None
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            "position_bias, which is added to scores, cannot be served by a tiered cache: use a DynamicCache"
        )
    if kwargs.get("is_causal") is False and attention_mask is None and new > 1:
        raise ValueError(
            "attention that is not causal needs a mask to be served by a tiered cache: pass a 4-D "
            "attention_mask, or use a DynamicCache"
        )
    if keys.shape[2] != new:
        raise ValueError(
            f"{new} queries come with {keys.shape[2]} keys: a tiered cache cannot serve cross-attention; use "
            "a DynamicCache"
        )
    past = layer.kv.length > 0
    first = past and not layer.kv.index
    if first and new <= MAX_DECODE_TOKENS:
        layer.graph.eager_steps += 1
    at_once, compact = not layer.shared, layer.graph.compact if first else None
    output = step.run(layer.kv, query, keys, values, attention_mask, options, plain, at_once, compact)
    return without_gradient(output, query, keys, values) if past else output, None


def _plain_attention(module, options: ScoreOptions, kwargs: dict) -> step.PlainAttention:
    """Attention over plain tensors, as transformers does it with `sdpa` for this module."""
    kwargs = kwargs | dict(scaling=options.scaling, sliding_window=options.window)

    def plain(query, keys, values, mask, **more) -> Tensor:
        return sdpa_attention_forward(module, query, keys, values, mask, **kwargs | more)[0]

    return plain


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs,
) -> Tensor | None:
    """The mask of a step as transformers asks for it: `sdpa_mask`, made at once where it is known.

    The only token of a step sees itself; so in a captured step, whose mask may not be skipped, what is
    left to say is whether each row's is real.
    """
    single = q_length == kv_length == 1 and not (args or allow_is_causal_skip or use_vmap)
    if single and attention_mask is not None and attention_mask.shape[-1] == kv_offset + 1:
        # Always new strides: those of a slice tell its length, for which a graph would be compiled anew.
        return attention_mask[:, None, None, -1:].clone(memory_format=torch.contiguous_format)
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        *args,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        **kwargs,
    )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
