"""What attention reads of keys and values in a format, in float64: for `benchmarks.simulation`.

Formats are ours (by the codecs of `fade_ref`), those of `benchmarks.baselines`, and product quantization
with the codebooks of `benchmarks.codebooks`. A `Reader` also counts the bytes that a token takes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fade_fast
from fade_fast.measure.methods import key_shape
from fade_fast.measure.names import configuration
from fade_ref import matched, product, quantize
from fade_ref.config import FadeConfig
from fade_ref.rotation import RotatedCodec, key_mean, qr_rotation

from . import baselines, codebooks

#: (layer index, keys, values) -> both as they are read; [H, n, D] each. Keys are after RoPE. Their first
#: token has the position `n_sink`.
Read = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Reader:
    """A format, for one model.

    Attributes:
        name: in tables.
        source: what it is, and where it is described.
        key_bytes, value_bytes: of one token in one KV head, with its share of what a group of tokens stores.
        tables: bytes that all tokens of all caches of the model share.
        read: keys and values as they are read.
    """

    name: str
    source: str
    key_bytes: float
    value_bytes: float
    tables: int
    read: Read

    @property
    def bytes(self) -> float:
        """Of one token in one KV head, keys and values."""
        return self.key_bytes + self.value_bytes


def reader(name: str, model, config: FadeConfig) -> Reader:
    """The format called `name`: widths as in `methods`, or a baseline as in `baselines`.

    Args:
        config: its `n_sink` and `block_size` hold for every format of ours.

    Raises `ValueError` if no format has this name, and for presets that drop tokens.
    """
    dim = key_shape(model, 0)[1]
    if baselines.NAME.fullmatch(name):
        found = baselines.baseline(name)
        sizes = (side.bytes_per_token(dim) for side in (found.keys, found.values))
        return Reader(name, found.source, *sizes, 0, lambda layer, keys, values: found.read(keys, values))
    ours = configuration(name)
    if not ours.compresses or ours.evicts or ours.layer_bits or ours.middle_v_bits == 16:
        raise ValueError(f"{name!r}: only formats of every token and layer can be simulated")
    bits = ours.middle_k_bits, ours.middle_v_bits
    if ours.quant_backend == "matched":
        return _matched(name, model, config, bits)
    if ours.quant_backend != "rotated":
        raise ValueError(f"{name!r}: {ours.quant_backend} cannot be simulated by name")
    return rotated(name, dim, config, bits)


def rotated(name: str, dim: int, config: FadeConfig, bits: tuple[int, int]) -> Reader:
    """Our default format, with bits of (keys, values)."""
    P = qr_rotation(dim)
    of_keys, of_values = (RotatedCodec(b, dim, P) for b in bits)

    def read(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for part in keys.double().split(config.block_size, dim=-2):
            mean = key_mean(part)
            found.append(of_keys.decode(of_keys.encode(part, mean), mean))
        return torch.cat(found, dim=-2), of_values.decode(of_values.encode(values.double()))

    mean_bytes = 2 * dim / config.block_size
    return Reader(
        name, "fade_ref.rotation: mean of a block, rotation, a scale a token",
        of_keys.bytes_per_token + mean_bytes, of_values.bytes_per_token, 0, read,
    )  # fmt: skip


def _matched(name: str, model, config: FadeConfig, bits: tuple[int, int]) -> Reader:
    """The matched format, with the calibration that caches of the model use."""
    cache = fade_fast.create_cache(model, FadeConfig(quant_backend="matched"))
    known, indices = cache.calibration, [layer.layer_idx for layer in cache.tiered]
    fade_fast.detach(model)
    kinds = {i: "block" if known.rotates(i) else "moved" for i in indices}
    codecs, means, tables = {}, {}, 0
    for i in indices:
        moments = matched.Moments(*(x.double() for x in known.moments[i]))
        means[i], keys, queries = matched.frame(moments, kinds[i], known.ropes[i], config.block_size)
        sides = matched.matched(keys, queries), matched.matched(moments.values, moments.outputs)
        codecs[i] = tuple(map(matched.MatchedCodec, bits, sides, (False, True)))
        shared = known.tables(kinds[i], config.block_size, torch.device("cpu"))[i]
        tables += sum(x.nbytes for x in (shared[0], *shared[1], *shared[2]))

    def mean_of(layer: int, length: int) -> Tensor:
        """Mean [H, n or 1, D] that the keys of `length` tokens are stored without."""
        if kinds[layer] == "moved":
            return quantize.stored(means[layer])[:, None]
        at = torch.arange(config.n_sink, config.n_sink + length).split(config.block_size)
        found = [matched.block_mean(means[layer], part, known.ropes[layer]) for part in at]
        return torch.cat([m[:, None].expand(-1, len(part), -1) for m, part in zip(found, at)], dim=1)

    def read(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        of_keys, of_values = codecs[layer]
        mean = mean_of(layer, keys.shape[-2])
        return of_keys.decode(of_keys.encode(keys, mean), mean), of_values.decode(of_values.encode(values))

    sizes = (codec.bytes_per_token for codec in codecs[indices[0]])
    return Reader(
        name, "fade_ref.matched: matrices of a KV head, feedback, a scale a token", *sizes, tables, read
    )


def coded(name: str, books: dict[int, codebooks.Books]) -> Reader:
    """Product quantization called `name`, as in "pq-4x256", with codebooks by layer."""
    width, centroids, _ = codebooks.settings(name)
    key, value = next(iter(books.values()))
    sizes = (product.bytes_per_token(len(x) * width, width, centroids) for x in (key, value))

    def read(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found = zip((keys, values), books[layer])
        return tuple(product.decode(product.encode(x, book), book) for x, book in found)

    tables = sum(product.codebook_bytes(len(x) * width, centroids) for pair in books.values() for x in pair)
    source = "fade_ref.product: codebooks of a layer, trained beforehand"
    return Reader(f"pq-{width}x{centroids}", source, *sizes, tables, read)
