"""The life of a token, step by step, in one layer.

A token arrives in the dtype of the model and joins the recent region. When this region holds
`recent_window + block_size` columns, the oldest `block_size` leave it for the middle. The policy plans the
middle, and every token there is encoded, moved to a lower tier, left alone or evicted.

A **column** is one index of the batch along the sequence: every row has a token or padding there. Padding is
never stored.
"""

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import attention, importance, matched, policies, select, summaries
from .attention import Terms
from .config import KEPT, FadeConfig
from .quantize import stored
from .rope import NOPE, Rope, rotate
from .rotation import Record, RotatedCodec, key_mean, qr_rotation
from .tiers import INTEGER_TIERS, Tier, first_tier


@dataclass
class Token:
    """One stored token of one row, for H KV heads: a record that depends on no other token.

    In tier FP16, `key` and `value` are [H, D], and the key is after RoPE. In every other tier they are
    `Record`s of the rotated or matched codec. `mean` [H, 1, D] was subtracted from the key, which is before
    RoPE if positions are contiguous.
    """

    position: int  # index among the real tokens of its row
    column: int
    tier: Tier
    key: Tensor | Record
    value: Tensor | Record
    mean: Tensor | None = None


class Row:
    """The tokens of one batch row, the oldest first, for the KV heads that share a plan.

    `group` is the place of these heads among the groups of the layer.
    """

    def __init__(self, heads: int, group: int = 0):
        self.tokens: list[Token] = []
        self.group = group
        self.seen = 0  # real tokens that ever arrived
        self.mean: Tensor | None = None  # of keys, where tokens move: fixed at the first demotion
        self.importance = importance.empty(heads)

    @property
    def evicted(self) -> int:
        """Tokens that were dropped."""
        return self.seen - len(self.tokens)


class Unquantized:
    """The codec of values that have 16 bits: a vector is its own record."""

    def encode(self, x: Tensor) -> Tensor:
        """The record of vectors `x` [..., D]: themselves."""
        return x

    def decode(self, record: Tensor) -> Tensor:
        """The vectors of a `record`, float64 [..., D]."""
        return record.double()

    def requantize(self, record: Tensor, other: "Unquantized") -> Tensor:
        """The `record` for an `other` codec of this kind: the same."""
        return record


