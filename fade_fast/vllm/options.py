"""What a user may ask of the plugin, and which models and settings of vLLM it refuses.

The options are `--additional-config '{"fade": {...}}'`, or `additional_config={"fade": {...}}` of `LLM`:

- `preset`: "safe" (the default: 4 bits, or the widths that the calibration file has), "int4", "lossless" (8
  bits) or "dense" (no compression, to compare).
- `middle_k_bits`, `middle_v_bits`, `layer_bits`: as in `FadeConfig`, instead of those of the preset.
- `quant_backend`: "rotated" (the default: a step stores its tokens in few kernels) or "matched", which needs
  a calibration.
- `calibration`: a file of `fade vllm-calibrate`.
- `full_graphs`: whether vLLM may capture whole decode steps as CUDA graphs (`false` is the default).

Everything is checked when the engine starts: in the process of the user on a CPU, in the workers on GPUs.
"""

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fade_ref.config import KEPT, Bits, FadeConfig
from fade_ref.tiers import packed_bytes

from . import calibration

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

NAME = "fade"  # key of `additional_config`
PRESETS = ("safe", "int4", "lossless", "dense")
BITS = ("middle_k_bits", "middle_v_bits", "layer_bits")
WIDTHS = (*BITS, "quant_backend")
CODECS = ("rotated", "matched")
ALLOWED = ("preset", *WIDTHS, "calibration", "full_graphs")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Speculative methods that have no model, and so no layers, of their own.
SPECULATIVE = ("ngram", "suffix")


@dataclass(frozen=True)
class Options:
    """The options of an engine.

    Attributes:
        config: the widths. None: no layer is compressed.
        calibration: path of the calibration file, or None.
        full_graphs: whether vLLM may capture whole decode steps.
    """

    config: FadeConfig | None
    calibration: str | None
    full_graphs: bool = False

    def bits(self, layer: int, layers: int) -> Bits:
        """Bits of keys and values of a layer; a model has `layers` layers."""
        return (KEPT, KEPT) if self.config is None else self.config.bits(layer, layers)


def read(additional_config: object) -> Options:
    """The options in vLLM's `additional_config`, usually a dict.

    Raises `ValueError`, which names the option, its value and what is allowed.
    """
    given = additional_config.get(NAME, {}) if isinstance(additional_config, dict) else {}
    if not isinstance(given, dict):
        raise ValueError(f"{NAME}={given!r} in additional_config: an object with options is allowed")
    if unknown := sorted(given.keys() - set(ALLOWED)):
        raise ValueError(
            f"unknown options {unknown} under {NAME!r} in additional_config: {', '.join(ALLOWED)} are allowed"
        )
    preset = given.get("preset", "safe")
    if preset not in PRESETS:
        why = (
            "it drops tokens, and a page of vLLM keeps all its tokens; "
            if preset in ("balanced", "aggressive")
            else ""
        )
        raise ValueError(f"preset={preset!r}: {why}one of {', '.join(PRESETS)} is allowed")
    path = given.get("calibration")
    if path is not None and not isinstance(path, str):
        raise ValueError(f"calibration={path!r}: the path of a file is allowed")
    graphs = given.get("full_graphs", False)
    if not isinstance(graphs, bool):
        raise ValueError(f"full_graphs={graphs!r}: true or false is allowed")
    widths = {name: given[name] for name in WIDTHS if name in given}
    if preset == "dense":
        if widths:
            raise ValueError(
                f"preset='dense' compresses nothing and contradicts {', '.join(widths)}: leave one out"
            )
        return Options(None, path, graphs)
    base = replace(FadeConfig.preset(preset), quant_backend=CODECS[0])
    if (codec := given.get("quant_backend", base.quant_backend)) not in CODECS:
        raise ValueError(f"quant_backend={codec!r}: one of {', '.join(CODECS)} is allowed")
    chosen = base.loss_bound is not None and not widths.keys() & set(BITS)
    config = replace(base, **(widths if chosen else {"loss_bound": None, **widths}))
    if config.quant_backend == "matched" and path is None:
        raise ValueError(
            "quant_backend='matched' needs calibration, a file of `fade vllm-calibrate`: give its path"
        )
    if chosen:  # by the file; an engine measures nothing
        config = calibration.with_widths(path, config)
    return Options(config, path, graphs)


