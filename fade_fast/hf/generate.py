"""Every change to transformers, in one place. `install` makes them for a model, `remove` undoes them.

| hook | why | undone by |
|---|---|---|
| `_attn_implementation` of the model's configurations | attention reads compressed tokens | detach |
| two hooks around the model's forward (`entry.py`) | name the cache, refuse what would go wrong | detach |
| `model.generate` | checks the prompt, names the cache as this version does, remembers ids | detach |
| the same | makes a cache for `cache_implementation="fade"` | detach |
| `model.generate_batch`, `.init_continuous_batching` | these have a cache of their own: refused | detach |
| `model.get_compiled_call` | demotions and counters around the compiled step; captures the step | detach |
| `model._valid_auto_compile_criteria` | tells whether steps are compiled | detach |
| `model._beam_search_has_unfinished_sequences` | the next call is a step of a beam search | detach |
| `model._check_early_stop_heuristic` | the end of a search is known late (`search_stop.py`) | detach |
| `model._get_candidate_generator` | the next calls check drafts | detach |
| `model._compiled_call_impl` | compiles steps of beams and drafts, which generate() calls plainly | detach |
| `model.prepare_inputs_for_generation` (Phi-3) | keeps the cache where long RoPE switches | detach |
| `DeferredStopCheck.is_supported` | lets generate() run a step ahead on CUDA | the end of each generate() |
| functions named "fade" in transformers' registries (`attention.py`) | attention and masks | no need |

The hooks are tested with transformers 5.17 and 5.24. Names that begin with an underscore may change in any
version. If transformers never calls a hook that it should call, `_notice` warns once. The generated text is
then correct, but generation is slow.
"""

import contextlib
import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import transformers
from transformers import Cache, CompileConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation import utils as generation

from fade_ref.config import FadeConfig

from ..cache.cuda_graph import Captured
from ..cache.decode_graph import DecodeGraph
from ..cache.guard import without_autocast
from ..compile.inductor import row_products, uncaptured
from ..compile.pieces import in_pieces
from . import entry, versions
from .attention import NAME
from .cache import TieredKVCache
from .models import CACHE_NAME, cache_in, cache_parameter, named_cache, text_config
from .prompts import Prompt
from .search_stop import SearchStop
from .undisturbed import attention_names, restore_attention

#: Private method that only beam search calls. It calls the method once per step.
BEAM_SEARCH_HAS_UNFINISHED_SEQUENCES = "_beam_search_has_unfinished_sequences"
#: Private method that beam search calls before the former. It is told how long the texts are.
CHECK_EARLY_STOP_HEURISTIC = "_check_early_stop_heuristic"
#: Private method that greedy decoding and sampling call. It tells them whether to compile the steps.
VALID_AUTO_COMPILE_CRITERIA = "_valid_auto_compile_criteria"
#: Private method that only assisted decoding calls. It calls the method once, to get the drafter.
GET_CANDIDATE_GENERATOR = "_get_candidate_generator"
#: The method that compiles a step.
GET_COMPILED_CALL = "get_compiled_call"
FADE = "fade"  # the value of `cache_implementation` that asks for one of our caches
#: What makes such a cache. `create.py`, which imports this module, adds `create_cache`.
MAKERS: dict[str, Callable[..., TieredKVCache]] = {}


@dataclass
class Attachment:
    """The changes to one model. The model stores them, so a copy of the model has its own copy.

    Attributes:
        names: the original attention functions of the model's configurations. None if the attention could
            not be replaced.
        hooks: handles that remove the hooks around the model's forward.
        replaced: the attributes of the model that a hook replaced, by name.
        parameter: the name of the forward parameter that takes a cache.
    """

    names: list[tuple[PreTrainedConfig, str | None]] | None = None
    hooks: list = field(default_factory=list)
    replaced: dict = field(default_factory=dict)
    parameter: str | None = None


