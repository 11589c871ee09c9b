"""Whether a beam search goes on: generate() learns this one step late, so that the GPU need not wait.

After each step, generate() asks the device whether another step follows. Until the host knows, it prepares
nothing. Here the answer is yes at first. The true answer is read when the rows would be reordered after the
next step, which the GPU is still at. If the search had ended, that step was one too many: its token is
cropped, and rows stay in their places. Its iteration changes no result, because the best beam that has ended
in a text whose search is over cannot be replaced. generate() itself relies on this: it goes on until the
searches of all texts are over.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..cache import decode_graph as graphs

#: Options of generate() that could see the iteration that is one too many.
WATCHING = (
    "return_dict_in_generate", "stopping_criteria", "prefix_allowed_tokens_fn", "max_time", "stop_strings",
    "synced_gpus", "constraints", "force_words_ids",
)  # fmt: skip


@dataclass
class SearchStop:
    """Of one generate().

    Attributes:
        decode_graph: of its cache.
        watched: whether an option of `WATCHING` is set, or several beams of a text are returned.
        lengths: tokens of the texts before the next step, and at most; None: not known.
        ended: whether the search has ended, and one step more has been undone.
    """

    decode_graph: graphs.DecodeGraph
    watched: bool
    lengths: tuple[int, int] | None = None
    ended: bool = False
    _answer: Tensor | None = field(default=None, repr=False)  # what is not read yet
    _host: Tensor | None = field(default=None, repr=False)  # where the GPU writes it
    _copied: "torch.cuda.Event | None" = field(default=None, repr=False)

    @classmethod
    def of(cls, decode_graph: graphs.DecodeGraph, config, kwargs: dict) -> "SearchStop":
        """For the arguments of `model.generate` and its generation configuration."""
        option = lambda name: kwargs.get(name, getattr(config, name, None))  # noqa: E731
        watched = any(option(name) not in (None, False, []) for name in WATCHING)
        # Where few tokens are allowed, fewer beams than these may have ended, and a step more ends others.
        several = (option("num_return_sequences") or 1) > 1
        return cls(decode_graph, watched or several)

    def _may_be_late(self, lengths: tuple[int, int] | None) -> bool:
        """Whether another step fits, is captured, and can be undone by a crop."""
        graph = self.decode_graph
        if self.watched or lengths is None or lengths[0] >= lengths[1] or graph.search is None:
            return False
        plain = all(layer.observer is None and layer.ranks is None for layer in graph.layers)
        return plain and graph.captures and graph.steps > 0 and graph.layers[0].device.type in graphs.AHEAD_ON

    def goes_on(self, answer: Tensor | bool) -> bool:
        """Whether generate() shall take another step, given what it found on the device."""
        lengths, self.lengths = self.lengths, None
        self._answer = None
        if self.ended:
            return False
        if not isinstance(answer, Tensor) or not self._may_be_late(lengths):
            return bool(answer)
        if not answer.is_cuda:
            self._answer = answer.clone()
            return True
        if self._host is None:
            self._host, self._copied = torch.empty((), dtype=torch.bool).pin_memory(), torch.cuda.Event()
        self._answer = self._host.copy_(answer, non_blocking=True)
        self._copied.record()
        return True

    def one_too_many(self) -> bool:
        """Whether the newest step came after the end of the search. The host waits until that is known."""
        if self._answer is None:
            return False
        if self._copied is not None:
            self._copied.synchronize()
        self.ended, self._answer = not bool(self._answer), None
        return self.ended
