"""A tiny random model of each family of transformers, and the expected behavior of a tiered cache."""

from dataclasses import dataclass, field

import torch
import transformers
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

VOCABULARY = 128
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
    tie_word_embeddings=False,
)


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: the name in the table.
        architecture: the class names in transformers without "Config" and without the name of the head.
        config: fields of the configuration in addition to `SIZES`. `...` removes a size.
        tiered: the tiered layers. The other layers keep the cache of transformers.
        layers: the number of layers in the cache of the model.
        dispatches: whether the attention function can be replaced. Decoding then reads packed tokens.
        renumbers: the reason why live tokens cannot be renumbered after eviction; empty if they can.
        refused: the reason why no cache can be created; empty if one can.
        drops_cache: whether the model replaces its cache if fade_fast is not attached.
        state_of_batch: whether the frequencies depend on the longest row. A row alone gives other results.
        branches: whether the forward pass branches on data. It then never compiles into one graph.
        dtype: float32 if the attention of transformers returns NaN for padding in float64.
        note: a remark for the table.
        eager: whether `sdpa` lacks a feature of the model, and `eager` is not exact in float64.
    """

    name: str
    architecture: str
    config: dict = field(default_factory=dict)
    tiered: tuple[int, ...] = (0, 1)
    layers: int = 2
    dispatches: bool = True
    renumbers: str = ""
    refused: str = ""
    drops_cache: bool = False
    state_of_batch: bool = False
    branches: bool = False
    dtype: torch.dtype = torch.float64
    note: str = ""
    eager: bool = False

    def model(self, seed: int = 0) -> PreTrainedModel:
        """A random model of the family. The seed determines the model."""
        torch.manual_seed(seed)
        head = getattr(transformers, self.architecture + "ForCausalLM", None) or getattr(
            transformers, self.architecture + "LMHeadModel", None
        )
        name = self.architecture + "Config"
        if self.architecture.endswith("Text"):
            head = getattr(transformers, self.architecture[:-4] + "ForCausalLM")
        if "text_config" in self.config:
            head = getattr(transformers, self.architecture + "ForConditionalGeneration")
            config = dict(self.config, text_config=_sizes(self.config["text_config"]))
        else:
            config = _sizes(self.config)
        model = head(getattr(transformers, name)(**config)).to(self.dtype).eval()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("batched_mm")  # it supports float64 and does not branch on data
        if self.eager:
            model.set_attn_implementation(REFERENCE)
        model.generation_config.use_cache = True  # the default of MPT is False
        _sharpen(model)
        return model


REFERENCE = "float64 reference"


def _reference(module, query, key, value, attention_mask, scaling, softcap=None, **kwargs):
    """Eager attention with a float64 softmax. In transformers eager attention gives NaN for padding rows."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is None:
        new, held = scores.shape[-2:]
        attention_mask = torch.ones(new, held, dtype=torch.bool).tril(held - new)
    probabilities = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min).softmax(-1)
    return (probabilities @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(REFERENCE, _reference)
AttentionMaskInterface.register(REFERENCE, sdpa_mask)


def _sizes(config: dict) -> dict:
    return {name: x for name, x in (SIZES | config).items() if x is not ...}


def _sharpen(model: PreTrainedModel) -> None:
    """Add noise to parameters that transformers initializes with 0 or 1: norms, biases, sinks must matter."""
    generator = torch.Generator().manual_seed(1)
    for name, x in model.named_parameters():
        if x.dim() == 1 and ("norm" in name or "bias" in name or "sinks" in name):
            x.data += 0.2 * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def rope(kind: str, **parameters) -> dict:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=10000.0, **parameters))


MAX_DECODE_TOKENS = dict(max_position_embeddings=16)  # dynamic and long RoPE change after this length
LAYER_TYPES = dict(
    sliding=["sliding_attention", "full_attention"],
    linear=["linear_attention", "full_attention"],
)
LINEAR = dict(
    layer_types=LAYER_TYPES["linear"],
    head_dim=32,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)
LEARNED = "learned positions are part of the hidden state"
DYNAMIC = "dynamic RoPE changes its frequencies while the text grows"
ALIBI = "its bias counts stored keys"
LEARNED_SIZES = dict(hidden_size=..., intermediate_size=..., num_hidden_layers=...)

