"""How generate() calls a model that has a tiered cache: prompts as they are, steps compiled and captured."""

import functools
import types

import torch
from transformers import CompileConfig, PreTrainedModel
from transformers.generation import utils as generation

from .capture import Captured
from .kernels.compile import row_products, uncaptured
from .models import text_config
from .stepper import Stepper

#: What generate() asks in beam search, and nowhere else: after each step, whether there will be another.
QUESTION = "_beam_search_has_unfinished_sequences"
#: What it asks before it samples or decodes greedily: whether to compile the steps.
CRITERIA = "_valid_auto_compile_criteria"


def attach(model: PreTrainedModel) -> None:
    """Let generate() compile `model` with the surroundings that a tiered cache needs, in beam search, too."""
    _defer_checks()
    model.get_compiled_call = types.MethodType(compiled_call, model)
    if hasattr(type(model), QUESTION):
        setattr(model, QUESTION, types.MethodType(_unfinished, model))
    if hasattr(type(model), CRITERIA):
        setattr(model, CRITERIA, types.MethodType(_compiles, model))
    if model._compiled_call_impl is None:  # what `model.compile()` sets
        model._compiled_call_impl = types.MethodType(_call, model)


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`."""
    for name in ("get_compiled_call", QUESTION, CRITERIA, "_fade_searching"):
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
        compiled = row_products()(made(config or compile_config))
        return Captured(compiled, otherwise) if config else lambda epoch, arguments: compiled(**arguments)

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


# -- whether there is another step


def _defer_checks() -> None:
    """Let generate() ask one step late whether a text is over, if its cache is tiered and captures steps.

    Otherwise it waits for each step before it prepares the next, and the GPU then waits for Python: half a
    millisecond of nine on an H100. Transformers can run a step ahead, and undo it by `crop`, but does so on
    one kind of device only; other caches are left to it.
    """
    late = getattr(generation, "DeferredStopCheck", None)
    if late is None or hasattr(late.is_supported, "theirs"):
        return
    theirs = late.is_supported

    def is_supported(device, cache, *args, is_assistant=False, **kwargs):
        stepper = getattr(cache, "stepper", None)
        if isinstance(stepper, Stepper) and stepper.runs_ahead:
            return not is_assistant
        return theirs(device, cache, *args, is_assistant=is_assistant, **kwargs)

    is_supported.theirs = theirs
    late.is_supported = staticmethod(is_supported)


def _compiles(model: PreTrainedModel, model_kwargs: dict, generation_config) -> bool:
    """The answer of transformers, which the cache is told: eager steps do not run ahead."""
    answer = getattr(type(model), CRITERIA)(model, model_kwargs, generation_config)
    if stepper := _stepper(model_kwargs):
        stepper.compiled = answer
    return answer


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
