"""The matched codec: each KV head has matrices that match its keys to the queries that read them.

A score is q.k, so an error of a key matters as much as queries see it. Two second moments are measured once
for a model: S of the keys (or values), and M of the vectors that multiply them. The codec then stores
y = A (x - mean), and attention multiplies codes by A^-T q. Three ideas make the codes good:

- **Matching.** A makes both moments equal, so no direction is more exposed than another. Then a random
  rotation spreads every vector evenly.
- **A mean that knows RoPE.** The mean of the keys before RoPE, rotated to the positions of a block, is a
  function of the positions alone. `Frame` names the cases.
- **Feedback.** Channels are rounded in order. Each one makes up for the errors of the channels before it, as
  seen through M (GPTQ, arXiv 2210.17323, does this for weights; here each vector is alone). At 3 and 2 bits,
  several scales are tried so, and a second pass rounds each channel given the errors of all others.

Codes are symmetric, with one fp16 scale for each vector. All reals are float64.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import quantize
from .rope import NOPE, Rope, rotate  # noqa: F401 - callers of `measure` need NOPE
from .rotation import Record, qr_rotation
from .tiers import INTEGER_TIERS, packed_bytes

#: Distance between evenly spaced levels of N(0, 1) with the least squared error, by bits.
STEPS = {8: 0.0308, 4: 0.3352, 3: 0.5860, 2: 0.9957}
#: Scales that the encoder tries, relative to that of `STEPS`.
FACTORS = (0.7, 0.78, 0.86, 0.93, 1.0, 1.08, 1.17, 1.27, 1.4)
#: Smallest of these scales that is used, by bits. At 2 bits the best one for plain rounding clips too much.
LEAST = {8: 0.7, 4: 0.7, 3: 0.7, 2: 1.2}
#: Scales with which all channels of a key are rounded, relative to the one found so, by bits. Few levels
#: depend much on their distance.
SEARCHED = {8: (1.0,), 4: (1.0,), 3: (0.88, 0.95, 1.02, 1.09, 1.17), 2: (0.8, 0.88, 0.96, 1.04, 1.14)}
#: The same for values. Attention adds values up, and a small scale clips many of them in one direction.
SEARCHED_FOR_VALUES = SEARCHED | {2: (1.0,)}
PASSES = {8: 1, 4: 1, 3: 2, 2: 2}  # how often each channel is rounded, by bits
SHRINK = 0.3  # how far moments are drawn to their diagonals: they are measured on a few hundred tokens
RIDGE = 1e-4  # added to the diagonals, relative to their mean
SIZES = 2.0**-7, 2.0**15  # least and greatest size of the largest value of a stored A^-1
WHITEN = 0.4  # extra whitening, which feedback turns into accuracy
SPAN = 2048  # keys and queries are assumed at random positions below it
BLOCK = 64  # positions that share a mean

#: How keys reach the codec: after RoPE, less the mean of each block of positions; after RoPE, less one mean;
#: before RoPE, less one mean.
FRAMES = ("block", "moved", "still")


class Moments(NamedTuple):
    """What calibration knows of one layer; H KV heads of D channels.

    Keys and queries are before RoPE. `keys` is centered on `mean`, `values` are not centered.
    """

    mean: Tensor  # [H, D], of the keys
    keys: Tensor  # [H, D, D]
    queries: Tensor  # [H, D, D], of the queries of a head's group, scaled as scores are
    values: Tensor  # [H, D, D]
    outputs: Tensor  # [H, D, D], of the rows of the output projection that read a head's group


def measure(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor | None,
    rope: Rope,
    scaling: float,
    n_sink: int,
) -> Moments:
    """Moments of one layer from the vectors of a text whose tokens stand at positions 0 to n - 1.

    Half of the weight of a token is even, and half follows attention: a key and its value count as much as
    they are attended, a query as much as it attends to keys that are not sinks.

    Args:
        query: [Hq, n, D]; keys, values: [H, n, D], all after RoPE. Hq / H query heads read a KV head.
        output: [hidden, Hq * D], the output projection. Its rows may be multiplied by how much the model
            reads of their hidden channels. None: all channels count alike.
        rope: how the vectors were rotated. `NOPE`: not at all, or in an unknown way; then moments are those
            of the vectors as they are.
        scaling: of the scores. n_sink: first tokens, which are never encoded.

    Raises `ValueError` if there are no tokens beside the sinks.
    """
    (heads, n, dim), group = keys.shape, query.shape[0] // keys.shape[0]
    if n <= n_sink:
        raise ValueError(f"{n} tokens: more than the {n_sink} sinks are needed")
    query, keys, values = (x.double() for x in (query, keys, values))
    query = scaling * query.unflatten(0, (heads, group))
    hidden = torch.ones(n, n, dtype=torch.bool, device=keys.device).triu(1)
    shares = torch.einsum("hgid,hjd->hgij", query, keys).masked_fill(hidden, -torch.inf).softmax(-1)
    shares = shares[..., n_sink:, n_sink:]
    received, given = _half(shares.mean(1).sum(1)), _half(shares.sum(-1).flatten(1))
    at = torch.arange(n_sink, n, device=keys.device)
    still, asked = rotate(keys[:, n_sink:], -at, rope), rotate(query[:, :, n_sink:], -at, rope).flatten(1, 2)
    mean = still.mean(1)
    return Moments(
        mean, _second(still - mean[:, None], received), _second(asked, given),
        _second(values[:, n_sink:], received), _of_outputs(output, heads, dim, keys.device),
    )  # fmt: skip


def measure_alone(
    keys: Tensor, values: Tensor, position: Tensor, output: Tensor | None, rope: Rope
) -> Moments:
    """Moments of one layer where queries are not known: all tokens count alike, and queries see all channels
    alike.

    Args:
        keys, values: [H, n, D], n at least 1, keys after RoPE, of tokens that are no sinks.
        position: int64 [n], of the tokens.
        output, rope: as in `measure`.
    """
    keys, values = keys.double(), values.double()
    (heads, _, dim), even = keys.shape, torch.ones_like(keys[..., 0])
    still = rotate(keys, -position, rope)
    mean = still.mean(1)
    return Moments(
        mean, _second(still - mean[:, None], even), _of_outputs(None, heads, dim, keys.device),
        _second(values, even), _of_outputs(output, heads, dim, keys.device),
    )  # fmt: skip


def _of_outputs(output: Tensor | None, heads: int, dim: int, device: torch.device) -> Tensor:
    """Moments [H, D, D] of the rows of an output projection [hidden, Hq * D] that read each KV head."""
    if output is None:
        return torch.eye(dim, dtype=torch.float64, device=device).expand(heads, -1, -1)
    rows = output.double().unflatten(1, (heads, -1, dim)).transpose(0, 1).flatten(1, 2)  # [H, rows, D]
    return rows.mT @ rows * heads * dim / output.shape[1]


def with_output(moments: Moments, output: Tensor) -> Moments:
    """`moments` that were measured without an output projection, with this one, [hidden, Hq * D]."""
    heads, dim = moments.mean.shape
    return moments._replace(outputs=_of_outputs(output, heads, dim, moments.mean.device))


def mean_of(texts: list[Moments]) -> Moments:
    """Moments over several texts of the same length."""
    mean, keys, *rest = (torch.stack(x).mean(0) for x in zip(*texts))
    apart = torch.stack([m.mean - mean for m in texts])
    return Moments(mean, keys + torch.einsum("thi,thj->hij", apart, apart) / len(texts), *rest)


def _half(weight: Tensor) -> Tensor:
    """Weights [H, n] of mean 1, half of them even."""
    return 0.5 + 0.5 * weight / weight.mean(-1, keepdim=True)


def _second(x: Tensor, weight: Tensor) -> Tensor:
    """Weighted second moment [H, D, D] of x [H, n, D]."""
    return (x * weight[..., None]).mT @ x / x.shape[1]


# -- moments at other positions


def _pairs(rope: Rope, dim: int) -> tuple[Tensor, Tensor]:
    """A unitary T [D, D] and frequencies [D], such that R(p) x = T^H (exp(i frequency p) * T x)."""
    inv_freq = rope.inv_freq.double()
    d, eye = 2 * len(inv_freq), torch.eye(dim, dtype=torch.float64, device=inv_freq.device)
    a, b = (eye[0:d:2], eye[1:d:2]) if rope.interleaved else (eye[: d // 2], eye[d // 2 : d])
    rows = torch.cat((torch.complex(a, b), torch.complex(a, -b))) / math.sqrt(2)
    return torch.cat((rows, eye[d:].to(rows.dtype))), torch.cat((inv_freq, -inv_freq, eye.new_zeros(dim - d)))


def _average(frequency: Tensor, span: int, step: int = 1) -> Tensor:
    """Mean of exp(i frequency p) over p = 0, step, 2 step, ... below `span`: a geometric sum."""
    count, half = -(-span // step), frequency * (step / 2)
    still = half.sin().abs() < 1e-12  # a frequency that the steps do not see
    size = torch.where(still, 1.0, (count * half).sin() / (count * half.sin().where(~still, 1.0)))
    return torch.polar(size.abs(), (count - 1) * half + torch.where(size < 0, math.pi, 0.0))


def at_random_positions(moment: Tensor, rope: Rope, span: int, step: int = 1) -> Tensor:
    """Second moment [H, D, D] of R(p) x, p random among 0, step, ... below `span`, from that of x."""
    turn, frequency = _pairs(rope, moment.shape[-1])
    inside = (turn @ moment.to(turn.dtype) @ turn.mH) * _average(frequency[:, None] - frequency, span, step)
    return (turn.mH @ inside @ turn).real


def mean_at(mean: Tensor, rope: Rope, span: int) -> Tensor:
    """Mean [H, D] of R(p) mean over positions p below `span`."""
    turn, frequency = _pairs(rope, mean.shape[-1])
    return ((mean.to(turn.dtype) @ turn.mT * _average(frequency, span)) @ turn.conj()).real


def frame(
    moments: Moments, kind: str, rope: Rope, block: int = BLOCK, span: int = SPAN
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [H, D] that the frame `kind` subtracts, and moments of centered keys and of queries, [H, D, D].

    In the frame "block" the mean is that before RoPE: `block_mean` takes it to a block of `block` positions.
    Keys and queries are at random positions below `span`. In the frame "still" queries are at random
    distances from the keys.

    Raises `ValueError` for an unknown `kind`. `rope` is that of the layer.
    """
    if kind not in FRAMES:
        raise ValueError(f"frame {kind!r}: one of {', '.join(FRAMES)} is allowed")
    mean = moments.mean
    queries = at_random_positions(moments.queries, rope, span)
    if kind == "still":
        return mean, moments.keys, queries
    outer = lambda x: x.unsqueeze(-1) * x.unsqueeze(-2)  # noqa: E731
    keys = at_random_positions(moments.keys + outer(mean), rope, span)
    if kind == "moved":
        one = mean_at(mean, rope, span)
        return one, keys - outer(one), queries
    of_blocks = at_random_positions(outer(mean_at(mean, rope, block)), rope, max(span, block), block)
    return mean, keys - of_blocks, queries