def install(model: PreTrainedModel) -> bool:
    """Install every hook of the table above on a model, once. Returns whether its attention is replaced."""
    held = model.__dict__.setdefault("_fade", Attachment())
    held.parameter = cache_parameter(type(model).forward)
    if not held.hooks:
        held.hooks = [
            model.register_forward_pre_hook(entry.before, with_kwargs=True),
            model.register_forward_hook(entry.after, with_kwargs=True),
        ]
    hooks = _methods()
    if model.config.model_type in SWITCHING:
        hooks["prepare_inputs_for_generation"] = _prepare_inputs
    for name, hook in hooks.items():
        before = model.__dict__.get(name)
        if not hasattr(type(model), name) or _is_hook(before):
            continue
        if before is not None:
            held.replaced[name] = before
        # A partial function can be pickled and copied with the model. A bound method cannot.
        model.__dict__[name] = functools.partial(hook, model)
    if model._compiled_call_impl is None:  # `model.compile()` sets this attribute
        model._compiled_call_impl = functools.partial(_call, model)
    dispatches = model._can_set_attn_implementation()
    if dispatches and model.config._attn_implementation != NAME:
        held.names = attention_names(model)
        model.set_attn_implementation(NAME)
    return dispatches


def remove(model: PreTrainedModel) -> None:
    """Undo `install`. If other code has replaced a hook since then, its replacement stays."""
    held = model.__dict__.pop("_fade", None)
    if held is None:
        return
    if held.names is not None:
        restore_attention(held.names)
    for hook in held.hooks:
        hook.remove()
    for name, hook in list(model.__dict__.items()):
        if _is_hook(hook):
            del model.__dict__[name]
            if name in held.replaced:
                model.__dict__[name] = held.replaced[name]
    model.__dict__.pop("_fade_searching", None)


def _is_hook(x) -> bool:
    return isinstance(x, functools.partial) and x.func in _HOOKS


# -- generate()


def generate(model: PreTrainedModel, *args, **kwargs):
    """Run `model.generate(...)`. With a tiered cache, check the prompt before and remember the ids after."""
    attachment = model.__dict__.get("_fade")
    call = attachment and attachment.replaced.get("generate")  # a hook of another library
    call = call or functools.partial(type(model).generate, model)
    name, cache = named_cache(kwargs)
    if kwargs.get("cache_implementation") == NAME:
        name, cache = CACHE_NAME, _asked(model, cache, kwargs)
        kwargs[name] = cache
    decode_graph = getattr(cache, "decode_graph", None)
    if not isinstance(decode_graph, DecodeGraph):
        return call(*args, **kwargs)
    # Users may use two names for the cache, but the installed version of transformers accepts only one.
    kwargs[CACHE_NAME] = kwargs.pop(name)
    prompt = Prompt.of(model, cache, args, kwargs)
    prompt.check()
    decode_graph.open_text(
        hooked=all(hasattr(type(model), name) for name in (VALID_AUTO_COMPILE_CRITERIA, GET_COMPILED_CALL)),
        texts=prompt.texts,
    )
    decode_graph.asked = prompt.options
    config = args[1] if len(args) > 1 else kwargs.get("generation_config") or model.generation_config
    before, stop = getattr(_searches, "now", None), SearchStop.of(decode_graph, config, kwargs)
    _searches.now, decode_graph.one_too_many = stop, stop.one_too_many
    cache.token_positions.expected = prompt.longest
    try:
        with _deferred_checks():
            output = call(*args, **kwargs)
    finally:
        cache.token_positions.expected, _searches.now = None, before
        decode_graph.close_text()
        if decode_graph.reordered:  # beam search moved the rows, so the remembered ids are wrong
            cache.seen.set(None)
    prompt.remember(output)
    _notice(decode_graph)
    return output


def _asked(model: PreTrainedModel, given: Cache | None, kwargs: dict) -> TieredKVCache:
    """A new cache for `generate(cache_implementation="fade")`, whose options leave `kwargs`.

    `cache_config` says which: the name of a preset, a `FadeConfig`, or a dict of its fields; `safe` without.
    """

    if given is not None:
        raise ValueError('cache_implementation="fade" makes a cache, and one is given: leave one of them out')
    del kwargs["cache_implementation"]
    config = kwargs.pop("cache_config", None) or "safe"
    return MAKERS[FADE](model, FadeConfig(**config) if isinstance(config, dict) else config)


_noticed: set[str] = set()  # warnings that were already given


