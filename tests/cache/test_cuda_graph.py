"""Captured steps: what is replayed, and what is not. Where there is no GPU, a graph is played by Python."""

import contextlib
import copy
import gc
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig
from transformers.generation import utils as generation
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

import fade_fast
from fade_fast.cache import cuda_graph, decode_graph
from fade_fast.cache.cuda_graph import Captured
from fade_fast.cache.decode_graph import MAX_DECODE_TOKENS
from fade_fast.compile import pieces
from fade_fast.compile.inductor import uncaptured
from fade_fast.hf import generate
from fade_fast.hf.models import CACHE_NAME
from fade_fast.saved.memory import storage_bytes
from fade_ref.config import FadeConfig

from ..marks import part, slow_but
from ..models import compressed_tokens, drafts, new_cache, predictable, prompt, tiny_llama
from .test_decode_graph import CAPTURED, CONFIGS, REPLAYED, compiled, eager

CUDA = torch.device("cuda")


class Tape:
    """What `cuda_graph.record` makes, without a GPU: a replay runs the call again, on the same inputs.

    As with a graph, recording computes nothing, and a replay leaves its output where the last one was.
    """

    def __init__(self, call, arguments):
        self.call, self.arguments, self.replays = call, arguments, 0
        self.output, self.tensors = CausalLMOutputWithPast(), {}

    def pool(self) -> int:
        return id(self)

    def replay(self) -> None:
        self.replays += 1
        for name, x in self.call(**self.arguments).items():
            if isinstance(x, torch.Tensor):
                x = self.tensors.setdefault(name, torch.empty_like(x)).copy_(x)
            self.output[name] = x


class Tapes(list):
    """The tapes that were made. With an `error`, calls are refused, and counted."""

    error, refused = None, 0

    def record(self, call, pool=None, **arguments):
        if self.error:
            self.refused += 1
            raise self.error
        assert pool in {None, *map(id, self)}
        self.append(Tape(call, arguments))
        return self[-1], self[-1].output


@pytest.fixture
def tapes(monkeypatch):
    """Captures on the CPU; the tapes that were made."""
    made, plain = Tapes(), CompileConfig(backend="aot_eager", mode=None)
    monkeypatch.setattr(cuda_graph, "record", made.record)
    monkeypatch.setattr(generate, "uncaptured", lambda config, device: plain)
    torch._dynamo.reset()
    return made


def hold_the_same(cache, other):
    assert torch.equal(cache.token_positions.logical, other.token_positions.logical)
    for ours, theirs in zip(cache.tiered, other.tiered):
        for a, b in zip(ours.decode_all(), theirs.decode_all()):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name, padded", slow_but(REPLAYED, ("int4, int2, evict", False)))
def test_replayed_steps_equal_eager_steps(tapes, name, padded):
    model = tiny_llama(dtype=torch.float64)
    inputs = prompt(30, batch=2, pads=(0, 9) if padded else ())
    theirs, cache = new_cache(model, CONFIGS[name]), new_cache(model, CONFIGS[name])
    expected = eager(model, theirs, inputs, new=40)
    assert torch.equal(compiled(model, cache, inputs, new=40), expected)
    replays = sum(tape.replays for tape in tapes)
    # Of 39 steps, one an epoch is run for what it compiles.
    assert replays > 20 and replays + len(tapes) <= 39
    assert name == "off" or compressed_tokens(cache) > 0
    hold_the_same(cache, theirs)


def test_layers_that_are_alike_are_compiled_once(tapes, monkeypatch):
    """A captured step is compiled in the pieces between its attention operators."""
    graphs, compile_one = [], pieces._compile
    monkeypatch.setattr(pieces, "_compile", lambda *args: graphs.append(args) or compile_one(*args))
    model = tiny_llama(layers=5, dtype=torch.float64)
    inputs = prompt(30, batch=2)
    theirs, cache = new_cache(model, CONFIGS["int4"]), new_cache(model, CONFIGS["int4"])
    expected = eager(model, theirs, inputs, new=12)
    assert torch.equal(compiled(model, cache, inputs, new=12), expected)
    assert len(graphs) == 3 and sum(tape.replays for tape in tapes) > 4
    hold_the_same(cache, theirs)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["off", "int4", "evict"])
