"""The engine: one thread that owns the model and answers requests.

A request is read in chunks that end at fixed positions, and is continued in slices of some tokens. The thread
takes turns among the requests that it works on, a chunk or a slice each. Kept caches are states at the end of
a chunk. So a request gets the same answer, to the bit, whether it is alone, follows another one, or finds its
beginning in a kept cache. When nothing else is to do, the engine reads the answers that it gave, so that the
next turn of a conversation begins at the end of the last one.
"""

import copy
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fade_ref.config import FadeConfig

from ..hf.cache import TieredKVCache
from ..hf.create import create_cache
from ..hf.decoding import Piece, Row, Sampling, advance, end_tokens, read
from ..hf.models import text_config, vocabulary
from .metrics import Metrics
from .prefixes import Prefixes
from .view import View
from .waiting import FairQueue, QueueFull

log = logging.getLogger(__name__)

#: What a prompt may take from caches of earlier requests.
REUSE = ("exact", "longest", "off")
#: Answers that wait to be read. Older ones are forgotten.
MAX_UNREAD_ANSWERS = 16

__all__ = ["REUSE", "Done", "End", "Engine", "Failed", "Options", "QueueFull", "Request", "Text", "Ticket"]


@dataclass(frozen=True)
class Options:
    """How an engine works.

    Args:
        reuse: "exact": prompts continue kept caches at the ends of chunks; answers do not depend on what was
            kept. "longest": they continue any kept cache, cropped where it allows that. The next turn of a
            conversation then reads its last answer from the codes of tokens that were decoded one by one.
            This differs from reading them in chunks by rounding. "off": every prompt is read.
        chunk: tokens of a prompt that are read at once; None: 128 on a CPU, 1024 on a GPU.
        slice: tokens after which another request has its turn; None: 64 on a CPU, 512 on a GPU.
        max_active: requests that take turns. The others wait.
        max_queue: requests that wait. Others are refused.
        max_batch: requests with prompts of one length that are answered as one batch. In batches of another
            size, sums are rounded in another way, so that a nearly tied token may win.
        max_sessions: kept caches, those on disk included.
        memory_budget: bytes of all caches in memory; None: no limit.
        folder: where idle caches go; None: a temporary folder.
        max_length: most tokens of a prompt with its answer; None: the positions of the model.
    """

    reuse: str = "exact"
    chunk: int | None = None
    slice: int | None = None
    max_active: int = 4
    max_queue: int = 64
    max_batch: int = 1
    max_sessions: int = 32
    memory_budget: int | None = None
    folder: str | None = None
    max_length: int | None = None

    def __post_init__(self):
        if self.reuse not in REUSE:
            raise ValueError(f"reuse={self.reuse!r}: one of {', '.join(REUSE)} is allowed")
        for name in ("chunk", "slice", "memory_budget", "max_length"):
            self._positive(name, optional=True)
        for name in ("max_active", "max_queue", "max_batch"):
            self._positive(name)
        if not isinstance(self.max_sessions, int) or self.max_sessions < 0:
            raise ValueError(f"max_sessions={self.max_sessions!r}: an integer of at least 0 is allowed")

    def _positive(self, name: str, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: an integer of at least 1 is allowed")


@dataclass(frozen=True)
class Request:
    """What is to be answered.

    Args:
        tokens: the prompt.
        sampling: how tokens are chosen. Text i of several has its own random numbers.
        texts: number of answers.
        client: whose turn it takes.
    """

    tokens: tuple[int, ...]
    sampling: Sampling
    texts: int = 1
    client: str = ""


@dataclass(frozen=True)
class Text:
    """A piece of answer `index`."""

    index: int
    piece: Piece


@dataclass(frozen=True)
class End:
    """Answer `index` has ended, by the reason of `Row.finish`."""

    index: int
    reason: str


@dataclass(frozen=True)
class Done:
    """All answers have ended. `cached` tokens of the prompt were not read."""

    prompt: int
    cached: int
    completion: int


@dataclass(frozen=True)
class Failed:
    """The request cannot be answered."""

    error: BaseException


Event = Text | End | Done | Failed


@dataclass(eq=False)
class Ticket:
    """A request in the engine. The last event that it delivers is `Done` or `Failed`."""

    request: Request
    deliver: Callable[[Event], None]
    number: int
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self):
        self._cancelled = threading.Event()
        self.first_token: float | None = None
        self.concluded = False

    def cancel(self) -> None:
        """End the answers at the next token. Any thread may call this."""
        self._cancelled.set()

    def send(self, event: Event) -> None:
        """Deliver an event. If nobody can take it any more, the request is cancelled."""
        self.concluded |= isinstance(event, Done | Failed)
        try:
            self.deliver(event)
        except Exception:  # whatever the receiver is, the engine goes on
            self.cancel()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()


