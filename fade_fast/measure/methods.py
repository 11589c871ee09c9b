"""Named ways to keep a cache: our presets and formats, policies at equal bytes, and caches to compare with.

A name is one of `NAMES`, or one of ours followed by changed fields of `FadeConfig`, as in
"int4:recent_window=0:block_size=32".
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, QuantizedCache

import fade_fast
from fade_fast.cache.layer import MAX_DECODE_TOKENS
from fade_fast.cache.positions import PAD
from fade_fast.compile import compiled as compiling
from fade_fast.hf.cache import TieredKVCache
from fade_fast.hf.layer import TieredLayer
from fade_fast.hf.models import text_config
from fade_fast.saved.memory import storage_bytes
from fade_ref.config import FadeConfig

from .names import POLICIES, QUANTIZED, changed_fields, check, config_of, is_config, least

SHARE = 4  # policies keep a quarter of the tokens

EXACT, COMPRESSES, EVICTS = "exact", "compresses", "evicts"


class Unavailable(RuntimeError):
    """A method cannot run here. Its row shows the reason."""


@dataclass(frozen=True)
class Method:
    """A way to keep a cache.

    Attributes:
        name: the name in tables.
        does: `EXACT` keeps every token unchanged. `COMPRESSES` compresses some, and may evict others.
            `EVICTS` keeps some unchanged and drops the rest.
        make: `(model, length)` to an empty cache for texts of `length` tokens, attached if it is ours.
        rowwise: whether the rows of a batch do not influence each other.
        most: most tokens of a step in which queries choose what they read; None where they read everything.
            Longer steps are then fed in parts.
        config: of ours, where it has the form of a preset; else None.
    """

    name: str
    does: str
    make: Callable[[PreTrainedModel, int], Cache]
    rowwise: bool = True
    most: int | None = None
    config: FadeConfig | None = None

    def least(self, chunk: int = 1) -> int:
        """Fewest tokens of a text, fed in chunks, of which a step reads some compressed, and some not at all
        where queries choose. 1 where that is not known before the run.
        """
        return least(self.name, chunk)

    @property
    def stored(self) -> FadeConfig | None:
        """What a prompt leaves in the cache. Methods with one of these differ only in what queries read."""
        if self.config is None or self.config.select is None:
            return self.config
        return replace(self.config, select=self.config.select_page, select_max=None, resident=None)

    def __call__(self, model: PreTrainedModel, length: int) -> Cache:
        """An empty cache. Raises `Unavailable` if something that it needs is missing."""
        fade_fast.detach(model)
        return self.make(model, length)


def method(name: str, weights=None) -> Method:
    """The method called `name`.

    Args:
        name: see `NAMES` and the module.
        weights: for the policy "learned", a safetensors file; None: the shipped ones.

    Raises `ValueError` if no method has this name, or a field cannot have such a value.
    """
    check(name)
    base, *changes = name.split(":")
    changed = changed_fields(name, changes)
    if base in POLICIES:
        return _policy(name, base, changed, weights)
    if base == "streaming":
        return Method(name, EVICTS, lambda model, length: _ours(model, streaming(model, length, changed)))
    if is_config(base):
        config = replace(config_of(base), **changed)
        does = COMPRESSES if config.compresses else EXACT
        most = None if config.select is None else MAX_DECODE_TOKENS
        return Method(name, does, lambda model, length: _ours(model, config), most=most, config=config)
    if base == "dynamic":
        return Method(name, EXACT, lambda model, length: DynamicCache(config=model.config))
    # Groups of HQQ run across rows, so each row is measured by itself.
    return Method(name, COMPRESSES, lambda model, length: _quantized(model, *QUANTIZED[base]), rowwise=False)


def by_prompt(methods: list[Method]) -> list[list[Method]]:
    """The methods in groups. After a prompt, the caches of a group hold the same; see `read_by`."""
    groups: dict = {}
    for m in methods:
        chooses = m.config is not None and m.config.select is not None
        groups.setdefault(m.stored if chooses else m.name, []).append(m)
    return list(groups.values())


def read_by(m: Method, cache: Cache) -> Cache:
    """A copy of the cache of a prompt, which queries read as `m` says; `m` is of the group of the cache."""
    twin = copy.deepcopy(cache)
    twin.fade_config = m.config
    for layer in twin.tiered:
        layer.config = m.config
        if layer.middle is not None:
            layer.middle.choose_by(m.config)
    return twin


def made_for(model: PreTrainedModel, m: Method, length: int) -> Cache:
    """An empty cache of a method. If it is ours, it was made for `length` tokens and does not grow.

    Raises `Unavailable` if something that it needs is missing.
    """
    cache = m(model, length)
    if not isinstance(cache, TieredKVCache):
        return cache
    weights = next((x.observer.weights for x in cache.tiered if hasattr(x.observer, "weights")), None)
    return fade_fast.create_cache(model, cache.fade_config, max_length=length, policy_weights=weights)


def _ours(model, config: FadeConfig, weights=None) -> TieredKVCache:
    return fade_fast.create_cache(model, config, policy_weights=weights)


def _quantized(model, backend: str, bits: int) -> Cache:
    try:
        return QuantizedCache(backend, model.config, nbits=bits)
    except ImportError as error:
        package = {"quanto": "optimum-quanto"}.get(backend, backend)
        raise Unavailable(f"{backend} is not installed: pip install {package}") from error
    except ValueError as error:  # a model with sliding or linear layers
        raise Unavailable(f"refused by transformers: {error}") from error


# -- equal bytes


def _policy(name: str, policy: str, changed: dict, weights) -> Method:
    def make(model, length: int) -> TieredKVCache:
        try:
            config = at_equal_bytes(model, policy, length, changed, weights)
            return _ours(model, config, weights if policy == "learned" else None)
        except ValueError as error:
            if policy == "learned" and weights is None:
                raise Unavailable("no weights are shipped, and none were given") from error
            raise

    return Method(name, COMPRESSES, make)


def at_equal_bytes(model, policy: str, length: int, changed: dict, weights=None) -> FadeConfig:
    """A quarter of `length` tokens. All but sinks and recent ones are INT4 if `policy` is "position".

    Other policies store something with each token, so they get fewer tokens for the same bytes. Raises
    `Unavailable` if not even the uncompressed tokens fit.
    """
    base = replace(FadeConfig(int4_budget=1, eviction_policy=policy), **changed)
    plain = replace(base, eviction_policy="position")
    most = base.n_sink + base.recent_window + base.block_size  # uncompressed tokens
    budget = length // SHARE - most
    if "int4_budget" in changed:
        return base
    exact, middle = record_bytes(model, plain)
    total = most * exact + budget * middle
    exact, middle = record_bytes(model, base, weights if policy == "learned" else None)
    budget = (total - most * exact) // middle
    if budget < 1:
        raise Unavailable(f"{policy}: a quarter of {length} tokens leaves no room beside {most} recent ones")
    return replace(base, int4_budget=budget)


def streaming(model, length: int, changed: dict) -> FadeConfig:
    """StreamingLLM: uncompressed sinks and recent tokens, in as many bytes as "position" takes."""
    if "recent_window" in changed:
        return replace(FadeConfig(int4_budget=0), **changed)
    config = at_equal_bytes(model, "position", length, {})
    exact, middle = record_bytes(model, config)
    most = config.n_sink + config.recent_window + config.block_size
    tokens = (most * exact + config.int4_budget * middle) // exact
    recent = tokens - config.n_sink - config.block_size
    return replace(FadeConfig(recent_window=recent, int4_budget=0), **changed)


def record_bytes(model, config: FadeConfig, weights=None) -> tuple[int, int]:
    """Bytes of one token of a bfloat16 model in one layer: uncompressed, and in the first middle tier."""
    cache = _ours(model, config, weights)
    layer = cache.tiered[0]
    heads, dim = key_shape(model, layer.layer_idx)
    one = torch.zeros(1, heads, 1, dim, dtype=torch.bfloat16, device=model.device)
    layer.allocate(one)
    fade_fast.detach(model)
    return layer.dense.record_bytes, layer.middle.tiers[0].records.record_bytes


def key_shape(model, index: int) -> tuple[int, int]:
    """KV heads and head_dim of a layer: from its key projection, or else from the configuration."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) == index and hasattr(module, "k_proj"):
            return module.k_proj.weight.shape[0] // module.head_dim, module.head_dim
    config = text_config(model)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads, dim


