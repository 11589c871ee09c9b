"""What a case is, what it finds, and the inputs that all cases draw from."""

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
    """The worst that a case found about one claim.

    Attributes:
        claim: which one, a key of `tolerances.CLAIMS`.
        error, allowed: how far both packages are apart where that is worst against what is allowed;
            of claims bit for bit, how many elements differ, and 0.
        where: which part of the case that was.
        digest: SHA-256 of all the bits that were compared, for claims bit for bit; else "".
    """

    claim: str
    error: float
    allowed: float
    where: str = ""
    digest: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # NaN does not

    @property
    def excess(self) -> float:
        """Error over what is allowed; above 1 it fails."""
        if self.passed:
            return self.error / self.allowed if self.allowed else 0.0
        return self.error / self.allowed if self.allowed and self.error == self.error else float("inf")


@dataclass
class Found:
    """What a case writes down. A claim may be checked many times; the worst time is kept.

    Attributes:
        device: where fade_fast runs.
        fused: whether it runs compiled there, as far as it compiles anything.
        ran: what ran compiled so far.
    """

    device: str = "cpu"
    fused: bool = False
    ran: twins.Twins = field(default_factory=twins.Twins)
    checks: dict[str, Check] = field(default_factory=dict)
    _bits: dict = field(default_factory=dict)

    def near(self, claim: str, error: float, where="", *, dtype=torch.float64, strain: float = 0.0) -> None:
        """An error that must lie within the claim's tolerance for `dtype`, plus `strain`.

        `strain` is what the input itself makes of a rounding, see `tolerances.strain`.
        """
        self._keep(Check(claim, float(error), CLAIMS[claim].allows(dtype) + strain, str(where)))

    def same(self, claim: str, ours: Tensor | None, exact: Tensor | None, where="") -> None:
        """Two tensors that must agree bit for bit, dtypes apart; a NaN equals a NaN."""
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
        """Something that must be so."""
        self._keep(Check(claim, int(not truth), 0.0, str(where)))

    def refused(self, call: Callable, *names: str) -> None:
        """`call` must raise `ValueError`, with a message that holds all `names`."""
        try:
            call()
        except ValueError as error:
            missing = [name for name in names if name not in str(error)]
            self.holds("refusal", not missing, f"{missing} missing in {error}" if missing else "")
        else:
            self.holds("refusal", False, "nothing was refused")

    def bits(self, claim: str, x) -> None:
        """Let a claim's digest cover `x`: a tensor, or anything whose `repr` says all."""
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
        """Every check, with its digest."""
        for claim, digest in self._bits.items():
            if claim in self.checks:
                self.checks[claim].digest = digest.hexdigest()
        return list(self.checks.values())


@dataclass(frozen=True)
class Case:
    """One thing that is compared.

    Attributes:
        subject: what of the packages it is about; tables are grouped by it, and by `group`.
        name: unique within the group.
        run: does it, given where to write down what it finds, and a seed.
        covers: names of what the registries list, such as "policy h2o"; see `subjects.REGISTRIES`.
        dtype: what `--dtype` selects by; None where a case has all, or none.
        known: what is wrong, of a bug that is known: such a case is shown, and does not fail a run.
        compiled: whether it is one of the cases that run compiled by default, see `twins`.
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
    """What became of a case: its checks, or the exception that ended it, and what ran compiled."""

    case: Case
    checks: list[Check]
    raised: str = ""
    ran: twins.Twins = field(default_factory=twins.Twins)

    @property
    def passed(self) -> bool:
        return not self.raised and bool(self.checks) and all(c.passed for c in self.checks)


def perform(case: Case, device: str = "cpu", seed: int = 0, compiled: str = "some") -> Outcome:
    """Run a case. An exception in it is its failure. `compiled`: see `twins.CHOICES`."""
    with twins.allowed(twins.wanted(compiled, case.compiled)) as ran:
        found, raised = Found(device, twins.fused(device), ran), ""
        try:
            with torch.no_grad():
                case.run(found, seed + zlib.crc32(case.title.encode()))
        except Exception as error:  # noqa: BLE001
            raised = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return Outcome(case, found.finish(), raised, ran)


class Draw:
    """Seeded random inputs, the same bits on every machine.

    Reals lie on a grid of 2^-12, so that the last bit of a machine's logarithm leaves no trace.
    """

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *size: int) -> Tensor:
        """float64, of mean 0 and variance 1."""
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
    """Norm of the difference over the norm of the exact tensor, or alone where that is 0.

    NaN and infinity never pass for small.
    """
    difference = ours.detach().cpu().double() - exact
    peak = float(exact.abs().max()) if exact.numel() else 0.0
    scale = peak or 1.0  # squares of denormals would vanish
    error = (difference / scale).norm() / ((exact / scale).norm() if peak else 1.0)
    return float("inf") if not error.isfinite() else float(error)
