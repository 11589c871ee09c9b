"""Continue texts through `model.generate()`: rows with samplers and ends of their own, told token by token.

generate() has one set of options for a batch. Here each row has its own: a processor chooses the token of
each row and leaves generate() no other, and a stopping criterion shows each row its token.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .cache import TieredKVCache
from .models import CACHE_NAME
from .pieces import Detokenizer, StopStrings


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a text are chosen, and when it ends.

    Args:
        max_tokens: most new tokens.
        temperature: 0 takes the likeliest token.
        top_p: the likeliest tokens that together have this probability may be taken.
        top_k: so many of the likeliest tokens may be taken; 0: all.
        seed: the same seed gives the same text. None: another one each time.
        stop: strings that end the text. They are not part of it.
        logprobs: for each token, its log probability and those of so many likeliest tokens; None: neither.
            They are those of the model, before temperature and penalties.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens that the answer already
            has, once or by their count.
        logit_bias: pairs of a token and what is added to its logit.
        ignore_eos: the text goes on where the model would end it.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    ignore_eos: bool = False

    @property
    def plain(self) -> bool:
        """Whether generate() chooses the same tokens by itself."""
        penalties = self.presence_penalty or self.frequency_penalty or self.logit_bias
        return self.temperature == 0 and self.logprobs is None and not penalties


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probability of a token, and the likeliest tokens with theirs, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """A part of a text, for which the tokens so far are enough, and the log probabilities of its tokens."""

    text: str
    tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass
class Row:
    """One text that grows.

    Args:
        tokenizer: writes its tokens as text.
        sampling: its options.
        ends: tokens that end it, from `end_tokens`.
        tell: called with each `Piece`.
        index: number of this text among those of one prompt. Each number has random numbers of its own.
        cancelled: asked at every token. Once it returns true, the text ends.

    Attributes:
        tokens: its new tokens, a final end token included.
        finish: why it ended: "stop", "length" or "cancelled"; None while it grows.
    """

    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    ends: frozenset[int]
    tell: Callable[[Piece], None]
    index: int = 0
    cancelled: Callable[[], bool] = lambda: False
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None

    def __post_init__(self):
        self._detokenizer = Detokenizer(self.tokenizer)
        self._stops = StopStrings(self.sampling.stop)
        self._waiting: list[TokenLogprobs] = []
        self._told = 0
        seed = self.sampling.seed
        seed = int.from_bytes(os.urandom(8), "little") if seed is None else seed
        # Mixed, so that the texts of seeds 1 and 2 share no random numbers.
        self._random = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + self.index) % 2**63)

    def choose(self, logits: Tensor) -> Tensor:
        """The next token, int64 [], for logits [V] in float32, on their device."""
        options = self.sampling
        scores = self._penalized(logits)
        if options.temperature == 0:
            token = scores.argmax()
        else:
            token = self._draw(scores / options.temperature)
        if options.logprobs is not None and self.finish is None:
            logprobs = logits.log_softmax(-1)
            top = logprobs.topk(min(options.logprobs, len(logprobs))) if options.logprobs else None
            pairs = tuple(zip(top.indices.tolist(), top.values.tolist())) if top else ()
            self._waiting.append(TokenLogprobs(int(token), float(logprobs[token]), pairs))
        return token

    def _penalized(self, logits: Tensor) -> Tensor:
        options = self.sampling
        if options.logit_bias:
            tokens, bias = zip(*options.logit_bias)
            logits = logits.clone()
            logits[list(tokens)] += torch.tensor(bias, dtype=logits.dtype, device=logits.device)
        if self.tokens and (options.presence_penalty or options.frequency_penalty):
            used, counts = torch.tensor(self.tokens).unique(return_counts=True)
            less = options.presence_penalty + options.frequency_penalty * counts.to(logits.dtype)
            logits = logits.clone()
            logits[used.to(logits.device)] -= less.to(logits.device)
        return logits

    def _draw(self, scores: Tensor) -> Tensor:
        """A random token, by inverse transform sampling: one random number a token, whatever the device."""
        u = torch.rand((), dtype=torch.float64, generator=self._random).to(scores.device)
        top_p, top_k = self.sampling.top_p, self.sampling.top_k
        if top_p >= 1 and not top_k:
            mass = scores.double().softmax(-1).cumsum(-1)
            return torch.searchsorted(mass, u * mass[-1]).clamp_max(len(mass) - 1)
        count = min(top_k, len(scores)) if top_k else len(scores)
        values, tokens = scores.double().topk(count) if top_k else scores.double().sort(descending=True)
        probability = values.softmax(-1)
        before = probability.cumsum(-1) - probability
        kept = probability.masked_fill(before >= top_p, 0.0)
        kept[0] = probability[0]  # the likeliest token is always among them
        mass = kept.cumsum(-1)
        return tokens[torch.searchsorted(mass, u * mass[-1]).clamp_max(count - 1)]

    def accept(self, token: int) -> None:
        """Take a new token. A text that has ended takes none."""
        if self.finish is not None:
            return
        self.tokens.append(token)
        if self.cancelled():
            self.finish = "cancelled"
            return
        if token in self.ends and not self.sampling.ignore_eos:
            self._end("stop")
            return
        shown = self._stops.push(self._detokenizer.push(token))
        if self._stops.found:
            self.finish = "stop"
        elif len(self.tokens) >= self.sampling.max_tokens:
            self._end("length", shown)
            return
        if shown or self.finish:
            self._tell(shown)

    def _end(self, reason: str, shown: str = "") -> None:
        """End the text, and show what was held back."""
        shown += self._stops.push(self._detokenizer.flush())
        if self._stops.found:
            reason = "stop"
        else:
            shown += self._stops.flush()
        self.finish = reason
        self._tell(shown)

    def _tell(self, text: str) -> None:
        logprobs, self._waiting = tuple(self._waiting), []
        new, self._told = len(self.tokens) - self._told, len(self.tokens)
        self.tell(Piece(text, new, logprobs))


class _Choose(LogitsProcessor):
    """Leaves generate() one token in each row: the one that the row chooses."""

    def __init__(self, rows: list[Row]):
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.stack([row.choose(x) for row, x in zip(self.rows, scores)])
        return torch.full_like(scores, -math.inf).scatter_(1, chosen[:, None], 0.0)


class _Accept(StoppingCriteria):
    """Shows each row its new tokens. generate() ends when every row has ended."""

    def __init__(self, rows: list[Row], held: int, each: Callable[[], None] | None):
        self.rows, self.held, self.each = rows, held, each

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        new = input_ids[:, self.held :].tolist()
        self.held = input_ids.shape[1]
        for row, tokens in zip(self.rows, new):
            for token in tokens:
                row.accept(token)
        if self.each is not None:
            self.each()
        ended = [row.finish is not None for row in self.rows]
        return torch.tensor(ended, device=input_ids.device)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a text: those of the model's generation configuration, and the tokenizer's."""
    named = model.generation_config.eos_token_id
    named = [named] if isinstance(named, int) else list(named or ())
    return frozenset(x for x in (*named, tokenizer.eos_token_id) if x is not None)


