"""Pieces of text, samplers of rows, and `fade_fast.stream`."""

import pytest
import torch

import fade_fast
from fade_fast.hf import decoding
from fade_fast.hf.decoding import Row, Sampling
from fade_fast.hf.models import CACHE_NAME
from fade_fast.hf.pieces import Detokenizer, StopStrings

from ..models import EVICTING, SAFE, compressed_tokens, prompt, tiny_llama
from ..tokenizers import byte_tokenizer

ENDS = frozenset((0, 2))  # of the tiny model and its tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_pieces_make_up_the_text(tokenizer):
    text = "Grüße, 世界 🌍! Ein Satz."
    ids = tokenizer(text).input_ids
    assert len(ids) > len(text)  # some characters are several tokens
    pieces = Detokenizer(tokenizer)
    shown = [pieces.push(token) for token in ids]
    assert "".join(shown) + pieces.flush() == text
    assert not any("\ufffd" in piece for piece in shown)


def test_half_a_character_is_shown_at_the_end_only(tokenizer):
    pieces = Detokenizer(tokenizer)
    half = tokenizer("a🌍").input_ids[:-1]
    assert [pieces.push(token) for token in half] == ["a", "", "", ""]
    assert set(pieces.flush()) == {"\ufffd"}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_a_stop_string_ends_a_text_however_it_is_split(size):
    text, strings = "one two thXXree XYX four XYZ five", ("XYZ", "five", "thXXX")
    cut, shown = StopStrings(strings), ""
    for start in range(0, len(text), size):
        shown += cut.push(text[start : start + size])
        assert "XYZ" not in shown
    assert cut.found and shown == "one two thXXree XYX four "


def test_without_a_stop_string_nothing_is_lost():
    cut = StopStrings(["aab"])
    assert cut.push("xaa") + cut.push("a") + cut.push("a") + cut.flush() == "xaaaa" and not cut.found


def row_of(tokenizer, sampling, told=None, **options):
    told = [] if told is None else told
    return Row(tokenizer, sampling, ENDS, told.append, **options)


def alone(model, tokenizer, ids, sampling, config=SAFE, index=0, steps=None):
    """The tokens of one text in a cache of its own."""
    row, cache = row_of(tokenizer, sampling, index=index), fade_fast.create_cache(model, config)
    while row.finish is None:
        ids = decoding.advance(model, cache, ids, [row], steps or sampling.max_tokens)
    return row, cache


def test_greedy_tokens_are_those_of_generate(model, tokenizer):
    ids = prompt(60)["input_ids"]
    row, cache = alone(model, tokenizer, ids, Sampling(max_tokens=40))
    other = fade_fast.create_cache(model, SAFE)
    expected = model.generate(ids, **{CACHE_NAME: other}, max_new_tokens=40, do_sample=False)
    assert row.tokens == expected[0, 60:].tolist() and compressed_tokens(cache) > 0
    assert row.finish == "length" and decoding.end_tokens(model, tokenizer) == ENDS
    # A processor that chooses the likeliest token changes nothing.
    with_logprobs, _ = alone(model, tokenizer, ids, Sampling(max_tokens=40, logprobs=0))
    assert with_logprobs.tokens == row.tokens


@pytest.mark.parametrize(
    "config", [pytest.param(SAFE, id="safe", marks=pytest.mark.slow), pytest.param(EVICTING, id="evicting")]
)
def test_slices_change_nothing(model, tokenizer, config):
    ids, sampling = prompt(60)["input_ids"], Sampling(max_tokens=45, temperature=0.8, seed=5, top_p=0.9)
    whole, one = alone(model, tokenizer, ids, sampling, config)
    parts, other = alone(model, tokenizer, ids, sampling, config, steps=7)
    assert whole.tokens == parts.tokens
    (ours, about), (theirs, other_about) = one.state_dict(), other.state_dict()
    assert about == other_about and all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def test_rows_of_a_batch_sample_as_if_alone(model, tokenizer):
    model = tiny_llama(dtype=torch.float64)
    ids = prompt(40, batch=2)["input_ids"]
    samplings = [Sampling(30, temperature=1.0, seed=1), Sampling(20, temperature=0.7, top_k=20, seed=2)]
    rows = [row_of(tokenizer, sampling) for sampling in samplings]
    decoding.advance(model, fade_fast.create_cache(model, SAFE), ids, rows, 30)
    for row, sampling, own in zip(rows, samplings, ids):
        assert row.tokens == alone(model, tokenizer, own[None], sampling)[0].tokens
        assert row.finish == "stop" or len(row.tokens) == sampling.max_tokens