@pytest.mark.parametrize(
    "options", [{}, dict(do_sample=True), dict(num_beams=2)], ids=["greedy", "sampled", "beams"]
)
def test_a_plain_generate_is_captured_on_a_gpu(name, options):
    """By the profiler: nearly every step is the launch of one CUDA graph."""
    model, new = tiny_llama(dtype=torch.bfloat16).cuda(), 60
    inputs = {k: v.cuda() for k, v in prompt(120, batch=2).items()}
    configs = dict(off=CONFIGS["off"], int4=FadeConfig(), evict=FadeConfig(int4_budget=64))
    cache = new_cache(model, configs[name])
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with warnings.catch_warnings(), torch.profiler.profile(activities=activities) as profile:
        warnings.filterwarnings("error", message=".*captured.*")
        model.generate(
            **inputs,
            **{CACHE_NAME: cache},
            max_new_tokens=new,
            min_new_tokens=new,
            **dict(do_sample=False) | options,
        )
    launches = sum(e.count for e in profile.key_averages() if e.key == "cudaGraphLaunch")
    assert cache.decode_graph.replays > new - 10 and launches >= cache.decode_graph.replays
    assert name == "off" or compressed_tokens(cache) > 0


def test_outputs_that_generate_keeps_are_those_of_their_own_step(tapes):
    model, inputs = tiny_llama(layers=1, dtype=torch.float64), prompt(30, batch=2)
    asked = dict(return_dict_in_generate=True, output_hidden_states=True, output_logits=True)
    expected = eager(model, new_cache(model, CONFIGS["int4"]), inputs, **asked)
    found = compiled(model, new_cache(model, CONFIGS["int4"]), inputs, **asked)
    assert sum(tape.replays for tape in tapes) > 10
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_samples_are_replayed(tapes):
    model, inputs = tiny_llama(dtype=torch.float64), prompt(30, batch=2)
    found = []
    for run in (eager, compiled):
        torch.manual_seed(0)
        found.append(run(model, new_cache(model, CONFIGS["int4"]), inputs, do_sample=True, top_k=20))
    assert torch.equal(*found) and sum(tape.replays for tape in tapes) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name, padded", slow_but(part("beams", CAPTURED), ("evict", False)))
def test_beam_search_is_captured(tapes, name, padded):
    """Transformers would run it uncompiled. Rows are reordered before each step, also by whole demotions."""
    model = tiny_llama(dtype=torch.float64)
    inputs = prompt(30, batch=2, pads=(0, 9) if padded else ())
    options = dict(num_beams=3, length_penalty=0.0, new=40)
    theirs, cache = new_cache(model, CONFIGS[name]), new_cache(model, CONFIGS[name])
    expected = eager(model, theirs, inputs, **options)
    assert not tapes
    cache.decode_graph.compileable = True
    orders = []
    real = cache.decode_graph._reorder
    cache.decode_graph._reorder = lambda index, *what: (orders.append(index.tolist()), real(index, *what))
    assert torch.equal(eager(model, cache, inputs, **options), expected)
    assert sum(tape.replays for tape in tapes) > 20
    assert any(order != sorted(order) or len(set(order)) < 6 for order in orders)  # rows did move
    assert name == "off" or compressed_tokens(cache) > 0
    hold_the_same(cache, theirs)


class Copies(TorchDispatchMode):
    """Watches casts, single copies, and the dtypes of copies of several tensors."""

    def __init__(self):
        super().__init__()
        self.casts, self.single, self.together = 0, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._foreach_copy_.default:
            self.together.append({x.dtype for tensors in args[:2] for x in tensors})
        self.casts += function is torch.ops.aten._to_copy.default
        self.single += function is torch.ops.aten.copy_.default
        return function(*args, **kwargs or {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "int4, int2, evict", "h2o"])
