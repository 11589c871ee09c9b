"""`python -m tests.conformance.sweep`: test whether every class of transformers is served or refused.

python -m tests.conformance.sweep --markdown docs/compatibility.md

A tiny random model of each causal-LM and image-text-to-text class decodes text with a tiered cache. There
are configurations without compression, with compression, and with eviction. The sweep takes long, so pytest
does not run it.
"""

import argparse
import contextlib
import copy
import dataclasses
import gc
import inspect
import json
import multiprocessing
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

import fade_fast
from fade_ref.config import FadeConfig

from .cells import OFF, SAFE, SMALL, compressed, create
from .families import REFERENCE
from .modes import NEW, prompt
from .twins import read_dense

SECONDS = 60  # CPU seconds per class
PATIENCE = 5  # wall-clock limit as a multiple of SECONDS, for a busy machine
MEMORY = 16 << 30  # address space of the process of a class, in bytes

#: The argument of models for a cache: `cache` since transformers 5.24, `past_key_values` before.
CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)

# Tiny models

#: The names of a size in configurations, and its tiny value in a decoder and in another tower.
_SIZES = [
    ("vocab_size unpadded_vocab_size ngram_vocab_size_base vocab_size_per_layer_input", 260, 260),
    ("hidden_size d_model n_embd embed_dim emb_dim dim embedding_size output_embedding_size", 64, 32),
    ("input_embedding_size word_embed_proj_dim lru_width width adapter_in_dim adapter_input_size", 64, 32),
    ("codebook_dim", 64, 32),
    ("out_hidden_size text_hidden_size adapter_out_dim projection_dim projector_hidden_size", 64, 64),
    ("output_dim proj_dim projection_hidden_size vision_hidden_size backbone_hidden_size", 64, 64),
    ("intermediate_size ffn_dim d_inner n_inner dff dim_ff encoder_ffn_dim decoder_ffn_dim d_ff", 64, 32),
    ("ffn_hidden_size feed_forward_size expert_ffn_hidden_size intermediate_size_mlp mlp_dim", 64, 32),
    ("moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size", 32, 32),
    ("shared_experts_intermediate_size moe_shared_expert_intermediate_size", 32, 32),
    ("dense_intermediate_size prefix_dense_intermediate_size", 32, 32),
    ("num_hidden_layers n_layer n_layers num_layers depth encoder_layers decoder_layers", 2, 2),
    ("num_encoder_layers num_decoder_layers layers", 2, 2),
    ("num_attention_heads n_head n_heads num_heads encoder_attention_heads swa_num_attention_heads", 4, 2),
    ("decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads attention_heads", 4, 2),
    ("num_key_value_heads num_kv_heads swa_num_key_value_heads kv_n_heads", 2, 2),
    ("head_dim dim_head kv_channels d_kv d_head attention_head_size swa_head_dim index_head_dim", 16, 16),
    ("indexer_head_dim v_head_dim swa_v_head_dim", 16, 16),
    ("q_lora_rank kv_lora_rank o_lora_rank", 16, 16),
    ("qk_rope_head_dim qk_nope_head_dim rotary_dim", 8, 8),
    ("index_n_heads indexer_n_heads o_groups", 2, 2),
    ("max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions", 512, 512),
    ("sliding_window attention_window_size sliding_window_size local_attention window_size", 12, 12),
    ("num_experts num_local_experts n_routed_experts moe_num_experts", 4, 4),
    ("num_experts_per_tok moe_topk moe_k top_k_experts num_experts_per_token moe_top_k", 2, 2),
    ("n_group topk_group", 1, 1),
    ("linear_num_key_heads linear_num_value_heads linear_num_heads", 2, 2),
    ("linear_key_head_dim linear_value_head_dim linear_head_dim", 16, 16),
    ("mamba_d_state ssm_state_size state_size mamba_chunk_size", 16, 16),
    ("mamba_num_heads mamba_n_heads", 8, 8),
    ("mamba_d_head mamba_head_dim", 16, 16),
    ("mamba_n_groups n_groups mamba_ngroups", 1, 1),
    ("base_channels moe_hidden_size", 32, 32),
    ("image_size", 28, 28),
    ("patch_size", 14, 14),
]
_TEXT = {name: text for names, text, _ in _SIZES for name in names.split()}
_TOWER = {name: tower for names, _, tower in _SIZES for name in names.split()}
_DECODERS = ("text_config", "llm_config", "decoder", "decoder_config", "vlm_config")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_OPTIONAL = ("head_dim", "num_key_value_heads")  # set even if the default depends on other fields
_SPECIAL = ("_token_id", "_token_index")


