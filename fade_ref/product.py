"""Product quantization (PQ): codes for short stretches of a vector (Jegou et al., TPAMI 2011).

A vector of D elements is cut into m = D / w subspaces of w adjacent elements. Each subspace has k
centroids, found by k-means. A code names the nearest centroid: log2(k) / w bits per element, 2 bits by
default. A **codebook** is a float64 tensor [m, k, w] of fp16 values. It is trained for one kind of vector:
keys and values, and keys before and after RoPE, each need their own.

This is a baseline: `benchmarks.simulation` measures its loss, and no cache has it. 2-bit codes of `matched`
lose less at its bytes, and a decode kernel that reads a table for each byte is slow.
"""

import torch
from torch import Tensor

from .quantize import finite, stored
from .tiers import packed_bytes


def _cut(x: Tensor, width: int) -> Tensor:
    """x [..., D] as [..., m, width]."""
    if width < 1 or x.shape[-1] % width:
        raise ValueError(f"subspaces of {width} do not divide {x.shape[-1]} elements")
    return x.unflatten(-1, (-1, width))


def _code_bits(centroids: int) -> int:
    if centroids not in (2, 4, 8, 16, 32, 64, 128, 256):
        raise ValueError(f"centroids={centroids!r}: a power of two from 2 to 256 is allowed")
    return centroids.bit_length() - 1


def train(x: Tensor, subspace_width: int = 4, centroids: int = 256, seed: int = 0) -> Tensor:
    """Codebook [m, centroids, w] for samples x [n, D] (paper, section II.B), by mini-batch k-means.

    `seed` makes it repeatable. Take at least 40 samples for each centroid. Raises `ValueError` for fewer
    samples than centroids, NaN, a width that does not divide D, and centroids that are no power of two up to
    256.
    """
    try:
        from sklearn.cluster import MiniBatchKMeans  # slow to import, and only training needs it
    except ImportError as error:
        raise ImportError('training needs scikit-learn: pip install "fade-fast[train]"') from error

    _code_bits(centroids)
    parts = _cut(finite(x), subspace_width)
    if len(x) < centroids:
        raise ValueError(f"{len(x)} samples are too few for {centroids} centroids")
    kmeans = MiniBatchKMeans(centroids, random_state=seed, batch_size=4096, n_init=1)
    centers = [kmeans.fit(part.numpy()).cluster_centers_ for part in parts.unbind(-2)]
    return stored(torch.stack([torch.from_numpy(center) for center in centers]))


def encode(x: Tensor, codebook: Tensor) -> Tensor:
    """Codes uint8 [..., m] of x [..., D]: the nearest centroid, or the lowest index among equally near ones.

    Raises `ValueError` for NaN and for a D that is not the codebook's.
    """
    parts = _cut(finite(x), codebook.shape[-1])
    if parts.shape[-2] != len(codebook):
        raise ValueError(f"the codebook has {len(codebook)} subspaces, x has {parts.shape[-2]}")
    codes = [
        (part.unsqueeze(-2) - book).square().sum(-1).argmin(-1)  # argmin: the first of equals
        for part, book in zip(parts.unbind(-2), codebook)
    ]
    return torch.stack(codes, dim=-1).to(torch.uint8)


def decode(codes: Tensor, codebook: Tensor) -> Tensor:
    """The centroids that codes [..., m] name, side by side: float64 [..., D].

    >>> book = torch.tensor([[[0.0, 0.0], [1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]]])
    >>> decode(encode(torch.tensor([0.9, 1.7, 2.8, 4.4]), book), book).tolist()
    [1.0, 2.0, 3.0, 4.0]
    """
    return codebook[torch.arange(len(codebook)), codes.long()].flatten(-2)


def bytes_per_token(dim: int, subspace_width: int = 4, centroids: int = 256) -> int:
    """Packed bytes of the codes of one vector. Raises `ValueError` if they do not fill whole bytes.

    >>> [bytes_per_token(128, w) for w in (2, 4, 32)]  # 4, 2 and 0.25 bits an element
    [64, 32, 4]
    """
    return packed_bytes(_code_bits(centroids), _cut(torch.empty(dim), subspace_width).shape[0])


def codebook_bytes(dim: int, centroids: int = 256) -> int:
    """Bytes of one fp16 codebook, which all vectors share: 2 k D.

    >>> codebook_bytes(128)
    65536
    """
    return 2 * dim * centroids
