"""Layers of transformers in a tiered cache: sliding windows and others, which keep tokens as they come."""

from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer

#: Layers with a sliding window, which keep it as it comes or, on a GPU, in a buffer of fixed size.
SLIDING = (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)


def static_window(window: int) -> StaticSlidingWindowLayer:
    """transformers' layer of a sliding window in a buffer of fixed size.

    With `window + 1` as the most tokens it may see, the layer knows that the window moves, and that tokens
    which fell out cannot come back. The buffer has `window` slots all the same.
    """
    return StaticSlidingWindowLayer(window + 1, window)


class ForeignLayer:
    """A layer of transformers as files and reports see it.

    Attributes:
        name: name of its class.
        kind: name under which it is stored: alike for both classes of a sliding window.
    """

    def __init__(self, layer):
        self.layer = layer
        self.name = type(layer).__name__
        self.kind = SLIDING[0].__name__ if type(layer) in SLIDING else self.name

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [x for x in vars(self.layer).values() if isinstance(x, Tensor)]

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors to store, and numbers beside them. Raises `ValueError` for a kind that cannot be stored."""
        layer = self.layer
        if type(layer) not in SLIDING:
            raise ValueError(f"a {self.name} cannot be stored; keep the text, and feed it to a new cache")
        length, parts = layer.get_seq_length(), {}
        if layer.is_initialized:
            parts = dict(keys=layer.keys, values=layer.values)
        if parts and type(layer) is StaticSlidingWindowLayer:
            # What lies in front of a full buffer falls out before it is read again.
            window = layer.max_cache_len
            held = slice(1, None) if length >= window else slice(0, length)
            parts = {name: x[:, :, held] for name, x in parts.items()}
        return parts, dict(cumulative_length=length)

    def load(self, parts: dict[str, Tensor], known: dict) -> None:
        """Fill an empty layer with what `state` gave; tensors that were used leave `parts`."""
        if not parts:
            return
        layer, length = self.layer, known["cumulative_length"]
        keys, values = parts.pop("keys"), parts.pop("values")
        layer.lazy_initialization(keys, values)
        if type(layer) is DynamicSlidingWindowLayer:
            layer.keys, layer.values, layer.cumulative_length = keys.clone(), values.clone(), length
            return
        window = layer.max_cache_len
        kept = min(length, window - 1)
        start = 1 if length >= window else 0
        for buffer, x in ((layer.keys, keys), (layer.values, values)):
            buffer[:, :, start : start + kept] = x[:, :, x.shape[2] - kept :]
        layer.cumulative_length.fill_(length)
        layer.cumulative_length_int = length