def test_samples_follow_the_distribution(tokenizer):
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf, 1.5])
    draws = {}
    for name, options in dict(all={}, top_k=dict(top_k=2), top_p=dict(top_p=0.6)).items():
        row = row_of(tokenizer, Sampling(1, temperature=1.0, seed=3, **options))
        draws[name] = torch.stack([row.choose(logits) for _ in range(1500)]).bincount(minlength=5) / 1500
    torch.testing.assert_close(draws["all"], logits.softmax(-1), atol=0.05, rtol=0)
    kept = torch.tensor([0.0, 0, 1, 0, 1]) * logits.softmax(-1)  # 0.6 needs two tokens
    for name in ("top_k", "top_p"):
        torch.testing.assert_close(draws[name], kept / kept.sum(), atol=0.05, rtol=0)
        assert draws[name][[0, 1, 3]].sum() == 0


def test_penalties_and_bias(tokenizer):
    logits = torch.tensor([0.0, 1.0, 3.0, 2.5])
    row = row_of(tokenizer, Sampling(9, frequency_penalty=0.4, presence_penalty=0.2))
    row.tokens = [2, 2]  # 3.0 - 0.2 - 2 * 0.4 < 2.5
    assert int(row.choose(logits)) == 3
    assert int(row_of(tokenizer, Sampling(9, logit_bias=((0, 5.0),))).choose(logits)) == 0
    assert torch.equal(logits, torch.tensor([0.0, 1.0, 3.0, 2.5]))


def test_log_probabilities_are_those_of_the_model(model, tokenizer):
    ids, told = prompt(30)["input_ids"], []
    row = row_of(tokenizer, Sampling(5, temperature=0.5, seed=1, logprobs=3), told)
    decoding.advance(model, fade_fast.create_cache(model, SAFE), ids, [row], 5)
    found = [x for piece in told for x in piece.logprobs]
    assert [x.token for x in found] == row.tokens and sum(piece.tokens for piece in told) == 5
    full = torch.cat((ids, torch.tensor([row.tokens])), 1)
    cache = fade_fast.create_cache(model, SAFE)
    with torch.no_grad():
        logits = model(full[:, :30], **{CACHE_NAME: cache}, use_cache=True).logits[:, -1:]
        for i in range(30, 34):
            step = model(full[:, i : i + 1], **{CACHE_NAME: cache}, use_cache=True).logits
            logits = torch.cat((logits, step), 1)
    expected = logits[0].log_softmax(-1)
    for x, right in zip(found, expected):
        assert x.logprob == pytest.approx(float(right[x.token]), abs=1e-4)
        assert [token for token, _ in x.top] == right.topk(3).indices.tolist()


@pytest.mark.parametrize("config", [SAFE, EVICTING], ids=["safe", "evicting"])
def test_reading_on_from_a_boundary_gives_the_same_bits(model, config):
    ids = prompt(150)["input_ids"]
    fresh = fade_fast.create_cache(model, config)
    assert list(decoding.read(model, fresh, ids, 32)) == [32, 64, 96, 128]
    begun = fade_fast.create_cache(model, config)
    other = torch.cat((ids[:, :64], prompt(50, seed=3)["input_ids"]), 1)
    for held in decoding.read(model, begun, other, 32):
        if held == 64:
            break
    list(decoding.read(model, begun, ids, 32))
    (ours, _), (theirs, _) = fresh.state_dict(), begun.state_dict()
    assert compressed_tokens(fresh) > 0 and ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