def _notice(decode_graph: DecodeGraph) -> None:
    """Warn once if generate() did not call a hook that it should have called."""
    reached, missed = decode_graph.reached, None
    if not decode_graph.compileable or "declined" in reached:
        return
    if decode_graph.eager_steps > 2 and "step" not in reached:
        missed = f"steps are not captured: {decode_graph.eager_steps} decode steps came by none of our hooks"
    elif decode_graph.steps > 2 and decode_graph.runs_ahead and not reached & {"ahead", "drafts", "search"}:
        missed = "generate() waits for each step: it did not ask whether it may run ahead"
    if missed and missed not in _noticed:
        _noticed.add(missed)
        warnings.warn(
            f"{missed}. The text is right, but slow: transformers {transformers.__version__} is unlike the "
            f"versions that fade_fast was tested with; install {versions.NEWEST}, for example",
            stacklevel=4,
        )


def _refuse_batching(model: PreTrainedModel, *args, **kwargs):
    raise ValueError(
        "continuous batching has a cache of its own, and the attention of this model is fade_fast's: call "
        "fade_fast.detach(model) first"
    )


# -- compiled steps


def compiled_call(model: PreTrainedModel, compile_config: CompileConfig | None, plain=None):
    """Replace `model.get_compiled_call`: return a function that runs the compiled step of a tiered cache.

    The function also runs demotions and updates counters around the step. `plain` is the function that runs
    a step that is not compiled. If it is None, the model runs that step.
    """
    if plain is None:  # avoid `_call`, because it would compile the step again
        plain = model._call_impl if _is_hook(model._compiled_call_impl) else model
    made = functools.partial(type(model).get_compiled_call, model)

    @functools.cache
    def ours(cache: TieredKVCache) -> bool:
        """Return whether the cache belongs to this model. The attention refuses other caches."""
        return cache.model_config is text_config(model)

    @functools.cache
    def step_of(decode_graph: DecodeGraph):
        """Return the compiled step. It is a function of the graph id and the arguments."""

        ranks = decode_graph.layers[0].ranks

        def otherwise(why: str):
            decode_graph.captures = False  # later calls of generate() do not try again
            if ranks is None:  # Inductor captures what it can
                return made(compile_config)
            decode_graph.uncaptured = why
            return compiled

        # Inductor's own graphs know nothing of other processes: there, steps are captured here or not at all.
        alone = decode_graph.captures or ranks is not None
        config = uncaptured(compile_config or CompileConfig(), model.device) if alone else None
        if config and decode_graph.captures:  # Python calls each piece, but not in a replay
            config = in_pieces(config, torch.ops.fade.step.default)
        compiled = row_products()(made(config or compile_config))
        if not config or not decode_graph.captures:
            return lambda graph_id, arguments, variant: compiled(**arguments)
        together = {} if ranks is None else dict(agree=functools.partial(ranks.agree, device=model.device))
        return Captured(
            compiled,
            otherwise,
            _must_clone,
            counts=decode_graph.counts,
            ahead=decode_graph.reading_more,
            **together,
        )

    def call(*args, **kwargs):
        cache = named_cache(kwargs)[1]
        if not isinstance(cache, TieredKVCache):
            return made(compile_config)(*args, **kwargs)
        decode_graph = cache.decode_graph
        decode_graph.reached.add("step")
        tokens = kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        usual = not args and tokens is not None and ours(cache)
        if usual and tokens.shape[1] == 1 and decode_graph.drafts() is not None:
            # The last step of a text has no drafts. This one step does not justify a graph for one token.
            usual, decode_graph.undrafted = decode_graph.undrafted, True
        with cache.guard:
            with without_autocast():
                ready = usual and decode_graph.begin(tokens.shape[1], tokens.shape[0])
            if not ready:
                return plain(*args, **kwargs)
            new = tokens.shape[1]
            if model.config.return_dict:  # assisted decoding leaves it out; then its steps are as others
                kwargs.setdefault("return_dict", True)
            if new > 1:
                kwargs = _of_any_length(kwargs, tokens)
            step = step_of(decode_graph)
            try:
                output = step(decode_graph.graph_id, kwargs, decode_graph.variant)
            except BaseException:
                decode_graph.active = False
                raise
            decode_graph.end(new)
            decode_graph.replays = getattr(step, "replays", 0)
            return output

    return call


