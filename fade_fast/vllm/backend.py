"""The attention backend that vLLM loads under the name CUSTOM.

vLLM makes one `FadeImpl` per attention layer, one `FadeBuilder` per group of layers with the same pages, and
asks the backend class of a layer for the bytes of a page. It then calls, in each step, `build` once a group
and `forward` once a layer.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from fade_ref.config import KEPT

from ..kernels.matched import Matrices
from . import calibration, options
from .batches import SHORT, TOGETHER, Step, split, uniform
from .graphs import Graphs, Held
from .layer import ELEMENTS, CompressedLayer, DenseLayer, PagedLayer, mean_rows
from .pages import GRANULARITY, PREFERRED, cell_bytes

logger = init_logger("vllm." + __name__)


class FadeBackend(AttentionBackend):
    """The backend of layers whose widths are not known yet. `of_record` makes that of each layer."""

    forward_includes_kv_cache_update = True  # storing keys needs positions, which are in the metadata
    supported_dtypes: ClassVar = list(options.DTYPES)
    supported_kv_cache_dtypes: ClassVar = ["auto", "float16", "bfloat16"]
    record: ClassVar[int | None] = None  # bytes of a token of a KV head; None: not compressed
    fine: ClassVar[bool] = False  # see `PageLayout`
    drafts: ClassVar[int] = 0

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks the backend up by this name

    @staticmethod
    def get_impl_cls():
        return FadeImpl

    @staticmethod
    def get_builder_cls():
        return FadeBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [MultipleOf(GRANULARITY)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return default_block_size if cls.supports_block_size(default_block_size) else PREFERRED

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False  # the bound of value scales would miss pages that come from elsewhere

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # batches are cut by the lengths on the host

    @classmethod
    def supported_kv_cache_layouts(cls):
        return (KVCacheLayout.LBHNC,)  # the bytes of a head in a page are one run

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if cls.record is None or spec.state_content_bytes is not None:
            return spec
        content = cell_bytes(cls.record, cls.fine, spec.block_size, cls.drafts)
        return replace(spec, dtype=torch.uint8, state_content_bytes=content)


@functools.cache
def of_record(record: int | None, fine: bool = False, drafts: int = 0) -> type[FadeBackend]:
    """The backend of layers with records of this size; see `PageLayout`."""
    name = (
        "FadeBackend"
        + ("Dense" if record is None else str(record))
        + ("Fine" if fine else "")
        + f"Drafts{drafts}" * bool(drafts)
    )
    names = {"record": record, "fine": fine, "drafts": drafts, "__module__": __name__, "__qualname__": name}
    return type(name, (FadeBackend,), names)


@dataclass
class FadeMetadata(AttentionMetadata):
    """The requests of a step, cut into batches, and where its tokens are stored.

    Attributes:
        cut: the step. None: it is captured, and `lengths`, `table` and `longest` are arguments of `uniform`.
        slots: int64 [T], slot s is slot s % N of page s // N; negative for padding. vLLM may add padding.
        held: the step, if its layers are replayed.
    """

    cut: Step | None
    slots: Tensor
    lengths: Tensor | None = None
    table: Tensor | None = None
    longest: int = 0
    made: dict[bool, Step] = field(default_factory=dict)
    held: Held | None = None

    @property
    def step(self) -> Step:
        """The step. A captured one is cut by the first layer that asks, within the graph.

        vLLM writes the lengths, tables and slots of later steps into the same tensors.
        """
        if self.cut is not None:
            return self.cut
        cuda = self.slots.is_cuda
        inside = cuda and torch.cuda.is_current_stream_capturing()  # what was made before is not in the graph
        if inside not in self.made:
            self.made[inside] = uniform(self.lengths, self.table, self.longest, rounded=cuda)
        return self.made[inside]


class FadeBuilder(AttentionMetadataBuilder[FadeMetadata]):
    """Cuts a step into batches, once for all layers with the same pages."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        logger.info(
            "fade: %d layers with pages of %d tokens in %d bytes",
            len(layer_names), kv_cache_spec.block_size, kv_cache_spec.page_size_bytes,
        )  # fmt: skip
        self.graphs = None
        if vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
            most = vllm_config.scheduler_config.max_num_seqs
            self.graphs = Graphs(most, kv_cache_spec.num_kv_heads)

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        """Whether vLLM may capture whole decode steps.

        Usually batches are cut on the host, and attention stays between the pieces of vLLM's CUDA graphs. Its
        work then follows the live lengths. A captured step reads as many slots as the longest context has.
        """
        if options.read(vllm_config.additional_config).full_graphs:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FadeMetadata:
        step = common_attn_metadata
        count = step.num_reqs
        reach = step.seq_lens_cpu_upper_bound
        reach = step.seq_lens.cpu() if reach is None else reach
        drafts = self.vllm_config.num_speculative_tokens
        cut = split(
            step.query_start_loc_cpu[: count + 1].numpy().astype("int64"),
            reach[:count].numpy().astype("int64"),
            step.seq_lens[:count],
            step.block_table_tensor[:count],
            rounded=self.device.type == "cuda",
            slack=2 * drafts,
            most=SHORT if drafts else 1,
        )
        held = None if self.graphs is None else self.graphs.hold(cut, step.slot_mapping)
        return FadeMetadata(cut, step.slot_mapping, held=held)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> FadeMetadata:
        """A step whose tensors are those of vLLM, where each request has one new token."""
        step = common_attn_metadata
        if step.max_query_len > 1:  # a profile run of vLLM, not a graph of ours
            return self.build(0, step)
        return FadeMetadata(
            None,
            step.slot_mapping,
            step.seq_lens[: step.num_reqs],
            step.block_table_tensor[: step.num_reqs],
            self.vllm_config.model_config.max_model_len,
        )


