"""`FadeConfig`: every choice a user can make, its default, and what is refused.

This is the only place where defaults stand; `fade_fast` uses the same class.
"""

from dataclasses import dataclass

from .tiers import INTEGER_TIERS

POLICIES = (
    "position", "h2o", "ema", "adaptive", "learned", "snapkv", "tova",
    "knorm", "keydiff", "expected_attention", "hybrid",
)  # fmt: skip
CODECS = ("rotated", "channel", "symmetric", "product")
POSITIONS = ("original", "contiguous")
PLAN_SCOPES = ("layer", "sequence", "head")


@dataclass(frozen=True)
class FadeConfig:
    """How the tokens of a cache are kept. Token counts are a batch row's, for each layer.

    `fade_ref` has all of it; `fade_fast.create_cache` refuses, by name, what it does not serve yet.

    Args:
        n_sink: first real (non-padding) tokens kept in the model's own dtype for ever.
        recent_window: newest tokens kept in the model's own dtype; `None` keeps all of them, which
            switches compression off.
        block_size: tokens that leave the recent region together. One key mean is stored a block
            where tokens never move (see `relocatable`).
        int4_budget: most tokens the first middle tier holds, best score first; `None`: no limit.
            Its width is `middle_k_bits` / `middle_v_bits`, 4 unless you say otherwise.
        int2_budget: most tokens of the second, 2-bit tier; `None`: no limit. Needs a finite
            `int4_budget`. What exceeds both budgets is evicted.
        eviction_policy: what scores the middle, one of `POLICIES`.
        middle_k_bits, middle_v_bits: width of keys and values in the first middle tier: 8, 4, 3, 2.
        quant_backend: the codec, one of `CODECS`. "product" needs codebooks, which the cache is given;
            they set the width, and the middle is one tier, PQ, that keeps every token.
        positions: RoPE positions of survivors. "contiguous" renumbers them without gaps
            (StreamingLLM, arXiv 2309.17453 section 3.2), "original" leaves their own. `None`, the
            default, is "contiguous" if tokens can be evicted and "original" otherwise.
        plan_scope: who shares a plan: "layer" (all rows and heads of a layer), "sequence" (each
            batch row has its own) or "head" (each row and KV head).

    Raises:
        ValueError: a value out of range, or two that contradict each other; the message names the
            field, the value and what is allowed.
    """

    n_sink: int = 4
    recent_window: int | None = 64
    block_size: int = 64
    int4_budget: int | None = None
    int2_budget: int | None = 0
    eviction_policy: str = "position"
    middle_k_bits: int = 4
    middle_v_bits: int = 4
    quant_backend: str = "rotated"
    positions: str | None = None
    plan_scope: str = "sequence"

    def __post_init__(self):
        self._integer("n_sink", 0)
        self._integer("recent_window", 0, optional=True)
        self._integer("block_size", 1)
        self._integer("int4_budget", 0, optional=True)
        self._integer("int2_budget", 0, optional=True)
        self._choice("eviction_policy", POLICIES)
        self._choice("middle_k_bits", tuple(INTEGER_TIERS))
        self._choice("middle_v_bits", tuple(INTEGER_TIERS))
        self._choice("quant_backend", CODECS)
        self._choice("positions", (None, *POSITIONS))
        self._choice("plan_scope", PLAN_SCOPES)
        if self.int4_budget is None and self.int2_budget != 0:
            raise ValueError(
                f"int2_budget={self.int2_budget} needs a finite int4_budget: with int4_budget=None "
                "no token would ever reach the INT2 tier"
            )
        if self.recent_window is None and self.int4_budget is not None:
            raise ValueError(
                f"recent_window=None (no compression) contradicts int4_budget={self.int4_budget}: "
                "no token would ever reach the middle"
            )
        if self.quant_backend == "channel" and self.relocatable:
            raise ValueError(
                "quant_backend='channel' quantises keys in blocks of tokens that cannot be moved: "
                "it needs int4_budget=None"
            )
        if self.quant_backend == "product":
            self._product()

    def _product(self) -> None:
        """What goes with codebooks: tokens that stay where they are, as they are."""
        if self.relocatable:
            raise ValueError(
                "quant_backend='product' has one tier, which keeps every token: "
                f"int4_budget={self.int4_budget} contradicts it, None is allowed"
            )
        if self.contiguous:
            raise ValueError(
                "quant_backend='product' encodes keys after RoPE, which cannot be renumbered: "
                "positions='contiguous' contradicts it"
            )
        if (self.middle_k_bits, self.middle_v_bits) != (4, 4):
            raise ValueError(
                "quant_backend='product' takes its width from the codebooks: "
                f"middle_k_bits={self.middle_k_bits}, middle_v_bits={self.middle_v_bits} mean nothing to it, "
                "leave them out"
            )

    def _integer(self, field: str, least: int, optional: bool = False) -> None:
        value = getattr(self, field)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            allowed = f"an integer of at least {least}" + (", or None" if optional else "")
            raise ValueError(f"{field}={value!r}: {allowed} is allowed")

    def _choice(self, field: str, allowed: tuple) -> None:
        value = getattr(self, field)
        known = isinstance(value, (str, int, type(None))) and not isinstance(value, bool)
        if not known or value not in allowed:
            raise ValueError(f"{field}={value!r}: one of {', '.join(map(repr, allowed))} is allowed")

    @property
    def compresses(self) -> bool:
        """Whether any token can leave the recent region."""
        return self.recent_window is not None

    @property
    def relocatable(self) -> bool:
        """Whether a middle token can change tier or slot, so that each must be a movable record."""
        return self.int4_budget is not None

    @property
    def evicts(self) -> bool:
        """Whether tokens can be dropped."""
        return self.int4_budget is not None and self.int2_budget is not None

    @property
    def contiguous(self) -> bool:
        """Whether survivors are renumbered; then keys are encoded before RoPE.

        >>> FadeConfig().contiguous, FadeConfig(int4_budget=400).contiguous
        (False, True)
        """
        return self.evicts if self.positions is None else self.positions == "contiguous"

    @classmethod
    def lossless(cls) -> "FadeConfig":
        """INT8 middle, every token kept: half the memory, no measurable change."""
        return cls(middle_k_bits=8, middle_v_bits=8)

    @classmethod
    def safe(cls) -> "FadeConfig":
        """INT4 middle, every token kept."""
        return cls()

    @classmethod
    def balanced(cls) -> "FadeConfig":
        """4 sinks, 64 to 128 recent tokens and the 400 newest of the middle at INT4.

        Older tokens are evicted by position alone, so what the text said before its last few
        hundred tokens is forgotten; positions are renumbered contiguously.
        """
        return cls(int4_budget=400)

    @classmethod
    def aggressive(cls) -> "FadeConfig":
        """4 sinks, 32 to 96 recent tokens and the 200 newest of the middle at INT4.

        Evicts by position alone, like `balanced`, from a smaller budget.
        """
        return cls(recent_window=32, int4_budget=200)

    @classmethod
    def preset(cls, name: str) -> "FadeConfig":
        """The preset called `name`; `ValueError` lists the names if there is none.

        >>> FadeConfig.preset("safe") == FadeConfig.safe()
        True
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: one of {', '.join(PRESETS)} is allowed")
        return getattr(cls, name)()


PRESETS = ("lossless", "safe", "balanced", "aggressive")
