"""The end of a beam search is known one step late: same texts, same cache."""

import pytest
import torch

from fade_fast.cache import decode_graph
from fade_fast.hf.models import CACHE_NAME

from ..cache.test_beams import CONFIGS, hold_the_same, search
from ..cache.test_cuda_graph import tapes  # noqa: F401 - a fixture
from ..marks import slow_but
from ..models import new_cache, prompt, tiny_llama

ENDS = list(range(1, 25))  # tokens that end a text
STOPS = {
    "until full": dict(early_stopping=True),
    "heuristic": dict(early_stopping=False, length_penalty=1.0),
    "never": dict(early_stopping="never", length_penalty=0.5),
    "all end": dict(early_stopping=False, eos_token_id=list(range(1, 256))),
    "at the longest": dict(eos_token_id=[1000]),
}


def both(model, inputs, monkeypatch, config="safe", **options):
    """A search whose host waits for each step, and one whose host does not: text, cache, and steps fed."""
    found = []
    for ahead in (set(), {"cpu"}):
        monkeypatch.setattr(decode_graph, "AHEAD_ON", ahead)
        cache = new_cache(model, CONFIGS[config])
        cache.decode_graph.compileable = True
        steps, begin = [], cache.decode_graph.begin
        cache.decode_graph.begin = lambda *args, begin=begin, steps=steps: (steps.append(1), begin(*args))[1]
        text = search(model, cache, inputs, **dict(min_new_tokens=0, eos_token_id=ENDS) | options)
        found.append((text, cache, len(steps)))
    return found


@pytest.mark.parametrize("stop", slow_but(STOPS, "heuristic"))
@pytest.mark.parametrize("seed", slow_but((2, 1, 4), 2))
def test_a_step_after_the_end_leaves_no_trace(stop, seed, tapes, monkeypatch):  # noqa: F811
    model = tiny_llama(layers=1, dtype=torch.float64, seed=seed)
    inputs = prompt(30, batch=2, pads=(0, 9), seed=seed)
    (expected, other, least), (text, cache, steps) = both(model, inputs, monkeypatch, **STOPS[stop])
    assert torch.equal(text, expected) and cache.get_seq_length() == other.get_seq_length()
    hold_the_same(cache, other)
    longest = cache.get_seq_length() == 30 + 40 - 1
    assert steps == least + (0 if longest or least < 2 else 1)
    assert longest == (stop == "at the longest")


@pytest.mark.slow
def test_a_sampled_search(tapes, monkeypatch):  # noqa: F811
    model, texts = tiny_llama(layers=1, dtype=torch.float64), []
    for ahead in (set(), {"cpu"}):
        monkeypatch.setattr(decode_graph, "AHEAD_ON", ahead)
        cache = new_cache(model, CONFIGS["safe"])
        cache.decode_graph.compileable = True
        torch.manual_seed(0)
        asked = dict(max_new_tokens=40, num_beams=3, do_sample=True, eos_token_id=ENDS, top_k=20)
        texts.append(model.generate(**prompt(30, batch=2), **{CACHE_NAME: cache}, **asked))
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    "watching",
    [
        dict(return_dict_in_generate=True, output_scores=True),
        dict(stopping_criteria=[lambda ids, x: ids[:, 0] < 0]),
        dict(num_return_sequences=3),
    ],
)
def test_whoever_watches_sees_no_step_too_many(watching, tapes, monkeypatch):  # noqa: F811
    model = tiny_llama(layers=1, dtype=torch.float64)
    (_, _, least), (_, _, steps) = both(model, prompt(30, batch=2), monkeypatch, **watching)
    assert steps == least > 2


def test_a_second_turn_after_a_step_too_many(tapes, monkeypatch):  # noqa: F811
    model, found = tiny_llama(layers=1, dtype=torch.float64), []
    for text, cache, _ in both(model, prompt(30, batch=2), monkeypatch):
        more = torch.cat((text, prompt(30, batch=2, seed=3)["input_ids"]), dim=1)
        turn = dict(input_ids=more, attention_mask=torch.ones_like(more))
        found.append((search(model, cache, turn, new=20), cache))
    (text, cache), (expected, other) = found
    assert torch.equal(text, expected)
    hold_the_same(cache, other)
