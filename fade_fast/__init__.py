"""A KV cache in tiers for Hugging Face models: several times smaller, in plain PyTorch.

>>> cache = fade_fast.create_cache(model, "safe")                       # doctest: +SKIP
>>> model.generate(**inputs, cache=cache)                               # doctest: +SKIP

The public names are imported when they are first used, so that `import fade_fast` loads neither torch nor
transformers.
"""

import importlib
import sys
from typing import TYPE_CHECKING

from . import deprecated

if TYPE_CHECKING:
    from fade_ref.config import FadeConfig

    from .cache.eviction import EvictionWarning
    from .hf import loading
    from .hf.attach import detach
    from .hf.cache import Memory, TieredKVCache
    from .hf.check import LayerCheck, ModelCheck, check_model
    from .hf.create import attach, create_cache, load_cache
    from .hf.prompts import common_prefix
    from .hf.stream import Summary, stream
    from .hf.warm import Warmed, warm
else:  # type checkers know all names

    def __getattr__(name: str):
        if name not in _HOMES:
            here = sys.modules[__name__]  # Python then says which name may have been meant
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}: fade_fast.__all__ lists the public names",
                name=name, obj=here,
            )  # fmt: skip
        home = _HOMES[name]
        if name == "loading":
            found = importlib.import_module(f"{home}.{name}")
        else:
            found = getattr(importlib.import_module(home), name)
        globals()[name] = found
        return found


__version__ = "0.1.0"
__all__ = [
    "EvictionWarning",
    "FadeConfig",
    "LayerCheck",
    "Memory",
    "ModelCheck",
    "Summary",
    "TieredKVCache",
    "Warmed",
    "attach",
    "check_model",
    "common_prefix",
    "create_cache",
    "detach",
    "load_cache",
    "loading",
    "stream",
    "warm",
]

#: The module of each public name. Type checkers read the imports above; a test compares both.
_HOMES = {
    "EvictionWarning": "fade_fast.cache.eviction",
    "FadeConfig": "fade_ref.config",
    "LayerCheck": "fade_fast.hf.check",
    "Memory": "fade_fast.hf.cache",
    "ModelCheck": "fade_fast.hf.check",
    "Summary": "fade_fast.hf.stream",
    "TieredKVCache": "fade_fast.hf.cache",
    "Warmed": "fade_fast.hf.warm",
    "attach": "fade_fast.hf.create",
    "check_model": "fade_fast.hf.check",
    "common_prefix": "fade_fast.hf.prompts",
    "create_cache": "fade_fast.hf.create",
    "detach": "fade_fast.hf.attach",
    "load_cache": "fade_fast.hf.create",
    "loading": "fade_fast.hf",
    "stream": "fade_fast.hf.stream",
    "warm": "fade_fast.hf.warm",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


deprecated.install()