# -- stream


def test_a_stream_yields_the_text_of_generate(model, tokenizer):
    cache = fade_fast.create_cache(model, SAFE)
    pieces = list(fade_fast.stream(model, tokenizer, "A question? " * 6, cache, max_new_tokens=50))
    ids = tokenizer("A question? " * 6, return_tensors="pt").input_ids
    other = fade_fast.create_cache(model, SAFE)
    out = model.generate(ids, **{CACHE_NAME: other}, max_new_tokens=50, do_sample=False)
    assert "".join(pieces) == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(pieces) > 10 and compressed_tokens(cache) > 0


def test_a_stream_can_be_left_and_its_cache_goes_on(model, tokenizer):
    cache = fade_fast.create_cache(model, SAFE)
    text = "A question? " * 6
    pieces = fade_fast.stream(model, tokenizer, text, cache, max_new_tokens=500, summaries=True)
    said, summaries = "", []
    for piece, summary in pieces:
        said, summaries = said + piece, [*summaries, summary]
        if len(said) > 12:
            break
    pieces.close()
    held = cache.get_seq_length()
    assert len(text) < held < len(text) + 120
    assert summaries[0].length < summaries[-1].length <= held
    assert sum(summaries[-1].tokens.values()) == summaries[-1].length and summaries[-1].tokens["INT4"] > 0
    # The next turn continues the same cache, and reads only what is new.
    known = cache.seen.ids
    longer, read = tokenizer.decode(known[0]) + " And then?", []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        assert list(fade_fast.stream(model, tokenizer, longer, cache, max_new_tokens=20))
    finally:
        hook.remove()
    assert read[0] == len(" And then?") and set(read[1:]) <= {1}
    assert torch.equal(cache.seen.ids[:, :held], known) and known.shape[1] == held


def test_an_error_in_a_stream_reaches_the_reader(model, tokenizer, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the device is lost")

    cache = fade_fast.create_cache(model, SAFE)
    monkeypatch.setattr(type(model), "generate", broken)
    with pytest.raises(RuntimeError, match="the device is lost"):
        list(fade_fast.stream(model, tokenizer, "text", cache))


def test_a_chat_that_does_not_continue_the_cache_is_refused(model, tokenizer):
    cache = fade_fast.create_cache(model, SAFE)
    list(fade_fast.stream(model, tokenizer, "one text of some length " * 4, cache, max_new_tokens=8))
    before = cache.get_seq_length()
    with pytest.raises(ValueError, match="differs from the .* cached tokens at token 0"):
        fade_fast.stream(model, tokenizer, "another text", cache)
    assert cache.get_seq_length() == before
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        fade_fast.stream(model, tokenizer, "text", max_new_tokens=0)
    with pytest.raises(ValueError, match="no chat template"):
        fade_fast.stream(model, tokenizer, [dict(role="user", content="x")])


def test_other_tokens_for_the_same_text_are_kept(model):
    """A tokenizer joins letters that the model wrote one by one, early in a long answer."""
    joining = byte_tokenizer(merges=(("a", "b"),))
    said = "ab" * 60  # one token a pair, as the tokenizer encodes it
    single = [joining.convert_tokens_to_ids(letter) for letter in said]
    cache = fade_fast.create_cache(model, SAFE)
    with torch.no_grad():
        model(torch.tensor([single]), **{CACHE_NAME: cache}, use_cache=True)
    cache.seen.set(torch.tensor([single]))
    assert len(joining(said).input_ids) == 60 and compressed_tokens(cache) > 0
    assert list(fade_fast.stream(model, joining, said + "cd", cache, max_new_tokens=3))
    assert cache.get_seq_length() == 120 + 2 + 2
