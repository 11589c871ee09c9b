"""What a cache of a model would hold, from the model's configuration alone.

Nothing is estimated by a formula: the buffers of a cache are made for the asked length on torch's meta
device, where tensors have shapes and no memory, by the code that makes them for a real cache. Their bytes are
those that `cache.memory()` reports for a cache made with `max_length` (tests/hf/test_capacity.py).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from fade_ref.config import FadeConfig

from ..cache.layer import KVLayer
from ..cache.positions import TokenPositions
from ..compile import compiled
from ..formats.matched import MatchedFormat, MatchedTier
from ..formats.rotated import RotatedFormat, RotatedTier, tier_widths
from ..formats.split import tier_class
from ..kernels import rotated
from ..kernels.matched import Matrices
from ..policies import plan, scores
from .foreign import SLIDING
from .models import CACHE_NAME, attention_modules, text_config

META = torch.device("meta")


@dataclass(frozen=True)
class LayerShape:
    """The cache of one layer.

    Attributes:
        heads, dim: KV heads and channels of a head. Both are 0 in a layer without keys and values.
        tiered: whether the layer attends to all tokens, so that its tokens go into tiers.
        window: tokens of a sliding window; None elsewhere.
        state: bytes of a row that do not depend on its length: states of linear attention, counters.
    """

    heads: int = 0
    dim: int = 0
    tiered: bool = False
    window: int | None = None
    state: int = 0


@dataclass(frozen=True)
class Architecture:
    """What a plan needs to know of a model.

    Attributes:
        name: name of the model class.
        layers: the caches of its layers.
        dtype: of weights, keys and values.
        weights: bytes of the weights in that dtype.
        dispatches: whether the model lets its attention be replaced. If not, no token can be dropped.
        longest: positions that the model was trained for; None if the configuration does not say.
    """

    name: str
    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    weights: int
    dispatches: bool
    longest: int | None

    def refusal(self, config: FadeConfig) -> str | None:
        """Why `create_cache` would refuse `config` for this model; None if it would not."""
        if config.eviction_policy not in plan.SUPPORTED or config.quant_backend not in ("rotated", "matched"):
            return "not served inside generate()"
        if (config.evicts or config.select is not None) and not self.dispatches:
            return f"{self.name} does not let its attention be replaced"
        return None


@dataclass(frozen=True)
class Size:
    """Bytes of a cache: those on the model's device, and those in host memory (`cold="host"`).

    `tables` is the part of `device` that all caches of a model share.
    """

    device: int
    host: int = 0
    tables: int = 0


def architecture(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> Architecture:
    """What a model is made of. It is built without memory for its weights.

    Args:
        config: the configuration of the model, or of a model of which it is a part.
        dtype: of weights, keys and values.

    Raises `ValueError` if transformers cannot build a decoder from the configuration, or if the model keeps
    no keys and values that can be tiered.
    """
    try:
        with META:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"transformers builds no decoder from this configuration: {error}; name a decoder that it knows"
        ) from error
    text = text_config(model.eval())
    parts = [*model.parameters(), *model.buffers()]
    return Architecture(
        type(model).__name__,
        tuple(_layers(model, text)),
        dtype,
        sum({id(x): x.nbytes for x in parts}.values()),
        model._can_set_attn_implementation(),
        getattr(text, "max_position_embeddings", None),
    )


def _layers(model, text) -> Iterator[LayerShape]:
    """The caches of the layers, from a step of two tokens on the meta device."""
    cache = DynamicCache(config=text)
    ids = torch.ones(1, 2, dtype=torch.int64, device=META)
    # Some models look at values, which tensors without memory do not have: their modules tell the shapes.
    with contextlib.suppress(Exception), torch.no_grad():
        model(input_ids=ids, **{CACHE_NAME: cache}, use_cache=True)
    modules = attention_modules(model)
    for index, layer in enumerate(cache.layers):
        keys = getattr(layer, "keys", None)
        full, sliding = type(layer) is DynamicLayer, type(layer) in SLIDING
        others = {
            n: x for n, x in vars(layer).items() if isinstance(x, Tensor) and n not in ("keys", "values")
        }
        state = sum(x.nbytes for x in others.values())
        if not full and not sliding:
            yield LayerShape(state=state)
            continue
        shape = (keys.shape[1], keys.shape[3]) if isinstance(keys, Tensor) and keys.dim() == 4 else None
        heads, dim = shape or _shape_of(modules.get(index), text)
        yield LayerShape(heads, dim, full, layer.sliding_window if sliding else None, 0 if full else state)


def _shape_of(module, text) -> tuple[int, int]:
    """KV heads and head_dim of a layer: from its key projection, or else from the configuration."""
    if hasattr(module, "k_proj") and hasattr(module, "head_dim"):
        return module.k_proj.out_features // module.head_dim, module.head_dim
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads, dim


# -- bytes


def uncompressed(model: Architecture, length: int, batch: int = 1) -> int:
    """Bytes that `DynamicCache` of a `model` holds for `length` tokens in each of `batch` rows."""
    return sum(_untiered(shape, model.dtype, length, batch, on_gpu=False) for shape in model.layers)


def size(model: Architecture, config: FadeConfig, length: int, batch: int = 1, on_gpu: bool = True) -> Size:
    """Bytes of `create_cache(model, config, max_length=length)` that holds `length` tokens in `batch` rows.

    A `loss_bound` is left out: the widths that `safe` chooses depend on the weights, so all layers have
    those of the configuration. `on_gpu` counts the buffers of a GPU, which have some slots to spare. Where
    the attention cannot be replaced, a preset has the codec that needs no calibration.
    """
    config = replace(config, loss_bound=None)
    if config.quant_backend == "matched" and not model.dispatches:
        config = replace(config, quant_backend="rotated")
    count = len(model.layers)
    config = config.resolved(count, [i for i, shape in enumerate(model.layers) if shape.tiered])
    device = host = matrices = 0
    tables: dict[int, int] = {}  # that layers share, by head_dim; -1: weights of a policy
    for index, shape in enumerate(model.layers):
        if not shape.tiered:
            device += _untiered(shape, model.dtype, length, batch, on_gpu)
            continue
        widths = tuple(tier_widths(config, config.bits(index, count)))
        found = _tiered(config, widths, shape.heads, shape.dim, model.dtype, length, batch, on_gpu)
        device, host = device + found[0], host + found[1]
        if config.quant_backend == "matched":
            matrices += found[2]  # each layer has its own
        else:
            tables[shape.dim] = max(tables.get(shape.dim, 0), found[2])
        if on_gpu:  # where each layer copies the weights of a policy
            device += found[3]
        else:
            tables[-1] = found[3]
    # Positions of the tokens, which all layers share: see `TokenPositions.reserve`.
    spare = length if on_gpu else length // 64
    positions = -(-(length + spare) // 256) * 256 * batch * torch.int32.itemsize
    shared = matrices + sum(tables.values())
    return Size(device + shared + positions, host, shared)


def _untiered(shape: LayerShape, dtype: torch.dtype, length: int, batch: int, on_gpu: bool) -> int:
    """Bytes of a layer that keeps its tokens as they come."""
    window = shape.window
    slots = length if window is None else window if on_gpu else min(length, window)
    return batch * (2 * shape.heads * shape.dim * slots * dtype.itemsize + shape.state)


@functools.lru_cache(maxsize=4096)
def _tiered(
    config: FadeConfig,
    widths: tuple[tuple[int, int], ...],
    heads: int,
    dim: int,
    dtype: torch.dtype,
    length: int,
    batch: int,
    on_gpu: bool,
) -> tuple[int, int, int, int]:
    """Bytes of a tiered layer on the device, in host memory, of its tables, and of its policy's weights."""
    format = _format(config, list(widths), heads, dim)
    weights = scores.load(scores.SHIPPED) if config.eviction_policy == "learned" else None
    observer = scores.observer(config, weights) if format.compresses else None
    layer = KVLayer(config, format, TokenPositions(), None, 0, length, observer)
    with _as_on_a_gpu() if on_gpu else contextlib.nullcontext():
        layer.allocate(torch.empty(batch, heads, length, dim, dtype=dtype, device=META))
    tables, policy = format.tensors(), observer.tensors() if weights and observer else []
    apart = {id(x) for x in [*layer.host_tensors(), *tables, *policy]}
    device = {id(x): x.nbytes for x in layer.tensors() if id(x) not in apart}
    leaving = config.compresses and length >= config.n_sink + (config.recent_window or 0) + config.block_size
    if config.relocatable and layer.middle is not None and leaving:  # made by the first demotion
        device["counts"] = 2 * batch * torch.int32.itemsize
        if config.contiguous:
            device["sinks"] = batch * heads * config.n_sink * dim * dtype.itemsize
    host = sum(x.nbytes for x in layer.host_tensors())
    return sum(device.values()), host, sum(x.nbytes for x in tables), sum(x.nbytes for x in policy)


