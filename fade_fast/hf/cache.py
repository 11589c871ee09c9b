"""`TieredKVCache`: the cache that goes into `model.generate(cache=...)`."""

import copy
import os

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticSlidingWindowLayer,
)

from fade_ref.config import FadeConfig

from ..cache.decode_graph import DecodeGraph
from ..cache.guard import Guard, reading, single_threaded
from ..cache.layer import KVLayer
from ..cache.positions import TokenPositions
from ..formats.product import ProductFormat
from ..formats.rotated import RotatedFormat, tier_widths
from ..kernels import rotated
from ..policies import plan, scores
from ..saved import checkpoint, memory, snapshot, telemetry
from ..saved.memory import Memory
from .attention import NAME
from .codebooks import Codebooks, given
from .foreign import ForeignLayer, static_window
from .layer import TieredLayer
from .models import attention_modules, execution_device, fingerprint, text_config, unwrapped
from .prompts import SeenTokens
from .rope_probe import RopeProbe

CODECS = ("rotated", "product")  # that a cache can have


class TieredKVCache(Cache):
    """A `transformers` cache whose full-attention layers keep their tokens in tiers.

    Make one with `fade_fast.create_cache(model)`. Layers of other kinds (sliding window, linear
    attention, shared) keep the classes that `DynamicCache` gives them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: FadeConfig,
        max_length: int | None = None,
        policy_weights: str | os.PathLike | dict[str, Tensor] | None = None,
        codebooks: str | os.PathLike | Codebooks | dict[str, Tensor] | None = None,
    ):
        model = unwrapped(model)
        model_config = text_config(model)
        if config.eviction_policy not in plan.SUPPORTED:
            raise ValueError(
                f"eviction_policy={config.eviction_policy!r}: one of {', '.join(plan.SUPPORTED)} is "
                "supported inside generate()"
            )
        if config.quant_backend not in CODECS or config.plan_scope not in plan.SCOPES:
            raise ValueError(
                f"quant_backend={config.quant_backend!r}, plan_scope={config.plan_scope!r}: 'rotated' or "
                f"'product', and one of {', '.join(plan.SCOPES)}, are supported inside generate()"
            )
        if (config.quant_backend == "product") != (codebooks is not None):
            what = "missing" if codebooks is None else "given"
            raise ValueError(
                f"quant_backend={config.quant_backend!r}, codebooks {what}: 'product' needs them, "
                "others take none"
            )
        if config.plan_scope == "head" and config.eviction_policy == "adaptive":
            raise ValueError(
                "plan_scope='head' with eviction_policy='adaptive': heads would keep different numbers of "
                "tokens, which the buffers of a layer cannot hold; every other policy is supported"
            )
        if config.plan_scope == "head" and config.contiguous and config.int2_budget != 0:
            raise ValueError(
                f"plan_scope='head' with int2_budget={config.int2_budget} and contiguous positions: heads "
                'would read a slot at different positions; int2_budget=0 or positions="original" is supported'
            )
        weights = None
        if config.eviction_policy == "learned":
            weights = scores.load(scores.SHIPPED if policy_weights is None else policy_weights)
        elif policy_weights is not None:
            raise ValueError(
                f"eviction_policy={config.eviction_policy!r}, policy_weights given: 'learned' has weights, "
                "others take none"
            )
        replaceable = model_config._attn_implementation == NAME or model._can_set_attn_implementation()
        if scores.observer(config, weights) and not replaceable:
            raise ValueError(
                f"eviction_policy={config.eviction_policy!r} ranks by attention, but {type(model).__name__} "
                f"does not let its attention be replaced: {', '.join(plan.SCORES)} are supported for it"
            )
        if config.evicts and not model._can_set_attn_implementation():
            raise ValueError(
                f"{type(model).__name__} does not dispatch its attention, whose masks and biases would count "
                "evicted tokens: use a configuration that keeps every token"
            )
        layers = list(DynamicCache(config=model_config).layers)
        full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
        config = config.resolved(len(layers), full)
        self.fade_config, self.token_positions, self.seen = config, TokenPositions(), SeenTokens()
        self.fingerprint, self.model_config = fingerprint(model), model_config
        self.began: dict[int, int] = {}  # by thread: tokens held when its forward pass began
        self.guard = Guard()
        self._tables: dict[tuple, Tensor] = {}
        self.codebooks: str | None = None  # their digest
        # Captured steps keep their counters on one device, so all layers must be there.
        on_gpu = {p.device.type for p in model.parameters()} == {"cuda"}
        on_gpu &= len({p.device for p in model.parameters()}) == 1
        by_layer = {}
        if not full:
            kinds = ", ".join(dict.fromkeys(type(layer).__name__ for layer in layers))
            raise ValueError(
                f"{type(model).__name__} has no layer whose cache could be tiered: no full-attention "
                f"layer that caches keys and values alone. transformers gives its layers {kinds}"
            )
        modules = attention_modules(model)
        #: Device of each layer's keys, which is not that of its weights if they are offloaded.
        self.homes = [
            i in modules and execution_device(modules[i]) or model.device for i in range(len(layers))
        ]
        ropes = RopeProbe(model) if config.contiguous else None
        if codebooks is not None:
            codebooks = given(codebooks, model)
            by_layer, self.codebooks = codebooks.by_layer(full), codebooks.digest
        self.tiered: list[KVLayer] = []
        for index, i in enumerate(full):
            if i in by_layer:
                format = ProductFormat(by_layer[i], self._table)
            else:
                format = RotatedFormat(tier_widths(config, config.bits(i, len(layers))), self._table)
            observer = scores.observer(config, weights, i, len(layers)) if format.compresses else None
            rope = ropes.find(i) if ropes else None
            self.tiered.append(
                KVLayer(config, format, self.token_positions, rope, index, max_length, observer, i)
            )
        self.decode_graph = DecodeGraph(self.token_positions, self.tiered, compileable=on_gpu)
        self.decode_graph.captures = len(full) == len(layers)
        shared = bool(getattr(model_config, "num_kv_shared_layers", 0))

        def dispatches() -> bool:
            return model_config._attn_implementation == NAME

        for kv, i in zip(self.tiered, full):
            layers[i] = TieredLayer(
                kv, self.decode_graph, self.guard, dispatches, self._rollback_step, model_config
            )
            layers[i].shared = shared
        for i, layer in enumerate(layers):
            if type(layer) is DynamicSlidingWindowLayer and on_gpu:
                layers[i] = static_window(layer.sliding_window)
        super().__init__(layers=layers)

    def __deepcopy__(self, memo: dict) -> "TieredKVCache":
        """An independent copy for the same model: its configuration, rotary modules, codebooks are shared."""
        memo[id(self.model_config)] = self.model_config
        for layer in self.tiered:
            for shared in (layer.rope, layer.telemetry, *layer.format.tensors()):
                memo[id(shared)] = shared
        for graph in (self.decode_graph.demotion, self.decode_graph.order):
            memo[id(graph)] = None  # a captured graph cannot be copied
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin.decode_graph.clear()  # captured steps of this cache must not become those of the copy
        for layer in twin.tiered:
            layer.telemetry = None
        return twin

    def __reduce__(self):
        raise TypeError(
            "a TieredKVCache can be neither pickled nor copied shallowly: cache.save(path) and "
            "fade_fast.load_cache(path, model) take it to another process, copy.deepcopy(cache) copies "
            "it here"
        )

    def _table(self, dim: int, device) -> Tensor:
        """The codec's rotation and the sum of its rows, float32: one for all layers of a head_dim."""
        key = (dim, str(device))
        if key not in self._tables:
            self._tables[key] = rotated.with_sum(rotated.rotation(dim)).float().to(device)
        return self._tables[key]

    @property
    def device(self) -> torch.device:
        """Device of the first tiered layer."""
        return self.homes[self.tiered[0].layer_idx]

    def stored_layers(self) -> list[KVLayer | ForeignLayer]:
        """The layers as files and reports see them, in order."""
        return [layer.kv if isinstance(layer, TieredLayer) else ForeignLayer(layer) for layer in self.layers]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: tokens seen, whatever became of them."""
        layer = self.layers[layer_idx]
        return layer.get_seq_length() if isinstance(layer, TieredLayer) else super().get_seq_length(layer_idx)

    def _rollback_step(self, start: int) -> None:
        """Take back a step from column `start` on, which failed halfway: the layers before have its tokens.

        Where that cannot be, the next step is refused: the step was long and came after others, so that
        some layers have compressed what it brought; or layers of transformers cannot take it back.
        """
        if not start:
            self.reset()
            return
        ahead = [layer for layer in self.layers if layer.get_seq_length() > start]
        kinds = (TieredLayer, DynamicSlidingWindowLayer)
        fits = all(
            layer.kv.num_croppable >= layer.kv.length - start
            for layer in ahead
            if isinstance(layer, TieredLayer)
        )
        if not fits or not all(isinstance(layer, kinds) for layer in self.layers):
            self.decode_graph.failed = True
            return
        try:
            for layer in sorted(ahead, key=lambda layer: isinstance(layer, TieredLayer)):
                layer.crop(start - layer.get_seq_length())
        except RuntimeError:  # a sliding window that has moved on
            self.decode_graph.failed = True
            return
        self._cropped(self.token_positions.length - start)
        self.decode_graph.touch()

    def _cropped(self, n: int) -> None:
        """What the layers share: the newest `n` columns are gone, which they have cropped."""
        self.token_positions.crop(n)
        self.seen.crop(self.token_positions.length)
        self.decode_graph.crop(n)
        if self.token_positions.has_padding:
            held = bool((self.token_positions.newest() >= self.fade_config.n_sink - 1).all())
            for layer in self.tiered:
                if layer.is_initialized:
                    layer.dense.sinks_placed &= held

    @single_threaded
    def reset(self) -> None:
        """Forget every token; the next ones may have another batch size, dtype or device."""
        super().reset()
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # transformers before 5.18 only zeroes them
                layer.keys, layer.values, layer.is_initialized = None, None, False
        self.token_positions.clear()
        self.seen.set(None)
        self.decode_graph.clear()

    @single_threaded
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens from every layer; nothing if one refuses.

        To remove all is to `reset()`. What policies counted of the attention of these tokens stays counted,
        but for a step that generate() takes back (`TieredLayer.record_past`).
        """
        self.decode_graph.check_whole()
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        most = min(layer.num_croppable for layer in self.tiered)
        for layer in self.layers if tokens_to_remove else ():
            moved_on = getattr(layer, "cumulative_length_int", 0) > getattr(layer, "max_cache_len", 0)
            if type(layer) is StaticSlidingWindowLayer and moved_on:
                raise ValueError(
                    f"crop({tokens_to_remove}): a sliding window of {layer.max_cache_len} tokens has "
                    "moved on, and what fell out of it cannot come back"
                )
        if not -most <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop({tokens_to_remove}): from {-most} to 0 is possible, the newest {most} tokens being "
                "uncompressed"
            )
        if tokens_to_remove == -1 and self.layers[self.tiered[0].layer_idx].record_past:
            self.decode_graph.uncount()
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self._cropped(-tokens_to_remove)
            if not self.token_positions.length:
                self.reset()

    @single_threaded
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was: int64 [B]."""
        self._check_rows(beam_idx, same=True)
        self.decode_graph.reorder(beam_idx, self._reorder)
        if not self.decode_graph.within:  # a beam search must not wait for indices
            self.seen.select_rows(beam_idx)

    def _reorder(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.token_positions.select_rows(beam_idx)

    @single_threaded
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep rows `indices` [B'], in that order."""
        self._check_rows(indices)
        for layer in self.layers:
            if isinstance(layer, TieredLayer):
                layer.kv.select_rows(indices)
            else:
                layer.batch_select_indices(indices)
        self.token_positions.select_rows(indices)
        self.seen.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, in place."""
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"repeats={repeats!r}: an integer of at least 1 is allowed")
        if self.token_positions.length:
            self.batch_select_indices(torch.arange(self.token_positions.batch).repeat_interleave(repeats))

    def _check_rows(self, index: Tensor, same: bool = False) -> None:
        """Refuse an index of no rows, or (`same`) of another number of them; on a GPU it is not read."""
        self.decode_graph.check_whole()
        if not self.token_positions.length:
            return
        batch = self.token_positions.batch
        fits = isinstance(index, Tensor) and index.dim() == 1 and index.dtype in (torch.int64, torch.int32)
        fits = fits and len(index) > 0 and (not same or len(index) == batch)
        if not fits or not index.is_cuda and not 0 <= int(index.min()) <= int(index.max()) < batch:
            number = f"{batch} numbers" if same else "numbers"
            raise ValueError(f"rows {index}: a tensor of {number} from 0 to {batch - 1} is allowed")

    @reading
    def memory(self) -> Memory:
        """What the cache weighs now. Blocks whose demotion was due are demoted first.

        Raises `RuntimeError` while another thread is in a step.
        """
        self.decode_graph.check_whole()
        for layer in self.tiered:
            layer.compact()
        return memory.of(self.stored_layers(), self.token_positions.tensors() + self.decode_graph.kept)

    @reading
    def save(self, path: str | os.PathLike, tokens: Tensor | None = None) -> None:
        """Write the cache to a file, whole or not at all; `load_cache` reads it.

        `tokens`, an integer tensor, travels along: the ids that were fed, which a cache does not know, for
        `checkpoint.read_tokens`.

        Raises `ValueError` for a layer of a kind that cannot be stored, `OSError` as the system does.
        """
        self.decode_graph.check_whole()
        checkpoint.save(self, path, tokens)

    @reading
    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors, cloned, and what else the cache knows, for people who store it themselves."""
        self.decode_graph.check_whole()
        return checkpoint.state_dict(self)

    @single_threaded
    def load_state_dict(self, tensors: dict[str, Tensor], known: dict) -> None:
        """Fill this cache, which must be empty, with what `state_dict` gave.

        Raises `ValueError`, and leaves the cache empty, if they do not fit; `TypeError` for other things.
        """
        checkpoint.load_state_dict(self, tensors, known)

    def listen(self, sink) -> telemetry.Listener:
        """Tell `sink` of demotions, plans, evictions, renumbering, growth and compilation from now on.

        `telemetry.py` says what the events hold. A sink is a path, to which lines of JSON are appended; a
        `logging.Logger`; or a function of an event. Close the result, or use it in a `with` block.
        Raises `TypeError` for another sink, `OSError` as the system does.
        """
        return telemetry.listen(self.tiered, self.tiered[0].telemetry, sink)

    def describe(self) -> str:
        """A text saying what each layer keeps, and how."""
        return snapshot.text(snapshot.of(self, positions=False))

    @reading
    def snapshot(self) -> dict:
        """The same and more as JSON has it: each layer's tiers, positions and bytes; see `snapshot.py`."""
        return snapshot.of(self)