def block_mean(mean: Tensor, position: Tensor, rope: Rope) -> Tensor:
    """The mean of a block of keys, fp16 values as float64 [H, D], from that before RoPE [H, D].

    `position` is int64 [n]: the positions of the real tokens of the block. Without any, the mean is 0.
    """
    if not len(position):
        return torch.zeros_like(mean, dtype=torch.float64)
    turned = rotate(mean.double()[:, None].expand(-1, len(position), -1), position, rope)
    return quantize.stored(turned.mean(1))


# -- matrices


class Matrices(NamedTuple):
    """Matrices of one side (keys or values) of one layer, [H, D, D] each, with fp16 values.

    A model has them once, for texts of any length. They are many bytes beside the codes of a short text, and
    fp16 is enough for them. `balanced` chooses their sizes, which codes do not depend on.
    """

    encode: Tensor  # A: y = A (x - mean) has the same variance in each channel
    decode: Tensor  # A^-1
    feedback: Tensor  # V, lower triangular: |V e|^2 is the damage that an error e of y does, up to a factor


def power(moment: Tensor, exponent: float) -> Tensor:
    """A power of symmetric positive matrices [..., D, D]."""
    value, vector = torch.linalg.eigh(moment)
    value = value.clamp_min(1e-12 * value.amax(-1, keepdim=True).clamp_min(1e-300))
    return (vector * value.pow(exponent).unsqueeze(-2)) @ vector.mT


