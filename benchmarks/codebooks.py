"""Codebooks of product quantization, trained from what a model caches of a text: for `benchmarks.simulation`.

A name is the width of a subspace and the number of centroids, as in "pq-4x256", with ":tokens=2048" for
another length of the text.
"""

import re

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from fade_fast.errors import require
from fade_fast.hf.models import CACHE_NAME
from fade_ref import product

NAME = re.compile(r"pq-(\d+)x(\d+)(?::tokens=(\d+))?")
TOKENS = 8192  # of the text, if the name does not say it
CHUNK = 1024  # tokens per forward pass
SAMPLES = 16384  # largest number of vectors that a codebook is trained from
#: Codebooks of the keys (after RoPE) and of the values of a layer, float64 [m, k, w] each.
Books = tuple[Tensor, Tensor]


def settings(name: str) -> tuple[int, int, int]:
    """Width of a subspace, centroids and tokens of the text, of a name.

    Raises `ValueError` for another name.

    >>> settings("pq-4x256"), settings("pq-2x32:tokens=2048")
    ((4, 256, 8192), (2, 32, 2048))
    """
    found = NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is no product quantization: pq-4x256 is, for example")
    width, centroids, tokens = found.groups(default=TOKENS)
    return int(width), int(centroids), int(tokens)


def train(model: PreTrainedModel, ids: Tensor, width: int, centroids: int) -> dict[int, Books]:
    """Codebooks of every full-attention layer, by its index, from what the model caches of `ids` [1, n].

    The KV heads of a layer share them. Raises `MissingPackage` without scikit-learn, and `ValueError` as
    `product.train`.
    """
    require("training codebooks", "train", "sklearn")  # before the model reads anything
    draw, books = torch.Generator().manual_seed(0), {}
    for layer, sides in cached(model, ids).items():
        chosen = (x[torch.randperm(len(x), generator=draw)[:SAMPLES]] for x in sides)
        books[layer] = tuple(product.train(x.double(), width, centroids) for x in chosen)
    return books


@torch.no_grad()
def cached(model: PreTrainedModel, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys (after RoPE) and values [H * n, D] of every full-attention layer, on the CPU."""
    cache = DynamicCache(config=model.config)
    for part in ids.to(model.device).split(CHUNK, dim=1):
        model(input_ids=part, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
    return {
        i: tuple(x.transpose(0, 1).flatten(0, 2).cpu() for x in (layer.keys, layer.values))
        for i, layer in enumerate(cache.layers)
        if type(layer) is DynamicLayer
    }
