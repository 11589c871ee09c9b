"""How generate() calls a model that has a tiered cache: prompts as they are, steps compiled and captured."""

import functools
import types
import warnings
import weakref

import torch
from transformers import CompileConfig, PreTrainedModel
from transformers.generation import utils as generation

from .capture import Captured
from .guard import plainly
from .kernels.compile import row_products, uncaptured
from .models import text_config
from .stepper import Stepper

#: What generate() asks in beam search, and nowhere else: after each step, whether there will be another.
QUESTION = "_beam_search_has_unfinished_sequences"
#: What it asks before it samples or decodes greedily: whether to compile the steps.
CRITERIA = "_valid_auto_compile_criteria"
#: What it asks for once in assisted decoding, and nowhere else: what drafts tokens.
DRAFTER = "_get_candidate_generator"


def attach(model: PreTrainedModel) -> None:
    """Let generate() compile `model` with the surroundings that a tiered cache needs, however it decodes."""
    _defer_checks()
    model.get_compiled_call = types.MethodType(compiled_call, model)
    if hasattr(type(model), QUESTION):
        setattr(model, QUESTION, types.MethodType(_unfinished, model))
    if hasattr(type(model), CRITERIA):
        setattr(model, CRITERIA, types.MethodType(_compiles, model))
    if hasattr(type(model), DRAFTER):
        setattr(model, DRAFTER, types.MethodType(_drafter, model))
    if model._compiled_call_impl is None:  # what `model.compile()` sets
        model._compiled_call_impl = types.MethodType(_call, model)


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`."""
    for name in ("get_compiled_call", QUESTION, CRITERIA, DRAFTER, "_fade_searching"):
        model.__dict__.pop(name, None)
    if getattr(model._compiled_call_impl, "__func__", None) is _call:
        del model._compiled_call_impl


def compiled_call(model: PreTrainedModel, compile_config: CompileConfig | None, plain=None):
    """What generate() gets for `model.get_compiled_call`: the compiled step, with its surroundings.

    `plain`: what runs a step that is not compiled; None for the model.
    """
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
        if usual and tokens.shape[1] == 1 and stepper.drafts() is not None:
            # The last step of a text has no drafts: by itself it is not worth a graph of one column.
            usual, stepper.undrafted = stepper.undrafted, True
        with stepper.layers[0].guard:
            with plainly():
                ready = usual and stepper.begin(tokens.shape[1], tokens.shape[0])
            if not ready:
                return (plain or model)(*args, **kwargs)
            new = tokens.shape[1]
            if new > 1:
                kwargs = _of_any_length(kwargs, tokens)
            try:
                output = step_of(stepper)(stepper.epoch, kwargs)
            except BaseException:
                stepper.active = False
                raise
            stepper.end(new)
            return output

    return call


def _of_any_length(arguments: dict, tokens: torch.Tensor) -> dict:
    """The arguments of a step of several tokens [B, q], for a graph that is compiled once for any q."""
    batch, new = tokens.shape[:2]
    if arguments.get("attention_mask") is None:  # or the model would make one, by the length of the cache
        arguments = arguments | {"attention_mask": _causal(batch, new, tokens.device)}
    if arguments.get("logits_to_keep") == new:
        arguments = arguments | {"logits_to_keep": 0}  # all, by a number that is the same for any q
    for x in arguments.values():
        for dim, length in enumerate(x.shape if isinstance(x, torch.Tensor) else ()):
            if length == new:
                torch._dynamo.maybe_mark_dynamic(x, dim)
    return arguments


@functools.lru_cache(maxsize=64)
def _causal(batch: int, new: int, device: torch.device) -> torch.Tensor:
    """What `new` columns see of each other, bool [B, 1, q, q]; kept, so that no step allocates it."""
    with plainly():
        return torch.ones(batch, 1, new, new, dtype=torch.bool, device=device).tril()


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


# -- beam search and assisted decoding, which generate() does not compile


def _unfinished(model: PreTrainedModel, *args, **kwargs) -> bool:
    """The answer of transformers; the next step, if there is one, is a search's."""
    model._fade_searching = bool(getattr(type(model), QUESTION)(*args, **kwargs))
    return model._fade_searching


def _drafter(model: PreTrainedModel, generation_config, *args, **kwargs):
    """What drafts tokens; as long as it lives, the steps of the cache check them."""
    made = getattr(type(model), DRAFTER)(model, generation_config, *args, **kwargs)
    asked = kwargs.get("model_kwargs", {})
    if stepper := _stepper(asked):
        cache = asked["past_key_values"]
        length = cache.get_seq_length()
        if length:  # transformers would append the prompt, of a DynamicCache, too
            warnings.warn(
                "assisted decoding reads the whole prompt again: "
                f"the {length} tokens that the cache holds are dropped first",
                stacklevel=2,
            )
            cache.reset()
        stepper.drafts, stepper.asked = weakref.ref(made), generation_config
        stepper.undrafted = False
    return made


def _call(model: PreTrainedModel, *args, **kwargs):
    """`model(...)`, compiled in beam search and in assisted decoding."""
    if not torch.compiler.is_compiling():
        stepper, asked = _stepper(kwargs), None
        if model.__dict__.pop("_fade_searching", False):
            asked = model.generation_config
        elif stepper and stepper.drafts() is not None:
            asked = stepper.asked
        wanted = asked is not None and not asked.disable_compile
        if wanted and stepper and stepper.compileable and stepper.captures:
            stepper.search = stepper.search or compiled_call(model, asked.compile_config, model._call_impl)
            return stepper.search(*args, **kwargs)
    return model._call_impl(*args, **kwargs)


def _stepper(arguments: dict) -> Stepper | None:
    return getattr(arguments.get("past_key_values"), "stepper", None)