def test_tensors_are_reordered_without_a_cast_or_a_copy_each(tapes, name):
    """On a GPU each is a kernel: transformers gives rows as int32, and only tensors of one dtype are copied
    by one kernel."""
    model = tiny_llama(dtype=torch.float64)
    cache = new_cache(model, CONFIGS[name])
    compiled(model, cache, prompt(30, batch=2), new=30)
    assert compressed_tokens(cache) > 0 and not cache.decode_graph._stale
    cache.seen.set(None)  # a beam search does not wait for ids
    with Copies() as seen:
        cache.reorder_cache(torch.tensor([1, 0], dtype=torch.int32))
    assert seen.casts == 1 and seen.single == 1  # of the index, and of the timeline
    assert all(len(dtypes) == 1 for dtypes in seen.together)
    assert len(cache.tiered) <= len(seen.together) < 4 * len(cache.tiered)


DRAFTED = [(name, False) for name in ("int4", "evict", "int4, int2, evict", "off", "h2o")]
DRAFTED.append(("evict", True))


@pytest.mark.slow
@pytest.mark.parametrize("name, padded", DRAFTED)
def test_assisted_decoding_is_captured(tapes, name, padded):
    """Transformers would run it uncompiled. Two graphs, for a column and for any number; where a policy
    counts attention, steps of several tokens stay eager."""
    model, inputs = predictable(tiny_llama(dtype=torch.float64)), prompt(40, pads=(9,) if padded else ())
    widths, refused = [], []
    theirs, cache = new_cache(model, CONFIGS[name]), new_cache(model, CONFIGS[name])
    text = eager(model, new_cache(model, CONFIGS[name]), inputs, new=80)
    with drafts(model, text) as options:
        expected = eager(model, theirs, inputs, new=80, **options)
    assert not tapes
    cache.decode_graph.compileable = True
    begin, crop = cache.decode_graph.begin, cache.decode_graph.crop

    def watched(new, batch):
        ready = begin(new, batch)
        widths.append((new, ready))
        return ready

    cache.decode_graph.begin = watched
    cache.decode_graph.crop = lambda n: (refused.append(n), crop(n))
    counters.clear()
    with drafts(model, text) as options:
        assert torch.equal(eager(model, cache, inputs, new=80, **options), expected)
    counting = cache.tiered[0].observer is not None
    several = [ready for new, ready in widths if 1 < new <= MAX_DECODE_TOKENS]
    assert len(several) > 10 and all(ready != counting for ready in several)
    assert len(widths) < 60 and len(set(refused)) > 2  # drafts were accepted, and refused
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]
    assert counting or sum(tape.replays for tape in tapes) > 1
    assert name == "off" or compressed_tokens(cache) > 0
    hold_the_same(cache, theirs)


@pytest.mark.slow
def test_the_last_step_of_a_text_is_not_compiled_for_itself(tapes):
    """It has no drafts, as the only one where all others have."""
    model, inputs = predictable(tiny_llama(dtype=torch.float64)), prompt(40)
    theirs, cache = new_cache(model, CONFIGS["int4"]), new_cache(model, CONFIGS["int4"])
    text = eager(model, theirs, inputs, new=42)
    cache.decode_graph.compileable = True
    for turn in range(2):
        counters.clear()
        with drafts(model, text, least=2) as options:
            assert torch.equal(eager(model, cache, inputs, new=42, **options), text)
        assert cache.decode_graph.undrafted and counters["stats"]["unique_graphs"] == 1 - turn
        assert sum(tape.replays for tape in tapes) > turn
        cache.reset()