def _format(config: FadeConfig, widths: list[tuple[int, int]], heads: int, dim: int):
    """The format of a layer, its tables without memory."""
    split = config.select is not None
    if config.quant_backend == "matched":
        one = lambda rows: torch.empty(heads, rows, dim, dtype=torch.float16, device=META)  # noqa: E731
        side = Matrices(one(dim), one(dim + 1), one(dim))
        mean = torch.empty(heads, dim, dtype=torch.float32, device=META)
        tables = mean, side, Matrices(*(torch.empty_like(x) for x in side))
        # Where survivors move, one mean serves all tokens, and it takes no buffer that grows.
        rope = None if config.relocatable else (lambda: None)
        tier = tier_class("matched", config.index_bits) if split else MatchedTier
        return MatchedFormat(widths, lambda device: tables, rope, tier)
    table = rotated.with_sum(rotated.rotation(dim)).float().to(META)
    tier = tier_class("rotated", config.index_bits) if split else RotatedTier
    return RotatedFormat(widths, lambda dim, device: table, tier)


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Buffers on the meta device get the sizes that they have on a GPU."""
    compiled.COMPILED_ON.add(META.type)
    try:
        yield
    finally:
        compiled.COMPILED_ON.discard(META.type)


# -- what fits


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 0 to `most` that fits, if every smaller one does."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def most_tokens(bytes_of: Callable[[int], int], room: int, step: int = 64, most: int = 1 << 27) -> int:
    """Most tokens of one row that fit into `room` bytes, in multiples of `step`; `most` means no limit.

    `bytes_of` gives the bytes of a cache of so many tokens. It raises `ValueError` where a cache cannot hold
    so many.
    """

    def fits(n: int) -> bool:
        try:
            return n == 0 or bytes_of(n * step) <= room
        except ValueError:
            return False

    return largest(fits, most // step) * step


def most_rows(bytes_of: Callable[[int], int], room: int, most: int = 1 << 16) -> int:
    """Most rows, at most `most`, that fit into `room` bytes. `bytes_of` gives the bytes of so many rows."""
    return largest(lambda n: n == 0 or bytes_of(n) <= room, most)
