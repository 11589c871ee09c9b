"""A small stand-in for vLLM's block manager, and attention in float64, one request at a time."""

import functools
import math

import numpy as np
import torch

from fade_fast.kernels import matched, rotated
from fade_fast.vllm import single
from fade_fast.vllm.batches import split
from fade_fast.vllm.layer import CompressedLayer, DenseLayer
from fade_fast.vllm.pages import FIRST, NEAR, SPAN

HEADS, GROUP, PAGE = 2, 3, 32


def draw(*shape, seed=0, dtype=torch.float32):
    """Normal numbers, with channels of very different means, as keys have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (x + 3 * torch.randn(shape[-1], generator=generator, dtype=torch.float64)).to(dtype)


def matrices():
    """Matrices of the `matched` codec, for keys and for values, of each of `HEADS` heads of 64 channels."""
    sides = []
    for seed in (5, 6):
        made = torch.linalg.qr(draw(HEADS, 64, 64, seed=seed, dtype=torch.float64))[0]
        made = made * torch.linspace(0.5, 2, 64)[:, None]
        inverse = made.inverse().mT
        whole = torch.cat((inverse, inverse.sum(1, keepdim=True)), 1)
        feedback = torch.eye(64).expand(HEADS, -1, -1)
        sides.append(matched.Matrices(made.float(), whole.float(), feedback))
    return tuple(sides)


def _decoders(layer):
    """The matrices that decode keys and values: [D, D], or [2, H, D, D]."""
    if layer.feedback is None:
        return layer.tier.matrix
    return torch.stack([side.decode for side in layer.tier.matrices])


class Engine:
    """Requests whose tokens are in pages of a cache, and steps over some of their tokens.

    Args:
        bits: widths of the layer; None for a layer that is not compressed.
        lengths: tokens of each request.
        most: see `batches.split`.
        serves: whether `single.py` and `prefill.py` serve steps; if not, the code of all other steps does.
        graphs: which graphs replay decode steps; None: none.
        options: of the layer.
    """

    def __init__(
        self,
        bits,
        lengths,
        *,
        dim=64,
        page=PAGE,
        dtype=torch.float32,
        seed=0,
        means=None,
        spare=7,
        matrices=None,
        most=1,
        serves=True,
        graphs=None,
        **options,
    ):
        self.most, self.serves, self.graphs = most, serves, graphs
        self.page, self.dim, self.dtype, self.bits = page, dim, dtype, bits
        options = dict(heads=HEADS, scaling=dim**-0.5) | options
        if bits is None:
            self.layer = DenseLayer(**options)
        else:
            self.layer = CompressedLayer(bits, dim, dtype, torch.device("cpu"), means, matrices, **options)
        self.options = options
        draws = torch.Generator().manual_seed(seed)
        blocks = [-(-n // page) for n in lengths]
        ids = 1 + torch.randperm(sum(blocks) + spare, generator=draws)  # page 0 belongs to nobody
        self.table = torch.full((len(lengths), max(blocks) + 3), 0, dtype=torch.int32)
        for row, part in enumerate(ids[: sum(blocks)].split(blocks)):
            self.table[row, : len(part)] = part
        cell = 2 * dim if bits is None else self.layer.layout.cell(page)
        shape = (sum(blocks) + spare + 1, HEADS, page, cell)
        self.cache = torch.full(shape, math.nan, dtype=dtype)
        if bits is not None:  # the bits of fp16 NaN, in scales too
            self.cache = torch.full(shape, 255, dtype=torch.uint8)
        make = lambda heads, s: [  # noqa: E731
            draw(n, heads, dim, seed=seed + 100 * i + s, dtype=dtype) for i, n in enumerate(lengths)
        ]
        self.queries, self.keys, self.values = make(HEADS * GROUP, 1), make(HEADS, 2), make(HEADS, 3)
        self.queries = [0.3 * x for x in self.queries]
        self.done = [0] * len(lengths)

    def step(self, counts, pads=0, rounded=False):
        """Run the next `counts` tokens of each request. Returns the outputs of each request [n, Hq, D].

        A request with more than `most` new tokens is one with many.

        `pads` tokens follow that belong to no request, as in vLLM's padded steps.
        """
        spans = [slice(d, d + n) for d, n in zip(self.done, counts)]
        flat = lambda xs: torch.cat([x[s] for x, s in zip(xs, spans)])  # noqa: E731
        poison = lambda x: torch.cat((x, torch.full((pads, *x.shape[1:]), math.nan, dtype=x.dtype)))  # noqa: E731
        query, keys, values = (poison(flat(xs)) for xs in (self.queries, self.keys, self.values))
        positions = [torch.arange(s.start, s.stop) for s in spans]
        slots = [t[p // self.page].long() * self.page + p % self.page for t, p in zip(self.table, positions)]
        slots = torch.cat([*slots, torch.full((pads,), -1)])
        reach = np.array([s.stop for s in spans])
        starts = np.concatenate(([0], np.cumsum(counts)))
        lengths = torch.from_numpy(reach).int()
        step = split(starts, reach, lengths, self.table[: len(counts)], rounded, most=self.most)
        assert torch.equal(step.positions, torch.cat(positions))
        step.single = step.single and self.serves
        output = torch.full_like(query, math.nan)
        held = None if self.graphs is None else self.graphs.hold(step, slots)
        if held is not None and held.serves(self.layer):
            held.forward(self.layer, self.cache, query, keys, values, output)
        else:
            self.layer.forward(self.cache, query, keys, values, slots, step, output)
        assert output[len(query) - pads :].isnan().all(), "padding was written"
        self.done = [s.stop for s in spans]
        self.batches = step.short, step.long
        self.groups = step.prefill
        return list(output[: len(query) - pads].split([int(n) for n in counts]))

    def stored(self, row):
        """Keys and values of a request by their first records, then by both, float64 [H, n, D] each."""
        keys, values = (x[row].transpose(0, 1)[None] for x in (self.keys, self.values))
        if self.bits is None:
            return [keys[0].double(), values[0].double()] * 2
        tier, rows = self.layer.tier, self.layer.means.shape[1]
        mean = self.layer.means[None, :, (torch.arange(keys.shape[2]) // SPAN).clamp_max(rows - 1)]
        if self.layer.takes_single:
            return self._twice(keys.double() - mean.double(), values.double(), mean[0].double())
        record = tier.encode(keys, values, mean, False)
        stored = tier.decode_keys(record, mean, torch.float64), tier.decode_values(record, torch.float64)
        missed = [(x.double() - y).float() for x, y in zip((keys, values), stored)]
        if self.bits[1] == 16:
            missed[1].zero_()
        record = tier.encode(missed[0], missed[1].to(self.dtype), 0 * mean[:, :, :1], False)
        rest = tier.decode_keys(record, None, torch.float64), tier.decode_values(record, torch.float64)
        both = [(x + y)[0] for x, y in zip(stored, rest)]
        for x, y, bits in zip(stored, both, self.bits):
            if bits >= 8:  # only the first tokens
                y[:, FIRST:] = x[0, :, FIRST:]
        return [x[0] for x in stored] + both

    def _twice(self, keys, values, mean):
        """`stored` of keys less their mean and of values, [1, H, n, D]."""
        encode, decode = (
            x.double() if x.dim() == 4 else x.double().expand(2, HEADS, -1, -1)
            for x in (self.layer.encoders, _decoders(self.layer))
        )
        once, both = [], []
        for i, (x, bits) in enumerate(zip((keys, values), self.bits)):
            y = x @ encode[i].mT
            quantize = rotated.quantize
            if self.layer.feedback is not None:
                quantize = functools.partial(
                    matched.quantize, feedback=self.layer.feedback[i], of_values=i == 1
                )
            first = rotated.dequantize(quantize(y.float(), bits=bits), bits, torch.float64)
            missed = (y - first).float()
            if self.layer.feedback is None or bits < single.PLAIN:
                rest = rotated.dequantize(quantize(missed, bits=bits), bits, torch.float64)
            else:
                rest = rotated.scaled(matched.quantize_to_nearest(missed, bits), bits, torch.float64)
            once.append((first @ decode[i])[0])
            both.append(((first + rest) @ decode[i])[0])
            if bits >= 8:  # only the first tokens
                both[-1][:, FIRST:] = once[-1][:, FIRST:]
        return [once[0] + mean, once[1], both[0] + mean, both[1]]

    def twice(self, at, position):
        """Which tokens queries at `at` [q, 1] read with both records: bool [q, n].

        The first tokens; and a token before the query where its page has slots for that many newest tokens.
        """
        if self.bits is None:
            return torch.zeros(len(at), len(position), dtype=torch.bool)
        slots = 4 if min(self.bits) >= 8 else 4 + 4 * (self.page // 128)
        kept = torch.where(position < self.page, slots - 4, slots)
        kept = kept * (min(self.bits) < 8)
        back = at - position
        return (back > 0) & ((position < FIRST) | (back <= kept.clamp_max(NEAR)))

    def expected(self, row, start, stop):
        """Attention of the queries `start` to `stop` of a request, float64 [n, Hq, D].

        A query reads its own token as it came, and the tokens before as they are stored.
        """
        keys, values, *both = (x.repeat_interleave(GROUP, 0) for x in self.stored(row))
        twice = self.twice(torch.arange(start, stop)[:, None], torch.arange(keys.shape[1]))
        own = [x[row].double().transpose(0, 1).repeat_interleave(GROUP, 0) for x in (self.keys, self.values)]
        query = self.queries[row][start:stop].double().transpose(0, 1)
        scores = torch.where(twice, query @ both[0].mT, query @ keys.mT)
        index = torch.arange(stop - start)
        scores[:, index, index + start] = (query * own[0][:, start:stop]).sum(-1)
        scores = scores * self.options["scaling"]
        if (cap := self.options.get("softcap")) is not None:
            scores = cap * torch.tanh(scores / cap)
        at, position = torch.arange(start, stop)[:, None], torch.arange(keys.shape[1])
        seen = position <= at
        if (window := self.options.get("window")) is not None:
            seen &= position > at - window
        scores = scores.masked_fill(~seen, -math.inf)
        if (learned := self.options.get("s_aux")) is not None:
            scores = torch.cat((scores, learned.double()[:, None, None].expand(-1, len(at), 1)), -1)
            values, both[1] = (torch.cat((x, torch.zeros_like(x[:, :1])), 1) for x in (values, both[1]))
            twice = torch.nn.functional.pad(twice, (0, 1))
        shares = scores.softmax(-1)
        missed = own[1][:, start:stop] - values[:, start:stop]
        found = (shares * ~twice) @ values + (shares * twice) @ both[1]
        return (found + shares[:, index, index + start, None] * missed).transpose(0, 1)


def distance(found, expected):
    """Norm of the difference over the norm of what is expected."""
    return float((found.double() - expected).norm() / expected.norm())
