"""The comparisons: each function runs both packages on the same input. There is one function per subject."""

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fade_fast
from fade_fast.cache.layer import MAX_DECODE_TOKENS, KVLayer
from fade_fast.cache.select_store import READ
from fade_fast.formats.rotated import unpack_record
from fade_fast.hf.attention import attention
from fade_fast.hf.calibration import Calibration
from fade_fast.hf.layer import PendingKV
from fade_fast.hf.models import fingerprint
from fade_fast.kernels import rotated
from fade_ref import attention as spec_attention
from fade_ref import matched, quantize, scores
from fade_ref.cache import LayerCache, Row, Token
from fade_ref.config import FadeConfig
from fade_ref.importance import Importance
from fade_ref.rope import Rope
from fade_ref.rotation import Record, RotatedCodec, key_mean, qr_rotation
from fade_ref.tiers import Tier

from .case import relative_error


@dataclass(frozen=True)
class Shape:
    """Batch rows, KV heads, query heads per KV head, channels per head; dtype and device of the model."""

    batch: int = 2
    heads: int = 2
    group: int = 3
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def random(self, *, queries: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, H * group, q, D], keys and values [B, H, q, D]; keys have an offset per channel."""
        draw = lambda heads: torch.randn(  # noqa: E731
            self.batch, heads, queries, self.head_dim, generator=generator, dtype=torch.float64
        )
        offset = torch.linspace(-4, 4, self.head_dim, dtype=torch.float64)
        q, k, v = draw(self.heads * self.group), draw(self.heads) + offset, draw(self.heads)
        return q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)


@dataclass(frozen=True)
class Codes:
    """The differences between the codes of both packages, for one encoding."""

    total: int
    differing: int  # counted where scale and zero point agree
    furthest: int  # largest difference between two such codes
    scale_error: float  # the largest relative error of a scale or zero point


def codes(x: Tensor, bits: int, *, centred: bool = True, device: str = "cpu") -> Codes:
    """Encode x [B, H, n, D] with both packages. fade_fast runs on `device`."""
    matrix = qr_rotation(x.shape[-1])
    mean = key_mean(x) if centred else None
    codec = RotatedCodec(bits, x.shape[-1], matrix)
    spec = codec.encode(x, mean)
    there = lambda t: None if t is None else t.to(device)  # noqa: E731
    ours = rotated.encode(there(x), None if mean is None else there(mean.half()), there(matrix.float()), bits)
    ours = rotated.Packed(*(None if t is None else t.cpu() for t in ours))
    return differing_codes(spec, ours, bits, x.shape[-1])


def codes_of_both(
    keys: Tensor, values: Tensor, bits: int, *, block: int | None = None, device: str = "cpu"
) -> tuple[Codes, Codes]:
    """Encode keys and values [B, H, n, D] together, as the cache encodes blocks and prompts.

    A prompt has one key mean per `block` tokens. Without `block` there is one mean.
    """
    dim, size = keys.shape[-1], block or keys.shape[2]
    means = key_mean(keys.unflatten(2, (-1, size))).squeeze(3)
    mean, matrix = means.repeat_interleave(size, dim=2), qr_rotation(dim)
    codec = RotatedCodec(bits, dim, matrix)
    there = [x.to(device) for x in (keys, values, means.half(), matrix.float())]
    ours = rotated.encode_both(*there, (bits, bits))
    ours = [rotated.Packed(*(None if t is None else t.cpu() for t in side)) for side in ours]
    spec = codec.encode(keys, mean), codec.encode(values, None)
    return tuple(differing_codes(*pair, bits, dim) for pair in zip(spec, ours))


def differing_codes(spec: Record, ours: rotated.Packed, bits: int, dim: int) -> Codes:
    """The differences between the codes of fade_fast and the specified codes.

    Uniform codes depend on scale and zero point, so they are compared where both agree. Lloyd-Max scales
    depend on the codes, so they are compared where all codes of a vector agree. If a Lloyd-Max scale is
    stored as 0, its codes have no meaning and are not compared.
    """
    a = quantize.unpack(spec.codes, bits, dim).int()
    b = quantize.unpack(ours.codes, bits, dim).int()
    pairs = [(spec.scale, ours.scale)] + ([] if spec.zero is None else [(spec.zero, ours.zero)])
    gap, counted = (a - b).abs(), torch.ones_like(spec.scale, dtype=torch.bool)
    same = spec.scale > 0
    if spec.zero is None:
        counted = ~(gap > 0).any(-1)
    else:
        same = torch.stack([u == v.double() for u, v in pairs]).all(0)
    errors = [((u - v.double()).abs() / u.abs().clamp_min(2.0**-14))[counted] for u, v in pairs]
    error = max(float(x.max()) if x.numel() else 0.0 for x in errors)
    gap = gap[same]
    return Codes(gap.numel(), int((gap > 0).sum()), int(gap.max()) if gap.numel() else 0, error)


def mirror(layer: KVLayer, spec: LayerCache) -> LayerCache:
    """A specification cache with exactly the codes of a layer of fade_fast, for the model of `spec`."""
    options = dict(moments=spec.moments) | spec.learned
    shape = len(spec.rows), layer.heads, spec.head_dim
    twin = LayerCache(layer.config, *shape, spec.rope, spec.terms, **options)
    twin.columns, twin.boundary = layer.length, layer.length - layer.recent
    positions = layer.token_positions.logical.cpu()
    exact = layer.dense_positions()[:, 0].tolist()
    keys = layer.dense["key"] if layer.dense.sink_keys is None else _original_keys(layer)
    dense = [x.double().cpu() for x in (keys, layer.dense["value"])]
    tiers = [_of_tier(layer.middle, t) for t in (layer.middle.tiers if layer.middle is not None else ())]
    for b in range(len(spec.rows)):
        row = Row(layer.heads)
        row.seen = int((positions[b] >= 0).sum())
        step_index = {int(p): i for i, p in enumerate(positions[b].tolist()) if p >= 0}
        for slot, p in enumerate(exact[b]):
            if p >= 0:
                row.tokens.append(Token(p, step_index[p], Tier.FP16, *(x[b, :, slot] for x in dense)))
        for tier, position, mean, sides in tiers:
            for slot, p in enumerate(position[b]):
                if p >= 0:
                    records = (_record(side, b, slot) for side in sides)
                    token_mean = mean[b, :, slot if mean.shape[2] > 1 else 0, None]
                    row.tokens.append(Token(p, step_index[p], tier, *records, token_mean))
        row.tokens.sort(key=lambda t: t.position)
        twin.rows[b] = [row]
    return twin


def _original_keys(layer: KVLayer) -> Tensor:
    """The original keys of uncompressed tokens. A row with evictions stores original sink keys apart."""
    keys = layer.dense["key"].clone()
    sinks = keys[:, :, : layer.dense.sink_keys.shape[2]]
    sinks.copy_(torch.where((layer.middle.evicted == 0)[..., None, None], sinks, layer.dense.sink_keys))
    return keys


def _of_tier(middle, tier) -> tuple[Tier, list, Tensor, list[rotated.Packed]]:
    """Positions, means and codes of a tier on the CPU. One copy serves all tokens."""
    count = tier.records.count
    sides = [
        [None if x is None else x.cpu() for x in unpack_record(tier.format.whole(tier.fields()), side)]
        for side in ("key", "value")
    ]
    mean = middle.mean(0, count).double().cpu() if count else torch.empty(0)
    return tier.tier, middle.position(tier)[:, 0].tolist(), mean, [rotated.Packed(*x) for x in sides]


def _record(side: rotated.Packed, b: int, slot: int) -> Record | Tensor:
    codes, scale, zero = (None if x is None else x[b, :, slot] for x in side)
    if scale is None:
        return codes
    return Record(codes, scale.double(), None if zero is None else zero.double())


@dataclass(frozen=True)
class Step:
    """The comparisons after one step of a trace."""

    output_error: float  # compared with the specification on the same codes
    same_tokens: bool  # whether positions, tiers and read positions agree with an independent run
    middle: int  # the number of compressed tokens in this attention
    score_error: float = 0.0  # scores of tokens after the sinks, compared with the independent run
    same_records: bool = True  # whether the bytes of each token that kept its tier are unchanged
    same_lengths: bool = True  # whether the lengths and the numbers of tokens per tier agree
    state: tuple = ()  # the state that `same_tokens` compares, for a digest
    stored_error: float = 0.0  # decoded tokens compared with the independent run; only in the last step
    #: Tokens of the middle that queries read where they chose, summed over KV heads: of fade_fast, and of the
    #: specification; and how many they would have read without a choice. None if nothing was chosen.
    chosen: tuple[int, int, int] | None = None


def policy_weights(seed: int = 0) -> dict[str, Tensor]:
    """Random weights for the network of the `learned` policy."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) / 2 for name, shape in scores.MLP.items()}


