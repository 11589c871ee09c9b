"""Run a model to inspect it, and restore its state afterwards."""

import contextlib
import threading
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..compile.compiled import COMPILED_ON

#: The stance of torch.compile, and `COMPILED_ON`, belong to the whole process. Two threads that changed them
#: at once could restore each other's values, and nothing would be compiled from then on.
_one_at_a_time = threading.RLock()
SMALL = 1 << 16  # most elements of a buffer that is saved; larger ones are weights


@contextlib.contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Eager and deterministic inside. Afterwards every module and configuration is as before.

    The modes, attributes and buffers of all modules are restored, the random state, and the attention
    function that each configuration names. Other threads wait until the block ends.
    """
    with _one_at_a_time:
        with _held(model):
            yield


@contextlib.contextmanager
def _held(model: PreTrainedModel) -> Iterator[None]:
    # Dynamic RoPE replaces its frequencies. Vision-language models store positions.
    held = [(m, dict(m.__dict__), dict(m._buffers)) for m in model.modules()]
    # Long RoPE writes its frequencies in place.
    values = {x: x.clone() for x in model.buffers() if x.numel() <= SMALL and not x.is_meta}
    names = attention_names(model)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    compiled_on = set(COMPILED_ON)
    with (
        torch.random.fork_rng(devices=sorted(devices, key=str)),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        try:
            COMPILED_ON.clear()  # compiling does not pay for a few tokens
            model.eval()
            yield
        finally:
            COMPILED_ON.update(compiled_on)
            restore_attention(names)
            for module, attributes, buffers in held:
                for name in module.__dict__.keys() - attributes.keys():
                    del module.__dict__[name]
                module.__dict__.update(attributes)
                for name in module._buffers.keys() - buffers.keys():
                    del module._buffers[name]
                module._buffers.update(buffers)
            for buffer, value in values.items():
                buffer.copy_(value)


#: Attribute of a transformers configuration that holds the name of its attention function.
KEPT_AT = "_attn_implementation_internal"


def attention_names(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str | None]]:
    """The attention function that each configuration of a model names, sub-configurations included."""
    waiting = [model.config, *(m.config for m in model.modules() if isinstance(m, PreTrainedModel))]
    configs: dict[int, PreTrainedConfig] = {}
    while waiting:
        config = waiting.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in configs:
            configs[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return [(config, getattr(config, KEPT_AT, None)) for config in configs.values()]


def restore_attention(names: list[tuple[PreTrainedConfig, str | None]]) -> None:
    """Restore the names that `attention_names` returned."""
    for config, name in names:
        setattr(config, KEPT_AT, name)
