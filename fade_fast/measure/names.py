"""Names of methods (`methods.py`), and the configurations that they stand for.

Importing this module imports nothing slow.
"""

import ast
import re
from dataclasses import replace

from fade_ref.config import PRESETS, FadeConfig

#: Policies compared at equal bytes; "position" alone is StreamingLLM with its older tokens at INT4.
POLICIES = ("position", "h2o", "ema", "adaptive", "snapkv", "tova", "knorm", "keydiff", "learned")
QUANTIZED = {"quanto4": ("quanto", 4), "quanto2": ("quanto", 2), "hqq4": ("hqq", 4), "hqq2": ("hqq", 2)}
WIDTHS = re.compile(r"int([8432])|k([8432])v([8432])")
NAMES = ("dynamic", *QUANTIZED, "streaming", "off", *PRESETS, "int8|4|3|2", "k4v2", *POLICIES)


def check(name: str) -> None:
    """Raise `ValueError` if no method has this name, or a field cannot have such a value."""
    base, *changes = name.split(":")
    changed = changed_fields(name, changes)
    if is_config(base):
        replace(config_of(base), **changed)
    elif base not in (*POLICIES, "streaming") and (base not in ("dynamic", *QUANTIZED) or changes):
        raise ValueError(f"no method {name!r}: there are {', '.join(NAMES)}")


def configuration(name: str) -> FadeConfig:
    """The configuration of a method that is a preset or has widths, with its changed fields.

    Raises `ValueError` for another name, and if a field cannot have such a value.
    """
    base, *changes = name.split(":")
    if not is_config(base):
        raise ValueError(f"{name!r} is no preset, and has no widths, as int4 and k4v2 have")
    return replace(config_of(base), **changed_fields(name, changes))


def least(name: str, chunk: int = 1) -> int:
    """Fewest tokens of a text for a method: see `Method.least`."""
    if not is_config(name.split(":")[0]):
        return 1
    c = configuration(name)
    if not c.compresses:
        return 1
    chosen = c.tokens_selected if isinstance(c.select, int) else 0
    before = c.n_sink + c.recent_window + (chosen // c.block_size + 1) * c.block_size
    return -(-before // chunk) * chunk + 1


def is_config(base: str) -> bool:
    """Whether a name without fields is a preset, "off", or has widths."""
    return base in PRESETS or base == "off" or WIDTHS.fullmatch(base) is not None


def changed_fields(name: str, changes: list[str]) -> dict:
    """Fields of `FadeConfig` from "field=value"."""
    changed = {}
    for change in changes:
        field, _, value = change.partition("=")
        if field not in FadeConfig.__dataclass_fields__ or not value:
            raise ValueError(f"{name!r}: {change!r} is no field=value of FadeConfig")
        try:
            changed[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changed[field] = value  # not a number: a string
    return changed


def config_of(base: str) -> FadeConfig:
    """The configuration of such a name."""
    if base in PRESETS:
        return FadeConfig.preset(base)
    if base == "off":
        return FadeConfig(recent_window=None)
    both, key, value = WIDTHS.fullmatch(base).groups()
    return FadeConfig(middle_k_bits=int(both or key), middle_v_bits=int(both or value))
