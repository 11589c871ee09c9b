"""Reference attention over the same codes, decoded to dense keys and values, in plain PyTorch."""

from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from fade_fast.cache.reads import AttentionQuery
from fade_ref import quantize, select


def held(layer) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens of a tiered layer, decoded: keys and values [B, H, n, D], positions [B, 1 or H, n]."""
    parts = [(layer.dense["key"], layer.dense["value"], _dense_positions(layer))]
    for tier in layer.held_tiers():
        keys, values = layer.decode(tier)
        parts.append((keys, values, layer.middle.position(tier)))
    return parts[0] if len(parts) == 1 else tuple(torch.cat(x, dim=2) for x in zip(*parts))


def _dense_positions(layer) -> Tensor:
    """Positions [B, 1, n] of uncompressed tokens: the sinks that have arrived, and the recent tokens."""
    positions, sinks = (
        layer.token_positions.logical[:, : layer.length],
        min(layer.length, layer.config.n_sink),
    )
    slots = torch.arange(sinks).expand(positions.shape[0], -1)
    slots = torch.where(slots <= positions.amax(-1, keepdim=True), slots, -1)
    recent = positions[:, layer.length - layer.recent :]
    return torch.cat((slots, torch.where(recent < layer.config.n_sink, -1, recent)), dim=-1)[:, None]


def _plain(rows: AttentionQuery, keys: Tensor, values: Tensor, position: Tensor, read=None) -> Tensor:
    """Attention [B, q, Hq, D] over keys with logical positions. Position -1 is padding.

    `read`, bool [B, Hq, q, n], says which keys are read; None: all.
    """
    query, terms = rows.raw, rows.options
    keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (keys, values))
    scores = query @ keys.mT * terms.scaling
    if terms.softcap is not None:
        scores = terms.softcap * torch.tanh(scores / terms.softcap)
    here, there = (
        rows.layer.token_positions.logical[:, None, rows.start : rows.stop, None],
        position[:, :, None],
    )
    seen = (there >= 0) & (there <= here)
    if terms.window is not None:
        seen &= there > here - terms.window
    if rows.step_mask is not None:  # the tokens of the step come last
        new = rows.step_mask.shape[-1]
        seen = torch.cat((seen[..., :-new], rows.step_mask.expand(*seen.shape[:-1], new)), dim=-1)
    seen = seen if read is None else seen & read
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if terms.s_aux is not None:
        sinks = terms.s_aux.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    probabilities = scores.softmax(-1)[..., : values.shape[2]]
    return (probabilities @ values).transpose(1, 2).contiguous()


def _attend(self) -> Tensor:
    keys, values, position = held(self.layer)
    exact = self.layer.dense.count  # the uncompressed tokens are first, and must be last
    order = [*range(exact, keys.shape[2]), *range(exact)]
    read = None
    if self.layer.has_middle and self.layer.middle.chooses:
        read = torch.cat((chosen(self), torch.ones(*self.raw.shape[:3], exact, dtype=torch.bool)), dim=-1)
    return _plain(self, keys[:, :, order], values[:, :, order], position[..., order], read)


def chosen(rows: AttentionQuery) -> Tensor:
    """Tokens of the middle that each query chooses by the specification, bool [B, Hq, q, n]."""
    layer, config, (batch, q_heads, new, dim) = rows.layer, rows.layer.config, rows.raw.shape
    (tier,), heads = layer.held_tiers(), layer.heads
    record = tier.format.whole(tier.fields())
    codes = quantize.unpack(record["key_codes"], 4, dim)
    index = select.index_keys(codes, record["key_scale"], record.get("key_zero"))
    keys = index @ tier.format.key_matrix.double() + layer.middle.mean(0, tier.records.count).double()
    scores = rows.raw.double() @ keys.repeat_interleave(q_heads // heads, dim=1).mT * rows.options.scaling
    if rows.options.softcap is not None:
        scores = rows.options.softcap * torch.tanh(scores / rows.options.softcap)
    scores = scores.masked_fill(~rows.sees(layer.middle.position(tier)), -torch.inf)
    read = torch.zeros(scores.shape, dtype=torch.bool)
    for b in range(batch):
        for i in range(new):
            mass = select.page_mass(scores[b, :, i], config.select_page, heads)
            pages = select.choose(mass, config.tokens_selected // config.select_page)
            found = select.tokens_read(pages, config.select_page, scores.shape[-1])
            read[b, :, i] = found.repeat_interleave(q_heads // heads, dim=0)
    return read


def _attend_beside(self, first: int, keys: Tensor, values: Tensor, received=None) -> Tensor:
    position = self.layer.token_positions.logical[:, None, first:]
    beside = (keys, values, position)
    return _plain(self, *(torch.cat(parts, dim=2) for parts in zip(held(self.layer), beside)))


@contextmanager
def read_dense():
    """In this context, tiered caches use plain attention over dense keys and values."""
    with (
        mock.patch.object(AttentionQuery, "attend", _attend),
        mock.patch.object(AttentionQuery, "attend_beside", _attend_beside),
    ):
        yield