# -- how kernels run


@contextmanager
def eager(wanted: bool = True) -> Iterator[None]:
    """Run kernels without compilation, also on a GPU, if `wanted`.

    They compute the same (`python -m parity`), and a run of many shapes spends no minutes on compilation.
    """
    held = set(compiling.COMPILED_ON)
    if wanted:
        compiling.COMPILED_ON.clear()
    try:
        yield
    finally:
        compiling.COMPILED_ON.update(held)


# -- what a cache holds


def compressed_tokens(cache: Cache) -> torch.Tensor | float:
    """Tokens per row that the next step will read compressed, mean over rows and layers.

    For our layers it is a tensor on their device, so counting makes no step wait. Due blocks are demoted
    first, as in the next step.
    """
    if isinstance(cache, TieredKVCache):
        found = [torch.zeros((), device=cache.device)]
        for layer in cache.tiered:
            layer.compact()
            held = layer.held_tiers()
            found += [(layer.middle.position(tier) != PAD).sum(-1).float().mean() for tier in held]
        return torch.stack(found).sum() / len(cache.tiered)
    found = [0]
    for layer in cache.layers:
        if hasattr(layer, "_quantized_keys"):
            found.append(layer.get_seq_length() - (layer.keys.shape[-2] if layer.keys.dim() == 4 else 0))
    return sum(found) / max(1, len(found) - 1)


def chosen_tokens(cache: TieredKVCache) -> float | None:
    """Tokens of the middle that a query and KV head read where it chose, mean.

    None if no query chose, or if those that chose read as many as there were.
    """
    selected = cache.memory().selected
    return selected.read if selected and selected.read < selected.held else None


def evicted_tokens(cache: Cache) -> float:
    """Tokens per row that are gone, mean over rows and layers."""
    if not isinstance(cache, TieredKVCache):
        return 0.0
    return cache.memory().tokens.get("EVICTED", 0) / cache.token_positions.batch


def held_tensors(cache: Cache) -> list[torch.Tensor]:
    """Every tensor that a cache of any class holds, including those inside quantized ones."""
    found = cache.token_positions.tensors() if isinstance(cache, TieredKVCache) else []
    for layer in cache.layers:
        found += layer.kv.tensors() if isinstance(layer, TieredLayer) else list(_inside(vars(layer)))
    return found


def _inside(x):
    if isinstance(x, torch.Tensor) and hasattr(x, "__tensor_flatten__"):
        names, _ = x.__tensor_flatten__()
        yield from _inside([getattr(x, name) for name in names])
    elif isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, dict):
        yield from _inside(list(x.values()))
    elif isinstance(x, list | tuple):
        for part in x:
            yield from _inside(part)


def allocated(cache: Cache) -> int:
    """Bytes of every distinct storage that a cache holds, whatever the cache reports."""
    return storage_bytes(held_tensors(cache))
