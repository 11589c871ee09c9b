"""How generate() calls a model that has a tiered cache: prompts as they are, steps compiled and captured."""

import functools
import types

import torch
from transformers import CompileConfig, PreTrainedModel

from .capture import Captured
from .kernels.compile import uncaptured
from .models import text_config
from .stepper import Stepper

#: What generate() asks in beam search, and nowhere else: after each step, whether there will be another.
QUESTION = "_beam_search_has_unfinished_sequences"


def attach(model: PreTrainedModel) -> None:
    """Let generate() compile `model` with the surroundings that a tiered cache needs, in beam search, too."""
    model.get_compiled_call = types.MethodType(compiled_call, model)
    if hasattr(type(model), QUESTION):
        setattr(model, QUESTION, types.MethodType(_unfinished, model))
    if model._compiled_call_impl is None:  # what `model.compile()` sets
        model._compiled_call_impl = types.MethodType(_call, model)


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`."""
    for name in ("get_compiled_call", QUESTION, "_fade_searching"):
        model.__dict__.pop(name, None)
    if getattr(model._compiled_call_impl, "__func__", None) is _call:
        del model._compiled_call_impl


def compiled_call(model: PreTrainedModel, compile_config: CompileConfig | None):
    """What generate() gets for `model.get_compiled_call`: the compiled step, with its surroundings."""
    made = functools.partial(type(model).get_compiled_call, model)

    @functools.cache
    def ours(stepper: Stepper) -> bool:
        """Whether the cache is of this model; attention refuses others."""
        return stepper.layers[0].model_config is text_config(model)

    @functools.cache
    def step_of(stepper: Stepper):
        """The compiled step, a function of the epoch and the arguments."""

        def otherwise():
            stepper.captures = False  # later calls of generate() need not try
            return made(compile_config)

        config = uncaptured(compile_config or CompileConfig(), model.device) if stepper.captures else None
        if config:
            return Captured(made(config), otherwise)
        compiled = made(compile_config)
        return lambda epoch, arguments: compiled(**arguments)

    def call(*args, **kwargs):
        stepper = _stepper(kwargs)
        if stepper is None:
            return made(compile_config)(*args, **kwargs)
        tokens = kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        usual = not args and tokens is not None and ours(stepper)
        with stepper.layers[0].guard:
            if not usual or not stepper.begin(tokens.shape[1], tokens.shape[0]):
                return model(*args, **kwargs)
            try:
                output = step_of(stepper)(stepper.epoch, kwargs)
            except BaseException:
                stepper.active = False
                raise
            stepper.end()
            return output

    return call


# -- beam search, which generate() does not compile


def _unfinished(model: PreTrainedModel, *args, **kwargs) -> bool:
    """The answer of transformers; the next step, if there is one, is a search's."""
    model._fade_searching = bool(getattr(type(model), QUESTION)(*args, **kwargs))
    return model._fade_searching


def _call(model: PreTrainedModel, *args, **kwargs):
    """`model(...)`, compiled in beam search."""
    if not torch.compiler.is_compiling() and model.__dict__.pop("_fade_searching", False):
        stepper, asked = _stepper(kwargs), model.generation_config
        if stepper and stepper.compileable and stepper.captures and not asked.disable_compile:
            stepper.search = stepper.search or compiled_call(model, asked.compile_config)
            return stepper.search(*args, **kwargs)
    return model._call_impl(*args, **kwargs)


def _stepper(arguments: dict) -> Stepper | None:
    return getattr(arguments.get("past_key_values"), "stepper", None)
