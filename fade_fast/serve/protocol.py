"""The JSON of OpenAI's interface: requests, checked, and responses.

What is not served is refused by name. Nothing that was asked for is left out silently.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..hf.decoding import Piece, Sampling, TokenLogprobs

#: Most answers of a request: prompts times `n`.
MAX_TEXTS = 16
MAX_STOPS = 16

#: Fields that both kinds of requests have.
COMMON = {
    "model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n", "stream", "stream_options",
    "logprobs", "presence_penalty", "frequency_penalty", "logit_bias", "user", "ignore_eos",
}  # fmt: skip
CHAT = COMMON | {"messages", "max_completion_tokens", "top_logprobs"}
COMPLETION = COMMON | {"prompt", "echo", "suffix", "best_of"}
#: Fields without an effect on the answer.
HARMLESS = {
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
}
#: Values of fields that ask for nothing, so that clients may send them.
NOTHING: dict[str, tuple] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none",),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "echo": (False,), "suffix": ("",),
    "best_of": (1,), "reasoning_effort": ("none",),
}  # fmt: skip


class RequestError(Exception):
    """A request that is refused, as OpenAI's interface says it.

    Args:
        message: what is wrong, for the client.
        status: the HTTP status.
        kind: `type` of the error.
        parameter: the field that is wrong.
        code: a short name of the reason.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        kind: str = "invalid_request_error",
        parameter: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.kind, self.parameter, self.code = (
            message,
            status,
            kind,
            parameter,
            code,
        )

    @property
    def body(self) -> dict:
        """The error as JSON."""
        error = dict(message=self.message, type=self.kind, param=self.parameter, code=self.code)
        return dict(error=error)


@dataclass(frozen=True)
class Question:
    """A request, checked.

    Attributes:
        chat: whether it is a chat.
        prompts: the prompts, as text or as tokens. A chat has one.
        max_tokens: most tokens of an answer; None: as many as the model has room for.
        sampling: the options of sampling, without `max_tokens`.
        texts: number of answers to each prompt.
        stream, include_usage: whether the answers are streamed, and whether the last event has the usage.
        user: who asks, as the client says.
    """

    chat: bool
    prompts: tuple[str | tuple[int, ...], ...]
    max_tokens: int | None
    sampling: Sampling
    texts: int
    stream: bool
    include_usage: bool
    user: str


