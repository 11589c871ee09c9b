"""Predict the effect of a tiered cache on a model, before it is attached and before tokens are generated."""

import os
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fade_ref.config import FadeConfig

from ..cache.layer import KVLayer
from ..saved.memory import storage_bytes
from ..saved.units import compared, grouped, size
from .attach import verified
from .cache import TieredKVCache
from .calibration import Calibration
from .models import attention_modules, unwrapped
from .versions import untested
from .widths import settled


@dataclass(frozen=True)
class LayerCheck:
    """One layer of a model's cache.

    Attributes:
        index: index of the layer in the cache.
        tiered: whether the layer is compressed.
        text: the codec of the layer, or the reason why it is not compressed.
    """

    index: int
    tiered: bool
    text: str


@dataclass(frozen=True)
class ModelCheck:
    """Predicted result of `create_cache(model, config)`. `print` shows it as text.

    Attributes:
        model: class name of the model.
        refused: the reason why the model gets no cache; empty if it gets one.
        untried: the reason why the model was not compared with its own attention; empty if it was compared.
        layers: one `LayerCheck` per layer.
        decode: "packed" if attention reads the compressed tokens directly, else "dense".
        length: tokens per row that the sizes below are for.
        dense, packed: bytes of the tiered layers at batch size 1, uncompressed and compressed.
        tables: bytes of tables that all caches of the model share, and that `packed` leaves out.
        widths: how the widths of the layers were chosen; empty if they are those of the configuration.
    """

    model: str
    refused: str = ""
    untried: str = ""
    layers: tuple[LayerCheck, ...] = ()
    decode: str = "dense"
    length: int = 0
    dense: int = 0
    packed: int = 0
    tables: int = 0
    widths: str = ""

    @property
    def served(self) -> bool:
        """Whether a cache can be made."""
        return not self.refused

    def __str__(self) -> str:
        if self.refused:
            return "\n".join(x for x in (f"{self.model}: refused: {self.refused}", untested()) if x)
        tiered = sum(layer.tiered for layer in self.layers)
        how = {
            "packed": "decoding reads compressed tokens as they are",
            "dense": "decoding reads dense keys and values: memory is saved between steps, time is not",
        }[self.decode]
        lines = [
            f"{self.model}: {tiered} of {len(self.layers)} layers are tiered; {how}",
            f"at {self.length:,} tokens they need {size(self.packed)} instead of {size(self.dense)}: "
            f"{compared(self.dense, self.packed) or 'nothing to compress'}",
        ]
        if self.tables > self.packed // 64:
            lines.append(f"not counted: {size(self.tables)} of tables that all caches of the model share")
        lines += [f"widths: {self.widths}"] if self.widths else []
        lines += [f"not verified: {self.untried}"] if self.untried else []
        lines += [text] if (text := untested()) else []
        return "\n".join(lines + grouped((layer.index, layer.text) for layer in self.layers))


