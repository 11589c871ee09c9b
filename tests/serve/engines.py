"""Engines over tiny random models, and requests whose answers are collected."""

import copy
import functools
import queue
import random

from fade_fast.hf.decoding import Sampling
from fade_fast.serve.engine import Done, End, Engine, Failed, Options, Request, Text

from ..models import SAFE, tiny_llama
from ..tokenizers import TEMPLATE, byte_tokenizer

SMALL = dict(chunk=16, slice=5)


def engine(model=None, config=SAFE, **options) -> Engine:
    """An engine that was not started, with chunks and slices that tiny texts reach."""
    return Engine(model or tiny_llama(), byte_tokenizer(TEMPLATE), config, Options(**SMALL | options))


def tokens(length: int, seed: int = 0, begin=()) -> tuple[int, ...]:
    """Random tokens that do not end a text, after those of `begin`."""
    generator = random.Random(seed)
    return (*begin, *(generator.randrange(3, 256) for _ in range(length - len(begin))))


class Answer:
    """Collects the events of a request. `wait` for its end."""

    def __init__(self, running: Engine, request: Request):
        self.events: queue.SimpleQueue = queue.SimpleQueue()
        self.text: dict[int, str] = {}
        self.ends: dict[int, str] = {}
        self.logprobs: dict[int, list] = {}
        self.last = None
        self.ticket = running.submit(request, self.events.put)

    def next(self, timeout: float = 60):
        event = self.events.get(timeout=timeout)
        if isinstance(event, Text):
            self.text[event.index] = self.text.get(event.index, "") + event.piece.text
            self.logprobs.setdefault(event.index, []).extend(event.piece.logprobs)
        elif isinstance(event, End):
            self.ends[event.index] = event.reason
        elif isinstance(event, (Done, Failed)):
            self.last = event
        return event

    def wait(self) -> "Answer":
        while self.last is None:
            self.next()
        if isinstance(self.last, Failed):
            raise self.last.error
        return self

    @property
    def told(self):
        """What a client sees."""
        return self.text, self.ends, self.last.completion


def ask(running: Engine, prompt, new: int = 20, texts: int = 1, client: str = "", **sampling) -> Answer:
    """Submit a request. Greedy, unless `sampling` says otherwise."""
    return Answer(running, Request(tuple(prompt), Sampling(new, **sampling), texts, client))


@functools.lru_cache(maxsize=2)
def _copy(model):
    """A copy, because an engine wants its model for itself."""
    return copy.deepcopy(model)


def alone(model, prompt, new: int = 20, config=SAFE, **options) -> tuple:
    """What the same request gets from an engine that has never seen another one."""
    with engine(_copy(model), config) as running:
        return ask(running, prompt, new, **options).wait().told