@pytest.mark.slow
def test_a_model_drafts_for_another(tapes):
    """Which has a cache of its own."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(40)
    options = dict(assistant_model=tiny_llama(dtype=torch.float64, layers=1), new=40)
    theirs, cache = new_cache(model, CONFIGS["int4"]), new_cache(model, CONFIGS["int4"])
    expected = eager(model, theirs, inputs, **options)
    cache.decode_graph.compileable = True
    assert torch.equal(eager(model, cache, inputs, **options), expected)
    assert sum(tape.replays for tape in tapes) > 5
    hold_the_same(cache, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "evict"])
def test_a_second_turn_with_drafts_begins_anew(tapes, name):
    """Transformers feeds the whole text, whatever the cache holds: it must not come to hold it twice."""
    model, inputs = predictable(tiny_llama(dtype=torch.float64)), prompt(40)
    for compileable in (False, True):
        caches = [new_cache(model, CONFIGS[name]) for _ in range(2)]
        for cache in caches:
            cache.decode_graph.compileable = compileable
        turn = eager(model, caches[0], inputs)
        turn = dict(input_ids=turn, attention_mask=torch.ones_like(turn))
        expected = eager(model, caches[1], turn, prompt_lookup_num_tokens=3)
        with pytest.warns(UserWarning, match="the 63 tokens that the cache holds are dropped first"):
            found = eager(model, caches[0], turn, prompt_lookup_num_tokens=3)
        assert torch.equal(found, expected) and caches[0].get_seq_length() == 87
        hold_the_same(*caches)


@pytest.mark.slow
def test_drafts_are_compiled_only_where_generate_checks_them(tapes):
    """Not where that is switched off, nor short steps of one's own afterwards."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(40)
    cache = new_cache(model, CONFIGS["int4"])
    cache.decode_graph.compileable = True
    lookup = dict(prompt_lookup_num_tokens=3)
    out = eager(model, cache, inputs, **lookup, disable_compile=True)
    assert not tapes and cache.decode_graph.search is None
    cache.reset()
    assert torch.equal(eager(model, cache, inputs, **lookup), out)
    gc.collect()  # the generator of drafts may be part of a cycle
    assert tapes and cache.decode_graph.drafts() is None
    replays = sum(tape.replays for tape in tapes)
    with torch.no_grad():
        model(input_ids=out[:, -4:], **{CACHE_NAME: cache})
    assert sum(tape.replays for tape in tapes) == replays and cache.decode_graph.search is None


class Stamp:
    """A CUDA event, where there is no GPU."""

    def __init__(self, **kwargs):
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def undone(monkeypatch):
    """generate() runs ahead on the CPU, too; how many steps each call took back."""
    found, real = [], generation.DeferredStopCheck.finish
    monkeypatch.setattr(decode_graph, "AHEAD_ON", {"cpu"})
    monkeypatch.setattr(torch, "Event", Stamp)
    monkeypatch.setattr(
        generation.DeferredStopCheck, "finish", lambda self: found.append(real(self)) or found[-1]
    )
    return found


def ending(model, config, inputs, at):
    """Tokens that end each row of a greedy text, the last of them `at` new ones after its prompt."""
    out = eager(model, new_cache(model, config), inputs, new=at)[:, inputs["input_ids"].shape[1] :]
    ends = sorted({row[i] for row, i in zip(out.tolist(), (at - 5, at - 1))})
    return dict(eos_token_id=ends)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, padded",
    slow_but(
        [(name, False) for name in CONFIGS] + [(name, True) for name in ("int4", "evict", "h2o")],
        ("h2o", True),
    ),
)
def test_a_step_too_many_leaves_no_trace(tapes, undone, name, padded, at=18):
    """Run ahead, a text that has ended has had one more step: also where that demoted, evicted, counted."""
    model = tiny_llama(dtype=torch.float64)
    inputs = prompt(30, batch=2, pads=(0, 9) if padded else ())
    options = ending(model, CONFIGS[name], inputs, at)
    theirs, cache = new_cache(model, CONFIGS[name]), new_cache(model, CONFIGS[name])
    expected = eager(model, theirs, inputs, new=40, **options)
    assert not undone and expected.shape[1] < 70
    assert torch.equal(compiled(model, cache, inputs, new=40, **options), expected)
    waits = name in ("snapkv", "tova")  # what they count is large, and not kept twice
    assert undone == ([] if waits else [1])
    assert cache.get_seq_length() == theirs.get_seq_length() == expected.shape[1] - 1
    for layer in (*cache.tiered, *theirs.tiered):  # the step may have demoted what was due
        layer.compact()
    hold_the_same(cache, theirs)
    for ours, other in zip(cache.tiered, theirs.tiered):
        for a, b in zip(ours.observed(), other.observed()) if ours.observer else ():
            for field in a:
                n = min(a[field].shape[-1], b[field].shape[-1], ours.dense.count)
                torch.testing.assert_close(a[field][..., :n], b[field][..., :n], rtol=1e-9, atol=1e-9)
    counts = bool(cache.tiered[0].observer) and not waits
    if name != "off":  # whose compiled steps have more room
        assert cache.memory().allocated == theirs.memory().allocated + storage_bytes(cache.decode_graph.kept)
    assert bool(cache.decode_graph.kept) == counts
    again = dict(input_ids=torch.cat((expected, inputs["input_ids"][:, :7].clamp_min(1)), dim=1))
    again["attention_mask"] = torch.cat(
        (inputs["attention_mask"], torch.ones(2, again["input_ids"].shape[1] - 30).long()), dim=1
    )
    expected = eager(model, theirs, again, new=9)
    assert torch.equal(compiled(model, cache, again, new=9), expected)
    hold_the_same(cache, theirs)