def shrunk(moment: Tensor) -> Tensor:
    """A moment drawn to its diagonal, and made positive definite."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    ridge = (RIDGE * diagonal.mean(-1, keepdim=True)).clamp_min(1e-30).expand_as(diagonal)
    return (1 - SHRINK) * moment + torch.diag_embed(SHRINK * diagonal + ridge)


def matched(S: Tensor, M: Tensor, seed: int = 0) -> Matrices:
    """Matrices for vectors of second moment S [H, D, D] that are multiplied by vectors of moment M.

    With R the root of the geometric mean of S^-1 and M, the moments R S R and R^-1 M R^-1 are equal. Part of
    their spread is whitened (`WHITEN`), and the seeded rotation of the rotated codec mixes the channels.

    Up to its rounding, A is a continuous function of both moments. Eigenvectors alone are not: their signs,
    and their order where eigenvalues are equal, differ between machines, and old codes would decode to other
    vectors there.
    """
    S, M = shrunk(S), shrunk(M)
    root, inverse = power(S, 0.5), power(S, -0.5)
    R = power(inverse @ power(root @ M @ root, 0.5) @ inverse, 0.5)
    A = qr_rotation(S.shape[-1], seed).to(S.device) @ power(R @ S @ R, -WHITEN / 2) @ R
    A = A / (A @ S @ A.mT).diagonal(dim1=-2, dim2=-1).mean(-1).sqrt()[:, None, None]
    back = torch.linalg.inv(A)
    W = back.mT @ M @ back
    V = torch.linalg.cholesky(((W + W.mT) / 2).flip(-1, -2)).mT.flip(-1, -2)
    return balanced(back, V)


def balanced(back: Tensor, V: Tensor) -> Matrices:
    """Matrices with fp16 values, from A^-1 and V [H, D, D].

    Neither A^-1 nor scales may leave the range of fp16. So A^-1 is divided by the root of its largest value:
    small or large vectors make matrices and scales small or large, half and half. The largest value is kept
    within `SIZES`, even if all vectors are 0. A is the inverse of the A^-1 that is stored. Else the rounding
    of A^-1 would turn a direction of large keys into an error of directions that queries see better.

    Codes do not depend on the size of V, whose largest value becomes 1. The encoder divides by its diagonal,
    so that stays a normal number.
    """
    largest = lambda x: x.abs().amax((-2, -1), keepdim=True)  # noqa: E731
    size = largest(back)
    back = quantize.stored(back / size.sqrt().clamp(size / SIZES[1], size / SIZES[0]))
    V = quantize.stored(V / largest(V))
    diagonal = V.diagonal(dim1=-2, dim2=-1)
    V = V + torch.diag_embed(diagonal.clamp_min(quantize.FP16_TINY) - diagonal)
    return Matrices(quantize.stored(torch.linalg.inv(back)), back, V)


# -- codes


@dataclass(frozen=True, eq=False)
class MatchedCodec:
    """Vectors of H heads as records of `bits` bits per channel and one scale. Values are not searched for
    the same scales as keys (`of_values`).

    Raises `ValueError` for other widths, and for a head_dim that does not fill whole bytes.
    """

    bits: int
    matrices: Matrices
    of_values: bool = False

    def __post_init__(self):
        if self.bits not in INTEGER_TIERS:
            raise ValueError(f"bits={self.bits!r}: one of {tuple(INTEGER_TIERS)} is allowed")
        packed_bytes(self.bits, self.head_dim)

    @property
    def head_dim(self) -> int:
        return self.matrices.encode.shape[-1]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one vector: packed codes and an fp16 scale."""
        return packed_bytes(self.bits, self.head_dim) + 2

    def encode(self, x: Tensor, mean: Tensor | None = None) -> Record:
        """The record of x [H, ..., D] less `mean` (broadcast to x)."""
        x = quantize.finite(x)
        return self._encode_rotated(self._each(self.matrices.encode, x if mean is None else x - mean))

    def decode(self, record: Record, mean: Tensor | None = None) -> Tensor:
        """Undo `encode`: float64 [H, ..., D]; `mean` is added back."""
        x = self._each(self.matrices.decode, self._decode_rotated(record))
        return x if mean is None else x + mean

    def requantize(self, record: Record, other: "MatchedCodec") -> Record:
        """`record` in the codec `other`. Raises `ValueError` unless both have the same matrices."""
        if self.matrices is not other.matrices:
            raise ValueError("requantize needs two codecs with the same matrices")
        return other._encode_rotated(self._decode_rotated(record))

    def levels(self, record: Record) -> Tensor:
        """The numbers that the scale applies to, code less center: [..., D]."""
        return self._centered(quantize.unpack(record.codes, self.bits, self.head_dim))

    def rotate_query(self, query: Tensor) -> Tensor:
        """Queries [Hq, q, D] as they are multiplied with rotated keys: A^-T q."""
        return self._by_group(self.matrices.decode.mT, query)

    def rotate_back(self, x: Tensor) -> Tensor:
        """Sums of rotated values [Hq, q, D] as sums of values: A^-1 x."""
        return self._by_group(self.matrices.decode, x)

    def _by_group(self, matrix: Tensor, x: Tensor) -> Tensor:
        """The matrix of each KV head times the vectors of its query heads, [Hq, q, D]."""
        return self._each(matrix, x.unflatten(0, (matrix.shape[0], -1))).flatten(0, 1)

    def damage(self, error: Tensor) -> Tensor:
        """|V e|^2 of errors e of rotated vectors [H, ..., D]: [H, ...]."""
        return self._each(self.matrices.feedback, error).square().sum(-1)

    @staticmethod
    def _each(matrix: Tensor, x: Tensor) -> Tensor:
        """matrix [H, D, D] times every vector of x [H, ..., D]."""
        return torch.einsum("hij,h...j->h...i", matrix, x)

    def round(self, unit: Tensor) -> Tensor:
        """Codes uint8 of vectors in units of the level distance, [H, ..., D].

        Channel i is rounded after the errors e_j of the channels j < i were added: the damage is the sum of
        V_ii^2 (e_i + sum_j V_ij / V_ii e_j)^2, and the code of channel i can make its own term small.
        """
        V = self.matrices.feedback
        weight = V / V.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        codes, error = torch.zeros_like(unit), torch.zeros_like(unit)
        for i in range(unit.shape[-1]):
            wanted = unit[..., i] + torch.einsum("hj,h...j->h...", weight[:, i, :i], error[..., :i])
            codes[..., i] = self._nearest(wanted)
            error[..., i] = unit[..., i] - self._centered(codes[..., i])
        return codes.to(torch.uint8)

    def round_again(self, unit: Tensor, codes: Tensor) -> Tensor:
        """Codes of `unit` [H, ..., D] after one more pass over the channels of `codes`.

        Each channel gets the code with the least damage, given the errors of all other channels. With
        W = V^T V, the damage e^T W e is least for e_i = -sum_j W_ij / W_ii e_j over the other channels j. No
        step makes the damage larger (coordinate descent).
        """
        V = self.matrices.feedback
        W = V.mT @ V
        weight = W / W.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        codes = codes.double()
        error = unit - self._centered(codes)
        for i in range(unit.shape[-1]):
            others = torch.einsum("hj,h...j->h...", weight[:, i], error) - error[..., i]
            codes[..., i] = self._nearest(unit[..., i] + others)
            error[..., i] = unit[..., i] - self._centered(codes[..., i])
        return codes.to(torch.uint8)

    def _encode_rotated(self, y: Tensor) -> Record:
        """Codes with the best scale that is searched, and the scale that is stored.

        The first scale is the one of `FACTORS` that is best for plain rounding, but at least that of `LEAST`.
        At 8 and 4 bits, no other scale is searched. The one with the least squared error of plain rounding is
        nearly as good as the one with the least damage after feedback.

        Keys of 3 and 2 bits and values of 3 bits are rounded with several scales around the first one
        (`SEARCHED`). Feedback adds errors to what is rounded, and the channels that follow cannot make up for
        the large error of a clipped one. The scale whose codes have the smallest angle to y in the metric of
        V wins, the first of equal ones. At 3 and 2 bits, all channels are then rounded once more
        (`round_again`).

        The stored scale makes the vector unbiased in the metric of V, <Vy, V decoded> = |Vy|^2, as in the
        rotated codec. It stays within a factor of 2 of the scale that was used. A zero vector has scale 0.
        """
        first, best = self._first_scale(y), None
        Vy = self._each(self.matrices.feedback, y)
        searched = SEARCHED_FOR_VALUES if self.of_values else SEARCHED
        for factor in searched[self.bits]:
            codes = self.round(self._in_units(y, first * factor))
            Vz = self._each(self.matrices.feedback, self._centered(codes))
            aligned, size = (Vy * Vz).sum(-1), Vz.square().sum(-1)  # codes are never 0, nor are their sizes
            cosine = aligned.clamp_min(0).square() / size  # up to the size of Vy
            if best is None:
                best, kept, used = cosine, codes, first * factor
            better = cosine > best
            best, used = cosine.where(better, best), (first * factor).where(better, used)
            kept = codes.where(better.unsqueeze(-1), kept)
        for _ in range(1, PASSES[self.bits]):
            kept = self.round_again(self._in_units(y, used), kept)
        Vz = self._each(self.matrices.feedback, self._centered(kept))
        aligned = (Vy * Vz).sum(-1)
        scale = (Vy * Vy).sum(-1) / aligned.where(aligned > 0, 1.0)
        scale = scale.where(aligned > 0, used).clamp(used / 2, used * 2)
        return Record(quantize.pack(kept, self.bits), quantize.stored(scale), None)

    def _first_scale(self, y: Tensor) -> Tensor:
        """The scale of `FACTORS` with the least squared error of plain rounding, the first of equal ones, but
        at least that of `LEAST`: [H, ...] for y [H, ..., D].
        """
        size = y.square().mean(-1).sqrt() * STEPS[self.bits]
        found = least = None
        for factor in FACTORS:
            scale = size * factor
            near = self._centered(self._nearest(self._in_units(y, scale)))
            error = (y - scale.unsqueeze(-1) * near).square().sum(-1)
            if least is None:
                found, least = scale, error
            found, least = scale.where(error < least, found), error.where(error < least, least)
        return torch.maximum(found, size * LEAST[self.bits])

    @staticmethod
    def _in_units(y: Tensor, scale: Tensor) -> Tensor:
        return y / scale.where(scale > 0, 1.0).unsqueeze(-1)

    def _nearest(self, unit: Tensor) -> Tensor:
        """The code nearest to each number in units of the level distance."""
        top = 2**self.bits - 1
        return torch.round(unit + top / 2).clamp(0, top)

    def _centered(self, codes: Tensor) -> Tensor:
        return codes.double() - (2**self.bits - 1) / 2

    def _decode_rotated(self, record: Record) -> Tensor:
        codes = quantize.unpack(record.codes, self.bits, self.head_dim)
        return record.scale.double().unsqueeze(-1) * self._centered(codes)
