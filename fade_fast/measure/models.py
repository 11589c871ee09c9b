"""Models of a named shape with random weights for benchmarks. Nothing is downloaded."""

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

K = 1024
LLAMA, QWEN, GEMMA, TINY = "Llama-3.1-8B", "Qwen2.5-7B", "Gemma-3-4B", "tiny"


def shape(hidden, layers, heads, kv_heads, intermediate, vocab, **others) -> dict:
    """Arguments of the configuration of a model."""
    return dict(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
        **others,
    )


LLAMA_ROPE = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8 * K,
)
QWEN_ROPE = dict(rope_type="default", rope_theta=1e6)
GEMMA_ROPE = dict(
    full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
    sliding_attention=dict(rope_type="default", rope_theta=1e4),
)
LLAMA_SHAPE = shape(4096, 32, 32, 8, 14336, 128256, head_dim=128, rope_parameters=LLAMA_ROPE)
QWEN_SHAPE = shape(3584, 28, 28, 4, 18944, 152064, rope_parameters=QWEN_ROPE)
GEMMA_SHAPE = shape(2560, 34, 8, 4, 10240, 262208, head_dim=256, sliding_window=K, rope_parameters=GEMMA_ROPE)
#: name -> class, its configuration's class, and what is not the default of that
MODELS = {
    LLAMA: (LlamaForCausalLM, LlamaConfig, LLAMA_SHAPE),
    QWEN: (Qwen2ForCausalLM, Qwen2Config, QWEN_SHAPE),
    GEMMA: (Gemma3ForCausalLM, Gemma3TextConfig, GEMMA_SHAPE),
    TINY: (LlamaForCausalLM, LlamaConfig, shape(128, 2, 4, 2, 128, 256, head_dim=64)),
}
LONGEST = 144 * K  # positions every model is made for


def build(name: str, device: str, layers: int | None = None, **changed):
    """A model with random bfloat16 weights, made on the device. Its RoPE buffers are float32.

    `layers`: how many it has; None: as many as the shape says. `changed` are other numbers of its
    configuration that differ from those of the shape.
    """
    make, configure, options = MODELS[name]
    options = dict(max_position_embeddings=LONGEST) | options | changed
    options |= {} if layers is None else dict(num_hidden_layers=layers)
    config = configure(**options, attn_implementation="sdpa")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = make(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None  # random text must not end early
    model.generation_config.pad_token_id = 0
    return model


def step_weights(model) -> int:
    """Bytes of the parameters that a decode step reads: all except an embedding table that the head does not
    share.
    """
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    read = {id(p): p.nbytes for p in model.parameters()}
    return sum(read.values()) - (table.nbytes if table is not head else 0)
