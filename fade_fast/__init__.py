"""A KV cache in tiers for Hugging Face models: several times smaller, in plain PyTorch.

>>> cache = fade_fast.create_cache(model, "safe")                       # doctest: +SKIP
>>> model.generate(**inputs, cache=cache)                               # doctest: +SKIP
"""

from fade_ref.config import FadeConfig

from . import deprecated
from .cache.eviction import EvictionWarning
from .hf import loading
from .hf.attach import attach, detach
from .hf.cache import Memory, TieredKVCache
from .hf.check import LayerCheck, ModelCheck, check_model
from .hf.create import create_cache, load_cache
from .hf.prompts import common_prefix
from .hf.stream import Summary, stream

__version__ = "0.1.0"
__all__ = [
    "EvictionWarning",
    "FadeConfig",
    "LayerCheck",
    "Memory",
    "ModelCheck",
    "Summary",
    "TieredKVCache",
    "attach",
    "check_model",
    "common_prefix",
    "create_cache",
    "detach",
    "load_cache",
    "loading",
    "stream",
]

deprecated.install()
