"""The classes of a case and its results, and the random inputs of all cases."""

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import twins
from .tolerances import CLAIMS


@dataclass
class Check:
    """The worst result of a case for one claim.

    Attributes:
        claim: the name of the claim, a key of `tolerances.CLAIMS`.
        error, allowed: the error with the largest ratio to its tolerance, and that tolerance. For a
            claim bit for bit, `error` is the number of elements that differ, and `allowed` is 0.
        where: the part of the case that has this error.
        digest: for a claim bit for bit, the SHA-256 of all bits that were compared. Otherwise "".
    """

    claim: str
    error: float
    allowed: float
    where: str = ""
    digest: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    @property
    def excess(self) -> float:
        """The error divided by the tolerance. The check fails above 1."""
        if self.passed:
            return self.error / self.allowed if self.allowed else 0.0
        return self.error / self.allowed if self.allowed and self.error == self.error else float("inf")


@dataclass
class Found:
    """Collects the results of a case. A case may check a claim many times. The worst check is kept.

    Attributes:
        device: the device that runs fade_fast.
        fused: whether fade_fast runs compiled code on this device.
        ran: the compiled graphs that ran so far.
    """

    device: str = "cpu"
    fused: bool = False
    ran: twins.Twins = field(default_factory=twins.Twins)
    checks: dict[str, Check] = field(default_factory=dict)
    _bits: dict = field(default_factory=dict)

    def near(self, claim: str, error: float, where="", *, dtype=torch.float64, strain: float = 0.0) -> None:
        """Check that an error is within the claim's tolerance for `dtype`, plus `strain`.

        `strain` is the part of the error that this input adds, see `tolerances.strain`.
        """
        self._keep(Check(claim, float(error), CLAIMS[claim].allows(dtype) + strain, str(where)))

    def same(self, claim: str, ours: Tensor | None, exact: Tensor | None, where="") -> None:
        """Check that two tensors agree bit for bit. Their dtypes may differ. A NaN equals a NaN."""
        if ours is None or exact is None:
            differing = int(ours is not exact)
        elif ours.shape != exact.shape:
            differing = max(1, ours.numel(), exact.numel())
        else:
            a, b = ours.detach().cpu(), exact.detach().cpu()
            wide = torch.float64 if a.is_floating_point() or b.is_floating_point() else torch.int64
            a, b = a.to(wide), b.to(wide)
            differing = int(((a != b) & ~(a.isnan() & b.isnan())).sum())
        self.bits(claim, ours)
        self._keep(Check(claim, differing, 0.0, str(where)))

    def holds(self, claim: str, truth: bool, where="") -> None:
        """Check that `truth` is True."""
        self._keep(Check(claim, int(not truth), 0.0, str(where)))

    def refused(self, call: Callable, *names: str) -> None:
        """Check that `call` raises `ValueError` with a message that contains all `names`."""
        try:
            call()
        except ValueError as error:
            missing = [name for name in names if name not in str(error)]
            self.holds("refusal", not missing, f"{missing} missing in {error}" if missing else "")
        else:
            self.holds("refusal", False, "nothing was refused")

    def bits(self, claim: str, x) -> None:
        """Add `x` to the digest of a claim: a tensor, or an object whose `repr` is complete."""
        digest = self._bits.setdefault(claim, hashlib.sha256())
        if isinstance(x, Tensor):
            x = x.detach().cpu().contiguous()
            digest.update(f"{x.dtype} {list(x.shape)}".encode())
            x = x.view(torch.uint8) if x.dim() else x.reshape(1).view(torch.uint8)
            digest.update(x.numpy().tobytes())
        else:
            digest.update(repr(x).encode())

    def _keep(self, check: Check) -> None:
        worst = self.checks.get(check.claim)
        if worst is None or (check.excess, check.error) > (worst.excess, worst.error):
            self.checks[check.claim] = check

    def finish(self) -> list[Check]:
        """All checks, with their digests."""
        for claim, digest in self._bits.items():
            if claim in self.checks:
                self.checks[claim].digest = digest.hexdigest()
        return list(self.checks.values())


@dataclass(frozen=True)
class Case:
    """One comparison of both packages.

    Attributes:
        subject: the part of the packages that the case compares. Tables are grouped by it, and by `group`.
        name: unique within the group.
        run: a function that runs the case. It takes a `Found` for the results, and a seed.
        covers: the registered names that the case covers, such as "policy h2o"; see `subjects.registries`.
        dtype: the dtype that `--dtype` selects. None if the case uses all dtypes, or none.
        known: the description of a known bug. Such a case is reported, but the run does not fail.
        compiled: whether the case runs compiled by default, see `twins`.
    """

    subject: str
    group: str
    name: str
    run: Callable[[Found, int], None]
    covers: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    known: str = ""
    compiled: bool = False

    @property
    def title(self) -> str:
        return f"{self.subject}/{self.group}/{self.name}"


@dataclass
class Outcome:
    """The result of a case: its checks, the exception if there was one, and the compiled graphs."""

    case: Case
    checks: list[Check]
    raised: str = ""
    ran: twins.Twins = field(default_factory=twins.Twins)

    @property
    def passed(self) -> bool:
        return not self.raised and bool(self.checks) and all(c.passed for c in self.checks)


def perform(case: Case, device: str = "cpu", seed: int = 0, compiled: str = "some") -> Outcome:
    """Run a case. The case fails if it raises an exception. `compiled`: see `twins.CHOICES`."""
    with twins.allowed(twins.wanted(compiled, case.compiled)) as ran:
        found, raised = Found(device, twins.fused(device), ran), ""
        try:
            with torch.no_grad():
                case.run(found, seed + zlib.crc32(case.title.encode()))
        except Exception as error:  # noqa: BLE001
            raised = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return Outcome(case, found.finish(), raised, ran)


class Draw:
    """Seeded random inputs, with the same bits on every machine.

    Real numbers are multiples of 2^-12. Logarithms differ between machines in the last bit, and this grid
    removes the difference.
    """

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *size: int) -> Tensor:
        """float64 with mean 0 and variance 1."""
        x = torch.randn(*size, generator=self.generator, dtype=torch.float64)
        return (x * 4096).round() / 4096

    def uniform(self, *size: int) -> Tensor:
        """float64, from 0 to 1."""
        return torch.randint(0, 4096, size, generator=self.generator).double() / 4096

    def integers(self, low: int, high: int, *size: int) -> Tensor:
        """int64, from `low` to `high` - 1."""
        return torch.randint(low, high, size, generator=self.generator)

    def one(self, low: int, high: int) -> int:
        return int(self.integers(low, high, 1))

    def pick(self, options):
        options = list(options)
        return options[self.one(0, len(options))]

    def chance(self, p: float, *size: int) -> Tensor:
        """bool, True with probability p."""
        return self.uniform(*size) < p


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference divided by the norm of the exact tensor. If that norm is 0, no division.

    If the error is NaN or infinite, the result is infinite.
    """
    difference = ours.detach().cpu().double() - exact
    peak = float(exact.abs().max()) if exact.numel() else 0.0
    scale = peak or 1.0  # squares of denormals would underflow
    error = (difference / scale).norm() / ((exact / scale).norm() if peak else 1.0)
    return float("inf") if not error.isfinite() else float(error)