def advance(
    model: PreTrainedModel,
    cache: TieredKVCache,
    ids: Tensor,
    rows: list[Row],
    steps: int,
    each: Callable[[], None] | None = None,
) -> Tensor:
    """Continue the texts of a batch by at most `steps` tokens, and return all ids [B, m] on the device.

    The cache then holds all but the last token of each row. Calling this again with the result goes on
    exactly as one longer call would. In rows that have ended, later ids mean nothing.

    Args:
        model: the model, attached.
        cache: it holds a beginning of `ids`, in B rows, or nothing.
        ids: int64 [B, n], without padding.
        rows: B rows. They take the new tokens.
        steps: at least 1.
        each: called after every step.
    """
    ids = ids.to(model.device)
    least = steps if rows[0].sampling.ignore_eos else None
    chooses = [] if all(row.sampling.plain for row in rows) else [_Choose(rows)]
    pad = model.generation_config.pad_token_id
    ends = model.generation_config.eos_token_id
    pad = pad if pad is not None else ends[0] if isinstance(ends, list) else ends
    config = GenerationConfig(
        max_new_tokens=steps, min_new_tokens=least, do_sample=False, pad_token_id=0 if pad is None else pad
    )
    with torch.no_grad():
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE_NAME: cache},
            generation_config=config,
            logits_processor=LogitsProcessorList(chooses),
            stopping_criteria=StoppingCriteriaList([_Accept(rows, ids.shape[1], each)]),
        )


def read(model: PreTrainedModel, cache: TieredKVCache, ids: Tensor, chunk: int) -> Iterator[int]:
    """Feed the cache up to the last multiple of `chunk` before the end of ids [B, n], a chunk a step.

    Yields the number of tokens read after each chunk. At least one token is left for generate(). All chunks
    end at multiples of `chunk`. So what a cache holds at a boundary does not depend on the boundary at which
    the reading began, to the bit. That does not hold for a reading that began elsewhere.
    """
    start, stop = cache.get_seq_length(), (ids.shape[1] - 1) // chunk * chunk
    while start < stop:
        end = (start // chunk + 1) * chunk
        with torch.no_grad():
            part = ids[:, start:end].to(model.device)
            model(input_ids=part, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
        start = end
        yield end