def _must_clone(output) -> bool:
    """Return whether generate() may keep tensors of a step's output. It copies the logits itself."""
    return any(name != "logits" and not isinstance(x, Cache) for name, x in output.items())


def _of_any_length(arguments: dict, tokens: torch.Tensor) -> dict:
    """Change the arguments of a step of several tokens [B, q], so that one compiled graph serves any q."""
    batch, new = tokens.shape[:2]
    # Without a mask, the model would make one whose size depends on the length of the cache.
    if arguments.get("attention_mask") is None:
        arguments = arguments | {"attention_mask": _causal(batch, new, tokens.device)}
    if arguments.get("logits_to_keep") == new:
        arguments = arguments | {"logits_to_keep": 0}  # 0 keeps all logits, and is the same number for any q
    for x in arguments.values():
        for dim, length in enumerate(x.shape if isinstance(x, torch.Tensor) else ()):
            if length == new:
                torch._dynamo.maybe_mark_dynamic(x, dim)
    return arguments


@functools.lru_cache(maxsize=64)
def _causal(batch: int, new: int, device: torch.device) -> torch.Tensor:
    """Return the causal mask of `new` tokens, bool [B, 1, q, q]. It is cached, so no step allocates it."""
    with without_autocast():
        return torch.ones(batch, 1, new, new, dtype=torch.bool, device=device).tril()


# -- whether there is another step


_ahead = threading.Lock()  # protects `_deferring` and the replaced method
_deferring = 0  # number of running generate() calls


@contextlib.contextmanager
def _deferred_checks() -> Iterator[None]:
    """Inside this context, generate() checks one step late whether a text has ended.

    This applies only to a tiered cache that captures steps. Without it, generate() waits for each step before
    it prepares the next step, and the GPU waits for Python: half a millisecond of nine on an H100.
    Transformers can run one step ahead and undo it with `crop`, but it does this on one kind of device only.
    For other caches, transformers decides.
    """
    global _deferring
    late = getattr(generation, "DeferredStopCheck", None)
    if late is None:
        yield
        return
    with _ahead:
        _deferring += 1
        if _deferring == 1:
            _is_supported.theirs = late.__dict__["is_supported"]
            late.is_supported = staticmethod(_is_supported)
    try:
        yield
    finally:
        with _ahead:
            _deferring -= 1
            if not _deferring:
                late.is_supported = _is_supported.theirs


def _is_supported(device, cache, *args, is_assistant=False, **kwargs):
    """Return the answer of transformers. For our caches, the answer is yes if steps are captured."""
    decode_graph = getattr(cache, "decode_graph", None)
    if isinstance(decode_graph, DecodeGraph):
        decode_graph.reached.add("ahead")
        if decode_graph.runs_ahead:
            return not is_assistant
    return _is_supported.theirs.__func__(device, cache, *args, is_assistant=is_assistant, **kwargs)


def _compiles(model: PreTrainedModel, model_kwargs: dict, generation_config) -> bool:
    """Return the answer of transformers, and store it in the cache: eager steps do not run ahead."""
    answer = getattr(type(model), VALID_AUTO_COMPILE_CRITERIA)(model, model_kwargs, generation_config)
    if decode_graph := _graph_of(model_kwargs):
        decode_graph.compiled = answer
        if not answer:
            decode_graph.reached.add("declined")
    return answer


# -- beam search and assisted decoding, which generate() does not compile


_searches = threading.local()  # `now`: the `SearchStop` of the generate() of this thread


def _unfinished(model: PreTrainedModel, *args, **kwargs) -> bool:
    """Return the answer of transformers, perhaps a step late. If it is true, the next step belongs to a beam
    search.
    """
    answer = getattr(type(model), BEAM_SEARCH_HAS_UNFINISHED_SEQUENCES)(*args, **kwargs)
    stop = getattr(_searches, "now", None)
    model._fade_searching = bool(answer) if stop is None else stop.goes_on(answer)
    return model._fade_searching


