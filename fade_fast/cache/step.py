"""A step of one layer outside captured graphs: the four verbs in their order.

    prepare   compact what is due, record positions
    append    store the step's keys and values
    attend    over all that the layer holds
    compact   demote blocks that are due (a long step does so at once, a short one before the next step)

A short step is stored before it is attended. A long one is attended beside its own keys and values, so that
the dense buffers never grow with its length.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import dense
from ..kernels.merge import merge, of_heads, of_rows, sinks
from . import reads
from .layer import MAX_DECODE_TOKENS, KVLayer, ScoreOptions
from .positions import PAD
from .reads import AttentionQuery, rows_of

#: Attention over plain tensors as the model would do it: (query, keys, values, mask, is_causal) -> output.
#: `is_causal` None leaves causality to the mask and the query's length.
PlainAttention = Callable[..., Tensor]


def run(
    layer: KVLayer,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    options: ScoreOptions,
    plain: PlainAttention,
    compact_at_once: bool = True,
    compact: Callable[[], object] | None = None,
) -> Tensor:
    """Store a step's keys and values in a layer, and attend: [B, q, Hq, D].

    Args:
        query: [B, Hq, q, D]. keys, values: [B, H, q, D], keys after RoPE.
        mask: the step's mask as `MaskReader` reads it, or None.
        options: the model's score options.
        plain: attention over tensors, for steps that need no compressed tokens.
        compact_at_once: whether a long step may demote its tokens at once; not where another layer reads
            them, too.
        compact: demotes what is due in all layers, together; None: in this layer alone.

    Raises `ValueError` for a mask that cannot be obeyed, before anything is written.
    """
    new, start, positions = query.shape[2], layer.length, layer.token_positions
    layer.group = query.shape[1] // keys.shape[1]
    step_mask = positions.masks.read(mask, query.shape[0], new, start, positions.buffer)
    real = step_mask.real
    own = step_mask.own if start or layer.observer else None
    if real is not None and positions.all_real(start, real):
        real = None  # generate() makes such masks for caches it may compile, and where there is a window
        mask = None if new == 1 else mask
    if own is not None and positions.has_padding and not layer.dense.sinks_placed:
        raise ValueError(
            "a mask that is not causal, in a batch with padding whose first real tokens have just come: "
            "feed a few tokens first"
        )
    if real is not None:  # a NaN in a padding slot must not reach a real token
        keys, values = (x.masked_fill(~real[:, None, :, None], 0) for x in (keys, values))
    if not start and layer.format.awaits_tables:
        layer.format.learner.learn(query, keys, values, real, options.scaling)
    (compact or layer.compact)()
    positions.extend(start, real, query.shape[0], new, query.device)
    if not start:
        return _first_step(layer, query, keys, values, mask, own, options, plain)
    with torch.no_grad():
        return _later_step(layer, query, keys, values, start, own, options, plain, compact_at_once)


def _first_step(layer, query, keys, values, mask, own, options, plain) -> Tensor:
    """Attention of the first tokens of a text, which see nothing but each other."""
    if layer.chunk and layer.compresses:
        layer.append(keys, values, attended=True)
        return _in_chunks(layer, query, keys, values, own, options, plain)
    output = attend_tensors(query, keys, values, mask, options, plain)
    stats = _observe_first(layer, query, keys, options, own)
    layer.append(keys, values, attended=True, attention_stats=stats)
    return output


def _in_chunks(layer, query, keys, values, own, options, plain) -> Tensor:
    """Attention of the newest tokens of a text that the layer has stored; see `KVLayer.chunk`."""
    rows = AttentionQuery(query, layer, layer.length - query.shape[2], options, own)
    return attend_tensors(query, *rows.in_chunks(keys, values, layer.chunk), options, plain)


def _later_step(layer, query, keys, values, start, own, options, plain, compact_at_once) -> Tensor:
    """Attention of a step that begins at step index `start` > 0."""
    new = query.shape[2]
    if not layer.has_middle and options.plain and not layer.observer:
        layer.append(keys, values)
        rows = AttentionQuery(query, layer, start, options, own)
        needs_mask = new > 1 or layer.token_positions.has_padding or options.window is not None
        mask = rows.sees_dense() if needs_mask else None
        return plain(query, layer.dense["key"], layer.dense["value"], mask, is_causal=False)
    if new <= MAX_DECODE_TOKENS:
        layer.append(keys, values)
        return AttentionQuery(query, layer, start, options, own).attend()
    stats = layer.new_stats(new)
    size = AttentionQuery(query[:, :, :1], layer, start, options, own).most_rows
    parts = []
    for i, part in enumerate(query.split(size, dim=2)):
        rows = AttentionQuery(part, layer, start + i * size, options, rows_of(own, i * size, size))
        parts.append(rows.attend_beside(start, keys, values, stats))
    layer.append(keys, values, attended=compact_at_once, attention_stats=stats)
    return torch.cat(parts, dim=1)


def _observe_first(layer, query, keys, options, own) -> dict[str, Tensor] | None:
    """What the tokens of a first step receive; None where the policy does not ask.

    `plain` gives no scores. So they are computed again, in tiles, for the queries that can make a difference.
    """
    if not layer.observer:
        return None
    if not layer.is_initialized:
        layer.allocate(keys)
    new = query.shape[2]
    first = max(0, new - (layer.observer.horizon or new))
    stats = layer.new_stats(new)
    for i, part in enumerate(query[:, :, first:].split(reads.ROWS, dim=2)):
        start = first + i * reads.ROWS
        AttentionQuery(part, layer, start, options, rows_of(own, start, reads.ROWS)).observe(0, keys, stats)
    return stats


def read_again(
    layer: KVLayer,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    options: ScoreOptions,
    plain: PlainAttention,
) -> Tensor:
    """Attention over a layer that has stored the tokens of this step already, [B, q, Hq, D].

    Models that share keys and values between layers need this. The queries are those of the newest tokens,
    perhaps not of all that arrived.
    """
    new, arrived, positions = query.shape[2], keys.shape[2], layer.token_positions
    start, first = layer.length - new, layer.length - arrived
    own = None
    if mask is not None and new == arrived:
        own = positions.masks.read(mask, query.shape[0], new, first, positions.buffer).own
    with torch.no_grad() if first else contextlib.nullcontext():
        if first:
            parts = [
                AttentionQuery(
                    part, layer, start + i * MAX_DECODE_TOKENS, options,
                    rows_of(own, i * MAX_DECODE_TOKENS, MAX_DECODE_TOKENS),
                ).attend()
                for i, part in enumerate(query.split(MAX_DECODE_TOKENS, dim=2))
            ]  # fmt: skip
            return torch.cat(parts, dim=1)
        if layer.chunk and layer.compresses:
            return _in_chunks(layer, query, keys, values, own, options, plain)
        position = positions.logical[:, None]
        keys, values = (x.masked_fill((position == PAD)[..., None], 0) for x in (keys, values))
        seen = own if own is not None else AttentionQuery(query, layer, start, options).sees(position)
        return attend_tensors(query, keys, values, seen, options, plain)


def attend_tensors(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    options: ScoreOptions,
    plain: PlainAttention,
) -> Tensor:
    """Attention over plain tensors, [B, q, Hq, D]: `plain`, or our own where it lacks a score option."""
    if options.plain:
        return plain(query, keys, values, mask)
    wide = torch.promote_types(query.dtype, torch.float32)
    new, held = query.shape[2], keys.shape[2]
    if mask is None:
        index = torch.arange(held, device=query.device)
        mask = (index <= index[held - new :, None])[None, None]
    outputs = []
    for part, sees in zip(query.split(reads.ROWS, dim=2), mask[..., :held].split(reads.ROWS, dim=-2)):
        rows = of_rows(part.to(wide) * options.scaling, keys.shape[1])
        sees = sees if sees.dtype == torch.bool else sees == 0
        seen = sees.repeat(1, 1, rows.shape[2] // part.shape[2], 1)
        partials = [dense.attend(rows, keys, values, seen, options.softcap)]
        if options.s_aux is not None:
            partials.append(sinks(rows, options.s_aux))
        outputs.append(of_heads(merge(partials), part.shape))
    return torch.cat(outputs, dim=1).to(query.dtype)
