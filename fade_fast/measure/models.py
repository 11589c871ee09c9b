"""Models of a named shape with random weights for benchmarks. Nothing is downloaded."""

import zlib

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.distributed import DistributedConfig

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


def _made_of(name: str, layers: int | None, changed: dict) -> tuple[type, PreTrainedConfig]:
    """Class and configuration of a model."""
    make, configure, options = MODELS[name]
    options = dict(max_position_embeddings=LONGEST) | options | changed
    options |= {} if layers is None else dict(num_hidden_layers=layers)
    return make, configure(**options, attn_implementation="sdpa")


def build(name: str, device: str, layers: int | None = None, dtype: torch.dtype = torch.bfloat16, **changed):
    """A model with random weights, made on the device. Its RoPE buffers are float32.

    `layers`: how many it has; None: as many as the shape says. `changed` are other numbers of its
    configuration that differ from those of the shape.
    """
    make, config = _made_of(name, layers, changed)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = make(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    return _endless(model)


def build_split(name: str, layers: int | None = None, dtype: torch.dtype = torch.bfloat16, **changed):
    """The same, split between all processes by tensor parallelism. Each process draws its own part."""
    make, config = _made_of(name, layers, changed)
    torch.manual_seed(0)
    split = DistributedConfig(tp_plan="auto")
    model = make.from_pretrained(None, config=config, state_dict={}, dtype=dtype, distributed_config=split)
    return _endless(model.eval().requires_grad_(False))


def _endless(model):
    model.generation_config.eos_token_id = None  # random text must not end early
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def redraw(model) -> None:
    """Draw every matrix anew, by its name: parts of a split model then have the numbers of a whole one.

    Numbers of one kind of device are equal; a GPU draws others than a CPU.
    """
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        here = weight.to_local() if isinstance(weight, DTensor) else weight
        draw = torch.Generator(here.device).manual_seed(zlib.crc32(name.encode()))
        whole = torch.empty(weight.shape, dtype=weight.dtype, device=here.device)
        whole.normal_(std=model.config.initializer_range, generator=draw)
        if isinstance(weight, DTensor):
            parts = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
            whole = parts.to_local()
        here.copy_(whole)


def step_weights(model) -> int:
    """Bytes of the parameters that a decode step reads: all except an embedding table that the head does not
    share.
    """
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    read = {id(p): p.nbytes for p in model.parameters()}
    return sum(read.values()) - (table.nbytes if table is not head else 0)
