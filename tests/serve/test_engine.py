"""The engine: answers do not depend on other requests, and what is kept has its limits."""

import gc
import random
import threading
import time
import warnings

import numpy as np
import pytest
import torch

from fade_fast.hf.cache import TieredKVCache
from fade_fast.hf.decoding import Sampling
from fade_fast.serve import engine as engines
from fade_fast.serve.engine import Done, Options, QueueFull, Request
from fade_fast.serve.prefixes import Prefixes, digest_of, shared_length
from fade_fast.serve.waiting import FairQueue

from ..marks import slow_but
from ..models import EVICTING, SAFE, compressed_tokens, tiny_llama
from .engines import Answer, alone, ask, engine, tokens


@pytest.fixture(scope="module")
def model():
    return tiny_llama(heads=1, head_dim=32)


def live_caches() -> int:
    gc.collect()
    return sum(type(x) is TieredKVCache for x in gc.get_objects())


# -- the same answer as alone


@pytest.mark.parametrize(
    "config", [pytest.param(SAFE, id="safe"), pytest.param(EVICTING, id="evicting", marks=pytest.mark.slow)]
)
def test_a_kept_beginning_changes_no_answer(model, config):
    document = tokens(150)
    with engine(model, config) as running:
        cached = []
        for seed in range(3):
            prompt = tokens(165, seed, begin=document)
            answer = ask(running, prompt, temperature=0.9, seed=3).wait()
            assert answer.told == alone(model, prompt, config=config, temperature=0.9, seed=3)
            cached.append(answer.last.cached)
        # The others share 150 tokens, and find what the first one kept at the end of its prompt.
        assert cached == [0, 144, 144]
        assert all(compressed_tokens(entry.cache) > 0 for entry in running.prefixes.entries)


def test_the_next_turn_goes_on_from_the_answer(model):
    first = tokens(60)
    with engine(model) as running:
        answer = ask(running, first, new=40, logprobs=0, ignore_eos=True).wait()
        wait_until(lambda: running.idle)
        generated = [x.token for x in answer.logprobs[0]]
        assert answer.ends == {0: "length"} and len(generated) == 40
        second = (*first, *generated, *tokens(10, seed=9))
        again = ask(running, second).wait()
        held = [len(entry.tokens) for entry in running.prefixes.entries]
    assert max(held) >= 96 and again.last.cached == longest(first, generated)
    assert again.told == alone(model, second)


def longest(first, generated, chunk=16) -> int:
    """The last end of a chunk in a prompt and its answer."""
    return (len(first) + len(generated)) // chunk * chunk


