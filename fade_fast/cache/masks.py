"""Reads a step's mask: which new tokens are real, and which tokens of the step each of them sees.

A tiered cache stores which of its tokens are padding. A mask may repeat that, but not contradict it. So a
mask that hides a cached token, shows padding, or has another length is refused with `ValueError`. Over the
new tokens any boolean mask is allowed.
"""

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

PAD = -1  # position of a padding token
ROWS = 1024  # query tokens of a mask that are compared at a time


@dataclass(eq=False)
class Verdict:
    """Facts about a mask, for all layers of a step: its real tokens, and whether it is causal."""

    real: Tensor | None = None
    causal: bool | None = None


@dataclass(frozen=True, eq=False)
class StepMask:
    """The mask of a step of q tokens.

    `given`, bool [B or 1, 1, q, q], says which tokens of the step each token sees. None: all up to itself.
    """

    given: Tensor | None = None
    verdict: Verdict = field(default_factory=Verdict)

    @property
    def real(self) -> Tensor | None:
        """Which tokens are real, bool [B, q]; None: all."""
        return self.verdict.real

    @property
    def own(self) -> Tensor | None:
        """`given` if it is not causal over real tokens; None if it is causal and need not be applied."""
        if self.given is None or self.given.shape[-1] == 1:
            return None
        if self.verdict.causal is None:
            self.verdict.causal = _is_causal(self.given, self.real)
        return None if self.verdict.causal else self.given


class MaskReader:
    """Reads the masks of a cache's steps. All layers of a step get the same mask, which is checked once."""

    def __init__(self):
        self._last: tuple | None = None  # weak reference to the newest mask, its start, its verdict

    def read(
        self, mask: Tensor | None, batch: int, new: int, start: int, positions: Tensor | None
    ) -> StepMask:
        """The mask of the step of `new` tokens (q) that begins at step index `start`.

        Args:
            mask: bool [B or 1, 1, q, q] over the tokens of the step, or [B or 1, 1, q, start + q]; or None.
            batch: B.
            new: q.
            start: number of cached tokens per row.
            positions: int32 [B, start or more], positions of the cached tokens, `PAD` for padding.

        Raises `ValueError` for another shape or dtype, or if the part over cached tokens does not show
        exactly the real tokens.
        """
        if mask is None:
            return StepMask()
        same = self._last is not None and self._last[0]() is mask and self._last[1] == start
        if not same:
            verdict = _judge(mask, batch, new, positions[:, :start] if start else None)
            self._last = weakref.ref(mask), start, verdict
        return StepMask(mask[..., -new:], self._last[2])

    def __deepcopy__(self, memo: dict) -> "MaskReader":
        return MaskReader()


def check(mask: Tensor, batch: int, new: int, positions: Tensor | None) -> None:
    """Raise `ValueError` for a 2-D or 4-D mask that contradicts the cache or has another length.

    `positions`, int32 [B, past], are the positions of the cached tokens; None without cached tokens.
    """
    if mask.dim() == 2:
        _check_padding(mask, new, positions)
    else:
        _judge(mask, batch, new, positions)


def _judge(mask: Tensor, batch: int, new: int, positions: Tensor | None) -> Verdict:
    """Check the 4-D mask of a step, and find which tokens of the step are real."""
    past = 0 if positions is None else positions.shape[1]
    fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1:3] == (1, new)
    if not fits or mask.shape[3] not in (new, past + new):
        raise ValueError(
            f"attention mask of shape {tuple(mask.shape)}: a step of {batch} x {new} tokens after {past} "
            f"cached ones takes [{batch}, {past + new}], or bool [{batch}, 1, {new}, {new}] or "
            f"[{batch}, 1, {new}, {past + new}]"
        )
    if mask.dtype != torch.bool:
        raise ValueError(
            f"attention mask of {mask.dtype}: with a tiered cache a 4-D mask is bool, True where a token is "
            "attended; biases that are added to scores are not supported. Pass mask == 0 if yours has 0 and "
            "-inf"
        )
    given = mask[..., -new:]
    if mask.shape[3] > new:
        _check_past(mask[..., :-new], given, positions)
    return Verdict(given.any(dim=-2)[:, 0].expand(batch, new))  # no token sees padding


def _check_padding(mask: Tensor, new: int, positions: Tensor | None) -> None:
    """Raise `ValueError` for a mask [B, n] that does not cover all tokens or contradicts the cache."""
    past = 0 if positions is None else positions.shape[1]
    if mask.shape[1] != past + new:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens, but {past} are cached and {new} are new: it must "
            f"cover all {past + new}; pass the mask of the cached tokens again"
        )
    if past and mask.shape[0] == positions.shape[0]:
        differs = (mask[:, :past] != 0) != (positions != PAD)
        if differs.any():
            _refuse(differs)


def _check_past(shown: Tensor, given: Tensor, positions: Tensor) -> None:
    """Raise `ValueError` if a mask over the past [B, 1, q, past] does not show exactly the real tokens."""
    differs = (shown != (positions != PAD)[:, None, None, :]) & given.any(-1, keepdim=True)
    if differs.any():
        _refuse(differs.any(2)[:, 0])


def _refuse(differs: Tensor) -> None:
    row, token = differs.nonzero()[0].tolist()
    raise ValueError(
        f"attention_mask contradicts the cache: of row {row}, token {token} is cached as "
        "real and hidden now, or cached as padding and shown now. What is cached cannot be hidden from later "
        "tokens: crop() the cache, or make a new one"
    )


def _is_causal(given: Tensor, real: Tensor) -> bool:
    """Whether every real token sees exactly the real tokens up to itself."""
    new = given.shape[-1]
    index = torch.arange(new, device=given.device)
    for start in range(0, new, ROWS):
        rows = slice(start, start + ROWS)
        expected = (index <= index[rows, None]) & real[:, None, None, :]
        if ((given[:, :, rows] != expected) & real[:, None, rows, None]).any():
            return False
    return True