def calibrated(model, shape: Shape, seed: int = 0) -> Calibration:
    """The calibration of a one-layer model whose keys, queries and values are those of `Shape.random`."""
    generator = torch.Generator().manual_seed(seed)
    query, keys, values = (x[0] for x in shape.random(queries=160, generator=generator))
    rope = Rope(model.model.rotary_emb.inv_freq.double().cpu())
    output = model.model.layers[0].self_attn.o_proj.weight.detach().cpu()
    known = matched.measure(query, keys, values, output, rope, shape.head_dim**-0.5, n_sink=4)
    moments = matched.Moments(*(x.float() for x in known))
    return Calibration({0: moments}, {0: rope}, dict(fingerprint=fingerprint(model)))


#: A step of a trace: the number of new tokens per row, or a change of the stored tokens.
Change = int | tuple[str, int] | tuple[str, list[int]]


def trace(
    config: FadeConfig,
    shape: Shape,
    steps: list[Change],
    *,
    padding: tuple[int, ...] = (),
    holes: dict[int, int] | None = None,
    crops: dict[int, int] | None = None,
    order: dict[int, list[int]] | None = None,
    terms: dict | spec_attention.Terms | None = None,
    seed: int = 0,
) -> Iterator[Step]:
    """Run one layer of both packages over random tokens. `steps` has the number of tokens of each step.

    In the first step, the first `padding[b]` tokens of row b are padding. In step i, the first `holes[i]`
    tokens of row 0 are padding. Before step i the caches drop the newest `crops[i]` tokens of each row, then
    row j becomes the previous row `order[i][j]`. A step ("crop", n) drops the newest n tokens, or fewer if n
    is not allowed. ("reorder", rows) replaces the rows, ("select", rows) keeps these rows in this order, and
    ("repeat", n) repeats each row n times. ("copy",) and ("file",) go on with a deep copy of the fast cache,
    and with what a file of it holds. `terms` are the model's softcap, window and s_aux, if it has any.
    """
    by_network = config.eviction_policy == "learned"
    model = _model(shape).to(shape.device)
    module = model.model.layers[0].self_attn
    learned = dict(layer=0, layers=1, weights=policy_weights(seed)) if by_network else {}
    known = calibrated(model, shape, seed) if config.quant_backend == "matched" else None
    given = dict(policy_weights=learned.get("weights"), calibration=known)
    cache = fade_fast.create_cache(model, config, **given, verify=False)
    layer: KVLayer = cache.tiered[0]
    rope = Rope(model.model.rotary_emb.inv_freq.double().cpu())
    if isinstance(terms, dict):
        terms = spec_attention.Terms(shape.head_dim**-0.5, **terms)
    sizes = shape.batch, shape.heads, shape.head_dim
    moments = None if known is None else matched.Moments(*(x.double() for x in known.moments[0]))
    spec = LayerCache(config, *sizes, rope, terms, moments=moments, **learned)
    asked = {} if terms is None else _options(spec.terms, shape)
    generator = torch.Generator().manual_seed(seed)
    for i, count in enumerate(steps):
        if i in (crops or {}):
            cache.crop(-crops[i])
            spec.crop(crops[i])
        if i in (order or {}):
            cache.reorder_cache(torch.tensor(order[i], device=shape.device))
            spec.reorder(order[i])
        before = _records(layer)
        if isinstance(count, int):
            query, keys, values = shape.random(queries=count, generator=generator)
            valid = torch.ones(shape.batch, count, dtype=torch.bool)
            for b, n in enumerate(padding if i == 0 else ()):
                valid[b, :n] = False
            valid[0, : (holes or {}).get(i, 0)] = False
            padded = ~valid[:, None, :, None]
            # NaN in the padding shows whether a kernel reads padding.
            keys, values = (x.masked_fill(padded, torch.nan) for x in (keys, values))
            layer.compact()
            twin = mirror(layer, spec) if layer.length else spec
            attended, chosen = layer.middle.count if layer.has_middle else 0, None
            if layer.has_middle and layer.middle.chooses and count <= MAX_DECODE_TOKENS:
                chosen = [int(layer.middle.counted[READ]), 0, attended * count * shape.batch * shape.heads]
            exact = twin.step(query, keys, values, valid) if twin is not spec else None
            independent = spec.step(query, keys, values, valid)
            exact = independent if exact is None else exact
            causal = torch.ones(count, count, dtype=torch.bool).tril()
            if spec.terms.window is not None:
                causal = causal.triu(1 - spec.terms.window)
            mask = None if valid.all() and causal.sum() * 2 == count * (count + 1) else True
            mask = None if mask is None else causal & valid[:, None, None, :]
            query, keys, values = (x.to(shape.device) for x in (query, keys, values))
            layer.check(keys, values)
            arrival = PendingKV(cache.layers[0], keys, values)
            mask = None if mask is None else mask.to(shape.device)
            ours = attention(module, query, arrival, arrival, mask, **asked)[0].transpose(1, 2).cpu()
            real = valid[:, None, :, None].expand_as(exact)
            error = relative_error(ours[real], exact[real]) if real.any() else 0.0
            if chosen:
                chosen[:2] = int(layer.middle.counted[READ]) - chosen[0], twin.num_read
            layer.compact()
        else:
            error, attended, chosen = 0.0, 0, None
            if count[0] in ("copy", "file"):
                cache = copy.deepcopy(cache) if count[0] == "copy" else _through_a_file(cache, model)
                layer = cache.tiered[0]
            else:
                before = before if count[0] == "crop" else {}
                _change(cache, spec, *count)
            shape = replace(shape, batch=len(spec.rows))
        same = _same_tokens(layer, spec)
        yield Step(
            error,
            same,
            attended,
            _score_error(layer, spec) if same and layer.observer else 0.0,
            _kept_bytes(before, _records(layer)),
            _same_lengths(cache, spec),
            _state(layer),
            _stored_error(mirror(layer, spec), spec) if same and i == len(steps) - 1 else 0.0,
            tuple(chosen) if chosen else None,
        )


