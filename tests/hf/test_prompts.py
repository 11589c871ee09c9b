"""A prompt goes on where its cache ends, or is refused; what both share can be kept."""

import copy

import pytest
import torch

import fade_fast
from fade_fast.hf.models import CACHE_NAME
from fade_ref.config import FadeConfig

from ..marks import slow_but
from ..models import OFF, compressed_tokens, dense, generate, new_cache, prompt, tiny_llama

SMALL = FadeConfig(recent_window=16, block_size=8)


def told(model, cache, ids, new=6, **options):
    """The whole text after `generate()`."""
    options = dict(do_sample=False, max_new_tokens=new, min_new_tokens=new) | options
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **{CACHE_NAME: cache}, **options
    )


@pytest.fixture
def filled():
    """A model, a cache that holds 49 tokens, and their ids [1, 50], the last of which was never fed."""
    model = tiny_llama()
    cache = new_cache(model, SMALL)
    text = told(model, cache, prompt(40)["input_ids"], new=10)
    assert compressed_tokens(cache) > 0 and cache.get_seq_length() == 49
    return model, cache, text


@pytest.mark.parametrize("length", slow_but([1, 10, 48, 49], 1, 49))
def test_a_prompt_that_is_not_longer_than_the_cache_is_refused(filled, length):
    model, cache, text = filled
    for ids in (text[:, :length], (text[:, :length] + 1) % 250 + 3):
        for mask in (True, False):
            with pytest.raises(ValueError, match="a new text needs a new cache"):
                if mask:
                    told(model, cache, ids)
                else:
                    model.generate(input_ids=ids, cache=cache, max_new_tokens=2)
    assert cache.get_seq_length() == 49


@pytest.mark.parametrize("differs", slow_but([0, 17, 39, 44, 48], 0, 44))
@pytest.mark.parametrize("length", [50, 90])
def test_a_prompt_that_differs_from_what_is_cached_is_refused(filled, differs, length):
    """Also where it differs in what the model itself has written."""
    model, cache, text = filled
    ids = torch.cat((text, prompt(length, seed=3)["input_ids"][:, text.shape[1] :]), dim=1)[:, :length]
    ids[0, differs] = (ids[0, differs] + 1) % 250 + 3
    before = cache.state_dict()[0]
    with pytest.raises(ValueError, match=f"at token {differs}: a new text needs a new cache"):
        told(model, cache, ids)
    after = cache.state_dict()[0]
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_prompts_that_go_on_do():
    """Whole, new tokens only, the mask of all; by rows, samples and beams."""
    model = tiny_llama()
    first, more = prompt(40, batch=2)["input_ids"], prompt(30, batch=2, seed=1)["input_ids"]
    expected, found = [], []
    for make, results in ((dense, expected), (lambda model: new_cache(model, OFF), found)):
        cache = make(model)
        text = torch.cat((told(model, cache, first), more), dim=1)
        text = told(model, cache, text)
        new = torch.cat((text[:, -1:], more), dim=1)
        mask = torch.ones(2, cache.get_seq_length() + new.shape[1], dtype=torch.long)
        out = model.generate(
            input_ids=new, attention_mask=mask, **{CACHE_NAME: cache}, max_new_tokens=4, do_sample=False
        )
        results += [text, out]
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


def test_only_new_tokens_with_a_mask_of_another_length_are_refused(filled):
    model, cache, text = filled
    with pytest.raises(ValueError, match="must cover all 54"):
        model.generate(
            input_ids=text[:, -5:], attention_mask=torch.ones(1, 30, dtype=torch.long), cache=cache,
            max_new_tokens=2,
        )  # fmt: skip


def test_going_on_from_the_common_prefix(filled):
    """An edited end: crop to what is shared, and generate; the same as a cache that never saw the rest."""
    model, cache, text = filled
    edited = text.clone()
    edited[0, 44:] = (edited[0, 44:] + 5) % 250 + 3
    shared = fade_fast.common_prefix(cache, edited)
    assert shared == 44
    cache.crop(shared - cache.get_seq_length())
    out = told(model, cache, edited)
    again = new_cache(model, SMALL)
    assert torch.equal(
        out, told(model, again, torch.cat((told(model, again, text[:, :40], 5)[:, :44], edited[:, 44:]), 1))
    )
    assert fade_fast.common_prefix(cache, out) == cache.get_seq_length()
    assert fade_fast.common_prefix(cache, out[:, :20]) == 19, "one token must be left to feed"
    assert fade_fast.common_prefix(new_cache(model, SMALL), text) == 0
    with pytest.raises(ValueError, match="of shape"):
        fade_fast.common_prefix(cache, out.repeat(3, 1))