def parse(body: bytes) -> dict:
    """The fields of a request body. Raises `RequestError`."""
    try:
        fields = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"the body is no JSON: {error}; send a JSON object", code="invalid_json"
        ) from error
    if not isinstance(fields, dict):
        raise RequestError(
            "the body is no JSON object: send one, with the fields of a request", code="invalid_json"
        )
    return {name: x for name, x in fields.items() if x is not None}


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def question(fields: dict, chat: bool, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> Question:
    """Check the fields of a request for the model with one of the given names. Raises `RequestError`."""
    _check_names(fields, CHAT if chat else COMPLETION)
    model = fields.get("model", names[0])
    if model not in names:
        raise RequestError(
            f"the model {str(model)[:100]!r} does not exist: {', '.join(names)} is served",
            404, parameter="model", code="model_not_found",
        )  # fmt: skip
    texts = _number(fields, "n", 1, 1, MAX_TEXTS, integer=True)
    prompts = (chat_text(fields, tokenizer),) if chat else _prompts(fields)
    if len(prompts) * texts > MAX_TEXTS:
        raise _wrong("n", f"{len(prompts)} prompts times {texts}: at most {MAX_TEXTS} answers are possible")
    stream = _flag(fields, "stream")
    options = fields.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise _wrong("stream_options", "an object with include_usage is allowed")
    if options and not stream:
        raise _wrong("stream_options", "it needs stream=true")
    most = _number(fields, "max_tokens", None, 1, 2**31, integer=True)
    most = _number(fields, "max_completion_tokens", most, 1, 2**31, integer=True)
    if most is None and not chat:
        most = 16  # as OpenAI's interface says
    user = fields.get("user", "")
    if not isinstance(user, str):
        raise _wrong("user", "a string is allowed")
    sampling = _sampling(fields, chat)
    return Question(chat, prompts, most, sampling, texts, stream, bool(options.get("include_usage")), user)


def _check_names(fields: dict, known: set[str]) -> None:
    """Refuse fields that would be ignored."""
    for name, x in fields.items():
        if name in HARMLESS or (name in NOTHING and x in NOTHING[name]):
            continue
        if name not in known or name in NOTHING:
            raise _wrong(name, "this server does not support it, leave it out", code="unsupported_parameter")


def _sampling(fields: dict, chat: bool) -> Sampling:
    if chat:
        wanted = _flag(fields, "logprobs")
        logprobs = _number(fields, "top_logprobs", 0, 0, 20, integer=True) if wanted else None
        if "top_logprobs" in fields and not wanted:
            raise _wrong("top_logprobs", "it needs logprobs=true")
    else:
        logprobs = _number(fields, "logprobs", None, 0, 20, integer=True)
    return Sampling(
        temperature=_number(fields, "temperature", 1.0, 0, 2),
        top_p=_number(fields, "top_p", 1.0, 0, 1, above=True),
        top_k=_number(fields, "top_k", 0, 0, 2**31, integer=True),
        seed=_number(fields, "seed", None, -(2**63), 2**63 - 1, integer=True),
        stop=_stops(fields.get("stop", ())),
        logprobs=logprobs,
        presence_penalty=_number(fields, "presence_penalty", 0.0, -2, 2),
        frequency_penalty=_number(fields, "frequency_penalty", 0.0, -2, 2),
        logit_bias=_bias(fields.get("logit_bias", {})),
        ignore_eos=_flag(fields, "ignore_eos"),
    )


def _number(fields: dict, name: str, default, least, most, integer: bool = False, above: bool = False):
    """A number of the request, from `least` to `most`; with `above`, it must be greater than `least`."""
    x = fields.get(name)
    if x is None:
        return default
    fits = not isinstance(x, bool) and isinstance(x, int if integer else (int, float))
    if not fits or not least <= x <= most or (above and x == least):
        kind = "an integer" if integer else "a number"
        start = f"above {least}" if above else f"from {least}"
        raise _wrong(name, f"{kind} {start} to {most} is allowed, not {str(x)[:50]!r}")
    return x if integer else float(x)


def _flag(fields: dict, name: str) -> bool:
    x = fields.get(name, False)
    if not isinstance(x, bool):
        raise _wrong(name, "true or false is allowed")
    return x


def _stops(stop) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    fits = isinstance(stops, (list, tuple)) and len(stops) <= MAX_STOPS
    if not fits or not all(isinstance(x, str) and x for x in stops):
        raise _wrong("stop", f"a string or up to {MAX_STOPS} strings, none of them empty, are allowed")
    return tuple(stops)


def _bias(bias) -> tuple[tuple[int, float], ...]:
    try:
        pairs = tuple((int(token), float(x)) for token, x in bias.items())
    except (AttributeError, TypeError, ValueError):
        raise _wrong("logit_bias", "an object of tokens and numbers is allowed") from None
    if len(pairs) > 1024 or not all(-100 <= x <= 100 for _, x in pairs):
        raise _wrong("logit_bias", "at most 1024 numbers from -100 to 100 are allowed")
    return pairs


def _prompts(fields: dict) -> tuple[str | tuple[int, ...], ...]:
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt, list) and prompt:
        if all(isinstance(x, str) for x in prompt):
            return tuple(prompt)
        if _tokens(prompt):
            return (tuple(prompt),)
        if all(isinstance(x, list) and x and _tokens(x) for x in prompt):
            return tuple(tuple(x) for x in prompt)
    raise _wrong("prompt", "a string, a list of tokens, or a list of one of them, is needed")


def _tokens(x: list) -> bool:
    return all(isinstance(token, int) and not isinstance(token, bool) for token in x)


def chat_text(fields: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    """The messages of a chat as one text, by the template of the tokenizer. Raises `RequestError`."""
    if not tokenizer.chat_template:
        raise RequestError("this model has no chat template: use /v1/completions", code="no_chat_template")
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "a list with at least one message is needed")
    said = [_message(i, message) for i, message in enumerate(messages)]
    try:
        return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise errors of their own about the order of messages
        raise _wrong(
            "messages", f"the chat template refuses them: {error}; send others, or another order"
        ) from error