def _through_a_file(cache, model):
    """The cache that a file of `cache` holds."""
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder) / "cache")
        return fade_fast.load_cache(Path(folder) / "cache", model, verify=False)


def _options(terms: spec_attention.Terms, shape: Shape) -> dict:
    """The arguments of the attention function for `terms`."""
    s_aux = None if terms.s_aux is None else terms.s_aux.to(shape.dtype).to(shape.device)
    return dict(scaling=terms.scaling, softcap=terms.softcap, sliding_window=terms.window, s_aux=s_aux)


def _change(cache, spec: LayerCache, what: str, how) -> None:
    """Crop both caches, or change their rows."""
    if what == "crop":
        free = spec.columns - spec.boundary if spec.boundary > spec.config.n_sink else spec.columns
        n = min(how, free, spec.columns - 1)
        spec.crop(n)
        cache.crop(-n)
    elif what == "repeat":
        spec.reorder([row for row in range(len(spec.rows)) for _ in range(how)])
        cache.batch_repeat_interleave(how)
    else:
        spec.reorder(how)
        rows = torch.tensor(how, device=cache.token_positions.buffer.device)
        cache.reorder_cache(rows) if what == "reorder" else cache.batch_select_indices(rows)


def _records(layer: KVLayer) -> dict[tuple, tuple]:
    """The bytes of each compressed token. The keys are (row, position, tier)."""
    records = {}
    for tier in layer.middle.tiers if layer.is_initialized and layer.has_middle else ():
        name, position, mean, sides = _of_tier(layer.middle, tier)
        parts = [x for side in sides for x in side if x is not None]
        for b, slot in ((b, i) for b, row in enumerate(position) for i, p in enumerate(row) if p >= 0):
            token_mean = mean[b, :, slot if mean.shape[2] > 1 else 0]
            tensors = (*(x[b, :, slot] for x in parts), token_mean)
            records[b, position[b][slot], name] = tuple(x.numpy().tobytes() for x in tensors)
    return records