_ALL = [
    Family("Llama", "Llama"),
    Family("Llama, linear RoPE", "Llama", rope("linear", factor=4.0)),
    Family(
        "Llama, llama3 RoPE",
        "Llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    Family("Llama, yarn RoPE", "Llama", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    Family("Llama, dynamic RoPE", "Llama", rope("dynamic", factor=4.0), renumbers=DYNAMIC, branches=True),
    Family(
        "Llama, dynamic RoPE beyond its length",
        "Llama",
        MAX_DECODE_TOKENS | rope("dynamic", factor=4.0),
        renumbers=DYNAMIC,
        state_of_batch=True,
        branches=True,
    ),
    Family("Qwen2", "Qwen2"),
    Family("Qwen3", "Qwen3", dict(head_dim=32)),
    Family("Mistral", "Mistral", dict(sliding_window=None)),
    Family(
        "Mistral, sliding window",
        "Mistral",
        dict(sliding_window=12),
        tiered=(),
        refused="no full-attention layer",
    ),
    Family(
        "Ministral, alternating windows",
        "Ministral",
        dict(sliding_window=12, layer_types=LAYER_TYPES["sliding"], head_dim=16),
        tiered=(1,),
    ),
    Family(
        "Phi-3, long RoPE",
        "Phi3",
        rope("longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8, factor=4.0)
        | dict(original_max_position_embeddings=512, max_position_embeddings=2048, sliding_window=None),
    ),
    Family(
        "Phi-3, long RoPE beyond its first length",
        "Phi3",
        rope("longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8, factor=4.0)
        | dict(original_max_position_embeddings=16, max_position_embeddings=64, sliding_window=None),
        drops_cache=True,
        state_of_batch=True,
    ),
    Family(
        "Phi-3, partial RoPE", "Phi3", rope("default", partial_rotary_factor=0.5) | dict(sliding_window=None)
    ),
    Family("Gemma", "Gemma", dict(head_dim=32)),
    Family(
        "Gemma 2",
        "Gemma2",
        dict(
            head_dim=32,
            query_pre_attn_scalar=24,
            sliding_window=12,
            attn_logit_softcapping=4.0,
            layer_types=LAYER_TYPES["sliding"],
        ),
        tiered=(1,),
        eager=True,
    ),
    Family(
        "Gemma 3",
        "Gemma3Text",
        dict(head_dim=32, query_pre_attn_scalar=24, sliding_window=12, layer_types=LAYER_TYPES["sliding"]),
        tiered=(1,),
    ),
    Family(
        "Gemma 4",
        "Gemma4Text",
        dict(
            num_hidden_layers=4,
            head_dim=16,
            global_head_dim=32,
            sliding_window=12,
            num_kv_shared_layers=2,
            layer_types=LAYER_TYPES["sliding"] * 2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCABULARY,
        ),
        tiered=(1,),
        layers=4,
    ),
    Family(
        "Qwen3-Next",
        "Qwen3Next",
        LINEAR
        | dict(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
        ),
        tiered=(1,),
    ),
    Family("Qwen3.5", "Qwen3_5Text", LINEAR, tiered=(1,)),
    Family("OLMoE", "Olmoe", dict(num_experts=4, num_experts_per_tok=2)),
    Family("Mixtral", "Mixtral", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    Family("Cohere", "Cohere", dict(use_qk_norm=True)),
    Family("GLM", "Glm", dict(head_dim=16)),
    Family("Granite", "Granite", dict(attention_multiplier=0.4, residual_multiplier=0.7)),
    Family(
        "SmolLM3",
        "SmolLM3",
        dict(no_rope_layers=[0, 1], layer_types=["full_attention"] * 2, use_sliding_window=False),
        note="layer 0 has no RoPE",
    ),
    Family(
        "gpt-oss",
        "GptOss",
        dict(
            head_dim=16,
            sliding_window=12,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=LAYER_TYPES["sliding"],
        )
        | rope("default"),
        tiered=(1,),
    ),
    Family("GPT-NeoX", "GPTNeoX", dict(num_key_value_heads=...)),
    Family(
        "GPT-2",
        "GPT2",
        LEARNED_SIZES | dict(n_embd=64, n_layer=2, n_head=4, n_positions=512, num_key_value_heads=...),
        renumbers=LEARNED,
    ),
    Family("OPT", "OPT", dict(ffn_dim=64, word_embed_proj_dim=64, init_std=0.2), renumbers=LEARNED),
    Family("Falcon", "Falcon", dict(alibi=False), dispatches=False),
    Family("Falcon, ALiBi", "Falcon", dict(alibi=True), dispatches=False, renumbers=ALIBI),
    Family(
        "Bloom",
        "Bloom",
        LEARNED_SIZES | dict(hidden_size=64, n_layer=2, n_head=4, num_key_value_heads=...),
        dispatches=False,
        renumbers=ALIBI,
        dtype=torch.float32,
    ),
    Family(
        "MPT",
        "Mpt",
        dict(d_model=64, n_layers=2, n_heads=4, max_seq_len=512, num_key_value_heads=...),
        dispatches=False,
        renumbers=ALIBI,
        dtype=torch.float32,
        note="generate() needs use_cache=True",
    ),
    Family(
        "DeepSeek-V3",
        "DeepseekV3",
        dict(
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
            n_group=2,
            n_routed_experts=8,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            num_key_value_heads=4,
            first_k_dense_replace=1,
        ),
        tiered=(),
        refused="latent",
    ),
    Family(
        "Gemma 3, vision-language",
        "Gemma3",
        dict(
            text_config=dict(head_dim=32, sliding_window=12, layer_types=LAYER_TYPES["sliding"]),
            vision_config=dict(
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            ),
            mm_tokens_per_image=4,
            tie_word_embeddings=False,
        ),
        tiered=(1,),
    ),
    Family(
        "Qwen2-VL, vision-language",
        "Qwen2VL",
        dict(
            text_config=rope("default", mrope_section=[2, 3, 3]),
            vision_config=dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2),
        ),
        renumbers="images take fewer positions than tokens",
    ),
]
FAMILIES = {family.name: family for family in _ALL}
#: One family of each kind. Tests of the other families are slow.
KINDS = (
    "Llama",  # grouped queries
    "Llama, dynamic RoPE",  # frequencies that change
    "Ministral, alternating windows",
    "Gemma 2",  # softcap
    "Qwen3.5",  # linear attention
    "Mixtral",  # experts
    "gpt-oss",  # sinks
    "GPT-2",  # learned positions
    "Bloom",  # attention that cannot be replaced
    "DeepSeek-V3",  # refused
    "Qwen2-VL, vision-language",
)