def check_model(
    model: PreTrainedModel | PreTrainedConfig,
    config: str | FadeConfig = "safe",
    *,
    length: int = 8192,
    calibration: str | os.PathLike | Calibration | None = None,
    calibrate: bool = False,
) -> ModelCheck:
    """Predict the result of `create_cache(model, config)`. The model is left unchanged.

    The model runs over 72 random tokens, as in `attach`. So both functions refuse the same models.

    Args:
        model: a decoder of transformers, or its configuration. From a configuration, a model with random
            weights is built on the CPU, which is practical for small models only.
        config: the name of a preset, or a `FadeConfig`.
        length: tokens per row for the memory prediction.
        calibration: as in `create_cache`.
        calibrate: measure the loss of the widths again, although the result is known. Only for a
            configuration with a `loss_bound`, such as `safe`.

    Raises:
        ValueError: an unknown preset, a configuration without a decoder class, or `length` < 1.
        TypeError: `model` or `config` has another type.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length={length}: an integer of at least 1 is allowed")
    config = FadeConfig.preset(config) if isinstance(config, str) else config
    if not isinstance(config, FadeConfig):
        raise TypeError(
            f"config must be the name of a preset or a FadeConfig, not {type(config).__name__}: pass 'safe', "
            "for example"
        )
    if isinstance(model, PreTrainedConfig):
        model = AutoModelForCausalLM.from_config(model)
    model = unwrapped(model)
    name = type(model).__name__
    try:
        config, calibration, choice = settled(model, config, calibration, again=calibrate)
        cache = TieredKVCache(model, config, calibration=calibration)
        verification = verified(model)
        if verification.refused:
            raise ValueError(verification.refused)
        modules, sizes = attention_modules(model), {}
        for layer in cache.tiered:
            i = layer.layer_idx
            shape = verification.shapes.get(i)
            if shape:
                heads, dim = shape.heads, shape.key_dim
            else:
                heads, dim = _shape(modules.get(i), cache.model_config)
            sizes[i] = _bytes(layer, heads, dim, model.dtype, length)
    except ValueError as error:
        return ModelCheck(name, refused=str(error))
    layers = tuple(
        LayerCheck(
            i, i in sizes, _codec(config, config.bits(i, len(cache.layers))) if i in sizes else _reason(layer)
        )
        for i, layer in enumerate(cache.layers)
    )
    return ModelCheck(
        name,
        untried=verification.untried,
        layers=layers,
        decode="packed" if model._can_set_attn_implementation() else "dense",
        length=length,
        dense=sum(dense for dense, _ in sizes.values()),
        packed=sum(packed for _, packed in sizes.values()),
        tables=storage_bytes([x for layer in cache.tiered for x in layer.format.tensors()]),
        widths="" if choice is None else str(choice),
    )


def _codec(config: FadeConfig, bits: tuple[int, int]) -> str:
    if not config.compresses:
        return "tiered, but every token stays in the model's dtype (recent_window=None)"
    if bits[0] == 16:
        return "tiered, but every token stays in the model's dtype (layer_bits)"
    text = f"tiered: keys at {bits[0]} bits, values at {bits[1]}"
    if config.select is not None:
        most = (
            f"{config.tokens_selected} tokens" if isinstance(config.select, int) else f"{config.select:.0%}"
        )
        where = "" if config.cold is None else ", the rest in host memory"
        return f"{text}, {config.quant_backend}; a query reads {most} of the middle{where}"
    if not config.evicts:
        return f"{text}, {config.quant_backend}"
    kept = config.int4_budget + config.int2_budget
    return f"{text}, {config.quant_backend}; of the middle at most {kept} tokens are kept"


def _reason(layer) -> str:
    if getattr(layer, "is_sliding", False):
        return "kept as it is: a sliding window bounds it already"
    if getattr(layer, "is_linear", False) or "Linear" in type(layer).__name__:
        return "kept as it is: linear attention has a state of fixed size"
    return f"kept as it is: {type(layer).__name__} of transformers"


def _shape(attention, config) -> tuple[int, int]:
    """(KV heads, head_dim) of a layer, from the configuration, for a model that cannot be run."""
    heads = config.num_attention_heads
    names = ("head_dim", "head_size")
    dim = next((getattr(attention, n) for n in names if isinstance(getattr(attention, n, None), int)), None)
    dim = dim or config.hidden_size // heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1, dim
    return getattr(config, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None) or heads, dim


def _bytes(layer: KVLayer, heads: int, dim: int, dtype: torch.dtype, length: int) -> tuple[int, int]:
    """(dense, packed) bytes of a layer at a length, from a few blocks that are really encoded."""
    config, token = layer.config, heads * 2 * dim * dtype.itemsize
    dense = length * token
    if not layer.compresses:
        return dense, dense
    due = max(0, length - config.n_sink - config.recent_window) // config.block_size * config.block_size
    zeros = torch.zeros(1, heads, config.block_size, dim, dtype=dtype)
    if layer.format.awaits_tables:
        layer.format = layer.format.with_blank_tables(heads, dim)
    layer.allocate(zeros)
    layer.token_positions.extend(0, None, 1, config.block_size, zeros.device)
    layer.middle.demote(zeros, zeros, 0, config.block_size, layer.new_stats(config.block_size))
    records = [tier.records.record_bytes for tier in layer.middle.tiers]
    means = layer.middle.means
    mean = means["mean"].nbytes if means.count else 0
    layer.reset()
    layer.token_positions.clear()
    kept = [due]
    if config.int4_budget is not None:
        kept[0] = min(due, config.int4_budget)
        rest = due - kept[0]
        kept.append(rest if config.int2_budget is None else min(rest, config.int2_budget))
    packed = (length - due) * token + sum(n * size for n, size in zip(kept, records))
    if not config.relocatable:
        mean *= due // config.block_size
    return dense, packed + (mean if due else 0)