def _mrope(*section: int, **parameters) -> dict:
    return dict(
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=list(section), **parameters)
    )


def _mixed(*kinds: str) -> dict:
    return dict(layer_types=list(kinds), num_hidden_layers=len(kinds))


_FULL, _SLIDING = "full_attention", "sliding_attention"
_GEMMA_4 = _mixed(_SLIDING, _FULL, _SLIDING, _FULL) | dict(
    global_head_dim=32, num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=260
)

#: Fields of a configuration class in addition to the sizes, or instead of them. `...` keeps the default.
OVERRIDES: dict[str, dict] = {
    "BambaConfig": dict(attn_layer_indices=[1]),
    "BltConfig": dict(encoder_hash_byte_group_vocab=64),
    "ChameleonConfig": dict(vocabulary_map={"<image>": 250}),
    "CohereCompassTextConfig": _mixed(_SLIDING, _FULL)
    | dict(rope_parameters={kind: _mrope(2, 3, 3)["rope_parameters"] for kind in (_FULL, _SLIDING)}),
    "Cosmos3EdgeTextConfig": _mrope(2, 3, 3),
    "DbrxConfig": dict(attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8)),
    "DeepseekOcr2TextConfig": dict(mlp_layer_types=["dense", "sparse"], num_experts_per_tok=2),
    "DeepseekV2Config": dict(num_experts_per_tok=2),
    "Dots1Config": dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1),
    "DoryConfig": _mixed(_SLIDING, _SLIDING, _FULL, _FULL)
    | dict(n_input_layers=1, n_recurrent_layers=2, n_output_layers=1),
    "Emu3Config": dict(vocabulary_map={"<image>": 250}),
    "Ernie4_5_VLMoeTextConfig": dict(moe_intermediate_size=[32, 32]) | _mrope(3, 3, 2),
    "FalconH1Config": dict(mamba_d_ssm=128),
    "Gemma3nTextConfig": _mixed(_SLIDING, _FULL, _SLIDING, _FULL)
    | dict(num_kv_shared_layers=2, intermediate_size=64, activation_sparsity_pattern=...),
    "Gemma4TextConfig": _GEMMA_4,
    "Gemma4UnifiedTextConfig": _GEMMA_4,
    "Glm4vTextConfig": _mrope(2, 3, 3),
    "Glm4vMoeTextConfig": _mrope(1, 1, 2, partial_rotary_factor=0.5),
    "Glm5NextTextConfig": dict(qk_rope_head_dim=0),
    "GlmOcrTextConfig": _mrope(2, 3, 3),
    "GPTNeoConfig": dict(attention_types=[[["global", "local"], 1]]),
    "Granite4VisionConfig": dict(deepstack_layer_map=[], spatial_target_layers=[]),
    "GraniteMoeHybridConfig": _mixed("mamba", "attention"),
    "HunYuanVLTextConfig": _mrope(2, 2, 2, 2),
    "HYV4VLTextConfig": _mrope(1, 1, 2),
    "JambaConfig": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, mamba_dt_rank=4),
    "Lfm2MoeConfig": _mixed("conv", _FULL),
    "LongcatFlashConfig": dict(head_dim=8),
    "Mamba2Config": dict(num_heads=8, head_dim=16),
    "MinistralConfig": _mixed(_SLIDING, _FULL) | dict(sliding_window=12),
    "MuseSparkAudioConfig": dict(hidden_sizes=[32, 32, 32, 32]),
    "Molmo2AdapterConfig": dict(vision_feature_layer=[1, 0]),
    "PaddleOCRTextConfig": _mrope(2, 3, 3),
    "Qwen2VLTextConfig": _mrope(2, 3, 3),
    "Qwen2_5OmniTextConfig": _mrope(2, 3, 3),
    "Qwen2_5_VLTextConfig": _mrope(2, 3, 3),
    "Qwen4ExpTextConfig": dict(
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=64,
        indexer_compress_ratio=4,
    ),
    "RadioConfig": dict(video_temporal_patch_size=2),
    "ReformerConfig": dict(axial_pos_embds=False),
    "RecurrentGemmaConfig": dict(num_hidden_layers=3),
    "Step3p7TextConfig": _mixed(_FULL, _SLIDING) | dict(sliding_window=12),
    "XmodConfig": dict(default_language="en_XX"),
    "ZambaConfig": dict(layers_block_type=["linear_attention", "hybrid"] * 2, num_hidden_layers=4),
    "ZayaConfig": dict(num_experts_per_tok=1),
}