class FadeImpl(AttentionImpl[FadeMetadata]):
    """One attention layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **extra,
    ) -> None:
        config = get_current_vllm_config()
        options.check(config)
        refused = {
            "ALiBi": alibi_slopes is not None,
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "layers that share the keys and values of another layer": kv_sharing_target_layer_name
            is not None,
        } | {f"the attention option {name}": value not in (None, False) for name, value in extra.items()}
        for name, asked in refused.items():
            if asked:
                raise ValueError(
                    f"the attention backend of fade does not support {name}: use another backend"
                )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype, self.sliding_window = kv_cache_dtype, sliding_window
        self.logits_soft_cap, self.sinks = logits_soft_cap or None, sinks
        self.layer: PagedLayer | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Find the layer of this object, and with it widths and key means.

        vLLM does not say which layer an object serves, and asks the layer's backend class for the bytes of a
        page. So each layer gets a class of its width. When vLLM loads other weights later, nothing changes:
        pages in use would not fit other tables.
        """
        if self.layer is not None:
            return
        config = get_current_vllm_config()
        found = [
            (name, layer)
            for name, layer in config.compilation_config.static_forward_context.items()
            if getattr(layer, "impl", None) is self
        ]
        ((name, layer),) = found
        if type(layer) is not Attention or layer.head_size_v != self.head_size:
            raise ValueError(
                f"the attention backend of fade does not support {name}, a {type(layer).__name__} with "
                f"{layer.head_size_v} channels of values and {self.head_size} of keys: use another backend"
            )
        asked, index = options.read(config.additional_config), extract_layer_index(name)
        bits = asked.bits(index, options.num_layers(config.model_config))
        shared = dict(
            heads=self.num_kv_heads, scaling=self.scale, window=self.sliding_window,
            softcap=self.logits_soft_cap, s_aux=self.sinks,
        )  # fmt: skip
        if bits[0] == KEPT:
            self.layer = DenseLayer(**shared)
            layer.attn_backend = of_record(None)
            return
        means = matrices = None
        if asked.calibration is not None:
            means, matrices = self._tables(asked, index, config.model_config)
        else:
            options.warn_once(
                logger,
                "fade: no calibration, so keys are stored without subtracting their mean. This costs quality "
                "at 4 bits and fewer (docs/vllm.md). `fade vllm-calibrate MODEL --out FILE` writes a "
                'calibration, and {"fade": {"calibration": FILE}} in --additional-config uses it.',
            )
        device = torch.empty(0, device=config.device_config.device).device
        self.layer = CompressedLayer(
            bits, self.head_size, act_dtype, device, means, matrices,
            drafts=config.num_speculative_tokens, **shared,
        )  # fmt: skip
        layer.attn_backend = of_record(
            self.layer.layout.record, self.layer.layout.fine, self.layer.layout.drafts
        )

    def _tables(self, asked: options.Options, index: int, model):
        """Key means of this rank's heads from the calibration, and matrices if the format has any."""
        found = calibration.load(asked.calibration, model)
        means = calibration.key_means(found, index, mean_rows(model.max_model_len))
        sides = calibration.matched(found, index) if asked.config.quant_backend == "matched" else ()
        rank = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        mine = lambda x: calibration.of_rank(x, self.num_kv_heads, *rank)  # noqa: E731
        return mine(means), [Matrices(*map(mine, side)) for side in sides] or None

    def forward(
        self,
        layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: FadeMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store the step's keys and values [T, H, D] in `kv_cache` [P, H, N, C], and attend.

        Attention of the step is written to `output` [T, Hq, D]. Other tokens are read from the cache.
        """
        if attn_metadata is None:  # vLLM measures its memory: count what prefill takes
            if query.is_cuda:
                scores = 4 * ELEMENTS + 12 * key.numel()  # and vectors of a step, some in float64
                held = (TOGETHER + 2 * len(key)) * key[0].numel()  # in half precision: codes, product, result
                most = max(scores, 3 * held + 2 * query.numel())
                torch.empty(most, dtype=torch.float32, device=query.device)
            return output.zero_()
        held = attn_metadata.held
        if held is not None and held.serves(self.layer):
            held.forward(self.layer, kv_cache, query, key, value, output)
        else:
            self.layer.forward(kv_cache, query, key, value, attn_metadata.slots, attn_metadata.step, output)
        return output
