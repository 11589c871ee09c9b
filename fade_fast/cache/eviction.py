"""The warning that a cache has begun to forget."""

import sys
import warnings
from types import FrameType

from fade_ref.config import FadeConfig

_warned = False  # whether this process was told


class EvictionWarning(UserWarning):
    """A cache drops tokens for good. Given once in a process, at the first eviction.

    `warnings.filterwarnings("ignore", category=fade_fast.EvictionWarning)` silences it. Turned into an error,
    it stops the step before anything is dropped.
    """


def warn_once(config: FadeConfig, count: int) -> None:
    """Warn that `count` tokens of a row are about to be dropped, unless this process was warned before."""
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"this cache evicts: {count} tokens are being dropped for good, by eviction_policy="
        f"{config.eviction_policy!r}, and the model cannot answer questions about them. Use 'safe' or "
        "'recall' to keep every token. cache.memory().forgotten counts the dropped ones",
        EvictionWarning,
        stacklevel=_of_the_user(),
    )


def _of_the_user() -> int:
    """How many frames above `warn_once` the code is that called generate() or the model, counting from 1."""
    level = 2
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] not in ("fade_fast", "torch", "transformers"):
            return level
        level, frame = level + 1, frame.f_back
    return 2
