"""`FadeConfig`: every choice a user can make, its default, and what is refused.

Defaults stand here and nowhere else. `fade_fast` uses the same class.
"""

import difflib
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

from .tiers import INTEGER_TIERS

POLICIES = (
    "position", "h2o", "ema", "adaptive", "learned", "snapkv", "tova",
    "knorm", "keydiff", "expected_attention", "hybrid",
)  # fmt: skip
CODECS = ("rotated", "matched", "channel", "symmetric")
#: Why a codec of earlier versions is refused.
PRODUCT = (
    "quant_backend='product': product quantization is a baseline of the benchmarks only, because 2-bit codes "
    "lose less at its bytes: use quant_backend='matched', middle_k_bits=2, middle_v_bits=2"
)
POSITIONS = ("original", "contiguous")
PLAN_SCOPES = ("layer", "sequence", "head")
SAFE_LOSS = 0.003  # KL divergence per token that `safe` may cost, in nats
#: What scores pages where a query chooses what it reads: upper bits of key codes (`select.py`), and numbers
#: of pages (`summaries.py`). "+": the first one leaves some blocks, and the second one chooses among them.
INDEXES = ("k2", "k1", "deviation+k2", "bounds+k2", "deviation", "bounds")
SHORTLIST = 4  # times the tokens that a query reads: what the first of two indexes leaves to the second
#: Policies that can say which pages stay on the GPU, where the others lie in host memory. They look at the
#: mass that the index gives to each page.
RESIDENT_POLICIES = ("position", "h2o", "ema", "tova", "hybrid")
COLD = ("host",)  # where the payload of tokens lies that are not resident
PAGES = (8, 16, 32)  # tokens that are chosen together
DEFAULT_MOST = 2048  # tokens that are read at most where `select` is a share
KEPT = 16  # bits of keys or values that stay in the model's dtype
#: Named rules for `layer_bits`: bits of keys and values in the first two and the last two layers.
BOUNDARIES = {"boundary": (8, 8), "boundary-16": (KEPT, KEPT)}
#: Bits of keys and values.
Bits = tuple[int, int]


