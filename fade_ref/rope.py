"""Positions: rotary embeddings (RoPE), renumbering after eviction, ALiBi.

A rotary model rotates channel pair i of a query or key at position m by the angle m * inv_freq[i].
Rotations add, R(m) R(n) = R(m + n) (RoFormer, arXiv 2104.09864, eq. 14-16). So scores depend on distances
only, and a rotation by n - m moves a stored key from m to n. Positions are in tokens and angles in radians.
Parameters are named as in Hugging Face's `rope_parameters`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rope:
    """How one layer rotates (RoFormer, arXiv 2104.09864, section 3.2.2).

    Raises `ValueError` unless inv_freq is a float64 vector.
    """

    inv_freq: Tensor  # [d/2], radians per token; the first d channels of a head rotate, the rest do not
    scaling: float = 1.0  # multiplies cos and sin when a model makes queries and keys (YaRN, eq. 22)
    interleaved: bool = False  # pairs are channels (2i, 2i + 1), as in GPT-J, Cohere, GLM; else (i, i + d/2)

    def __post_init__(self) -> None:
        if self.inv_freq.ndim != 1 or self.inv_freq.dtype != torch.float64:
            raise ValueError(f"inv_freq must be float64 [d/2], not {self.inv_freq}")


NOPE = Rope(torch.zeros(0, dtype=torch.float64))  # a layer that does not rotate
Frequencies = tuple[Tensor, float]  # inv_freq and scaling, as in Rope


def default(p: Mapping, head_dim: int, max_positions: int, seq_len: int = 0) -> Frequencies:
    """inv_freq[i] = theta^(-2i/d), 0 <= i < d/2 (RoFormer, arXiv 2104.09864, section 3.2.2).

    d is head_dim * partial_rotary_factor, also in the exponent (GPT-NeoX, Phi). All schemes share this
    signature: the `rope_parameters` p of the model, its context max_positions, and the tokens it has seen,
    seq_len, which only dynamic and longrope use. All raise `KeyError` for a missing parameter.
    """
    d = int(head_dim * p.get("partial_rotary_factor", 1.0))
    return p["rope_theta"] ** (-torch.arange(0, d, 2, dtype=torch.float64) / d), 1.0


def linear(p: Mapping, head_dim: int, max_positions: int, seq_len: int = 0) -> Frequencies:
    """Every frequency divided by factor, as if positions were (PI, arXiv 2306.15595, section 2.3)."""
    return default(p, head_dim, max_positions)[0] / p["factor"], 1.0


def dynamic(p: Mapping, head_dim: int, max_positions: int, seq_len: int = 0) -> Frequencies:
    """NTK: theta grows with seq_len beyond max_positions (YaRN, arXiv 2309.00071, sections 3.1 and 3.3).

    A key that is stored before the growth was made with other frequencies. Move it with those.
    """
    d = int(head_dim * p.get("partial_rotary_factor", 1.0))
    stretch = p["factor"] * max(seq_len, max_positions) / max_positions - (p["factor"] - 1)
    theta = p["rope_theta"] * stretch ** (d / (d - 2))
    return default({**p, "rope_theta": theta}, head_dim, max_positions)


def _extension(p: Mapping, max_positions: int) -> tuple[int, float]:
    """Tokens of the original training context, and the factor that extended it."""
    original = p.get("original_max_position_embeddings") or max_positions
    return original, p.get("factor") or max_positions / original


def yarn(p: Mapping, head_dim: int, max_positions: int, seq_len: int = 0) -> Frequencies:
    """NTK by parts (YaRN, arXiv 2309.00071, section 3.2, Definition 2), as in its authors' code.

    Pairs that turn more than beta_fast times in the original context keep their frequency. Pairs that turn
    less than beta_slow times get it divided by factor. A ramp over the pair index joins the two. scaling is
    0.1 ln(factor) + 1 (section 3.4, eq. 22), unless attention_factor or mscale say otherwise.
    """
    inv_freq, _ = default(p, head_dim, max_positions)
    d, (original, factor) = 2 * len(inv_freq), _extension(p, max_positions)

    def pair(turns: float) -> float:  # solves original * inv_freq[pair] = 2 pi * turns
        return d / 2 * math.log(original / (2 * math.pi * turns)) / math.log(p["rope_theta"])

    low, high = pair(p.get("beta_fast") or 32), pair(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = (torch.arange(d // 2, dtype=torch.float64) - low) / (high - low or 0.001)
    scaling, m, m_all = p.get("attention_factor"), p.get("mscale"), p.get("mscale_all_dim")
    if scaling is None:
        log = math.log(max(factor, 1.0))
        scaling = (0.1 * m * log + 1) / (0.1 * m_all * log + 1) if m and m_all else 0.1 * log + 1
    return torch.lerp(inv_freq, inv_freq / factor, ramp.clamp(0, 1)), scaling


def llama3(p: Mapping, head_dim: int, max_positions: int, seq_len: int = 0) -> Frequencies:
    """YaRN with a ramp over the number of turns (Llama 3.1, `apply_scaling` in Meta's code).

    Pairs that turn more than high_freq_factor times in the original context keep their frequency. Pairs that
    turn less than low_freq_factor times get it divided by factor.
    """
    inv_freq, _ = default(p, head_dim, max_positions)
    original, factor = _extension(p, max_positions)
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    keep = (original * inv_freq / (2 * math.pi) - low) / (high - low)
    return torch.lerp(inv_freq / factor, inv_freq, keep.clamp(0, 1)), 1.0


def longrope(p: Mapping, head_dim: int, max_positions: int, seq_len: int = 0) -> Frequencies:
    """One divisor for each pair, found by search (LongRoPE, arXiv 2402.13753, section 3).

    The divisors are long_factor [d/2] once seq_len exceeds the original context, else short_factor. Stored
    keys keep theirs, as in `dynamic`. scaling = sqrt(1 + ln factor / ln original), as in the code of Phi-3.
    """
    original, factor = _extension(p, max_positions)
    divisor = p["long_factor"] if seq_len > original else p["short_factor"]
    scaling = p.get("attention_factor")
    if scaling is None:
        scaling = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original))
    inv_freq, _ = default(p, head_dim, max_positions)
    return inv_freq / torch.tensor(divisor, dtype=torch.float64), scaling


def proportional(p: Mapping, head_dim: int, max_positions: int, seq_len: int = 0) -> Frequencies:
    """`default` of all channels, with frequency 0 after the first partial_rotary_factor of the pairs (p-RoPE,
    arXiv 2410.06205; Gemma 4)."""
    inv_freq, _ = default({**p, "partial_rotary_factor": 1.0}, head_dim, max_positions)
    inv_freq[int(p.get("partial_rotary_factor", 1.0) * head_dim // 2) :] = 0
    return inv_freq / p.get("factor", 1.0), 1.0


#: rope_type -> scheme.
SCHEMES = {f.__name__: f for f in (default, linear, dynamic, yarn, llama3, longrope, proportional)}


def from_parameters(
    parameters: Mapping, *, head_dim: int, max_position_embeddings: int,
    seq_len: int | None = None, interleaved: bool = False,
) -> Rope:  # fmt: skip
    """The `Rope` of a model's flat `rope_parameters`, by the scheme that they name.

    Raises `ValueError` for an unknown rope_type and for a missing parameter.

    >>> from_parameters({"rope_theta": 1e4}, head_dim=4, max_position_embeddings=8).inv_freq
    tensor([1.0000, 0.0100], dtype=torch.float64)
    """
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type not in SCHEMES:
        raise ValueError(f"rope_type must be one of {', '.join(SCHEMES)}, not {rope_type!r}")
    try:
        scheme = SCHEMES[rope_type](parameters, head_dim, max_position_embeddings, seq_len or 0)
    except KeyError as missing:
        raise ValueError(f"rope_type {rope_type!r} needs the parameter {missing}") from None
    return Rope(*scheme, interleaved)


def from_config(
    config: Any,
    layer_type: str | None = None,
    layer_idx: int | None = None,
    seq_len: int | None = None,
    interleaved: bool = False,
) -> Rope:
    """The `Rope` of one layer of a Hugging Face text config; `NOPE` for a layer that does not rotate.

    No config says `interleaved`: the code of each model family does. Raises `ValueError` if positions are not
    rotary, and if layers differ and neither layer_type nor layer_idx says which one is meant.
    """
    if layer_type is None and layer_idx is not None and getattr(config, "layer_types", None):
        layer_type = config.layer_types[layer_idx]
    if _without_rope(config, layer_type, layer_idx):
        return NOPE
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise ValueError("config has no rope_parameters: its positions are not rotary")
    if any(isinstance(value, Mapping) for value in parameters.values()):  # one set a layer type
        if layer_type not in parameters:
            raise ValueError(f"layer_type must be one of {list(parameters)}, not {layer_type!r}")
        parameters = parameters[layer_type]
    if getattr(config, "is_heterogeneous", False):  # Gemma 4: head_dim, too, is a layer type's own
        config = config.per_layer_config[layer_type if layer_idx is None else layer_idx]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return from_parameters(parameters, head_dim=head_dim, seq_len=seq_len, interleaved=interleaved,
                           max_position_embeddings=config.max_position_embeddings)  # fmt: skip


def _without_rope(config, layer_type: str | None, layer_idx: int | None) -> bool:
    rotates = getattr(config, "no_rope_layers", None) or [1]  # despite its name, 1 means RoPE
    if not all(rotates):  # SmolLM3, Llama 4
        if layer_idx is None:
            raise ValueError("some layers of this config have no RoPE: pass layer_idx")
        return not rotates[layer_idx]
    if getattr(config, "model_type", None) in ("cohere2", "exaone4") and config.sliding_window:
        if layer_type is None:  # the rule stands only in the code of these families
            raise ValueError("full-attention layers of this config have no RoPE: pass layer_type")
        return layer_type == "full_attention"
    return bool(getattr(config, "alibi", False))  # Falcon


def rotate(x: Tensor, position: Tensor | int, rope: Rope, *, scaled: bool = False) -> Tensor:
    """R(position) x, a new tensor (RoFormer, arXiv 2104.09864, eq. 34).

    x and the result are float64 [..., n, head_dim]. position is in tokens, of any sign, broadcastable to
    [..., n]. scaled multiplies by rope.scaling, as models do when they *make* queries and keys; a key that
    is *moved* by the difference of two positions has that factor already. Raises `ValueError` if x is not
    float64 or has too few channels.

    >>> quarter_turn = Rope(torch.tensor([math.pi / 2], dtype=torch.float64))
    >>> rotate(torch.tensor([[1.0, 0.0]]).double(), 1, quarter_turn).round(decimals=9).tolist()
    [[0.0, 1.0]]
    """
    d = 2 * len(rope.inv_freq)
    if x.dtype != torch.float64 or x.shape[-1] < d:
        raise ValueError(f"x must be float64 of >= {d} channels, not {x.dtype} {tuple(x.shape)}")
    position = torch.as_tensor(position, dtype=torch.float64).expand(x.shape[:-1])
    angle = position[..., None] * rope.inv_freq
    cos, sin = angle.cos(), angle.sin()
    if scaled:
        cos, sin = rope.scaling * cos, rope.scaling * sin
    shape, axis = ((d // 2, 2), -1) if rope.interleaved else ((2, d // 2), -2)
    a, b = x[..., :d].unflatten(-1, shape).unbind(axis)
    rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), axis).flatten(-2)
    return torch.cat((rotated, x[..., d:]), -1)


def renumber(position: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous positions after eviction (StreamingLLM, arXiv 2309.17453, section 3.2).

    Args:
        position: int64 [..., n], of the stored tokens now, in any order, the newest included.
        alive: bool [..., n], False for evicted tokens and padding.

    Returns rank, int64 [..., n], the number of survivors before each (-1 for the others), and evicted,
    int64 [...], the number of tokens that are gone. Keys can be read at rank, with queries and new keys at
    their logical position less evicted. Or keys are read at rank + evicted, and queries keep their logical
    position: all distances are the same, and the cache does this. Raises `ValueError` if two survivors
    share a position.

    >>> rank, evicted = renumber(torch.arange(6), torch.tensor([1, 0, 0, 1, 1, 1]).bool())
    >>> rank.tolist(), evicted.item()
    ([0, -1, -1, 1, 2, 3], 2)
    """
    position, alive = torch.broadcast_tensors(position, alive)
    before = (position[..., None, :] < position[..., :, None]) & alive[..., None, :]
    rank, survivors = before.sum(-1), alive.sum(-1)
    if ((rank * alive).sum(-1) * 2 != survivors * (survivors - 1)).any():  # a tie lowers the sum
        raise ValueError("two survivors share a position")
    return rank.masked_fill(~alive, -1), position.amax(-1) + 1 - survivors


def alibi_slopes(heads: int) -> Tensor:
    """The slope of each head, float64 [heads], in score per token (ALiBi, arXiv 2108.12409, section 3).

    2^(-8j/p), j = 1..p, for the largest power of two p <= heads. The rest are every other slope of 2p
    heads, as in the code of the authors, Bloom, Falcon and MPT. Raises `ValueError` if heads < 1.

    >>> alibi_slopes(3).tolist()
    [0.0625, 0.00390625, 0.25]
    """
    if heads < 1:
        raise ValueError(f"heads must be positive, not {heads}")
    p = 1 << (heads.bit_length() - 1)
    exponent = [j / p for j in range(1, p + 1)] + [j / (2 * p) for j in range(1, 2 * p, 2)]
    return 2.0 ** (-8 * torch.tensor(exponent[:heads], dtype=torch.float64))


def alibi_bias(slopes: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
    """-slope * distance, to be added to the scores (ALiBi, arXiv 2108.12409, section 3).

    slopes [H] and positions [..., Q] and [..., K] (in tokens) give float64 [..., H, Q, K]. Keys carry no
    position. After eviction, pass logical or renumbered positions, not indices into the cache.

    >>> alibi_bias(alibi_slopes(1), torch.tensor([4]), torch.tensor([0, 2])).tolist()
    [[[-0.015625, -0.0078125]]]
    """
    distance = query_position[..., None, :, None] - key_position[..., None, None, :]
    return -slopes[:, None, None] * distance