@pytest.mark.slow
def test_a_text_that_ends_by_its_length_has_no_step_too_many(tapes, undone):
    model, inputs = tiny_llama(dtype=torch.float64), prompt(30, batch=2)
    cache, theirs = new_cache(model, CONFIGS["h2o"]), new_cache(model, CONFIGS["h2o"])
    assert torch.equal(compiled(model, cache, inputs), eager(model, theirs, inputs))
    assert undone == [0] and not any(layer.record_past for layer in cache.layers)


@pytest.mark.slow
def test_eager_steps_do_not_run_ahead(tapes, undone):
    """What they count could not be put back."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(30, batch=2)
    for name in ("int4", "h2o"):
        cache = new_cache(model, CONFIGS[name])
        compiled(model, cache, inputs, new=4)
        cache.reset()
        compiled(model, cache, inputs, new=40, disable_compile=True)
        assert undone == [0] and not tapes[2:]
        undone.clear(), tapes.clear()


@pytest.mark.slow
def test_a_step_too_many_finds_room(tapes, undone):
    """Also where the text fills the room that was asked for."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(30, batch=2)
    options = ending(model, CONFIGS["int4"], inputs, 20)
    expected = eager(model, new_cache(model, CONFIGS["int4"]), inputs, new=40, **options)
    cache = fade_fast.create_cache(model, CONFIGS["int4"], max_length=expected.shape[1] - 1)
    assert torch.equal(compiled(model, cache, inputs, new=40, **options), expected)
    assert undone == [1] and cache.get_seq_length() == expected.shape[1] - 1


@pytest.mark.slow
def test_streamed_tokens_are_those_of_the_text(tapes, undone):
    class Heard(BaseStreamer):
        def put(self, value):
            heard.extend(value.flatten().tolist())

        def end(self):
            heard.append("end")

    model, inputs = tiny_llama(dtype=torch.float64), prompt(30)
    options = ending(model, CONFIGS["int4"], inputs, 20)
    for new in (40, 10):
        heard = []
        out = compiled(model, new_cache(model, CONFIGS["int4"]), inputs, new=new, streamer=Heard(), **options)
        assert heard == [*out[0].tolist(), "end"]
    assert undone == [1, 0]


def test_other_caches_are_asked_as_before(undone):
    model = tiny_llama()
    fade_fast.create_cache(model)
    asked = dict(cache_is_returned=True, is_assistant=False)
    supported = generation.DeferredStopCheck.is_supported
    assert not supported(torch.device("cuda"), DynamicCache(), **asked)
    assert supported(torch.device("mps"), DynamicCache(), **asked)
    eager(model, DynamicCache(), prompt(30), new=4)
    assert not undone


