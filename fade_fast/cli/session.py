"""Read a long document once and answer questions about it, from a fresh prefill or from a saved cache."""

import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..hf.cache import TieredKVCache
from ..hf.create import load_cache
from ..hf.models import CACHE_NAME
from ..saved import checkpoint

CHUNK = 1024  # tokens of a document per forward pass
MARK = "<|fade-question|>"  # placeholder of the question in the chat template


class Stopwatch(BaseStreamer):
    """Records the time of each token from generate(), and moves a progress bar."""

    def __init__(self, bar: tqdm):
        self.bar, self.times = bar, []
        self.start = time.perf_counter()
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Called by generate(), first with the prompt, then with every new token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self.bar.update()

    def end(self) -> None:
        """Called by generate() at the end. Fills the bar, because a text may end early."""
        self.bar.update(self.bar.total - self.bar.n)


@dataclass(frozen=True)
class Answer:
    """The answer to a question.

    Attributes:
        tokens: ids of the new tokens.
        first_token_s: seconds from the call of generate() to the first token.
        decode_s: seconds from the first token to the last.
    """

    tokens: list[int]
    first_token_s: float
    decode_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Decode speed; None if there is only one new token."""
        return (len(self.tokens) - 1) / self.decode_s if len(self.tokens) > 1 else None


def encode(tokenizer: PreTrainedTokenizerBase, document: str, question: str) -> tuple[Tensor, Tensor]:
    """Token ids [1, n] of one user message, document first: the part before the question, and the rest.

    The parts are encoded separately, so the ids of the document are the same for every question.
    """
    said = f"{document}\n\n{MARK}" if document else MARK
    if tokenizer.chat_template:
        message = [{"role": "user", "content": said}]
        said = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, _, after = said.rpartition(MARK)
    special = not tokenizer.chat_template  # a chat template adds its own
    parts = (
        tokenizer(before, add_special_tokens=special),
        tokenizer(question + after, add_special_tokens=False),
    )
    return tuple(torch.tensor([part.input_ids], dtype=torch.int64) for part in parts)


def joined(read: Tensor, rest: Tensor) -> Tensor:
    """Ids of the tokens already read, followed by the rest."""
    return torch.cat((read, rest), dim=1)


def prefill(model: PreTrainedModel, cache: TieredKVCache, ids: Tensor) -> None:
    """Feed `ids` [1, n] to an empty cache, `CHUNK` tokens at a time, with a progress bar."""
    with (
        tqdm(total=ids.shape[1], desc="reading", unit="token", leave=False, delay=1, disable=None) as bar,
        torch.no_grad(),
    ):
        for part in ids.to(model.device).split(CHUNK, dim=1):
            model(input_ids=part, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
            bar.update(part.shape[1])
    cache.memory()  # demotes due blocks now, not at the first question


def resume(path: str | os.PathLike, model: PreTrainedModel) -> tuple[TieredKVCache, Tensor]:
    """The cache of a file that `TieredKVCache.save` wrote with ids, and these ids [1, n].

    Raises as `load_cache`, and `ValueError` for a file without ids.
    """
    ids = checkpoint.read_tokens(path)
    if ids is None:
        raise ValueError(f"{path} has no token ids: save(path, tokens) stores them")
    return load_cache(path, model), ids


def answer(model: PreTrainedModel, cache: TieredKVCache, ids: Tensor, max_new_tokens: int) -> Answer:
    """Generate greedily after `ids` [1, n]. The cache holds all of them except the last ones."""
    ids = ids.to(model.device)
    greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)
    with tqdm(
        total=max_new_tokens, desc="writing", unit="token", mininterval=1, leave=False, delay=1, disable=None
    ) as bar:
        watch = Stopwatch(bar)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE_NAME: cache},
            generation_config=greedy,
            streamer=watch,
        )
    first, last = watch.times[0], watch.times[-1]
    return Answer(out[0, ids.shape[1] :].tolist(), first - watch.start, last - first)