def names() -> list[str]:
    """The names of all causal-LM and image-text-to-text classes of transformers."""
    found = set()
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        for value in mapping.values():
            found.update(value if isinstance(value, tuple) else (value,))
    return sorted(found)


def build(name: str) -> PreTrainedModel:
    """A tiny random model of a class, always the same. Its output depends strongly on the cache."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**tiny(kind.config_class))).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # grouped_mm has no float64
    if getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        model.set_attn_implementation(REFERENCE)  # sdpa has no softcap, and eager is not exact in float64
    model.generation_config = GenerationConfig(pad_token_id=0, use_cache=True)
    draw = torch.Generator().manual_seed(1)
    for x in model.parameters():
        noise = 0.2 * torch.randn(x.shape, generator=draw)
        x.data.copy_(noise if x.dim() > 1 else x.data + noise)
    return model


def tiny(kind: type[PreTrainedConfig], text: bool = True) -> dict:
    """The arguments of a tiny configuration. The names of the fields determine them.

    Args:
        kind: a configuration class.
        text: whether the class is for a decoder. Other towers process no text.
    """
    default, sizes, found = kind(), _TEXT if text else _TOWER, {}
    special = iter(range(259, 128, -1))
    for field in dataclasses.fields(kind):
        value = _value(default, field)
        if field.name in kind.sub_configs and isinstance(value, PreTrainedConfig):
            inner = tiny(type(value), field.name in _DECODERS)
            found[field.name] = inner | dict(model_type=value.model_type)
        elif field.name in sizes and (type(value) is int or field.name in _OPTIONAL):
            found[field.name] = sizes[field.name]
        elif field.name.endswith(_SPECIAL):
            found[field.name] = 0 if field.name == "pad_token_id" else next(special)
        elif field.name == "is_decoder":
            found[field.name] = text
    found |= _layers(default)
    window = kind.__dataclass_fields__.get("sliding_window")
    if window and _windowed(default) and "None" in str(window.type):
        found["sliding_window"] = None
        found.pop("layer_types", None)
    if "kv_lora_rank" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]
    chosen = OVERRIDES.get(kind.__name__, {})
    return {name: x for name, x in (found | chosen).items() if x is not ...}


def _value(config: PreTrainedConfig, field: dataclasses.Field):
    """The value of a field. If the value differs between layers, its default."""
    return vars(config).get(field.name, field.default)


def _windowed(default: PreTrainedConfig) -> bool:
    """Whether all layers of a class have a sliding window by default."""
    kinds = getattr(default, "layer_types", None) or ["sliding_attention"]
    return set(kinds) == {"sliding_attention"}


def _layers(default: PreTrainedConfig) -> dict:
    """One layer of each kind in the default configuration, and at least two layers."""
    fields = {field.name for field in dataclasses.fields(default)}
    count = next((name for name in _DEPTHS if name in fields), None)
    lists = {
        name: list(x)
        for name, x in vars(default).items()
        if count and name in fields and isinstance(x, (list, tuple)) and len(x) == vars(default)[count] > 1
    }
    kinds: dict[str, int] = {}
    for i, kind in enumerate(zip(*lists.values())):
        kinds.setdefault(str(kind), i)
    if not kinds:
        return {}
    chosen = list(kinds.values())[:4]
    chosen += chosen[-1:] * (2 - len(chosen))
    return {name: [x[i] for i in chosen] for name, x in lists.items()} | {count: len(chosen)}


# The tests of a class

EVICTING = FadeConfig(**SMALL, int4_budget=8)
OWN_POSITIONS = FadeConfig(**SMALL, int4_budget=8, positions="original")
EQUAL, REFUSED, LATE, THEIRS = "equal", "refused", "refused late", "refused by transformers"
WRONG, CRASH, NOT_BUILT, DISAGREES = "WRONG", "CRASH", "not built", "CHECK DISAGREES"
BAD = (WRONG, CRASH, DISAGREES)
PADS = (0, 13)
CHUNKS = (30, 1, 1, 7, 20, 1)
TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-3,
}  # rotary angles and some norms use float32
HUGE = 1e30  # some models mask logits with the smallest number of the dtype


@dataclass(frozen=True)
class Found:
    """The outcome of a class in one configuration.

    Attributes:
        name: the class.
        config: the configuration of the cache; empty if the model was not built.
        outcome: one of the constants above.
        words: the reason, or the error.
        how: the modes and their precision.
    """

    name: str
    config: str
    outcome: str
    words: str = ""
    how: str = ""


@dataclass(frozen=True)
class Decoded:
    """The logits of each step [B, n, V], and the chosen tokens [B, steps] if the mode chooses tokens."""

    logits: list[Tensor]
    tokens: Tensor | None = None

    @property
    def tells(self) -> bool:
        """Whether a comparison with these logits is meaningful."""
        return not any(x.isnan().any() for x in self.logits) and self.logits[-1].unique().numel() > 2


@dataclass(frozen=True)
class Mode:
    """A way to decode with a dtype of the model, and the result with `DynamicCache`."""

    name: str
    dtype: torch.dtype
    decode: Callable
    padded: bool
    expected: Decoded

    def model(self, pristine: PreTrainedModel) -> PreTrainedModel:
        return copy.deepcopy(pristine).to(self.dtype)

    def run(self, model: PreTrainedModel, cache) -> Decoded:
        with torch.no_grad():
            return self.decode(model, cache, PADS if self.padded else ())


def generated(model: PreTrainedModel, cache, pads=()) -> Decoded:
    """Greedy tokens of `generate()`."""
    inputs = prompt(pads=pads)
    out = model.generate(
        **inputs,
        **{CACHE: cache},
        do_sample=False,
        max_new_tokens=NEW,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Decoded([x[:, None] for x in out.logits], out.sequences[:, -len(out.logits) :])


def chunked(model: PreTrainedModel, cache, pads=()) -> Decoded:
    """The logits of a text in chunks and single tokens."""
    inputs, start, found = prompt(length=sum(CHUNKS), pads=pads), 0, []
    for n in CHUNKS:
        ids, mask = inputs["input_ids"][:, start : start + n], inputs["attention_mask"][:, : start + n]
        out = model(input_ids=ids, attention_mask=mask, use_cache=True, **{CACHE: cache})
        found.append(out.logits)
        start += n
    return Decoded(found)


def difference(found: Decoded, expected: Decoded) -> float:
    """The largest relative error of a step. After the first different token, no step is compared."""
    steps = len(expected.logits)
    if len(found.logits) != steps:
        return float("inf")
    if expected.tokens is not None:
        parted = (found.tokens != expected.tokens).any(0)
        steps = int(parted.nonzero()[0]) + 1 if parted.any() else steps
    return max(_distance(x, y) for x, y in zip(found.logits[:steps], expected.logits[:steps]))


def _distance(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    real = expected.abs() < HUGE
    error = (found - expected)[real].norm() / expected[real].norm().clamp_min(1e-30)
    return error.nan_to_num(nan=float("inf")).item()


def modes(pristine: PreTrainedModel) -> tuple[list[Mode], str]:
    """The ways in which the model can decode with `DynamicCache`, and the first error in another way."""
    found, words = [], ""
    for name, decode, padded in (
        ("generate(), left-padded", generated, True),
        ("generate()", generated, False),
        ("chunks", chunked, False),
    ):
        if name == "generate()" and found:
            continue
        for dtype in TOLERANCE:
            mode = Mode(name, dtype, decode, padded, Decoded([]))
            model = mode.model(pristine)
            try:
                expected = mode.run(model, DynamicCache(config=model.config))
                if not expected.tells:
                    raise FloatingPointError("the logits are NaN, or all the same")
            except Exception as error:  # noqa: BLE001 - the code of a model may raise any error
                words = words or first_line(error)
                continue
            found.append(dataclasses.replace(mode, expected=expected))
            break
    return found, words


def examine(name: str, tell: Callable[[Found], None]) -> None:
    """Report the outcome of a class in each configuration."""
    try:
        pristine = build(name)
    except Exception as error:  # noqa: BLE001
        tell(Found(name, "", NOT_BUILT, first_line(error)))
        return
    ways, words = modes(pristine)
    configs = dict(off=OFF, safe=SAFE, evicting=EVICTING)
    for config_name, config in configs.items():
        refused = ask(partial(Found, name, config_name), config, pristine, ways, words, tell)
        if 'positions="original"' in refused:
            make = partial(Found, name, "evicting, own positions")
            ask(make, OWN_POSITIONS, pristine, ways, words, tell)


def ask(found: Callable[..., Found], config: FadeConfig, pristine, ways, words, tell) -> str:
    """Report the outcome of a class in one configuration. Returns the reason if create_cache() refuses it.

    Args:
        found: makes a `Found` from an outcome.
        config: the configuration.
        pristine: the model. It is copied before each use.
        ways, words: the result of `modes`.
        tell: receives each `Found`.
    """
    refused = ""
    try:
        refused, disagreement = refusal(ways[0].model(pristine) if ways else copy.deepcopy(pristine), config)
        if disagreement:
            tell(found(DISAGREES, disagreement))
        if refused:
            tell(found(REFUSED, refused))
        elif not ways:
            tell(found(THEIRS, words))
        else:
            tell(found(*decoded(pristine, config, ways)))
    except Exception as error:  # noqa: BLE001 - the table must show it
        if not ways and first_line(error) == words:
            tell(found(THEIRS, words))
        else:
            traceback.print_exc(limit=-3)
            tell(found(CRASH, f"{type(error).__name__}: {first_line(error)}"))
    return refused


def decoded(pristine: PreTrainedModel, config: FadeConfig, ways: list[Mode]) -> tuple[str, str, str]:
    """(outcome, words, how) after decoding in all ways, or of the first way that is not equal."""
    for way in ways:
        outcome, words = compare(pristine, config, way)
        if outcome != EQUAL:
            return outcome, f"{words}, {how(way)}", how(way)
    return EQUAL, "", "; ".join(map(how, ways))


def how(way: Mode) -> str:
    return f"{way.name} in {str(way.dtype).removeprefix('torch.')}"


def refusal(model: PreTrainedModel, config: FadeConfig) -> tuple[str, str]:
    """The reason if no cache is created, and the disagreement with `check_model`. Both are empty otherwise.

    This cache is created with verification, as a user creates it. The caches for decoding skip it.
    """
    promised = fade_fast.check_model(model, config).refused
    try:
        fade_fast.create_cache(model, config)
        refused = ""
    except ValueError as error:
        refused = str(error)
    if refused == promised:
        return refused, ""
    return refused, f"check_model says: {promised or 'served'}; create_cache: {refused or 'served'}"


def compare(pristine: PreTrainedModel, config: FadeConfig, way: Mode) -> tuple[str, str]:
    """(outcome, words) of decoding in one way, compared with `DynamicCache` or dense copies of the codes."""
    gc.collect()  # attached models are in reference cycles
    model = way.model(pristine)
    cache = create(model, config)
    try:
        found = way.run(model, cache)
    except ValueError as error:
        after = cache.get_seq_length()
        return LATE, first_line(error) + (f" (after {after} tokens)" if after else "")
    if not cache.get_seq_length():
        return WRONG, "the model leaves the cache empty"
    if config.compresses and not compressed(cache):
        return WRONG, "no compressed token was attended"
    expected = twin(pristine, config, way) if config.compresses else way.expected
    error = difference(found, expected)
    return (EQUAL, "") if error <= TOLERANCE[way.dtype] else (WRONG, f"relative error {error:.0e}")


def twin(pristine: PreTrainedModel, config: FadeConfig, way: Mode) -> Decoded:
    """The output with dense copies of the codes. Without padding, transformers computes the attention."""
    model = way.model(pristine)
    cache = create(model, config)
    if way.padded:
        with read_dense():
            return way.run(model, cache)
    fade_fast.detach(model)
    for layer in cache.layers:
        layer.shows_survivors = True
    return way.run(model, cache)


def first_line(error: Exception) -> str:
    """The first useful line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The library that validates configurations adds its own first line.
    said = [line for line in lines if not line.startswith(("Class validation error", "Validation error"))]
    return (said or lines or [type(error).__name__])[0]


