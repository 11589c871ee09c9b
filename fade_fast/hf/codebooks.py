"""Codebooks of product quantization, learned from the keys and values of a model that reads a text.

`create_cache(model, FadeConfig(quant_backend="product"), codebooks=...)` stores the middle as their codes.
This module trains, stores and loads codebooks. It encodes and decodes with `kernels/product.py`.

A file is safetensors. Its tensors are "{layer}.key" and "{layer}.value", float16 [m, k, w] for all KV heads
of a layer: m subspaces of w elements with k centroids each. Its metadata hold the provenance.
"""

import hashlib
import json
import os
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..errors import require
from ..kernels import product
from ..saved.files import whole
from .models import CACHE_NAME, fingerprint

VERSION = 1
CHUNK = 1024  # tokens per forward pass
SAMPLES = 16384  # largest number of vectors that a codebook is learned from
SIDES = ("key", "value")


@dataclass(frozen=True)
class Codebooks:
    """Codebooks of a model.

    Attributes:
        tensors: the codebooks by name, as in a file.
        provenance: model, text and settings of the training, and the relative error of each codebook by name:
            norm of the decoding error over norm of the training vectors.
    """

    tensors: dict[str, Tensor]
    provenance: dict

    def encode(self, layer: int, side: str, x: Tensor) -> Tensor:
        """Codes uint8 [B, H, n, m] of keys or values [B, H, n, D]; see `product.encode`."""
        return product.encode(x, self.tensors[f"{layer}.{side}"].to(x.device))

    def decode(self, layer: int, side: str, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Vectors [B, H, n, D] of codes; see `product.decode`."""
        return product.decode(codes, self.tensors[f"{layer}.{side}"].to(codes.device), dtype)

    @property
    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of the tensors, in hexadecimal."""
        digest = hashlib.sha256()
        for name, x in sorted(self.tensors.items()):
            x = x.detach().cpu().contiguous()
            digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
            digest.update(x.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def by_layer(self, layers: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """(key codebook, value codebook) by layer index. Exactly `layers` must be present.

        Raises `ValueError` for missing or surplus names, and for tensors that are not codebooks.
        """
        names = {f"{i}.{side}" for i in layers for side in SIDES}
        if names != self.tensors.keys():
            odd = ", ".join(sorted(map(str, names ^ self.tensors.keys())))
            raise ValueError(
                f"codebooks {odd} are missing or left over: one of keys and one of values are needed for "
                f"each of the layers {', '.join(map(str, layers))}. `fade train-codebook` writes them"
            )
        for name, x in self.tensors.items():
            fits = isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3
            if not fits or 0 in x.shape or x.shape[1] > 256 or not x.isfinite().all():
                what = f"{list(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(
                    f"codebook {name} is {what}: finite floating numbers [m, k, w], k at most 256, are "
                    "needed. `fade train-codebook` writes them"
                )
        return {i: tuple(self.tensors[f"{i}.{side}"] for side in SIDES) for i in layers}

    def save(self, path: str | os.PathLike) -> None:
        """Write the codebooks to a file, atomically. Raises `OSError` if the file cannot be written."""
        with whole(path) as written:
            save_file(self.tensors, written, metadata={"fade-codebooks": json.dumps(self.provenance)})


def load(path: str | os.PathLike, model: PreTrainedModel | None = None) -> Codebooks:
    """Load codebooks that `Codebooks.save` wrote. With `model`, they must have been learned from this model.

    Raises `FileNotFoundError`. Raises `ValueError` for another kind of file, another version or another
    model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            provenance = json.loads((file.metadata() or {})["fade-codebooks"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            version, _ = provenance["version"], provenance["fingerprint"]
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} holds no codebooks, or is damaged: {error}; make it again with `fade train-codebook`"
        ) from error
    if version != VERSION:
        raise ValueError(
            f"{path} has version {version}; {VERSION} is understood here: make the codebooks again with "
            "`fade train-codebook`"
        )
    if model is not None:
        _check_model(path, provenance, model)
    return Codebooks(tensors, provenance)


def given(source: "str | os.PathLike | Codebooks | dict[str, Tensor]", model: PreTrainedModel) -> Codebooks:
    """Convert the `codebooks` argument of `create_cache`: a file, `Codebooks`, or tensors named as in a file.

    Raises as `load`, also for `Codebooks` of another model. Raises `TypeError` for another type.
    """
    if isinstance(source, (str, os.PathLike)):
        return load(source, model)
    if isinstance(source, dict):
        return Codebooks({name: x.detach() if isinstance(x, Tensor) else x for name, x in source.items()}, {})
    if not isinstance(source, Codebooks):
        raise TypeError(
            f"codebooks are a file, Codebooks, or a dict of tensors, not {type(source).__name__}: give the "
            "path of a file that `fade train-codebook` wrote"
        )
    _check_model("these codebooks", source.provenance, model)
    return source


def _check_model(name, provenance: dict, model: PreTrainedModel) -> None:
    ours = fingerprint(model)
    learned = provenance.get("fingerprint", ours) | dict(dtype=ours["dtype"])  # another dtype only rounds
    if learned != ours:
        raise ValueError(
            f"{name}: learned from another model than {type(model).__name__} at hand; make them for this "
            "model with `fade train-codebook`"
        )


def train(
    model: PreTrainedModel, ids: Tensor, *, subspace_width: int = 4, centroids: int = 256, seed: int = 0
) -> Codebooks:
    """Learn codebooks from the keys (after RoPE) and values that the model caches as it reads `ids` [1, n].

    Mini-batch k-means (scikit-learn) runs in each subspace, over all KV heads together. A bar shows progress.

    Raises:
        MissingPackage: scikit-learn is not installed.
        ValueError: `centroids` is not a power of two from 2 to 256, `subspace_width` does not divide a
            head_dim, or there are fewer vectors than centroids.
    """
    require("learning codebooks", "train", "sklearn")  # before the model reads anything
    if centroids not in (2, 4, 8, 16, 32, 64, 128, 256):
        raise ValueError(f"centroids={centroids!r}: a power of two from 2 to 256 is allowed")
    vectors = collect(model, ids)
    for name, x in vectors.items():
        if subspace_width < 1 or x.shape[1] % subspace_width:
            raise ValueError(
                f"{name}: subspaces of {subspace_width} do not divide {x.shape[1]} elements; a divisor of "
                f"{x.shape[1]} is allowed"
            )
        if len(x) < centroids:
            raise ValueError(
                f"{name}: {len(x)} vectors are too few for {centroids} centroids; give a longer text, or "
                "fewer centroids"
            )
    draw = torch.Generator().manual_seed(seed)
    tensors, errors = {}, {}
    total = sum(x.shape[1] // subspace_width for x in vectors.values())
    with tqdm(total=total, desc="learning", unit="subspace", leave=False, delay=1) as bar:
        for name, x in vectors.items():
            x = x[torch.randperm(len(x), generator=draw)[:SAMPLES]]
            parts = x.unflatten(1, (-1, subspace_width)).unbind(1)
            book = torch.stack([_centres(part, centroids, seed, bar) for part in parts])
            tensors[name] = book.clamp(-65504, 65504).half()
            back = product.decode(product.encode(x[None, None], tensors[name]), tensors[name], torch.float32)
            errors[name] = ((back[0, 0] - x).norm() / x.norm()).item()
    provenance = dict(
        version=VERSION,
        fingerprint=fingerprint(model),
        model=os.path.basename(str(model.name_or_path).rstrip("/")),
        tokens=ids.shape[1],
        ids_sha256=hashlib.sha256(ids.to(torch.int32).cpu().numpy().tobytes()).hexdigest(),
        rope="after",
        subspace_width=subspace_width,
        centroids=centroids,
        seed=seed,
        torch=torch.__version__,
        errors=errors,
    )
    return Codebooks(tensors, provenance)


def _centres(x: Tensor, centroids: int, seed: int, bar: tqdm) -> Tensor:
    """Centroids [k, w] of vectors [n, w]."""
    from sklearn.cluster import MiniBatchKMeans  # slow to import, and only in the extra "train"

    kmeans = MiniBatchKMeans(centroids, random_state=seed, batch_size=4096, n_init=1, max_iter=20)
    bar.update()
    return torch.from_numpy(kmeans.fit(x.numpy()).cluster_centers_)


@torch.no_grad()
def collect(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Keys (after RoPE) and values of every full-attention layer for `ids` [1, n]: float32 [H * n, D]."""
    cache = DynamicCache(config=model.config)
    for part in tqdm(ids.to(model.device).split(CHUNK, dim=1), desc="reading", leave=False, delay=1):
        model(input_ids=part, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
    vectors = {}
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            vectors[f"{i}.key"], vectors[f"{i}.value"] = layer.keys, layer.values
    return {name: x.transpose(0, 1).flatten(0, 2).float().cpu() for name, x in vectors.items()}