@pytest.mark.slow
def test_cropping_by_hand_leaves_what_was_counted(tapes, undone):
    """As the specification has it; only a step that generate() takes back is uncounted."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(30, batch=2)
    cache = new_cache(model, CONFIGS["h2o"])
    compiled(model, cache, inputs)
    before = [x.clone() for x in cache.decode_graph._counted]
    cache.crop(-1)
    assert before and all(map(torch.equal, before, cache.decode_graph._counted))


@pytest.mark.slow
def test_a_loop_of_ones_own_is_not_compiled(tapes):
    """Nor by rows that are reordered in it; also after a beam search, of a model or of its copy."""
    first = tiny_llama(dtype=torch.float64)
    fade_fast.create_cache(first, CONFIGS["int4"])
    for model in (first, copy.deepcopy(first)):
        cache, ids = fade_fast.create_cache(model, CONFIGS["int4"]), prompt(30, batch=2)
        cache.decode_graph.compileable = True
        before = len(tapes)
        out = eager(model, cache, ids, num_beams=2, new=12)
        assert len(tapes) > before
        made = len(tapes), sum(tape.replays for tape in tapes)
        with torch.no_grad():
            for _ in range(3):
                cache.reorder_cache(torch.tensor([1, 0, 2, 3]))
                model(out[:, -1:].repeat(2, 1), **{CACHE_NAME: cache})
        assert (len(tapes), sum(tape.replays for tape in tapes)) == made


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["int4", "evict", "int4, int2, evict", "h2o", "select", "select, host", "off"],
)
def test_what_steps_read_follows_its_rows(name):
    """Beams of one text have the same padding; rows of two texts do not."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(30, batch=3, pads=(0, 9, 4))
    cache = new_cache(model, CONFIGS[name])
    compiled(model, cache, inputs)
    own = cache.decode_graph
    assert not own._stale and len(set(own.newest.tolist())) == 3
    cache.reorder_cache(torch.tensor([2, 2, 1]))
    assert not own._stale
    frozen = [
        x
        for layer in own.layers
        for slots in layer.static_views
        for x in slots
        if isinstance(x, torch.Tensor)
    ]
    held = [own.newest, *(group.held for group in own.groups), *frozen]
    found = [x.clone() for x in held]
    own._refresh()
    assert all(map(torch.equal, found, held)) and (name == "off" or frozen)


def test_beam_search_is_not_compiled_where_that_is_switched_off(tapes):
    model, inputs = tiny_llama(dtype=torch.float64), prompt(30, batch=2)
    cache = new_cache(model, CONFIGS["int4"])
    cache.decode_graph.compileable = True
    model.generation_config.disable_compile = True
    eager(model, cache, inputs, num_beams=3)
    assert not tapes and cache.decode_graph.search is None


@pytest.mark.slow
def test_a_conversation_is_captured_anew_in_each_turn(tapes):
    """Between two generate() the user may change the model, say its adapters, so guards must be asked."""
    model = tiny_llama(dtype=torch.float64)
    made = []
    for run in (eager, compiled):
        cache, out = new_cache(model, CONFIGS["evict"]), prompt(30, batch=2)["input_ids"]
        for turn in range(3):
            inputs = dict(input_ids=out, attention_mask=torch.ones_like(out))
            out = run(model, cache, inputs, new=6)
            out = torch.cat((out, prompt(5, batch=2, seed=turn)["input_ids"]), dim=1)
            made.append(len(tapes))
        if run is eager:
            expected = out
    assert torch.equal(out, expected)
    assert made[:3] == [0, 0, 0] and 0 < made[3] < made[4] < made[5]