def _kept_bytes(before: dict, after: dict) -> bool:
    return all(before[key] == after[key] for key in before.keys() & after.keys())


def _same_lengths(cache, spec: LayerCache) -> bool:
    """Whether the length and the numbers of tokens per tier in `memory()` agree."""
    tokens = [t.tier for (row,) in spec.rows for t in row.tokens]
    evicted = sum(row.evicted for (row,) in spec.rows)
    counted = cache.memory().tokens
    middle = sum(n for name, n in counted.items() if name not in ("FP16", "EVICTED"))
    ours = (cache.get_seq_length(), counted["FP16"], middle, counted.get("EVICTED", 0))
    exact = sum(t == Tier.FP16 for t in tokens)
    return ours == (spec.columns, exact, len(tokens) - exact, evicted)


def _state(layer: KVLayer) -> tuple:
    """(row, tier, position, read position) of each compressed token, and positions of uncompressed tokens."""
    held = []
    for tier in layer.middle.tiers if layer.has_middle else ():
        position = layer.middle.position(tier)[:, 0]
        at = layer.middle.read_at(tier)[:, 0] if layer.config.contiguous else position
        rows = zip(position.tolist(), at.tolist())
        held += [(b, int(tier.tier), p, r) for b, row in enumerate(rows) for p, r in zip(*row) if p >= 0]
    return tuple(sorted(held)), layer.dense_positions().tolist()