@dataclass(eq=False)
class Job:
    """Tickets that the engine works on as one batch, and how far it is."""

    tickets: list[Ticket]
    ids: torch.Tensor  # [B, n]
    rows: list[Row] = field(default_factory=list)
    cache: TieredKVCache | None = None
    cached: int = 0
    bytes: int = 0
    steps: Iterator[None] | None = None

    @property
    def cancelled(self) -> bool:
        return all(ticket.cancelled for ticket in self.tickets)


class Engine:
    """Answers requests for one model. `start` it, `submit` requests from any thread, and `close` it.

    Args:
        model, tokenizer: the model and its tokenizer. Nobody else may use the model meanwhile.
        config: the configuration of all caches.
        options: see `Options`.
        policy_weights, calibration: as in `create_cache`.

    Raises `ValueError` as `create_cache` does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: FadeConfig,
        options: Options = Options(),  # noqa: B008 (it is immutable)
        *,
        policy_weights=None,
        calibration=None,
    ):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self._extras = dict(policy_weights=policy_weights, calibration=calibration)
        self._extras = {name: x for name, x in self._extras.items() if x is not None}
        #: Copied for each prompt: creating a cache may run the model, to see how it rotates keys.
        self._empty = create_cache(model, config, **self._extras)
        self.config = self._empty.fade_config
        on_cpu = model.device.type == "cpu"
        self.chunk = options.chunk or (128 if on_cpu else 1024)
        self.slice = options.slice or (64 if on_cpu else 512)
        positions = getattr(text_config(model), "max_position_embeddings", None)
        self.max_length = min(x for x in (options.max_length, positions, 2**31) if x)
        self.vocabulary = vocabulary(model)
        self.ends = end_tokens(model, tokenizer)
        self.metrics, self.view = Metrics(), View()
        calibration = self._empty.calibration and self._empty.calibration.header()
        weights = policy_weights if isinstance(policy_weights, str) else bool(policy_weights)
        kind = f"{self.config} {options.reuse} {self.chunk} {calibration} {weights}"
        self.prefixes = Prefixes(
            model,
            budget=options.memory_budget,
            most=options.max_sessions if options.reuse != "off" else 0,
            kind=kind,
            folder=options.folder,
            load={name: x for name, x in self._extras.items() if name != "calibration"},
            crops=options.reuse == "longest",
        )
        self._queue: FairQueue[Ticket] = FairQueue(options.max_queue)
        self._active: deque[Job] = deque()
        self._current: Job | None = None  # not among the others during its turn
        self._unread: deque[np.ndarray] = deque(maxlen=MAX_UNREAD_ANSWERS)
        self._reading: Iterator[None] | None = None
        self._changed = threading.Condition()
        self._closing = self._idle = False
        self._numbers = itertools.count(1)
        self._thread = threading.Thread(target=self._work, name="fade-engine", daemon=True)

    # -- for all threads

    def start(self) -> "Engine":
        """Start the thread."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Cancel all requests, wait for the thread, and write or remove the kept caches."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        self.prefixes.close()

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *exception) -> None:
        self.close()

    def check(self, request: Request) -> None:
        """Raise `ValueError` for a request that cannot be answered."""
        new = len(request.tokens)
        if not new:
            raise ValueError("the prompt has no tokens: send some text")
        if new >= self.max_length:
            raise ValueError(
                f"the prompt has {new} tokens, and with its answer at most {self.max_length} are possible: "
                "shorten it"
            )
        if new + request.sampling.max_tokens > self.max_length:
            raise ValueError(
                f"the prompt has {new} tokens and the answer at most {request.sampling.max_tokens}, "
                f"together at most {self.max_length} are possible: shorten the prompt, or lower max_tokens"
            )
        if not 0 <= min(request.tokens) <= max(request.tokens) < self.vocabulary:
            raise ValueError(
                f"the prompt has tokens that are not from 0 to {self.vocabulary - 1}: send tokens of this "
                "model"
            )
        biased = [token for token, _ in request.sampling.logit_bias]
        if biased and not 0 <= min(biased) <= max(biased) < self.vocabulary:
            raise ValueError(
                f"logit_bias has tokens that are not from 0 to {self.vocabulary - 1}: send tokens of this "
                "model"
            )

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> Ticket:
        """Let a request wait for its turn. `deliver` is called in the engine's thread; it must not block.

        Raises `ValueError` as `check`, `QueueFull` if too many requests wait.
        """
        self.check(request)
        ticket = Ticket(request, deliver, next(self._numbers))
        with self._changed:
            if self._closing:
                raise QueueFull("the server is stopping: try again later")
            try:
                self._queue.put(request.client, ticket)
            except QueueFull:
                self.metrics.count("requests", outcome="refused")
                raise
            self._changed.notify()
        return ticket

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    @property
    def idle(self) -> bool:
        """Whether the thread has nothing to do, answers to read included."""
        with self._changed:
            return self._idle and not self._queue

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return len(self._queue)

    @property
    def active(self) -> int:
        """Number of jobs that are worked on."""
        return len(self._active) + (self._current is not None)

    # -- the thread

    def _work(self) -> None:
        while self._next_turn():
            if self._active:
                self._current = self._active.popleft()
                self._turn(self._current)
                self._current = None
            else:
                self._read_answers()
        for job in self._active:
            self._fail(job.tickets, QueueFull("the server is stopping: try again later"))
        self._active.clear()
        self._fail(
            self._queue.remove(lambda ticket: True), QueueFull("the server is stopping: try again later")
        )

    def _next_turn(self) -> bool:
        """Wait for something to do, and take requests from the queue. False: the engine closes."""
        with self._changed:
            while True:
                if self._closing:
                    return False
                gone = self._queue.remove(lambda ticket: ticket.cancelled)
                starting = self._admit()
                if gone or starting or self._active or self._unread or self._reading:
                    break
                self._idle = True
                self._changed.wait()
                self._idle = False
        for ticket in gone:
            self._conclude(ticket, Done(len(ticket.request.tokens), 0, 0), "cancelled")
        for tickets in starting:
            self._begin(tickets)
        return True

    def _admit(self) -> list[list[Ticket]]:
        """Take requests from the queue while there is room for more. One batch is one list."""
        starting: list[list[Ticket]] = []
        budget = self.options.memory_budget
        while self._queue and len(self._active) + len(starting) < self.options.max_active:
            used = sum(job.bytes for job in self._active)
            if budget is not None and used > budget and (self._active or starting):
                break
            first = self._queue.get()
            tickets = [first]
            if self.options.max_batch > 1 and first.request.texts == 1:
                tickets += self._queue.remove(
                    lambda other: _fits(first.request, other.request),  # noqa: B023 (it is called at once)
                    self.options.max_batch - 1,
                )
            starting.append(tickets)
        return starting

    def _begin(self, tickets: list[Ticket]) -> None:
        job = Job(tickets, torch.tensor([ticket.request.tokens for ticket in tickets]))
        for ticket in tickets:
            for index in range(ticket.request.texts):
                job.rows.append(self._row(ticket, index))
        job.steps = self._answer(job)
        self._active.append(job)

    def _row(self, ticket: Ticket, index: int) -> Row:
        def tell(piece: Piece) -> None:
            if ticket.first_token is None:
                ticket.first_token = time.monotonic()
                self.metrics.observe("time_to_first_token_seconds", ticket.first_token - ticket.since)
            self.metrics.count("generated_tokens", piece.tokens)
            ticket.send(Text(index, piece))

        sampling = ticket.request.sampling
        cancelled = ticket._cancelled.is_set
        return Row(self.tokenizer, sampling, self.ends, tell, index, cancelled)

    def _turn(self, job: Job) -> None:
        """Work on a job until its next yield."""
        self.view.begin(job.cache)
        try:
            next(job.steps)
        except StopIteration:
            return
        except Exception as error:  # of one request; the others go on
            log.exception("a request failed")
            self._fail(job.tickets, error)
            return
        finally:
            self.view.end()
        if job.cache is not None:
            job.bytes = job.cache.memory(compact=False).own
            self.prefixes.others = job.bytes + sum(other.bytes for other in self._active)
            self.prefixes.trim()
        self._active.append(job)

    def _answer(self, job: Job) -> Iterator[None]:
        """Answer the requests of a job. Each yield ends a turn."""
        shares = self.options.reuse != "off" and len(job.tickets) == 1
        ended: set[int] = set()
        yield from self._read_prompt(job, shares)
        if job.cancelled:
            self._finish(job, ended)
            return
        cache, ids = job.cache, job.ids
        if len(job.rows) > len(ids):
            cache.batch_repeat_interleave(len(job.rows))
            ids = ids.repeat_interleave(len(job.rows), 0)
        while not job.cancelled and len(ended) < len(job.rows):
            left = max(row.sampling.max_tokens - len(row.tokens) for row in job.rows if row.finish is None)
            ids = advance(self.model, cache, ids, job.rows, min(left, self.slice), self._each(job))
            self._tell_ends(job, ended)
            if len(ended) < len(job.rows):
                yield
        if shares:
            self._keep_answer(job, ids)
        self._finish(job, ended)

    def _read_prompt(self, job: Job, shares: bool) -> Iterator[None]:
        """Read the prompt but for its end, and keep the cache as it is then."""
        tokens = job.ids[0].numpy().astype(np.int32)
        cache, marks = None, set()
        if shares:
            match = self.prefixes.match(tokens)
            cache = self.prefixes.take(match) if match.entry else None
            job.cached = match.length if cache else 0
            last = (len(tokens) - 1) // self.chunk * self.chunk
            # Another request has begun as this one does, up to `shared`. A third one may follow.
            marks = {match.shared // self.chunk * self.chunk, last}
            if last - job.cached > 2 * self.chunk:  # a new text, and its question may begin before `last`
                marks.add(last - self.chunk)
        job.cache = copy.deepcopy(self._empty) if cache is None else cache
        self.metrics.count("prompt_tokens", job.ids.numel())
        self.metrics.count("cached_tokens", job.cached)
        self.metrics.count("prefix_lookups", hit="yes" if job.cached else "no")
        self.view.begin(job.cache)
        for held in read(self.model, job.cache, job.ids, self.chunk):
            if held in marks:
                self.prefixes.put(tokens[:held], copy.deepcopy(job.cache))
            self.view.step(self._about(job))
            yield
            if job.cancelled:
                return

    def _each(self, job: Job) -> Callable[[], None]:
        """What is done at every token: nothing, unless somebody looks."""

        def each() -> None:
            if self.view.watched:
                self.view.step(self._about(job))

        return each

    def _tell_ends(self, job: Job, ended: set[int]) -> None:
        """Deliver the ends of texts."""
        position = 0
        for ticket in job.tickets:
            rows = job.rows[position : position + ticket.request.texts]
            position += len(rows)
            for row in rows:
                if row.finish is not None and id(row) not in ended:
                    ended.add(id(row))
                    ticket.send(End(row.index, row.finish))
            whole = all(row.finish is not None for row in rows)
            if whole and len(job.tickets) > 1 and not ticket.concluded:
                self._conclude_rows(job, ticket, rows)  # others of the batch still go on

    def _finish(self, job: Job, ended: set[int]) -> None:
        """Conclude the tickets of a job. Texts that have not ended were cancelled."""
        for row in job.rows:
            row.finish = row.finish or "cancelled"
        self._tell_ends(job, ended)
        position = 0
        for ticket in job.tickets:
            rows = job.rows[position : position + ticket.request.texts]
            position += len(rows)
            if not ticket.concluded:
                self._conclude_rows(job, ticket, rows)

    def _conclude_rows(self, job: Job, ticket: Ticket, rows: list[Row]) -> None:
        done = Done(len(ticket.request.tokens), job.cached, sum(len(row.tokens) for row in rows))
        self._conclude(ticket, done, "cancelled" if ticket.cancelled else "answered")

    def _conclude(self, ticket: Ticket, done: Done, outcome: str) -> None:
        self.metrics.count("requests", outcome=outcome)
        self.metrics.observe("request_seconds", time.monotonic() - ticket.since)
        ticket.send(done)

    def _fail(self, tickets: list[Ticket], error: BaseException) -> None:
        for ticket in tickets:
            if not ticket.concluded:
                self.metrics.count("requests", outcome="failed")
                ticket.send(Failed(error))

    # -- kept caches

    def _keep_answer(self, job: Job, ids: torch.Tensor) -> None:
        """Keep what the next turn of the conversation can go on from."""
        if len(job.rows) > 1 or not job.rows[0].tokens:
            return
        text = ids[0].cpu().numpy().astype(np.int32)
        if self.options.reuse == "longest":
            self.prefixes.put(text[: job.cache.get_seq_length()], job.cache)
        elif len(text) // self.chunk > (job.ids.shape[1] - 1) // self.chunk:
            self._unread.append(text)  # at least one more chunk is complete

    def _read_answers(self) -> None:
        """Read a chunk of an answer, as a prompt would be read."""
        if self._reading is None:
            if not self._unread:
                return
            self._reading = self._read_answer(self._unread.popleft())
        try:
            if next(self._reading, "end") == "end":
                self._reading = None
        except Exception as error:  # nobody waits for it
            self._reading = None
            self.metrics.count("failed_readings")
            self.view.note(f"an answer could not be read again: {error}")

    def _read_answer(self, text: np.ndarray) -> Iterator[None]:
        match = self.prefixes.match(text)
        stop = len(text) // self.chunk * self.chunk
        if match.length >= stop:
            return
        cache = self.prefixes.take(match) if match.entry else None
        cache = copy.deepcopy(self._empty) if cache is None else cache
        # One more token, because reading stops before the last one.
        ids = torch.from_numpy(text[:stop].astype(np.int64))[None]
        ids = torch.cat((ids, ids[:, :1]), 1)
        for _ in read(self.model, cache, ids, self.chunk):
            yield
        self.prefixes.put(text[:stop], cache)

    # -- what is shown

    def _about(self, job: Job) -> dict:
        """What the view tells of the engine's work."""
        return dict(
            request=job.tickets[0].number,
            prompt=job.ids.shape[1],
            cached=job.cached,
            generated=sum(len(row.tokens) for row in job.rows),
            waiting=self.waiting,
            active=self.active,
        )


def _fits(first: Request, other: Request) -> bool:
    """Whether two requests can be answered as one batch."""
    same = len(first.tokens) == len(other.tokens) and other.texts == 1
    return same and first.sampling.ignore_eos == other.sampling.ignore_eos