def test_ids_follow_what_happens_to_the_cache(tmp_path):
    """crop, rows, reset, deepcopy, save with ids."""
    model = tiny_llama()
    ids = prompt(30, batch=3)["input_ids"]
    cache = new_cache(model, SMALL)
    text = told(model, cache, ids)
    shared = lambda x: fade_fast.common_prefix(cache, x)  # noqa: E731
    assert shared(text) == 35
    twin = copy.deepcopy(cache)
    cache.crop(-3)
    assert shared(text) == 32
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert shared(text[[2, 0]]) == 32 and shared(text[[0, 2]]) == 0
    cache.reorder_cache(torch.tensor([1, 0]))
    assert shared(text[[0, 2]]) == 32
    cache.batch_repeat_interleave(2)
    assert shared(text[[0, 0, 2, 2]]) == 32
    cache.save(tmp_path / "text.fade", tokens=text[[0, 0, 2, 2]])
    loaded = fade_fast.load_cache(tmp_path / "text.fade", model)
    assert fade_fast.common_prefix(loaded, text[[0, 0, 2, 2]]) == 32
    cache.reset()
    assert fade_fast.common_prefix(cache, text) == 0
    assert fade_fast.common_prefix(twin, text) == 35


def test_padding_ids_mean_nothing():
    """The same rows with another id for padding are the same text; padding that moved is not."""
    model = tiny_llama()
    inputs = prompt(40, batch=2, pads=(0, 9))
    cache = new_cache(model, SMALL)
    text = model.generate(**inputs, cache=cache, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    other = text.clone()
    other[1, :9] = 77
    mask = torch.cat((inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)), dim=1)
    assert fade_fast.common_prefix(cache, other) == 44
    model.generate(input_ids=other, attention_mask=mask, cache=cache, max_new_tokens=2)
    moved = torch.ones_like(mask)
    moved[1, :4] = 0
    more = torch.cat((text, text[:, :9]), dim=1)
    with pytest.raises(ValueError, match="contradicts the cache"):
        mask = torch.cat((moved, torch.ones(2, 9, dtype=torch.long)), dim=1)
        model.generate(input_ids=more, attention_mask=mask, cache=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="pass the attention_mask"):
        model.generate(input_ids=more, cache=cache, max_new_tokens=2)


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(do_sample=True, num_return_sequences=3)])
def test_beams_and_samples_of_one_prompt(options):
    """Rows of the cache are several for a row of the prompt; the prompt itself is known afterwards."""
    model, ids = tiny_llama(), prompt(40)["input_ids"]
    cache = new_cache(model, SMALL)
    torch.manual_seed(0)
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **{CACHE_NAME: cache}, max_new_tokens=6, **options
    )
    assert cache.token_positions.batch == 3
    wrong = prompt(60, seed=9)["input_ids"]
    with pytest.raises(ValueError, match="at token 0"):
        model.generate(
            input_ids=wrong, attention_mask=torch.ones_like(wrong), cache=cache, max_new_tokens=2, **options
        )


def test_tokens_fed_by_hand_are_not_known(filled):
    """They are trusted; what generate() showed before them is not."""
    model, cache, text = filled
    more = prompt(12, seed=5)["input_ids"]
    with torch.no_grad():
        model(input_ids=torch.cat((text[:, -1:], more), dim=1), **{CACHE_NAME: cache})
    whole = torch.cat((text, more, more), dim=1)
    assert told(model, cache, whole).shape[1] == whole.shape[1] + 6
    whole = whole.clone()
    whole[0, 3] += 1
    with pytest.raises(ValueError, match="a new text needs a new cache"):
        told(model, cache, whole)


def test_a_text_that_was_broken_off_leaves_no_wrong_ids(filled):
    """An exception within generate(): the tokens that were fed are in the cache, their ids unknown."""
    model, cache, text = filled
    more = torch.cat((text, prompt(12, seed=5)["input_ids"]), dim=1)

    class Stop(Exception):
        pass

    def stop(ids, scores):
        raise Stop

    with pytest.raises(Stop):
        told(model, cache, more, logits_processor=[stop])
    assert cache.get_seq_length() == more.shape[1]
    assert told(model, cache, torch.cat((more, more[:, :1]), dim=1)).shape[1] > more.shape[1]


def test_generate_with_embeddings_is_not_judged_by_ids(filled):
    model, cache, text = filled
    more = prompt(60, seed=4)["input_ids"]
    embedded = model.get_input_embeddings()(more)
    out = generate(model, cache, dict(inputs_embeds=embedded, input_ids=more[:, :0]), new=3)
    assert out.shape[1] == 3


def test_the_positional_prompt_is_found(filled):
    model, cache, text = filled
    with pytest.raises(ValueError, match="a new text needs a new cache"):
        model.generate(text[:, :10], cache=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="a new text needs a new cache"):
        model.generate(inputs=text[:, :10], **{CACHE_NAME: cache}, max_new_tokens=2)