def wait_until(condition, seconds: float = 30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@pytest.mark.parametrize("texts", slow_but((1, 3), 3))
def test_turns_change_no_answer(model, texts):
    prompts = [tokens(30 + 7 * i, seed=i) for i in range(3)]
    options = dict(temperature=1.0, seed=11, texts=texts)
    with engine(model, max_active=4) as running:
        answers = [ask(running, prompt, new=18, **options) for prompt in prompts]
        told = [answer.wait().told for answer in answers]
    assert told == [alone(model, prompt, new=18, **options) for prompt in prompts]
    assert all(len(text) == texts for text, _, _ in told)


def test_requests_of_one_length_are_answered_as_a_batch(monkeypatch):
    model = tiny_llama(heads=1, head_dim=32, dtype=torch.float64)
    batches, advance = [], engines.advance
    monkeypatch.setattr(engines, "advance", lambda *args: batches.append(len(args[2])) or advance(*args))
    prompts = [tokens(40, seed=i) for i in range(4)]
    running = engine(model, max_batch=3, max_active=2)
    answers = [ask(running, prompt, new=12 + i, client=str(i)) for i, prompt in enumerate(prompts)]
    with running:
        told = [answer.wait().told for answer in answers]
    assert set(batches) == {3, 1}
    assert told == [alone(model, prompt, new=12 + i) for i, prompt in enumerate(prompts)]


def test_longest_reuse_crops_and_continues(model):
    first = tokens(60)
    with engine(model, reuse="longest") as running:
        answer = ask(running, first, new=12, logprobs=0).wait()
        generated = tuple(x.token for x in answer.logprobs[0])
        again = ask(running, (*first, *generated[:8], *tokens(6, seed=4))).wait()  # another end: crop
        assert again.last.cached >= 60 + 7
        whole = ask(running, (*first, *generated, *tokens(6, seed=5))).wait()
        assert whole.last.cached == 60 + answer.last.completion - 1
        assert running.prefixes.entries and not running._unread


def test_reuse_off_keeps_nothing(model):
    with engine(model, reuse="off") as running:
        for _ in range(2):
            assert ask(running, tokens(60)).wait().last.cached == 0
        assert not running.prefixes.entries


# -- limits


@pytest.mark.slow
def test_idle_caches_go_to_disk_and_come_back(model, tmp_path):
    prompts = [tokens(100, seed=i) for i in range(4)]
    with engine(model, memory_budget=1, folder=str(tmp_path)) as running:
        told = [ask(running, prompt).wait().told for prompt in prompts]
        again = [ask(running, prompt).wait() for prompt in prompts]
        assert running.prefixes.stored >= 4 and running.prefixes.loaded >= 4
        wait_until(lambda: running.idle)
        assert running.prefixes.bytes == 0
    assert [answer.told for answer in again] == told
    assert [answer.last.cached for answer in again] == [96] * 4
    # After a restart, they are found.
    with engine(model, folder=str(tmp_path)) as running:
        answer = ask(running, prompts[2]).wait()
        assert answer.last.cached == 96 and answer.told == told[2]
    # Another model, and another configuration, find none of them.
    for other in (engine(tiny_llama(heads=1, head_dim=32, seed=1), folder=str(tmp_path)),
                  engine(model, EVICTING, folder=str(tmp_path))):  # fmt: skip
        with other:
            assert ask(other, prompts[2]).wait().last.cached == 0


def test_a_damaged_file_is_a_miss(model, tmp_path):
    with engine(model, memory_budget=1, folder=str(tmp_path)) as running:
        told = ask(running, tokens(100)).wait().told
    files = list(tmp_path.rglob("*.fade"))
    for path in files:
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    (files[0].parent / "junk.fade").write_bytes(b"junk")
    with engine(model, folder=str(tmp_path)) as running:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = ask(running, tokens(100)).wait()
    assert files and answer.last.cached == 0 and answer.told == told


def test_a_temporary_folder_is_removed(model):
    with engine(model, memory_budget=1) as running:
        ask(running, tokens(100)).wait()
        assert list(running.prefixes.folder.glob("*.fade"))
    assert not running.prefixes.folder.exists()


def test_the_oldest_entries_are_forgotten(model):
    with engine(model, max_sessions=3) as running:
        for seed in range(6):
            ask(running, tokens(40, seed=seed), new=2).wait()
        wait_until(lambda: running.idle)
        kept = [tuple(entry.tokens) for entry in running.prefixes.entries]
    assert kept == [tokens(40, seed=seed)[:32] for seed in (3, 4, 5)]


def test_a_full_queue_refuses_and_clients_take_turns(model):
    running = engine(model, max_queue=4, max_active=1)
    order, answers = [], []
    for client, seed in ("a", 0), ("a", 1), ("a", 2), ("b", 3):
        request = Request(tokens(20, seed=seed), Sampling(3), client=client)
        answers.append(
            running.submit(request, lambda e, seed=seed: isinstance(e, Done) and order.append(seed))
        )
    with pytest.raises(QueueFull, match="4 requests are waiting"):
        ask(running, tokens(20))
    with running:
        wait_until(lambda: len(order) == 4)
    assert order == [0, 3, 1, 2]
    assert running.metrics.total("requests", outcome="refused") == 1


def test_a_long_answer_does_not_delay_a_short_one(model):
    with engine(model) as running:
        long = ask(running, tokens(20), new=3000, ignore_eos=True)
        long.next()
        short = ask(running, tokens(20, seed=1), new=4).wait()
        assert long.last is None and short.last is not None
        long.ticket.cancel()
        long.wait()
    assert long.ends == {0: "cancelled"} and long.last.completion < 3000


def test_what_cannot_be_answered_is_refused(model):
    running = engine(model, max_length=100)
    for prompt, new, said in (
        ((), 5, "no tokens"),
        (tokens(100), 1, "100 tokens, and with its answer at most 100"),
        (tokens(90), 11, "90 tokens and the answer at most 11, together at most 100"),
        ((3, 256), 5, "not from 0 to 255"),
        ((3, -1), 5, "not from 0 to 255"),
    ):
        with pytest.raises(ValueError, match=said):
            ask(running, prompt, new)
    with pytest.raises(ValueError, match="reuse='some'"):
        Options(reuse="some")
    with pytest.raises(ValueError, match="chunk=0"):
        Options(chunk=0)
    assert running.waiting == 0
    running.prefixes.close()


def test_an_error_fails_one_request_only(model, monkeypatch):
    advance = engines.advance

    def sometimes(*args):
        if args[2].shape[1] == 33:
            raise RuntimeError("out of memory")
        return advance(*args)

    monkeypatch.setattr(engines, "advance", sometimes)
    with engine(model) as running:
        bad, good = ask(running, tokens(33)), ask(running, tokens(34))
        assert good.wait().told == alone(model, tokens(34))
        with pytest.raises(RuntimeError, match="out of memory"):
            bad.wait()
        assert running.alive and running.active == 0


def test_a_receiver_that_raises_cancels_its_request(model):
    def broken(event):
        raise OSError("the client is gone")

    with engine(model) as running:
        ticket = running.submit(Request(tokens(20), Sampling(2000)), broken)
        wait_until(lambda: ticket.cancelled and not running.active)
        assert ask(running, tokens(20), new=3).wait().last.completion == 3


def test_closing_ends_what_waits(model):
    running = engine(model, max_active=1).start()
    answers = [ask(running, tokens(20), new=4000, ignore_eos=True) for _ in range(3)]
    answers[0].next()
    running.close()
    for answer in answers:
        with pytest.raises(QueueFull, match="stopping"):
            answer.wait()
    with pytest.raises(QueueFull, match="stopping"):
        ask(running, tokens(20))


# -- what a request may ask for


def test_stop_strings_and_log_probabilities(model):
    prompt = tokens(40)
    text = alone(model, prompt, new=40)[0][0]
    stop = text[20:22]
    with engine(model) as running:
        answer = ask(running, prompt, new=40, stop=(stop,), logprobs=2).wait()
    assert answer.text[0] == text[: text.index(stop)] and answer.ends == {0: "stop"}
    assert len(answer.logprobs[0]) == answer.last.completion
    assert all(x.top[0][0] == x.token and len(x.top) == 2 for x in answer.logprobs[0])


# -- many


def random_request(random: random.Random, documents) -> tuple:
    begin = random.choice([(), *documents])
    prompt = tokens(len(begin) + random.choice([1, 5, 12, 33]), random.randrange(4), begin)
    sampling = dict(temperature=random.choice([0.0, 1.0]), seed=7)
    return prompt, random.choice([2, 24]), sampling


def many(model, count: int, seed: int = 0, config=SAFE, **options):
    """Answer requests in random order with cancellations. Compare each one with itself alone."""
    chance = random.Random(seed)
    documents = [tokens(90, seed=100), tokens(60, seed=101), tokens(120, seed=102)]
    right: dict = {}
    hits = cancelled = 0
    with engine(model, config, max_active=3, max_sessions=6, max_queue=count, **options) as running:
        pending: list = []
        for _ in range(count):
            prompt, new, sampling = random_request(chance, documents)
            answer = ask(running, prompt, new, client=str(chance.randrange(3)), **sampling)
            if chance.random() < 0.2:
                threading.Timer(chance.random() * 0.1, answer.ticket.cancel).start()
            pending.append((prompt, new, sampling, answer))
            while len(pending) > 8:
                check(model, *pending.pop(chance.randrange(len(pending))), right, config)
        for prompt, new, sampling, answer in pending:
            check(model, prompt, new, sampling, answer, right, config)
        hits = running.metrics.total("prefix_lookups", hit="yes")
        cancelled = running.metrics.total("requests", outcome="cancelled")
        wait_until(lambda: running.idle)
        kept = running.prefixes.in_memory
        # And the empty one, of which each request begins with a copy.
        assert live_caches() - kept - 1 <= MODULE_CACHES["before"]
        assert running.waiting == 0 and len(running.prefixes.entries) <= 6
    return hits, cancelled


MODULE_CACHES = dict(before=0)


def check(model, prompt, new, sampling, answer: Answer, right: dict, config):
    key = prompt, new, tuple(sampling.items())
    if key not in right:
        right[key] = alone(model, prompt, new, config, **sampling)
    text, ends, _ = right[key]
    answer.wait()
    if answer.ends.get(0, "cancelled") == "cancelled":
        assert text.get(0, "").startswith(answer.text.get(0, ""))
    else:
        assert (answer.text, answer.ends) == (text, ends)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SAFE, EVICTING], ids=["safe", "evicting"])