@dataclass(frozen=True)
class FadeConfig:
    """How the tokens of a cache are kept. Token counts are those of a batch row, for each layer.

    `fade_ref` has all of it. `fade_fast.create_cache` refuses, by name, what it does not serve yet.

    Args:
        n_sink: first real (non-padding) tokens, which are always kept in the dtype of the model.
        recent_window: newest tokens kept in the dtype of the model. `None` keeps all: no compression.
        block_size: tokens that leave the recent region together. If tokens never move (see `relocatable`),
            one key mean is stored for each block.
        int4_budget: most tokens that the first middle tier holds, best score first; `None`: no limit. The
            widths `middle_k_bits` and `middle_v_bits` set the bits of this tier.
        int2_budget: most tokens of the second, 2-bit tier; `None`: no limit. Needs a finite `int4_budget`.
            Tokens beyond both budgets are evicted.
        eviction_policy: what scores the middle, one of `POLICIES`. With `cold`, one of `RESIDENT_POLICIES`:
            it says which pages stay on the GPU. Nothing is dropped then. "position": those used last.
        middle_k_bits, middle_v_bits: bits of keys and values in the first middle tier: 8, 4, 3 or 2. Values
            may have 16: then only keys are compressed, and values stay in the dtype of the model.
        layer_bits: other bits for other layers: a mapping from a layer's index to (keys, values); "boundary",
            8 bits in the first two and the last two layers; "boundary-16", these layers not compressed; or a
            function `(layer, layers) -> (keys, values)` of a layer's index and the number of layers. (16, 16)
            is a layer that is not compressed: it keeps every token, and budgets do not apply to it. Indices
            are those of the model's layers.
        loss_bound: most KL divergence, in nats a token, that compression may cost on a short text.
            `fade_fast.create_cache` measures the loss once for a model. If `middle_k_bits` and
            `middle_v_bits` lose more, it chooses `layer_bits`. `None`: the widths are as given. `fade_ref`
            takes the widths as given.
        quant_backend: the codec, one of `CODECS`. "rotated", the default of this class, needs nothing from
            the model. "matched", the codec of the presets that keep every token at 4 bits, loses less and
            needs a calibration.
        positions: RoPE positions of survivors. "contiguous" renumbers them without gaps (StreamingLLM, arXiv
            2309.17453, section 3.2). "original" leaves their own. `None`, the default, is "contiguous" if
            tokens can be evicted and "original" otherwise.
        plan_scope: who shares a plan: "layer" (all rows and heads of a layer), "sequence" (each batch row has
            its own) or "head" (each row and KV head has its own).
        select: tokens of the middle that a query reads in each KV head, chosen by the query; a multiple of
            `select_page`. Or a share of probability between 0 and 1: as many pages as hold it. `None`: all
            tokens. Sinks and recent tokens are always read, and every token is kept.
        select_page: tokens that are chosen together, one of `PAGES`.
        select_max: most tokens that are read where `select` is a share; `None`: 2048.
        index: what scores the tokens, one of `INDEXES`. "k2" and "k1": the upper two bits, or the uppermost
            bit, of 4-bit key codes. "bounds" and "deviation": minimum and maximum, or mean and standard
            deviation, of the keys of each page. "bounds+k2" and "deviation+k2": these numbers of each block
            of `block_size` tokens leave `SHORTLIST` times the tokens that are read, among which "k2" chooses.
        cold: "host": the lower bits of keys, and the values, lie in host memory, and some pages of them also
            on the GPU. `None`: everything lies on the GPU.
        resident: tokens of each KV head whose payload lies on the GPU, with `cold`; `None`: twice as many as
            a query reads.

    Raises `ValueError` for a value out of range and for two that contradict each other. The message names the
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
    layer_bits: Mapping[int, Bits] | str | Callable[[int, int], Bits] | None = None
    loss_bound: float | None = None
    select: int | float | None = None
    select_page: int = 8
    select_max: int | None = None
    index: str = "k2"
    cold: str | None = None
    resident: int | None = None

    def __post_init__(self):
        self._integer("n_sink", 0)
        self._integer("recent_window", 0, optional=True)
        self._integer("block_size", 1)
        self._integer("int4_budget", 0, optional=True)
        self._integer("int2_budget", 0, optional=True)
        self._choice("eviction_policy", POLICIES)
        self._choice("middle_k_bits", tuple(INTEGER_TIERS))
        self._choice("middle_v_bits", (KEPT, *INTEGER_TIERS))
        if self.quant_backend == "product":
            raise ValueError(PRODUCT)
        self._choice("quant_backend", CODECS)
        self._choice("positions", (None, *POSITIONS))
        self._choice("plan_scope", PLAN_SCOPES)
        if self.int4_budget is None and self.int2_budget != 0:
            raise ValueError(
                f"int2_budget={self.int2_budget} needs a finite int4_budget: with int4_budget=None "
                "no token would ever reach the INT2 tier; give int4_budget, or leave int2_budget out"
            )
        if self.recent_window is None and self.int4_budget is not None:
            raise ValueError(
                f"recent_window=None (no compression) contradicts int4_budget={self.int4_budget}: "
                "no token would ever reach the middle; give recent_window, or leave int4_budget out"
            )
        if self.quant_backend == "channel" and self.relocatable:
            raise ValueError(
                "quant_backend='channel' quantises keys in blocks of tokens that cannot be moved: "
                "it needs int4_budget=None"
            )
        self._normalize_layer_bits()
        by_layer = self.quant_backend in ("rotated", "matched")
        if not by_layer and (self.layer_bits or self.middle_v_bits == KEPT):
            raise ValueError(
                f"quant_backend={self.quant_backend!r} has one width for all layers: layer_bits and "
                "middle_v_bits=16 need quant_backend='rotated' or 'matched'"
            )
        self._selection()
        if self.loss_bound is not None:
            self._loss_bound(by_layer)
        if self.eviction_policy != "position" and not self.relocatable and self.cold is None:
            warnings.warn(
                f"eviction_policy={self.eviction_policy!r} has no effect without a budget: every token is "
                "kept. Give int4_budget, a number of tokens, or leave the policy out",
                stacklevel=4,  # of __post_init__, __init__ and the function that checks keywords
            )

    def _loss_bound(self, by_layer: bool) -> None:
        """Refuse a bound that is no positive number, and what leaves no widths to choose."""
        bound = self.loss_bound
        if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0 < bound < math.inf:
            raise ValueError(f"loss_bound={bound!r}: a positive number of nats, or None, is allowed")
        against = {
            f"quant_backend={self.quant_backend!r}": not by_layer,
            f"layer_bits={self.layer_bits!r}": self.layer_bits is not None,
            f"int4_budget={self.int4_budget!r}": self.relocatable,
            "recent_window=None": not self.compresses,
            f"select={self.select!r}": self.select is not None,
        }
        for what, contradicts in against.items():
            if contradicts:
                raise ValueError(
                    f"loss_bound={bound!r} asks for a choice of widths by layer, which {what} contradicts: "
                    "leave one out"
                )

    def _normalize_layer_bits(self) -> None:
        """Store a mapping as sorted pairs, (layer, (keys, values)): they can be hashed and stored as JSON."""
        rule = self.layer_bits
        if rule is None or callable(rule):
            return
        if isinstance(rule, str):
            self._choice("layer_bits", (None, *BOUNDARIES))
            return
        try:
            pairs = sorted((int(layer), self._bits(bits)) for layer, bits in dict(rule).items())
        except TypeError as error:
            raise ValueError(
                f"layer_bits={rule!r}: a mapping from layers to (keys, values), one of "
                f"{', '.join(map(repr, BOUNDARIES))}, a function or None is allowed"
            ) from error
        if pairs and pairs[0][0] < 0:
            raise ValueError(
                f"layer_bits={rule!r}: layers are numbered from 0; integers of at least 0 are allowed"
            )
        object.__setattr__(self, "layer_bits", tuple(pairs) or None)

    def _bits(self, bits) -> Bits:
        """Bits of keys and values, checked."""
        keys, values = bits
        allowed = (KEPT, *INTEGER_TIERS)
        if keys not in allowed or values not in allowed or (keys == KEPT and values != KEPT):
            raise ValueError(
                f"layer_bits has {bits!r}: keys and values have one of {', '.join(map(str, allowed))} bits, "
                "keys of 16 bits go with values of 16 bits; (8, 8), (4, 4) and (8, 16), for example, are "
                "allowed"
            )
        return int(keys), int(values)

    def bits(self, layer: int, layers: int) -> Bits:
        """Bits of keys and values in the first middle tier of a layer; a model has `layers` layers.

        >>> [FadeConfig(layer_bits="boundary").bits(layer, 6) for layer in range(6)]
        [(8, 8), (8, 8), (4, 4), (4, 4), (8, 8), (8, 8)]
        """
        rule, default = self.layer_bits, (self.middle_k_bits, self.middle_v_bits)
        if rule is None:
            return default
        if callable(rule):
            bits = self._bits(rule(layer, layers))
            self._index_bits(bits[0])
            return bits
        if isinstance(rule, str):
            return BOUNDARIES[rule] if min(layer, layers - 1 - layer) < 2 else default
        return dict(rule).get(layer, default)

    def resolved(self, layers: int, tiered: list[int]) -> "FadeConfig":
        """The same configuration without a function: its results for the layers `tiered`, of `layers` layers.

        Raises `ValueError` if `layer_bits` names a layer that is not among `tiered`.
        """
        if callable(self.layer_bits):
            return replace(self, layer_bits={i: self.bits(i, layers) for i in tiered})
        named = {} if isinstance(self.layer_bits, str) else dict(self.layer_bits or ())
        if without := sorted(named.keys() - set(tiered)):
            raise ValueError(
                f"layer_bits names layers {without}: layers {tiered} can be compressed; name no others"
            )
        return self

    def _selection(self) -> None:
        """Refuse a choice of what to read that contradicts itself or the other fields."""
        self._choice("select_page", PAGES)
        self._choice("index", INDEXES)
        self._choice("cold", (None, *COLD))
        page, is_share = self.select_page, isinstance(self.select, float)
        if self.select is None:
            defaults = {"select_page": PAGES[0], "select_max": None, "index": INDEXES[0], "cold": None}
            for field, default in (defaults | {"resident": None}).items():
                if getattr(self, field) != default:
                    raise ValueError(
                        f"{field}={getattr(self, field)!r} needs select: nothing is chosen; give select, or "
                        f"leave {field} out"
                    )
            return
        if is_share and not 0 < self.select < 1:
            raise ValueError(f"select={self.select!r}: a share between 0 and 1 is allowed")
        if not is_share:
            self._pages("select", page)
            if self.select_max is not None:
                raise ValueError(
                    f"select_max={self.select_max!r} needs a share, not select={self.select!r}: a share is a "
                    "number between 0 and 1; give one, or leave select_max out"
                )
        if self.select_max is not None:
            self._pages("select_max", page)
        if self.resident is not None:
            if self.cold is None:
                raise ValueError(
                    f"resident={self.resident!r} needs cold='host': all tokens are resident; give "
                    "cold='host', or leave resident out"
                )
            self._pages("resident", self.tokens_selected)
        if self.block_size % page:
            raise ValueError(
                f"select_page={page} must divide block_size={self.block_size}: a multiple of {page} is "
                "allowed as block_size"
            )
        if self.int4_budget is not None:
            raise ValueError(
                f"select={self.select!r} keeps every token, and a plan would drop or move some: "
                f"int4_budget={self.int4_budget!r} contradicts it, None is allowed. With cold='host', "
                "resident is the budget of tokens on the GPU"
            )
        self._residents()
        if self.recent_window is None or self.contiguous or self.quant_backend not in ("rotated", "matched"):
            raise ValueError(
                f"select={self.select!r} reads codes of keys at their own positions: recent_window="
                f"{self.recent_window}, positions={self.positions!r}, quant_backend={self.quant_backend!r}; "
                "allowed: a recent_window, positions='original', 'rotated' or 'matched'"
            )
        self._index_bits(self.middle_k_bits)
        if isinstance(self.layer_bits, tuple):
            for _, (keys, _) in self.layer_bits:
                self._index_bits(keys)
        elif isinstance(self.layer_bits, str):
            self._index_bits(BOUNDARIES[self.layer_bits][0])

    def _residents(self) -> None:
        """Refuse a policy that cannot say which pages stay on the GPU."""
        policy = self.eviction_policy
        if policy == "position":
            return
        if self.cold is None:
            raise ValueError(
                f"select={self.select!r} keeps every token, and a plan would drop or move some: "
                f"eviction_policy={policy!r} contradicts it, 'position' is allowed. With cold='host', it "
                "says which pages stay on the GPU"
            )
        if policy not in RESIDENT_POLICIES:
            raise ValueError(
                f"eviction_policy={policy!r} with select={self.select!r} and cold='host': the policy looks "
                "at single tokens, but pages move, and only their mass is known: one of "
                f"{', '.join(RESIDENT_POLICIES)} is allowed"
            )
        if self.blocks_shortlisted is not None:
            raise ValueError(
                f"eviction_policy={policy!r} with index={self.index!r}: the index gives most pages no mass "
                "to rank them by: an index without '+', or eviction_policy='position', is allowed"
            )

    def _index_bits(self, keys: int) -> None:
        """Refuse widths of keys whose upper bits are no index."""
        if self.select is not None and keys not in (4, KEPT):
            raise ValueError(
                f"select={self.select!r} with index={self.index!r} takes the upper bits of 4-bit keys: "
                f"keys of {keys} bits contradict it, 4 is allowed, and 16 for layers that are not compressed"
            )

    def _pages(self, field: str, least: int) -> None:
        """Refuse a number of tokens that is no whole number of pages, or below `least`."""
        value = getattr(self, field)
        whole = isinstance(value, int) and not isinstance(value, bool) and value % self.select_page == 0
        if not whole or value < least:
            raise ValueError(
                f"{field}={value!r}: a multiple of select_page={self.select_page}, at least {least}, is "
                "allowed"
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
        """Whether a middle token can change its tier or slot. It must then be a record that can be moved."""
        return self.int4_budget is not None

    @property
    def evicts(self) -> bool:
        """Whether tokens can be dropped."""
        return self.int4_budget is not None and self.int2_budget is not None

    @property
    def tokens_selected(self) -> int | None:
        """Most tokens of the middle that a query reads in a KV head; None: all.

        >>> FadeConfig(select=256).tokens_selected, FadeConfig(select=0.9).tokens_selected
        (256, 2048)
        """
        if isinstance(self.select, float):
            return DEFAULT_MOST if self.select_max is None else self.select_max
        return self.select

    @property
    def index_bits(self) -> int | None:
        """Upper bits of key codes that score tokens; None where only the numbers of pages do.

        >>> [FadeConfig(select=256, index=index).index_bits for index in ("k1", "bounds+k2", "bounds")]
        [1, 2, None]
        """
        return {"k1": 1, "k2": 2}.get(self.index.split("+")[-1])

    @property
    def summary(self) -> str | None:
        """The numbers of pages or blocks that score them, "bounds" or "deviation"; None: there are none."""
        first = self.index.split("+")[0]
        return None if first in ("k1", "k2") else first

    @property
    def blocks_shortlisted(self) -> int | None:
        """Blocks that the first of two indexes leaves to the second; None: there is one index.

        >>> FadeConfig(select=256, index="bounds+k2").blocks_shortlisted
        16
        """
        if self.select is None or "+" not in self.index:
            return None
        return -(-SHORTLIST * self.tokens_selected // self.block_size)

    @property
    def tokens_resident(self) -> int | None:
        """Tokens of each KV head whose payload lies on the GPU; None: all.

        >>> FadeConfig(select=256, cold="host").tokens_resident
        512
        """
        if self.cold is None:
            return None
        return 2 * self.tokens_selected if self.resident is None else self.resident

    @property
    def contiguous(self) -> bool:
        """Whether survivors are renumbered. Keys are then encoded before RoPE.

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
        """Matched INT4 middle, every token kept. Layers get more bits if it loses more than `SAFE_LOSS`."""
        return cls(quant_backend="matched", loss_bound=SAFE_LOSS)

    @classmethod
    def int4(cls) -> "FadeConfig":
        """Matched INT4 middle for every model, every token kept."""
        return cls(quant_backend="matched")

    @classmethod
    def recall(cls) -> "FadeConfig":
        """Matched INT4 middle, every token kept; each query reads the 512 tokens of it that matter to it.

        Nothing is forgotten. The upper bits of keys and 1024 tokens stay on the GPU. The lower bits of keys
        and the values of all tokens lie in host memory.
        """
        return cls(quant_backend="matched", select=512, cold="host")

    @classmethod
    def balanced(cls) -> "FadeConfig":
        """4 sinks, 64 to 128 recent tokens and the 400 newest of the middle at INT4.

        The policy evicts by position alone, so the model forgets the text before its last few hundred tokens.
        Positions are renumbered contiguously.
        """
        return cls(int4_budget=400)

    @classmethod
    def aggressive(cls) -> "FadeConfig":
        """Like `balanced`, with 32 to 96 recent tokens and the 200 newest of the middle."""
        return cls(recent_window=32, int4_budget=200)

    @classmethod
    def preset(cls, name: str) -> "FadeConfig":
        """The preset called `name`. Raises `ValueError`, which lists the names, if there is none.

        >>> FadeConfig.preset("safe") == FadeConfig.safe()
        True
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: one of {', '.join(PRESETS)} is allowed")
        return getattr(cls, name)()


PRESETS = ("lossless", "safe", "int4", "recall", "balanced", "aggressive")


def _naming_fields(init: Callable) -> Callable:
    """`init` of a dataclass. For an unknown keyword, the error names near fields and all fields."""

    @functools.wraps(init)
    def named(self, *args, **kwargs):
        names = [field.name for field in fields(FadeConfig)]
        for name in kwargs:
            if name not in names:
                near = " or ".join(difflib.get_close_matches(name, names))
                hint = f" (did you mean {near}?)" if near else ""
                raise TypeError(f"FadeConfig has no field {name!r}{hint}; its fields are {', '.join(names)}")
        init(self, *args, **kwargs)

    return named


# Not in the class body, so that type checkers read the fields of the dataclass.
setattr(FadeConfig, "__init__", _naming_fields(FadeConfig.__init__))  # noqa: B010