def check(vllm_config: "VllmConfig") -> None:
    """Raise `ValueError` if our backend is chosen and cannot serve this engine, or options are wrong.

    `vllm_config` is what vLLM made of the engine's arguments.
    """
    chosen = vllm_config.attention_config.backend
    kinds = vllm_config.attention_config.backend_per_kind or {}
    if "CUSTOM" not in [getattr(x, "name", x) for x in (chosen, *kinds.values())]:
        given = vllm_config.additional_config
        if isinstance(given, dict) and NAME in given:
            raise ValueError(
                f"additional_config has options of {NAME!r}, which need --attention-backend CUSTOM "
                "(attention_backend='CUSTOM' of LLM): another backend would ignore them; "
                "add it, or leave the options out"
            )
        return
    options = read(vllm_config.additional_config)
    if vllm_config.model_config is not None:
        check_model(vllm_config, options)


def check_model(vllm_config: "VllmConfig", options: Options) -> None:
    """Raise `ValueError`, which names what this engine needs and our backend does not have.

    `vllm_config` is the engine's, `options` are its options of ours.
    """
    for name in unsupported(vllm_config):
        raise ValueError(f"the attention backend of fade does not support {name}: use another backend")
    model = vllm_config.model_config
    layers, head_dim = num_layers(model), model.get_head_size()
    if options.config is not None:
        options.config.resolved(layers, list(range(layers)))
    for bits in sorted({options.bits(i, layers) for i in range(layers)}):
        check_head_dim(head_dim, bits)
    if options.calibration is not None:
        calibration.load(options.calibration, model)


def check_head_dim(head_dim: int, bits: Bits) -> None:
    """Raise `ValueError` if heads of `head_dim` channels cannot be stored at these widths."""
    if head_dim % 8:
        raise ValueError(
            f"head_dim {head_dim}: a multiple of 8 is allowed; use another backend for this model"
        )
    for width in bits:
        if width != KEPT:
            packed_bytes(width, head_dim)


def num_layers(model: "ModelConfig") -> int:
    """Number of layers of a model, on all ranks of a pipeline."""
    return model.hf_text_config.num_hidden_layers


def unsupported(vllm_config: "VllmConfig"):
    """Names of what an engine needs and our backend does not have."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    if model.use_mla:
        yield "multi-head latent attention (MLA)"
    if model.is_encoder_decoder:
        yield "encoder-decoder models"
    if model.is_hybrid:
        yield "hybrid models with state-space or linear-attention layers"
    if model.is_mm_prefix_lm:
        yield "bidirectional attention over a multimodal prefix"
    if getattr(model.hf_text_config, "attention_chunk_size", None):
        yield "chunked local attention"
    if getattr(model, "rswa_window", None) is not None:
        yield "reference sliding-window attention"
    if model.dtype not in DTYPES:
        yield f"models in {model.dtype}"
    if not _is_plain(cache.cache_dtype, model.dtype):
        yield f"--kv-cache-dtype {cache.cache_dtype} (widths are options under {NAME!r})"
    if cache.kv_cache_dtype_skip_layers:
        yield f"--kv-cache-dtype-skip-layers (use layer_bits under {NAME!r})"
    if vllm_config.kv_transfer_config is not None:
        yield "KV connectors (kv_transfer_config)"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "context parallelism"
    if speculative is not None and speculative.method not in SPECULATIVE:
        yield f"speculative decoding by {speculative.method!r} (allowed: {', '.join(SPECULATIVE)})"
    if vllm_config.attention_config.use_non_causal:
        yield "non-causal attention"


def _is_plain(cache_dtype: str, dtype: torch.dtype) -> bool:
    """Whether a cache dtype of vLLM means the dtype of the model."""
    return cache_dtype == "auto" or getattr(torch, cache_dtype, None) == dtype


@functools.cache
def warn_once(logger, message: str, *args) -> None:
    """Log a warning once in a process."""
    logger.warning(message, *args)
