"""How a text is fed through a cache, and what is counted meanwhile."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache

from fade_fast.cache.layer import MAX_DECODE_TOKENS
from fade_fast.errors import InputError
from fade_fast.hf.models import CACHE_NAME

from .methods import COMPRESSES, EVICTS, Method, by_prompt, chosen_tokens, compressed_tokens, read_by

KEPT = 4 << 30  # bytes of uncompressed logits that are kept


class NothingCompressed(InputError, AssertionError):
    """A measured method compressed or evicted nothing, so its numbers would mean nothing."""


def chunks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


@torch.no_grad()
def stream(
    model, cache, ids: Tensor, size: int, heard=lambda cache, new: None, most: int | None = None
) -> Iterator[Tensor]:
    """Logits [B, n, vocabulary] of `ids` [B, L], fed in chunks of `size` through one cache.

    `heard` is called before each chunk with the cache and the length of the chunk. With `most`, a chunk is
    fed in parts of at most so many tokens.
    """
    for part in chunks(ids.shape[1], size):
        heard(cache, part.stop - part.start)
        yield in_parts(model, cache, ids[:, part], most)


class Uncompressed:
    """The logits of the uncompressed model over a text, chunk by chunk, as often as they are asked for.

    They are kept if they take at most `keep` bytes. Logits of a long text over a large vocabulary take many
    gigabytes: then the model runs again each time, beside the cache that is compared with it.
    """

    def __init__(self, model, ids: Tensor, size: int, keep: int = KEPT):
        self.model, self.ids, self.size, self.keep = model, ids, size, keep
        self.kept: list[Tensor] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        if self.kept is not None:
            yield from self.kept
            return
        count, kept = len(list(chunks(self.ids.shape[1], self.size))), []
        # Plain caches work under our attention, too: the model may be attached.
        for logits in stream(self.model, DynamicCache(config=self.model.config), self.ids, self.size):
            if count * logits.nbytes <= self.keep:
                kept.append(logits)
            if len(kept) == count:  # before the last one is given: who has it may ask for nothing more
                self.kept = kept
            yield logits


def in_parts(model, cache, ids: Tensor, most: int | None) -> Tensor:
    """Logits of `ids` [B, n], fed in parts of at most `most` tokens; None: at once."""
    parts = chunks(ids.shape[1], most or ids.shape[1])
    each = [model(input_ids=ids[:, p], **{CACHE_NAME: cache}, use_cache=True).logits for p in parts]
    return each[0] if len(each) == 1 else torch.cat(each, dim=1)


class Reader:
    """Counts the tokens that the queries of a stream read. Nothing waits for the device before `mean`."""

    def __init__(self):
        self.read, self.queries = 0.0, 0

    def __call__(self, cache, new: int) -> None:
        if self.queries:  # the first chunk finds an empty cache
            self.read = self.read + compressed_tokens(cache) * new
        self.queries += new

    def mean(self) -> float:
        return float(self.read) / self.queries


def read_by_choice(m: Method, cache) -> float:
    """Tokens of the middle that a query read in each KV head. Refuses a cache that read all of them."""
    read = chosen_tokens(cache)
    if read is None:
        raise NothingCompressed(f"{m.name}: no query read fewer tokens than there were: use longer windows")
    return read


def check(m: Method, read: float, evicted: float) -> None:
    """Refuse the numbers of a cache that did nothing to its tokens."""
    if m.does == COMPRESSES and not read > 0:
        raise NothingCompressed(f"{m.name}: no query read a compressed token: use longer windows")
    if m.does == EVICTS and not evicted > 0:
        raise NothingCompressed(f"{m.name}: no token was evicted: use longer windows")


def of_one_prompt(methods: list[Method], tokens: int, size: int) -> list[list[Method]]:
    """Methods in groups that may share the prefill of a prompt of `tokens`, fed in chunks of `size`.

    A short chunk chooses already what it reads, and so differs from method to method.
    """
    short = any(part.stop - part.start <= MAX_DECODE_TOKENS for part in list(chunks(tokens, size))[1:])
    return [[m] for m in methods] if short else by_prompt(methods)


def prefilled(model, methods: list[Method], prompts: Tensor, length: int, size: int) -> Iterator:
    """`(method, cache)` for a group of `of_one_prompt`, after `prompts` [B, n], which are fed once.

    `length`: tokens that the text will have.
    """
    cache = methods[0](model, length)
    for part in chunks(prompts.shape[1], size):
        step = {CACHE_NAME: cache, "use_cache": True, "logits_to_keep": 1}
        with torch.no_grad():
            model(input_ids=prompts[:, part], **step)
    for m in methods:
        yield m, cache if len(methods) == 1 else read_by(m, cache)