def _stored_error(ours: LayerCache, spec: LayerCache) -> float:
    """The largest error over rows, keys and values, between the same tokens encoded by each package.

    In a small sample one code may be near a boundary. Such a code adds a step of two standard deviations,
    which is subtracted.
    """
    worst = 0.0
    for (our_row,), (spec_row,) in zip(ours.rows, spec.rows):
        for a, b in zip(ours.read(our_row), spec.read(spec_row)) if spec_row.tokens else ():
            worst = max(worst, relative_error(a, b) - 2 / b.numel() ** 0.5)
    return worst


def _own_scores(policy: str, known: Importance) -> Tensor:
    """The attention that each token of a row received, as a policy counts it: [H, n]."""
    if policy in ("h2o", "learned"):
        return known.mass / known.queries.clamp(min=1)
    if policy in ("snapkv", "tova"):
        return known.window[..., -1, :] if policy == "tova" else known.window.nanmean(-2)
    return known.ema


def _score_error(layer: KVLayer, spec: LayerCache) -> float:
    """The largest error over rows of the scores of each token. Both caches must have the same tokens."""
    buffers = [(layer.dense_positions(), layer.dense)]
    for tier in layer.middle.tiers if layer.has_middle else ():
        buffers.append((layer.middle.position(tier), tier.records))
    worst = 0.0
    for b, (row,) in enumerate(spec.rows):
        specified = _own_scores(layer.config.eviction_policy, row.importance)
        ours = torch.zeros_like(specified)
        slot = {t.position: i for i, t in enumerate(row.tokens)}
        for position, records in buffers:
            received = {name: records[name] for name in layer.observer.fields}
            scores = layer.observer.score(received)[b].cpu()
            for i, p in enumerate(position[b, 0].tolist()):
                if p >= layer.config.n_sink:
                    ours[:, slot[p]] = scores[:, i]
        chosen = torch.tensor([t.position >= layer.config.n_sink for t in row.tokens], dtype=torch.bool)
        if chosen.any():
            ours, specified = ours[:, chosen], specified[:, chosen]
            if not torch.equal(ours.isnan(), specified.isnan()):
                return float("inf")
            worst = max(worst, relative_error(ours.nan_to_num(), specified.nan_to_num()))
    return worst


def _same_tokens(layer: KVLayer, spec: LayerCache) -> bool:
    """Whether both caches have the same tokens in the same tiers, at the same read positions."""
    for b, (row,) in enumerate(spec.rows):
        specified = {
            (t.position, t.tier, at) for t, at in zip(row.tokens, spec.read_at(row)) if t.tier != Tier.FP16
        }
        ours = set()
        for tier in layer.middle.tiers if layer.has_middle else ():
            position = layer.middle.position(tier)[b, 0].tolist()
            at = layer.middle.read_at(tier)[b, 0].tolist() if layer.config.contiguous else position
            ours |= {(p, tier.tier, r) for p, r in zip(position, at) if p >= 0}
        exact = {p for p in layer.dense_positions()[b, 0].tolist() if p >= 0}
        if ours != specified or exact != {t.position for t in row.tokens if t.tier == Tier.FP16}:
            return False
    return True


def _model(shape: Shape) -> LlamaForCausalLM:
    heads = shape.heads * shape.group
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=heads * shape.head_dim,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_dim,
    )
    return LlamaForCausalLM(config).to(shape.dtype).eval()