class LayerCache:
    """Keys and values of one attention layer.

    Args:
        config: how tokens are kept; `quant_backend` must be "rotated" or "matched".
        batch, heads, head_dim: rows, KV heads, and channels of a head.
        rope: how keys are rotated, needed if positions are contiguous.
        terms: how scores are made, by default scaled by 1 / sqrt(head_dim).
        observe: whether to count the attention that tokens receive, by default if the policy uses it.
        moments: what calibration knows of the layer, for the codec "matched" alone.
        **learned: `layer`, `layers` and `weights` for the `learned` policy, see `policies.Candidates`.

    Raises `ValueError` for another codec, and if moments do not go with the codec.
    """

    def __init__(
        self, config: FadeConfig, batch: int, heads: int, head_dim: int, rope: Rope = NOPE,
        terms: Terms | None = None, observe: bool | None = None,
        moments: matched.Moments | None = None, **learned: int | dict[str, Tensor],
    ):  # fmt: skip
        if config.quant_backend not in ("rotated", "matched"):
            raise ValueError(f"quant_backend={config.quant_backend!r}: its tokens cannot be moved")
        if (config.quant_backend == "matched") != (moments is not None):
            raise ValueError(f"quant_backend={config.quant_backend!r}: 'matched' alone has moments")
        self.config, self.rope, self.learned, self.head_dim = config, rope, learned, head_dim
        #: Bits of keys and values in the first middle tier of this layer.
        self.widths = config.bits(learned.get("layer", 0), learned.get("layers", 1))
        self.compresses = config.compresses
        self.terms = terms or Terms(head_dim**-0.5)
        by_attention = config.eviction_policy not in ("position", "knorm", "keydiff", "expected_attention")
        self.observe = by_attention and config.select is None if observe is None else observe
        # Heads that share a plan share a list of tokens.
        self.groups = [[h] for h in range(heads)] if config.plan_scope == "head" else [[*range(heads)]]
        self.rows = [[Row(len(g), i) for i, g in enumerate(self.groups)] for _ in range(batch)]
        self.columns = 0  # seen: the logical length
        self.boundary = config.n_sink  # columns before it have left the recent region
        self.moments, self.expected = moments, None
        self.num_read = 0  # tokens of the middle that queries read where they chose, over all KV heads
        key_bits, value_bits = self.widths
        self.compresses = self.compresses and key_bits != KEPT
        self.first_tier = first_tier(key_bits, value_bits) if self.compresses else Tier.FP16
        self.codecs = []
        for keys, values in self._integer_codecs(moments):
            pairs = {Tier.INT2: (keys[2], values[KEPT if value_bits == KEPT else 2])}
            self.codecs.append(pairs | {self.first_tier: (keys[key_bits], values[value_bits])})

    def _integer_codecs(self, moments: matched.Moments | None) -> list[tuple[dict, dict]]:
        """Codecs of keys and of values by bits, for each group of heads. All groups share those of "rotated".

        With moments this sets `expected`, the mean of the keys of each head: it is known before they come.
        """
        if moments is None:
            rotation = qr_rotation(self.head_dim)
            codecs = {bits: RotatedCodec(bits, self.head_dim, rotation) for bits in INTEGER_TIERS}
            codecs[KEPT] = Unquantized()
            return [(codecs, codecs)] * len(self.groups)
        kind = "still" if self.config.contiguous else "moved" if self.config.relocatable else "block"
        self.expected, *second = matched.frame(moments, kind, self.rope, self.config.block_size)
        sides = matched.matched(*second), matched.matched(moments.values, moments.outputs)
        found = []
        for group in self.groups:
            own = [matched.Matrices(*(x[group] for x in side)) for side in sides]
            found.append(tuple(
                {bits: matched.MatchedCodec(bits, side, of_values) for bits in INTEGER_TIERS}
                | {KEPT: Unquantized()}
                for side, of_values in zip(own, (False, True))
            ))  # fmt: skip
        return found

    def step(self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """Take in q new columns, attend, and only then compress.

        Args:
            query: [B, Hq, q, D], after RoPE.
            keys, values: [B, H, q, D], keys after RoPE.
            valid: bool [B, q], False at padding. None: there is no padding.

        Returns the output, float64 [B, Hq, q, D]; 0 where the query is padding.
        """
        valid = torch.ones(keys.shape[0], keys.shape[2]).bool() if valid is None else valid
        output = torch.zeros(query.shape, dtype=torch.float64)
        per_head = query.shape[1] // keys.shape[1]
        for b, rows in enumerate(self.rows):
            for row, group in zip(rows, self.groups):
                position = self._arrive(row, keys[b, group], values[b, group], valid[b])
                own = [h * per_head + i for h in group for i in range(per_head)]
                output[b, own] = self._attend(row, query[b, own].double(), position, self.terms.of(own))
        self.columns += keys.shape[2]
        self._demote()
        return output

    def _arrive(self, row: Row, keys: Tensor, values: Tensor, valid: Tensor) -> Tensor:
        """Store the real tokens among q new ones. Returns their positions, int64 [q], -1 at padding."""
        position = torch.where(valid, row.seen + valid.long().cumsum(0) - 1, -1)
        for i in valid.nonzero().flatten().tolist():
            key, value = keys[:, i].double(), values[:, i].double()
            row.tokens.append(Token(row.seen, self.columns + i, Tier.FP16, key, value))
            row.seen += 1
        return position

    # -- reading

    def read_at(self, row: Row) -> list[int]:
        """Position at which the key of each token is read.

        Contiguous survivors are numbered 0, 1, ... without gaps. Queries keep their logical positions, so the
        number of evicted tokens is added. Then every distance is that of the contiguous numbering.
        """
        if not self.config.contiguous:
            return [t.position for t in row.tokens]
        return [rank + row.evicted for rank in range(len(row.tokens))]

    def read(self, row: Row) -> tuple[Tensor, Tensor]:
        """Decoded keys (at the positions of `read_at`) and values of a row, [H, n, D] each."""
        pairs = [self._decode(row, t, at) for t, at in zip(row.tokens, self.read_at(row))]
        return tuple(torch.stack(x, dim=1) for x in zip(*pairs))

    def _decode(self, row: Row, token: Token, at: int) -> tuple[Tensor, Tensor]:
        if token.tier == Tier.FP16:
            return rotate(token.key, at - token.position, self.rope), token.value
        key_codec, value_codec = self.codecs[row.group][token.tier]
        key = key_codec.decode(token.key, _of_heads(token.mean))
        if self.config.contiguous:
            key = rotate(key, at, self.rope)
        return key, value_codec.decode(token.value)

    def _attend(self, row: Row, query: Tensor, position: Tensor, terms: Terms) -> Tensor:
        """Attention of queries [Hq, q, D] over the tokens of a row: tier by tier, then merged."""
        if not row.tokens:
            return torch.zeros_like(query)
        if self.chooses(query.shape[1]):
            return self._attend_chosen(row, query, position, terms)
        keys, values = self.read(row)
        # Window, causality and ALiBi use the positions at which keys are read: the model sees those.
        at = torch.tensor(self.read_at(row))
        tiers = torch.tensor([t.tier for t in row.tokens])
        partials = [
            attention.over_tensors(
                query, keys[:, tiers == t], values[:, tiers == t], position, at[tiers == t], terms
            )
            for t in tiers.unique()
        ]
        if terms.s_aux is not None:
            partials.append(attention.sink(terms.s_aux, query.shape))
        if self.observe:
            self._observe(row, query, keys, position, at, terms)
        return attention.merge(partials)

    # -- choosing what to read

    def chooses(self, queries: int) -> bool:
        """Whether the queries of a step read a part of the middle: it holds more than they may read."""
        c, held = self.config, self.boundary - self.config.n_sink
        few = not isinstance(c.select, float) and c.select is not None and held <= c.select
        return c.select is not None and queries <= select.LONGEST and held > 0 and not few

    def chosen(self, row: Row, query: Tensor, position: Tensor, terms: Terms) -> list[list[int]]:
        """Pages that one query [Hq, 1, D] reads in each KV head. Page p holds the columns from
        n_sink + p * select_page on."""
        c, middle = self.config, self.middle(row)
        held, heads = self.boundary - c.n_sink, len(self.groups[row.group])
        slots = [t.column - c.n_sink for t in middle]
        at = torch.full((held,), -1)  # position of the token in each slot
        at[slots] = torch.tensor([t.position for t in middle], dtype=torch.int64)
        seen = attention.visible(position, at, terms.window)[0]
        share = c.select if isinstance(c.select, float) else None
        budget = c.tokens_selected // c.select_page
        if c.summary is not None:
            size = c.select_page if c.blocks_shortlisted is None else c.block_size
            summary = summaries.summarize(c.summary, self._in_slots(row, middle, slots, held), at >= 0, size)
            found = summaries.log_mass(c.summary, query, summary, seen, size, terms)
            mass = select.mass_of(found, heads)
            if c.blocks_shortlisted is None:
                return select.choose(mass, budget, share)
            blocks, per = select.choose(mass, c.blocks_shortlisted), c.block_size // c.select_page
            allowed = [[b * per + i for b in own for i in range(per)] for own in blocks]
            read = select.tokens_read(blocks, c.block_size, held)
        else:
            allowed = [list(range(held // c.select_page))] * heads
            read = torch.ones(heads, held, dtype=torch.bool)
        scores = torch.full((query.shape[0], held), -torch.inf, dtype=torch.float64)
        if middle:
            records, means = zip(*((t.key, t.mean) for t in middle))
            keys = Record(*(None if x[0] is None else torch.stack(x, dim=1) for x in zip(*records)))
            mean = torch.cat([m.expand(heads, 1, -1) for m in means], dim=1)
            codec = self.codecs[row.group][self.first_tier][0]
            scores[:, slots] = select.index_scores(query, keys, mean, codec, terms, c.index_bits)[:, 0]
        seen = (seen & read).repeat_interleave(query.shape[0] // heads, dim=0)
        mass = select.page_mass(scores.masked_fill(~seen, -torch.inf), c.select_page, heads)
        return select.choose_within(mass, allowed, budget, share)

    def _in_slots(self, row: Row, tokens: list[Token], slots: list[int], held: int) -> Tensor:
        """Decoded keys of some tokens in their slots of the middle, [H, held, D]; 0 where there is none."""
        keys = torch.zeros(len(self.groups[row.group]), held, self.head_dim, dtype=torch.float64)
        if tokens:
            keys[:, slots] = torch.stack([self._decode(row, t, t.position)[0] for t in tokens], dim=1)
        return keys

    def _attend_chosen(self, row: Row, query: Tensor, position: Tensor, terms: Terms) -> Tensor:
        """Attention over sinks, recent tokens and the pages that each query chooses in each KV head."""
        keys, values = self.read(row)
        at, output = torch.tensor([t.position for t in row.tokens]), torch.zeros_like(query)
        slot = torch.tensor([t.column - self.config.n_sink for t in row.tokens])
        always = torch.tensor([t.tier == Tier.FP16 for t in row.tokens])
        held, group = self.boundary - self.config.n_sink, query.shape[0] // keys.shape[0]
        for i, now in enumerate(position.split(1)):
            pages = self.chosen(row, query[:, i : i + 1], now, terms)
            read = select.tokens_read(pages, self.config.select_page, held)
            for h in range(keys.shape[0]):
                own = list(range(h * group, (h + 1) * group))
                reads = always | read[h, slot.clamp(0, held - 1)]
                self.num_read += int((reads & ~always & attention.visible(now, at, terms.window)[0]).sum())
                asked, mine = query[own, i : i + 1], terms.of(own)
                both = (x[h : h + 1, reads] for x in (keys, values))
                partials = [attention.over_tensors(asked, *both, now, at[reads], mine)]
                if mine.s_aux is not None:
                    partials.append(attention.sink(mine.s_aux, asked.shape))
                output[own, i : i + 1] = attention.merge(partials)
        return output

    def _observe(self, row: Row, query: Tensor, keys: Tensor, position: Tensor, at: Tensor, terms: Terms):
        """Count the attention that this step gives to each token."""
        seen = attention.visible(position, at, terms.window)
        one = torch.eye(len(at), dtype=torch.float64).expand(keys.shape[0], -1, -1)
        partials = [attention.over_tensors(query, keys, one, position, at, terms)]
        if terms.s_aux is not None:
            partials.append(attention.sink(terms.s_aux, partials[0].acc.shape))
        shares = importance.group_mean(attention.merge(partials), keys.shape[0])
        row.importance = importance.observe(row.importance, shares, seen)

    # -- compressing

    def _demote(self) -> None:
        """Move whole blocks of the oldest recent columns to the middle, once there are enough."""
        c, recent = self.config, self.columns - self.boundary
        if not self.compresses or recent < c.recent_window + c.block_size:
            return
        first, blocks = self.boundary, (recent - c.recent_window) // c.block_size
        self.boundary += blocks * c.block_size
        for row in (row for rows in self.rows for row in rows):
            if c.relocatable:
                self._fix_mean(row, self._between(row, first, self.boundary))
                continue
            for start in range(first, self.boundary, c.block_size):
                block = self._between(row, start, start + c.block_size)
                mean = self._mean(row, block)
                for token in block:
                    self._put(row, token, self.first_tier, mean)
        if c.relocatable:
            self._replan()

    def _between(self, row: Row, first: int, stop: int) -> list[Token]:
        """Tokens of columns `first` to `stop` that are not sinks."""
        return [t for t in row.tokens if first <= t.column < stop and t.position >= self.config.n_sink]

    def middle(self, row: Row) -> list[Token]:
        """The tokens of the middle, oldest first."""
        return self._between(row, 0, self.boundary)

    def _as_encoded(self, token: Token) -> Tensor:
        """The key [H, D] that the codec sees, rotated back to position 0 if it can be renumbered."""
        return rotate(token.key, -token.position, self.rope) if self.config.contiguous else token.key

    def _mean(self, row: Row, tokens: list[Token]) -> Tensor | None:
        if not tokens:
            return None
        if self.expected is not None:
            expected = self.expected[self.groups[row.group]]
            if self.config.relocatable:
                return stored(expected)[:, None]
            positions = torch.tensor([t.position for t in tokens])
            return matched.block_mean(expected, positions, self.rope)[:, None]
        return key_mean(torch.stack([self._as_encoded(t) for t in tokens], dim=1))

    def _fix_mean(self, row: Row, demoted: list[Token]) -> None:
        if row.mean is None:
            row.mean = self._mean(row, demoted)

    def _put(self, row: Row, token: Token, tier: Tier, mean: Tensor) -> None:
        """Move a token to a tier: encode it, or re-encode it from a higher tier. Never within a tier."""
        if token.tier == tier:
            return
        codecs = self.codecs[row.group][tier]
        if token.tier == Tier.FP16:
            token.mean = mean
            token.key = codecs[0].encode(self._as_encoded(token), _of_heads(mean))
            token.value = codecs[1].encode(token.value)
        else:
            old = self.codecs[row.group][token.tier]
            token.key = old[0].requantize(token.key, codecs[0])
            token.value = old[1].requantize(token.value, codecs[1])
        token.tier = tier

    def _replan(self) -> None:
        """Plan the middle again: each row alone, or all rows together if they share a plan."""
        every = [row for rows in self.rows for row in rows]
        for rows in [every] if self.config.plan_scope == "layer" else [[row] for row in every]:
            for row, plan in zip(rows, self._plan(rows)):
                for token in self.middle(row):
                    if plan[token.column] == Tier.EVICTED:
                        token.tier = Tier.EVICTED
                    else:
                        self._put(row, token, plan[token.column], row.mean)
                self._keep(row, [i for i, t in enumerate(row.tokens) if t.tier != Tier.EVICTED])

    def _keep(self, row: Row, alive: list[int]) -> None:
        row.tokens = [row.tokens[i] for i in alive]
        if self.observe:
            row.importance = importance.keep(row.importance, torch.tensor(alive, dtype=torch.int64))

    def _plan(self, rows: list[Row]) -> list[dict[int, Tier]]:
        """For each row, the tier of each middle column. Padding is a hole in the plan of its row."""
        columns = sorted({t.column for row in rows for t in self.middle(row)})
        position, slots, spent = [], [], []
        for row in rows:
            middle = {t.column: t.position for t in self.middle(row)}
            tier = {t.column: t.tier for t in row.tokens}
            spent.append([tier.get(c) == Tier.INT2 != self.first_tier for c in columns])
            slot = {t.column: i for i, t in enumerate(row.tokens)}
            position.append([middle.get(c, -1) for c in columns])
            slots.append(torch.tensor([slot[c] if c in middle else -1 for c in columns], dtype=torch.int64))
        keys, values = (torch.stack(x) for x in zip(*(self._pick(r, i) for r, i in zip(rows, slots))))
        known = None
        if self.observe:
            each = [vars(importance.keep(row.importance, i)) for row, i in zip(rows, slots)]
            known = importance.Importance(**{f: torch.stack([e[f] for e in each]) for f in each[0]})
        now = torch.tensor([[max(row.seen - 1, 0)] for row in rows])
        candidates = policies.Candidates(
            torch.tensor(position, dtype=torch.int64), now, known, keys, values,
            spent=torch.tensor(spent, dtype=torch.bool), **self.learned,
        )  # fmt: skip
        scope = "layer" if self.config.plan_scope == "layer" else "sequence"  # each head has a `Row`
        keys, values = self.widths
        config = replace(
            self.config, plan_scope=scope, middle_k_bits=keys, middle_v_bits=values, layer_bits=None
        )
        tiers = policies.make_plan(config, candidates)
        return [dict(zip(columns, map(Tier, row))) for row in tiers.tolist()]

    def _pick(self, row: Row, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [H, n, D] of some slots of a row. A hole (-1) repeats any token."""
        if not row.tokens:
            hole = torch.zeros(row.importance.mass.shape[0], len(slots), self.head_dim).double()
            return hole, hole
        keys, values = self.read(row)
        return keys[:, slots], values[:, slots]

    # -- what generate() asks of a cache

    def crop(self, columns: int) -> None:
        """Forget the newest columns. The attention that their queries gave to older tokens stays counted.

        Raises `ValueError` if there are fewer columns, or if some have left the recent region.
        """
        most = self.columns - self.boundary if self.boundary > self.config.n_sink else self.columns
        if not 0 <= columns <= most:
            raise ValueError(f"crop of {columns} columns: 0 to {most} are uncompressed")
        self.columns -= columns
        for row in (row for rows in self.rows for row in rows):
            alive = [i for i, t in enumerate(row.tokens) if t.column < self.columns]
            row.seen -= len(row.tokens) - len(alive)
            self._keep(row, alive)

    def reorder(self, index: list[int]) -> None:
        """Row i becomes a copy of row `index[i]` (beam search)."""
        self.rows = [deepcopy(self.rows[i]) for i in index]


def _of_heads(mean: Tensor | None) -> Tensor | None:
    """A mean [H, 1, D] as one token needs it, [H, D]."""
    return None if mean is None else mean[:, 0]