def _heuristic(model: PreTrainedModel, *args, **kwargs) -> torch.Tensor:
    """Return the answer of transformers, and remember how long the texts are and may become."""
    if stop := getattr(_searches, "now", None):
        now, most = kwargs.get("cur_len"), kwargs.get("max_length")
        stop.lengths = (now, most) if isinstance(now, int) and isinstance(most, int) else None
    return getattr(type(model), CHECK_EARLY_STOP_HEURISTIC)(*args, **kwargs)


def _drafter(model: PreTrainedModel, generation_config, *args, **kwargs):
    """Return the object that drafts tokens. While it exists, the steps of the cache check its drafts."""
    made = getattr(type(model), GET_CANDIDATE_GENERATOR)(model, generation_config, *args, **kwargs)
    asked = kwargs.get("model_kwargs", {})
    if decode_graph := _graph_of(asked):
        cache = named_cache(asked)[1]
        length = cache.get_seq_length()
        if length:  # transformers would append the prompt again; it does this with a DynamicCache, too
            warnings.warn(
                "assisted decoding reads the whole prompt again: "
                f"the {length} tokens that the cache holds are dropped first. The text is right; to save "
                "time, decode without drafts",
                stacklevel=2,
            )
            cache.reset()
        decode_graph.drafts = weakref.ref(made)
        decode_graph.undrafted = False
        decode_graph.reached.add("drafts")
    return made


def _call(model: PreTrainedModel, *args, **kwargs):
    """Run `model(...)`. The step is compiled in beam search and in assisted decoding."""
    if not torch.compiler.is_compiling():
        decode_graph, searching = _graph_of(kwargs), model.__dict__.pop("_fade_searching", False)
        if decode_graph and searching:
            decode_graph.beams.continue_search()
        if decode_graph and (searching or decode_graph.drafts() is not None):
            asked = decode_graph.asked
            wanted = decode_graph.captures and not asked.get("disable_compile")
            decode_graph.reached.add("search" if wanted else "declined")
            if wanted and decode_graph.compileable:
                if decode_graph.search is None:
                    decode_graph.search = compiled_call(model, asked.get("compile_config"), model._call_impl)
                return decode_graph.search(*args, **kwargs)
    return model._call_impl(*args, **kwargs)


def _graph_of(arguments: dict) -> DecodeGraph | None:
    """Return the `DecodeGraph` of the tiered cache in the arguments. None if there is no tiered cache."""
    decode_graph = getattr(named_cache(arguments)[1], "decode_graph", None)
    return decode_graph if isinstance(decode_graph, DecodeGraph) else None


# -- models that drop their cache

#: Models that drop their cache permanently when the text reaches the length at which long RoPE switches.
SWITCHING = ("phi3", "phimoe", "phi4_multimodal")


def _prepare_inputs(model, input_ids, *args, **kwargs):
    """Prepare the inputs of a step of such a model. The model keeps the same cache after the switch."""
    prepare = type(model).prepare_inputs_for_generation
    length = getattr(model.config, "original_max_position_embeddings", None)
    cache = cache_in((*args, *kwargs.values()))
    if not isinstance(cache, TieredKVCache) or length is None or input_ids.shape[1] <= length:
        return prepare(model, input_ids, *args, **kwargs)
    if cache.get_seq_length() <= length:  # the keys use the short frequencies, so compute all keys again
        cache.reset()
        kwargs["next_sequence_length"] = None
    return GenerationMixin.prepare_inputs_for_generation(model, input_ids, *args, **kwargs)


def _methods() -> dict[str, Callable]:
    """Return the hooks that replace methods of a model, by method name."""
    return {
        "generate": generate,
        "generate_batch": _refuse_batching,
        "init_continuous_batching": _refuse_batching,
        GET_COMPILED_CALL: compiled_call,
        BEAM_SEARCH_HAS_UNFINISHED_SEQUENCES: _unfinished,
        CHECK_EARLY_STOP_HEURISTIC: _heuristic,
        VALID_AUTO_COMPILE_CRITERIA: _compiles,
        GET_CANDIDATE_GENERATOR: _drafter,
    }


_HOOKS = {*_methods().values(), _call, _prepare_inputs}
