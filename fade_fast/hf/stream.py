"""`stream`: the answer to a chat, piece by piece, while a cache keeps the conversation."""

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .cache import TieredKVCache
from .create import create_cache
from .decoding import Piece, Row, Sampling, advance, end_tokens
from .prompts import common_prefix

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Summary:
    """The state of a cache at a moment.

    Attributes:
        length: tokens seen.
        tokens: tokens by tier, mean over layers.
        allocated, dense: bytes that the cache holds, and that an uncompressed one would.
    """

    length: int
    tokens: dict[str, float]
    allocated: int
    dense: int


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Messages | str) -> str:
    """A chat as one text, up to where the answer begins. A string is one message of the user.

    Without a chat template, a string is the beginning of a text. Raises `ValueError` for messages then.
    """
    if tokenizer.chat_template:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    if not isinstance(messages, str):
        raise ValueError(
            "the tokenizer has no chat template, so messages cannot be written as one text: pass a string"
        )
    return messages


def chat_ids(tokenizer: PreTrainedTokenizerBase, text: str, cache: TieredKVCache) -> torch.Tensor:
    """Token ids [1, n] of a text that continues a cache.

    A model may have chosen other tokens for a text than the tokenizer would. If the text begins with that of
    the cache, the tokens of the cache are kept, and only the rest is encoded.
    """
    special = not tokenizer.chat_template  # a chat template adds its own
    ids = torch.tensor([tokenizer(text, add_special_tokens=special).input_ids], dtype=torch.int64)
    held = cache.get_seq_length()
    seen = cache.seen.ids
    if seen is None or not held or cache.seen.known != held or len(seen) > 1:
        return ids
    if common_prefix(cache, ids) == held:
        return ids
    known = seen[0]
    written = str(tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if not text.startswith(written) or len(text) == len(written):
        return ids
    rest = tokenizer(text[len(written) :], add_special_tokens=False).input_ids
    return torch.tensor([[*known.tolist(), *rest]], dtype=torch.int64)


def keep_shared(cache: TieredKVCache, ids: torch.Tensor) -> int:
    """Crop the cache to what it shares with `ids` [1, n], and return the number of tokens that it holds then.

    Raises `ValueError` if the part that differs is compressed already: it cannot be cropped.
    """
    held = cache.get_seq_length()
    if not held:
        return 0
    shared = common_prefix(cache, ids)
    if shared < held:
        try:
            cache.crop(shared - held)
        except ValueError as error:
            raise ValueError(
                f"the chat differs from the {held} cached tokens at token {shared}, and the cache cannot go "
                f"back so far ({error}): use a new cache, or reset() this one"
            ) from error
    return shared


@overload
def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages | str,
    cache: TieredKVCache | None = None,
    *,
    summaries: Literal[False] = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> Iterator[str]: ...


@overload
def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages | str,
    cache: TieredKVCache | None = None,
    *,
    summaries: Literal[True],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> Iterator[tuple[str, Summary]]: ...


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages | str,
    cache: TieredKVCache | None = None,
    *,
    summaries: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> Iterator[str] | Iterator[tuple[str, Summary]]:
    """Generate the answer to a chat, and yield it in pieces of text as they come.

    The next turn is a call with the longer chat and the same cache, which reads only what is new. To end an
    answer early, leave the loop or close the generator; an interrupt (Ctrl-C) does the same. The cache then
    holds the text as far as it came, and goes on from there.

    Args:
        model, tokenizer: the model and its tokenizer.
        messages: dicts of `role` and `content`, the whole chat so far; or a string, as one message.
        cache: keeps the conversation. None: `create_cache(model)`, for this answer alone.
        summaries: yield pairs of a piece and a `Summary` of the cache at that moment. This costs some
            milliseconds a piece.
        max_new_tokens: most tokens of the answer.
        temperature, top_p, top_k, seed, stop: see `Sampling`.

    Raises:
        ValueError: the chat does not continue the cache, and the cache cannot be cropped to what both share.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, stop)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r}: an integer of at least 1 is allowed")
    text = chat_text(tokenizer, messages)
    cache = create_cache(model) if cache is None else cache
    ids = chat_ids(tokenizer, text, cache)
    keep_shared(cache, ids)
    return _pieces(model, tokenizer, cache, ids, sampling, summaries)


def _pieces(model, tokenizer, cache, ids, sampling: Sampling, summaries: bool):
    """Run generate() in a thread, and yield what it tells. The thread has ended when this generator has."""
    told: queue.SimpleQueue = queue.SimpleQueue()
    closed = threading.Event()

    def tell(piece: Piece) -> None:
        if piece.text:
            told.put((piece.text, _summary(cache)) if summaries else piece.text)

    row = Row(tokenizer, sampling, end_tokens(model, tokenizer), tell, cancelled=closed.is_set)

    def work() -> None:
        end: BaseException | None = None
        try:
            advance(model, cache, ids, [row], sampling.max_tokens)
        except BaseException as error:  # it is raised where the pieces are read
            end = error
        told.put(_End(end))

    thread = threading.Thread(target=work, name="fade-stream", daemon=True)
    thread.start()
    try:
        while not isinstance(piece := told.get(), _End):
            yield piece
        if piece.error is not None:
            raise piece.error
    finally:
        closed.set()
        with contextlib.suppress(RuntimeError):
            thread.join()


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def _summary(cache: TieredKVCache) -> Summary:
    memory = cache.memory(compact=False)
    return Summary(cache.get_seq_length(), memory.tokens, memory.allocated, memory.dense)