# A process for each class


def _child(name: str, pipe) -> None:
    """Examine a class. This function runs in a separate process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    warnings.simplefilter("ignore")
    examine(name, pipe.send)


def in_process(name: str) -> list[Found]:
    """The outcomes of a class in bounded time, even if its code ends the process."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(name, sender))
    process.start()
    sender.close()
    found, end = [], time.monotonic() + PATIENCE * SECONDS
    with contextlib.suppress(EOFError):
        while receiver.poll(max(0, end - time.monotonic())):
            found.append(receiver.recv())
        process.kill()  # the process has ended, or has sent nothing for too long
    process.join()
    if process.exitcode:
        ended = signal.Signals(-process.exitcode).name if process.exitcode < 0 else process.exitcode
        found.append(Found(name, "", CRASH, f"the process was ended by {ended} (SIGXCPU: after {SECONDS} s)"))
    return found


# The table

START, END = "<!-- sweep -->", "<!-- end sweep -->"
ORDER = (EQUAL, REFUSED, LATE, THEIRS, DISAGREES, WRONG, CRASH, NOT_BUILT)


def general(found: Found) -> str:
    """The words of an outcome without class name and layer index, so that classes can share them."""
    words = re.sub(rf"\b{found.name}\b", "the model", found.words)
    words = re.sub(r"\blayer \d+\b", "a layer", words)
    if found.outcome in (REFUSED, DISAGREES):  # classes with different errors belong to one group
        words = re.sub(r", relative error \S+ \(at most \S+ is rounding\)", "", words)
    return " ".join(words.split()).replace("|", "\\|")


