"""A tiered layer as transformers knows it: the protocol of a cache layer around a `KVLayer`."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from ..cache.decode_graph import DecodeGraph
from ..cache.guard import Guard, single_threaded
from ..cache.layer import MAX_DECODE_TOKENS, KVLayer


@dataclass(frozen=True, eq=False)
class PendingKV:
    """What `update` hands to the attention function, as its keys and as its values.

    Attributes:
        layer: the layer that will store them.
        keys, values: of the step, [B, H, q, D].
    """

    layer: "TieredLayer"
    keys: Tensor
    values: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of all keys of the layer, the new ones included, as stock attention would see."""
        batch, heads, new, dim = self.keys.shape
        return torch.Size((batch, heads, self.layer.kv.length + new, dim))

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def of_another(self, module) -> bool:
        """Whether the attention module that reads this is another than the one whose keys these are."""
        return getattr(module, "layer_idx", self.layer.layer_idx) != self.layer.layer_idx

    def to(self, *args, **kwargs) -> "PendingKV":
        """Nothing moves: some models ask for the device that the keys are on already."""
        return self


#: Layers by the number that compiled graphs name them by.
by_number: "weakref.WeakValueDictionary[int, TieredLayer]" = weakref.WeakValueDictionary()
_next_number = 0


class TieredLayer(CacheLayerMixin):
    """A `KVLayer` in a transformers cache.

    Args:
        kv: the tokens.
        graph: captures the decode steps of the cache.
        guard: lets one thread work on the cache.
        dispatches: whether the model's attention calls are ours at the moment. If they are not, `update`
            returns dense keys and values.
        rollback_step: takes back a failed step, from a step index on, in all layers.
        model_config: configuration of the model's text part.

    Attributes:
        record_past: whether generate() may take back a step, with all that it counted.
        shows_survivors: whether stock attention may read the tokens that are left after eviction. That is
            right only without padding.
        shared: whether other layers may read what this one stores (Gemma 4).
    """

    is_sliding = False
    is_croppable = True
    record_past = False
    shows_survivors = False
    shared = False

    def __init__(
        self,
        kv: KVLayer,
        graph: DecodeGraph,
        guard: Guard,
        dispatches: Callable[[], bool],
        rollback_step: Callable[[int], None],
        model_config: PreTrainedConfig,
    ):
        super().__init__()
        global _next_number
        self.number, _next_number = _next_number, _next_number + 1
        by_number[self.number] = self
        self.kv, self.graph, self.guard = kv, graph, guard
        self.rollback_step, self.model_config = rollback_step, model_config
        self._dispatches = dispatches

    @property
    def layer_idx(self) -> int | None:
        """Place among the model's layers."""
        return self.kv.layer_idx

    @property
    def is_initialized(self) -> bool:
        """Whether keys have come."""
        return self.kv.is_initialized

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """transformers sets it to False at first; the tokens themselves say whether keys have come."""

    @property
    def is_compileable(self) -> bool:
        """Whether generate() may compile the decode step: on a GPU, and if it calls our hooks."""
        return self.graph.compileable and self.graph.hooked

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        self.kv.allocate(keys)

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs):
        """Check the new keys and values [B, H, q, D], and hand them on to attention.

        Our attention function stores them, once it knows which are padding. Other attention functions get
        all keys and values back, dense.
        """
        if torch.is_autocast_enabled(keys.device.type):  # stored tokens have one dtype
            known = self.kv.dtype if self.is_initialized else torch.get_autocast_dtype(keys.device.type)
            keys, values = keys.to(known), values.to(known)
        if self.graph.active or torch.compiler.is_compiling() and self._dispatches():
            pending = PendingKV(self, keys, values)  # attention checks them, within a compiled graph
            return pending, pending
        return self._update(keys, values)

    @torch.compiler.disable
    @single_threaded
    def _update(self, keys: Tensor, values: Tensor):
        kv, positions, config = self.kv, self.kv.token_positions, self.kv.config
        kv.check(keys, values)
        self.check_whole()
        if self._dispatches():
            pending = PendingKV(self, keys, values)
            return pending, pending
        if kv.observer:
            raise ValueError(
                f"eviction_policy={config.eviction_policy!r} ranks by attention, which this model's "
                "own attention function does not tell: fade_fast.attach(model) replaces it"
            )
        if config.evicts and not self.shows_survivors or config.relocatable and positions.has_padding:
            raise ValueError(
                "this cache evicts or moves tokens, and masks of the model's own attention would count "
                "every token seen: fade_fast.attach(model) brings ours back"
            )
        start, new = kv.length, keys.shape[2]
        try:
            kv.compact()
            both = (keys, values)
            if start:
                both = tuple(torch.cat(parts, dim=2) for parts in zip(kv.decode_all(), both))
            positions.extend(start, None, keys.shape[0], new, keys.device)
            kv.append(keys, values, attended=new > MAX_DECODE_TOKENS)  # drafts may be cropped again
        except BaseException:
            self.rollback_step(start)
            raise
        return both

    def check_whole(self) -> None:
        """Raise `RuntimeError` if a step begins in the first layer while the last step has not ended."""
        if self.kv.index == 0:
            self.graph.check_whole()

    def get_seq_length(self) -> int:
        """Logical length: tokens seen, not tokens held."""
        return self.kv.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask must cover.

        Our attention knows which stored tokens are valid. So its mask covers the new tokens only.
        """
        kv = self.kv
        if self._dispatches():
            return query_length, kv.length
        self._compact()  # blocks that are due are evicted before the keys are read
        held = kv.length - (kv.num_evicted if self.is_initialized else 0)
        return held + query_length, kv.length - held

    @single_threaded
    def _compact(self) -> None:
        self.kv.compact()

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget everything, shape and dtype included."""
        self.kv.reset()

    def activate_past_recording(self) -> None:
        """generate() says so before it runs ahead, and may have to crop a step (transformers)."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens, which must still be uncompressed.

        Raises `ValueError` for a positive number, and where the cut would fall into the middle.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give a negative number, of tokens to remove")
        self.kv.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.kv.select_rows(beam_idx)

    def offload(self) -> None:
        self.kv.map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.kv.map(lambda x: x.to(self.kv.device, non_blocking=True))
