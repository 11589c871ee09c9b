"""The decoding modes. Each mode is a function that runs a model with a cache and returns its output."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

from fade_fast.hf.models import CACHE_NAME

from .families import FAMILIES, VOCABULARY, Family

PROMPT, NEW = 40, 8
PADS = (0, 13, 34)  # very unequal lengths


@dataclass
class Run:
    """One run of a mode.

    Attributes:
        model: the model that decodes.
        make: a function that returns a new, empty cache.
        plain: whether this is a reference run. A reference run is never compiled.
        cache: the cache that was created last.
    """

    model: PreTrainedModel
    make: Callable
    plain: bool = False
    cache: object = None

    def new_cache(self):
        self.cache = self.make()
        return self.cache

    def generate(self, inputs: dict, cache=None, **options) -> Tensor:
        """The output of `generate()`, greedy by default. The seed is always the same."""
        torch.manual_seed(5)
        options = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW) | options
        cache = self.new_cache() if cache is None else cache
        return self.model.generate(**inputs, **{CACHE_NAME: cache}, **options)


def prompt(batch: int = 2, pads=(), length: int = PROMPT) -> dict:
    """Random `input_ids` and `attention_mask`, row b left-padded by `pads[b]`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (max(batch, len(pads)), length), generator=generator)
    mask = torch.ones_like(ids)
    for b, n in enumerate(pads):
        ids[b, :n], mask[b, :n] = 0, 0
    return dict(input_ids=ids, attention_mask=mask)


def looped() -> dict:
    """A prompt with a repeated part, so that prompt look-up finds drafts."""
    inputs = prompt(batch=1)
    inputs["input_ids"][:, PROMPT // 2 :] = inputs["input_ids"][:, : PROMPT // 2]
    return inputs


def generating(inputs: Callable = prompt, **options) -> Callable[[Run], Tensor]:
    """A mode that calls `generate()` once with these options."""
    return lambda run: run.generate(inputs(), **options)


def padded(length: int = PROMPT) -> dict:
    return prompt(pads=PADS, length=length)


def late() -> dict:
    """A prompt with rows that begin in the second of two long chunks."""
    return padded(60)


def assisted(run: Run) -> Tensor:
    draft = FAMILIES["Llama"].model(seed=1)
    draft.generation_config.num_assistant_tokens = 5
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    return run.generate(prompt(batch=1), assistant_model=draft)


def turns(run: Run) -> Tensor:
    """Two turns of a conversation with one cache. The second call must feed only the new tokens."""
    inputs, cache = prompt(), run.new_cache()
    first = {name: x[:, :24] for name, x in inputs.items()}
    answer = run.generate(first, cache)
    text = torch.cat((answer, inputs["input_ids"][:, 24:]), dim=1)
    return run.generate(dict(input_ids=text, attention_mask=torch.ones_like(text)), cache)


class Listener(BaseStreamer):
    """Collects the tokens that a `TextStreamer` would print."""

    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, value):
        self.heard.append(value.reshape(-1))

    def end(self):
        self.ended = True


def streaming(run: Run) -> Tensor:
    streamer = Listener()
    out = run.generate(prompt(batch=1), streamer=streamer)
    assert streamer.ended and torch.equal(torch.cat(streamer.heard), out[0])
    return out


class AfterFive(StoppingCriteria):
    """Stops row 0 after three new tokens and the other rows after five, like a stop string."""

    def __call__(self, ids, scores, **kwargs):
        limit = torch.full((ids.shape[0],), PROMPT + 5)
        limit[0] = PROMPT + 3
        return ids.shape[1] >= limit


def stopping(run: Run) -> Tensor:
    out = run.generate(prompt(), stopping_criteria=StoppingCriteriaList([AfterFive()]), min_new_tokens=None)
    assert out.shape[1] == PROMPT + 5
    return out