def grouped(found: list[Found]) -> dict[tuple[str, str, str], list[str]]:
    """The names of the classes for each (outcome, words, configurations), in the order of the table."""
    per_class: dict[tuple[str, str, str], list[str]] = {}
    for x in found:
        per_class.setdefault((x.name, x.outcome, general(x)), []).append(x.config)
    groups: dict[tuple[str, str, str], list[str]] = {}
    for (name, outcome, words), configs in per_class.items():
        groups.setdefault((outcome, words, "; ".join(filter(None, configs))), []).append(name)
    return dict(sorted(groups.items(), key=lambda item: (ORDER.index(item[0][0]), -len(item[1]), item[0])))


def section(found: list[Found]) -> str:
    """The section as Markdown, with its markers."""
    groups, every = grouped(found), len({x.name for x in found})
    lines = [
        START,
        f"## Sweep over every class of transformers {transformers.__version__}",
        "",
        "`python -m tests.conformance.sweep --markdown docs/compatibility.md` writes this section, here with "
        f"torch {torch.__version__.split('+')[0]}. Each causal-LM and image-text-to-text class is tiny and "
        "random. It decodes text in two ways: with left-padded `generate()`, and as a text in chunks. The "
        'configuration "off" compresses nothing and is compared with `DynamicCache`. The configurations '
        '"safe" and "evicting" are compared with attention over the same codes, decoded to dense keys and '
        "values. A model whose attention cannot be replaced always uses dense keys and values.",
        "",
        f"Of {every} classes:",
        "",
    ]
    for outcome in ORDER:
        names = {x.name for x in found if x.outcome == outcome}
        if names:
            configs = sorted({x.config for x in found if x.outcome == outcome and x.config})
            by_config = [
                f"{config} {sum(x.outcome == outcome and x.config == config for x in found)}"
                for config in configs
            ]
            lines.append(f"- {outcome}: {len(names)}" + (f" ({', '.join(by_config)})" if by_config else ""))
    lines += ["", "| outcome | configurations | classes |", "| --- | --- | --- |"]
    for (outcome, words, configs), names in groups.items():
        said = f"{outcome}: {words}" if words else outcome
        lines.append(f"| {said} | {configs or '-'} | {len(names)}: {', '.join(names)} |")
    unusual = unusually(found)
    if unusual:
        lines += [
            "",
            "These classes are compared in fewer ways or in float32, because `DynamicCache` itself fails in "
            "the other ways:",
            "",
        ]
        lines += [f"- {ways}: {', '.join(names)}" for ways, names in unusual.items()]
    return "\n".join([*lines, END])