def _message(i: int, message) -> dict:
    name = f"messages[{i}]"
    if not isinstance(message, dict) or message.get("role") not in (
        "system",
        "developer",
        "user",
        "assistant",
    ):
        raise _wrong(name, "an object with a role is needed: system, developer, user or assistant")
    extra = {key for key, x in message.items() if x is not None and x != []}
    if extra - {"role", "content", "name", "refusal", "annotations"}:
        raise _wrong(name, f"{', '.join(sorted(extra - {'role', 'content'}))} is not supported, leave it out")
    content = message.get("content")
    if isinstance(content, list):
        parts = [x for x in content if isinstance(x, dict) and x.get("type") == "text"]
        if len(parts) != len(content) or not all(isinstance(x.get("text"), str) for x in parts):
            raise _wrong(name, "parts of the content can only be text, send no others")
        content = "".join(x["text"] for x in parts)
    if not isinstance(content, str):
        raise _wrong(name, "the content must be a string, send one")
    role = "system" if message["role"] == "developer" else message["role"]
    return dict(role=role, content=content)


def _wrong(parameter: str, why: str, code: str = "invalid_value") -> RequestError:
    name = parameter[:100]
    return RequestError(f"{name}: {why}", parameter=name, code=code)


# -- responses


@dataclass
class Reply:
    """Writes the response to a question.

    Args:
        question: the question.
        name: the model's name.
        tokenizer: writes the tokens of log probabilities.
        id: names the response.
    """

    question: Question
    name: str
    tokenizer: PreTrainedTokenizerBase
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def _head(self, part: bool) -> dict:
        kind = "chat.completion" if self.question.chat else "text_completion"
        kind += ".chunk" if part and self.question.chat else ""
        return dict(id=self.id, object=kind, created=self.created, model=self.name)

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprobs] = ()) -> dict:
        """An event with a part of an answer."""
        return self._part(index, dict(content=text), text, self._logprobs(logprobs, index), None)

    def begin(self, index: int) -> dict | None:
        """The first event of an answer; None for a completion, which has none."""
        if not self.question.chat:
            return None
        return self._part(index, dict(role="assistant", content=""), "", None, None)

    def end(self, index: int, reason: str) -> dict:
        """The last event of an answer."""
        return self._part(index, {}, "", None, finish_reason(reason))

    def _part(self, index: int, delta: dict, text: str, logprobs, reason: str | None) -> dict:
        choice = dict(index=index, logprobs=logprobs, finish_reason=reason)
        choice |= dict(delta=delta) if self.question.chat else dict(text=text)
        return self._head(True) | dict(choices=[choice])

    def usage(self, prompt: int, cached: int, completion: int) -> dict:
        """The event with the usage, for a stream that asks for it."""
        return self._head(True) | dict(choices=[], usage=usage(prompt, cached, completion))

    def whole(self, answers: dict[int, "Collected"], prompt: int, cached: int, completion: int) -> dict:
        """A response that is not streamed."""
        choices = []
        for index, answer in sorted(answers.items()):
            choice = dict(index=index, finish_reason=finish_reason(answer.reason))
            choice["logprobs"] = self._logprobs(answer.logprobs, index) if answer.logprobs else None
            if self.question.chat:
                choice["message"] = dict(role="assistant", content=answer.text, refusal=None)
            else:
                choice["text"] = answer.text
            choices.append(choice)
        return self._head(False) | dict(choices=choices, usage=usage(prompt, cached, completion))

    def _logprobs(self, tokens: Sequence[TokenLogprobs], index: int) -> dict | None:
        if self.question.sampling.logprobs is None:
            return None
        if self.question.chat:
            content = [
                self._token(x.token, x.logprob) | dict(top_logprobs=[self._token(*pair) for pair in x.top])
                for x in tokens
            ]
            return dict(content=content, refusal=None)
        texts = [self._text(x.token) for x in tokens]
        starts, at = [], 0
        for text in texts:
            starts.append(at)
            at += len(text)
        top = [{self._text(token): logprob for token, logprob in x.top} for x in tokens]
        return dict(
            tokens=texts, token_logprobs=[x.logprob for x in tokens], top_logprobs=top, text_offset=starts
        )

    def _token(self, token: int, logprob: float) -> dict:
        text = self._text(token)
        return dict(token=text, logprob=max(logprob, -9999.0), bytes=list(text.encode()))

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token])


@dataclass
class Collected:
    """An answer that is not streamed, as far as it came."""

    text: str = ""
    reason: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Add a piece."""
        self.text += piece.text
        self.logprobs += piece.logprobs


def finish_reason(reason: str) -> str:
    """OpenAI's name of why an answer ended."""
    return "stop" if reason == "cancelled" else reason


def usage(prompt: int, cached: int, completion: int) -> dict[str, Any]:
    """Numbers of tokens."""
    return dict(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=dict(cached_tokens=cached),
    )