class Sum(nn.Module):
    """A call that can be compiled, and counts how often it is run in Python."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def forward(self, x, y=None, scale=1):
        self.runs += 1
        return CausalLMOutputWithPast(logits=x * scale + (0 if y is None else y))


def test_what_makes_a_call_of_another_kind(tapes):
    """Each kind is run once, then captured; only numbers in tensors may differ in a replay."""
    model = Sum()
    call = Captured(model, otherwise=None)
    x = torch.arange(4.0)
    kinds = [
        (1, dict(x=x)),
        (2, dict(x=x)),  # another epoch
        (2, dict(x=x[:3])),
        (2, dict(x=x.double())),
        (2, dict(x=x, scale=3)),
        (2, dict(x=x, scale=4)),
        (2, dict(x=x, y=x)),
        (2, dict(x=x, y=1)),
    ]
    for graph_id, arguments in kinds:
        before = len(tapes)
        for i in range(4):
            moved = arguments | dict(x=arguments["x"] + i)
            assert torch.equal(call(graph_id, moved).logits, Sum()(**moved).logits)
            assert len(tapes) == before + (i > 0)
        assert tapes[-1].replays == 3


def test_a_step_that_cannot_be_captured_is_compiled_otherwise():
    def record(call, pool=None, **arguments):
        raise RuntimeError("operation not permitted when stream is capturing")

    x, other = torch.arange(4.0), Sum()
    call = Captured(Sum(), otherwise=lambda why: other, capture=record)
    call(1, dict(x=x))
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        assert torch.equal(call(1, dict(x=x)).logits, x)
    assert torch.equal(call(1, dict(x=x + 1)).logits, x + 1) and torch.equal(call(2, dict(x=x)).logits, x)
    assert other.runs == 3


def test_a_step_that_another_process_cannot_capture_is_compiled_otherwise(tapes):
    """Also the next variant, ahead: nothing is replayed that another process does not replay."""
    x, other, why, votes, heard = torch.arange(4.0), Sum(), [], [True, False], []

    def agree(yes):
        heard.append(yes)
        return votes.pop(0)

    call = Captured(
        Sum(),
        otherwise=lambda reason: why.append(reason) or other,
        ahead=lambda within: contextlib.nullcontext("more slots"),
        agree=agree,
    )
    for i in range(cuda_graph.SETTLED + 1):
        assert torch.equal(call(1, dict(x=x + i)).logits, x + i)
    assert len(tapes) == 2 and tapes[1].replays == 0, "the next variant was captured, and dropped"
    votes.append(False)
    call(1, dict(x=x), "more slots")
    with pytest.warns(UserWarning, match="another process could not capture it"):
        assert torch.equal(call(1, dict(x=x), "more slots").logits, x)
    assert heard == [True] * 3 and why == ["another process could not capture it"] and other.runs == 1


@pytest.mark.slow
def test_a_model_that_cannot_be_captured_is_tried_once_a_cache(tapes):
    tapes.error = RuntimeError("operation not permitted when stream is capturing")
    model, ids = tiny_llama(dtype=torch.float64), prompt(30, batch=2)["input_ids"]
    cache, twin, found, expected = *(new_cache(model, CONFIGS["int4"]) for _ in range(2)), ids, ids
    with pytest.warns(UserWarning, match="cannot be captured as a whole"):
        for _ in range(2):
            found = compiled(
                model, cache, dict(input_ids=found, attention_mask=torch.ones_like(found)), new=9
            )
            expected = eager(
                model, twin, dict(input_ids=expected, attention_mask=torch.ones_like(expected)), new=9
            )
    assert torch.equal(found, expected) and tapes.refused == 1 and not tapes and compressed_tokens(cache) > 0
    assert "not captured" not in cache.describe(), "Inductor captures parts of a step"


def test_memory_that_ran_out_is_no_reason_to_compile_otherwise():
    def record(call, pool=None, **arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    call = Captured(Sum(), otherwise=lambda why: pytest.fail("compiled otherwise"), capture=record)
    call(1, dict(x=torch.ones(2)))
    with pytest.raises(torch.OutOfMemoryError):
        call(1, dict(x=torch.ones(2)))


def test_which_configurations_are_captured_here():
    options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
    made = uncaptured(CompileConfig(), CUDA)
    assert (made.mode, made.options) == ("default", None)
    assert uncaptured(CompileConfig(mode="max-autotune"), CUDA).mode == "max-autotune-no-cudagraphs"
    config = CompileConfig(mode=None, options=options, fullgraph=True)
    made = uncaptured(config, CUDA)
    assert (made.mode, made.options, made.fullgraph) == (None, {"coordinate_descent_tuning": True}, True)
    assert config.options is options and len(options) == 2  # not changed
    for plain in (
        CompileConfig(mode="default"),
        CompileConfig(mode=None, options={"coordinate_descent_tuning": True}),
        CompileConfig(backend="aot_eager", mode="reduce-overhead"),
    ):
        assert uncaptured(plain, CUDA) is None
    assert uncaptured(CompileConfig(), torch.device("cpu")) is None


def test_layers_that_count_in_python_are_left_to_inductor(tapes):
    """Transformers' sliding windows do, and a replay runs no Python."""
    assert fade_fast.create_cache(tiny_llama()).decode_graph.captures
    sizes = dict(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=4, head_dim=32,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=8, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes)).eval()
    cache = fade_fast.create_cache(model, FadeConfig(recent_window=8, block_size=4))
    assert not cache.decode_graph.captures
    compiled(model, cache, prompt(30, batch=2))
    assert not tapes and compressed_tokens(cache) > 0