def unusually(found: list[Found]) -> dict[str, list[str]]:
    """The classes with unusual ways of decoding, for each list of ways."""
    usual, ways = "generate(), left-padded in float64; chunks in float64", {}
    for x in found:
        if x.outcome == EQUAL and x.config == "off" and x.how != usual:
            ways.setdefault(x.how, []).append(x.name)
    return dict(sorted(ways.items()))


def write(path: Path, text: str) -> None:
    """Write the section into a file. It replaces an older section, or is added at the end."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    before, marker, rest = old.partition(START)
    after = rest.partition(END)[2] if marker else ""
    path.write_text(before.rstrip("\n") + "\n\n" + text + (after or "\n"), encoding="utf-8")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance.sweep", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--markdown", type=Path, help="file for the section. The default is standard output.")
    parser.add_argument("--json", type=Path, help="file for all outcomes")
    parser.add_argument("--only", default="", help="run only classes whose name contains this text")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    started, found = time.monotonic(), []
    for name in names():
        if options.only in name:
            for x in in_process(name):
                found.append(x)
                print(
                    ": ".join(filter(None, (name, x.config, x.outcome, x.words))), file=sys.stderr, flush=True
                )
    text = section(found)
    if options.json:
        options.json.write_text(
            json.dumps([dataclasses.asdict(x) for x in found], indent=1), encoding="utf-8"
        )
    if options.markdown:
        write(options.markdown, text)
    else:
        print(text)
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    return 1 if any(x.outcome in BAD for x in found) else 0


if __name__ == "__main__":
    sys.exit(main())