def test_thirty_requests_in_any_order(model, config):
    MODULE_CACHES["before"] = live_caches()
    hits, _ = many(model, 30, config=config, memory_budget=60_000)
    assert hits > 3


@pytest.mark.slow
def test_five_hundred_requests_in_any_order(model):
    import psutil

    many(model, 40, seed=1)  # what is allocated once
    MODULE_CACHES["before"], before = live_caches(), psutil.Process().memory_info().rss
    hits, cancelled = many(model, 500, memory_budget=200_000)
    assert hits > 100 and cancelled > 20
    assert live_caches() <= MODULE_CACHES["before"]
    assert psutil.Process().memory_info().rss - before < 60e6


# -- parts


def test_shared_length_and_digest(model):
    assert shared_length(np.array([1, 2]), np.array([1, 2, 3])) == 2
    assert shared_length(np.array([]), np.array([1])) == 0
    assert digest_of(model) == digest_of(tiny_llama(heads=1, head_dim=32))
    assert digest_of(model) != digest_of(tiny_llama(heads=1, head_dim=32, seed=1))


def test_links_in_the_folder_are_not_followed(model, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    kept = dict(budget=None, most=4, kind="k", folder=tmp_path / "kept")
    folder = Prefixes(model, **kept).folder
    (folder / "x.fade").symlink_to(secret)
    assert not Prefixes(model, **kept).entries
    assert secret.read_text() == "secret"


def test_the_queue_is_fair():
    full: FairQueue[int] = FairQueue(8)
    with pytest.raises(QueueFull, match="6 requests are waiting"):
        for i in range(8):
            full.put("a", i)
    full.put("b", 9)
    queue: FairQueue[int] = FairQueue(10)
    for i in range(6):
        queue.put("a" if i < 4 else "b", i)
    assert queue.remove(lambda x: x % 2 == 1, most=2) == [1, 3] and len(queue) == 4
    assert [queue.get() for _ in range(4)] == [0, 4, 2, 5]
    with pytest.raises(IndexError):
        queue.get()