def feed(run: Run, cache, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [B, n, V] of the new tokens `ids` [B, n]. `mask` covers all tokens."""
    position = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    step = dict(input_ids=ids, attention_mask=mask, position_ids=position)
    with torch.no_grad():
        return run.model(**step, **{CACHE_NAME: cache}, use_cache=True).logits


def after(operation: Callable) -> Callable[[Run], Tensor]:
    """A mode that calls the model directly and applies an operation to the cache between two steps.

    `operation(cache, feed)` returns the new cache, the old row of each new row, and whether to start again.
    `feed(ids)` feeds tokens that the operation must remove.
    """

    def mode(run: Run) -> Tensor:
        inputs = prompt(pads=PADS, length=PROMPT + 8)
        ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], run.new_cache()

        def start(cache):
            feed(run, cache, ids[:, :PROMPT], mask[:, :PROMPT])
            for n in range(PROMPT, PROMPT + 4, 2):
                feed(run, cache, ids[:, n : n + 2], mask[:, : n + 2])

        def more(junk):
            feed(run, cache, junk, torch.cat((mask[:, : PROMPT + 4], torch.ones_like(junk)), dim=1))

        start(cache)
        cache, rows, restart = operation(cache, more)
        run.cache = cache
        if restart:
            cache = run.cache = run.new_cache() if type(cache).__name__ == "DynamicCache" else cache
            start(cache)
        ids, mask = ids[rows], mask[rows]
        steps = range(PROMPT + 4, PROMPT + 8)
        return torch.cat([feed(run, cache, ids[:, n : n + 1], mask[:, : n + 1]) for n in steps], dim=1)

    return mode


ROWS = list(range(len(PADS)))


def crop(cache, more):
    more(torch.randint(3, VOCABULARY, (len(PADS), 5), generator=torch.Generator().manual_seed(2)))
    cache.crop(-5)
    return cache, ROWS, False


def reset(cache, more):
    cache.reset()
    return cache, ROWS, True


def reorder(cache, more):
    rows = [1, 1, 0]
    cache.reorder_cache(torch.tensor(rows))
    return cache, rows, False


def select(cache, more):
    rows = [2, 0]
    cache.batch_select_indices(torch.tensor(rows))
    return cache, rows, False


def repeat(cache, more):
    cache.batch_repeat_interleave(2)
    return cache, [b for b in ROWS for _ in range(2)], False


def deepcopy(cache, more):
    twin = copy.deepcopy(cache)
    more(torch.full((len(PADS), 3), 7))
    return twin, ROWS, False


def offload(cache, more):
    for layer in cache.layers:
        layer.offload()
    for layer in cache.layers:
        layer.prefetch()
    return cache, ROWS, False


def chunks(run: Run) -> Tensor:
    """Logits of a text in short chunks, long chunks, and single tokens."""
    ids, cache, start, out = prompt(length=62)["input_ids"], run.new_cache(), 0, []
    with torch.no_grad():
        for n in (30, 1, 1, 7, 20, 1, 1, 1):
            part = dict(
                input_ids=ids[:, start : start + n], attention_mask=torch.ones_like(ids[:, : start + n])
            )
            out.append(run.model(**part, **{CACHE_NAME: cache}, use_cache=True).logits)
            start += n
    return torch.cat(out, dim=1)


def compiled(inputs: Callable) -> Callable[[Run], Tensor]:
    """A mode in which `generate()` compiles the steps into one graph. Reference runs stay eager."""

    def mode(run: Run) -> Tensor:
        if run.plain:
            return run.generate(inputs())
        torch._dynamo.reset()
        counters.clear()
        config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        config._compile_all_devices = True
        cache = run.new_cache()
        cache.decode_graph.compileable = True
        for i, layer in enumerate(cache.layers):  # create_cache() does the same on a GPU
            if type(layer) is DynamicSlidingWindowLayer:
                cache.layers[i] = StaticSlidingWindowLayer(layer.sliding_window, layer.sliding_window)
        out = run.generate(inputs(), cache, compile_config=config)
        assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]
        return out

    return mode


@dataclass(frozen=True)
class Mode:
    """A way to decode.

    Attributes:
        name: the name in the table.
        run: the function. It returns tokens, or logits of the newest tokens.
        everywhere: whether every family runs this mode. Otherwise only Llama runs it.
        padded: whether rows are left-padded.
        slow: whether the mode takes long.
        compiles: whether the decode step is compiled.
    """

    name: str
    run: Callable[[Run], Tensor]
    everywhere: bool = False
    padded: bool = False
    slow: bool = False
    compiles: bool = False

    def applies_to(self, family: Family) -> bool:
        """Whether the matrix has this cell."""
        if family.name == "Llama":
            return True
        eager = not family.dispatches or family.branches or family.refused
        return self.everywhere and not (self.compiles and eager)


_ALL = [
    Mode("greedy", generating(), everywhere=True),
    Mode("greedy, left-padded", generating(padded), everywhere=True, padded=True),
    Mode("logits in chunks", chunks, everywhere=True),
    Mode("sampling", generating(do_sample=True, temperature=1.5)),
    Mode("beam", generating(num_beams=3), everywhere=True),
    Mode("beam, left-padded", generating(padded, num_beams=2), padded=True),
    Mode("beam sampling", generating(num_beams=3, do_sample=True)),
    Mode("several return sequences", generating(do_sample=True, num_return_sequences=3)),
    Mode("prompt look-up", generating(looped, prompt_lookup_num_tokens=4), everywhere=True),
    Mode("assisted, own draft model", assisted),
    Mode("chunked prefill", generating(prefill_chunk_size=16), everywhere=True),
    Mode("chunked prefill, left-padded", generating(late, prefill_chunk_size=30), padded=True),
    Mode("two turns on one cache", turns, everywhere=True),
    Mode("streaming", streaming),
    Mode("stopping criteria", stopping),
    Mode("reset()", after(reset), padded=True),
    Mode("crop()", after(crop), padded=True),
    Mode("reorder_cache()", after(reorder), padded=True),
    Mode("batch_select_indices()", after(select), padded=True),
    Mode("batch_repeat_interleave()", after(repeat), padded=True),
    Mode("deepcopy", after(deepcopy), padded=True),
    Mode("offload() and prefetch()", after(offload), padded=True),
    Mode("compiled step", compiled(prompt), everywhere=True, slow=True, compiles=True),
    Mode("compiled step, left-padded", compiled(padded), padded=True, slow=True, compiles=True),
]
MODES = {mode.name: mode for mode in _ALL}
