"""Old places of public names. Each still works, and warns that the place is deprecated."""

import importlib
import warnings
from collections.abc import Callable

#: Module -> old name -> where the name stands now.
MOVED = {
    "importance": {
        "expected_attention": "baselines.expected_attention",
        "key_diff": "scores.key_diff",
        "key_norm": "scores.key_norm",
        "pool_neighbours": "scores.pool_neighbors",
    },
    "policies": {"HIGH_SHARE": "plan.HIGH_SHARE", "KEEP_SHARE": "plan.KEEP_SHARE"},
    "quantize": {
        f"{codec}_{verb}": f"baselines.{codec}_{verb}"
        for codec in ("akv", "channel", "group", "symmetric")
        for verb in ("encode", "decode")
    },
    "rotation": {name: f"baselines.{name}" for name in ("hadamard_rotate", "hadamard_rotation")},
}


def lookup(module: str) -> Callable[[str], object]:
    """`__getattr__` of a module, called with its `__name__`."""
    names = MOVED[module.rpartition(".")[2]]

    def __getattr__(name: str):
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        message = f"{module}.{name} moved to {__package__}.{names[name]}; the old path will be removed"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        home, _, new = names[name].rpartition(".")
        return getattr(importlib.import_module(f"{__package__}.{home}"), new)

    return __getattr__
