"""What a cache weighs."""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fade_ref.tiers import Tier

from ..cache.layer import KVLayer
from .units import compared, size


@dataclass(frozen=True)
class Selected:
    """What short steps have read of the middle, where queries choose, over all layers and rows.

    Attributes:
        queries: queries that chose, once for each KV head.
        read: tokens of the middle that such a query read, mean.
        held: tokens of the middle that a row holds now, mean over layers. A query without a choice reads
            them.
        hits, misses: chosen pages that were on the GPU, and pages that were fetched from the host. Both are 0
            if everything is on the GPU.
    """

    queries: int
    read: float
    held: float
    hits: int
    misses: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a cache, and how many tokens it keeps in which tier.

    Attributes:
        allocated: every distinct storage the cache holds, spare capacity included. The ids seen, 4 bytes per
            token on the host, are left out, and so is `host`.
        packed: bytes that the live tokens need, means of keys included.
        dense: bytes that `DynamicCache` would hold for the same logical tokens.
        tokens: tokens by tier, "EVICTED" included, summed over the batch, of one tiered layer (the mean over
            layers where they differ).
        tables: the part of `allocated` that does not grow with the text: rotations and matrices.
            All caches of a model share them.
        host: bytes of the storages in host memory, with `cold="host"`.
        selected: what queries have read, where they choose; None if none has chosen.
    """

    allocated: int
    packed: int
    dense: int
    tokens: dict[str, float]
    tables: int = 0
    host: int = 0
    selected: Selected | None = None

    @property
    def forgotten(self) -> float:
        """Tokens that were dropped for good, over all rows (the mean over layers where they differ).

        Tokens that a sliding window has left behind are not counted: the model cannot see them.
        """
        return self.tokens.get(Tier.EVICTED.name, 0)

    @property
    def own(self) -> int:
        """What this cache alone allocates: `allocated` without `tables`."""
        return self.allocated - self.tables

    @property
    def ratio(self) -> float:
        """How many times smaller the cache is than an uncompressed one: dense / own."""
        return self.dense / self.own if self.own else 1.0

    def __str__(self) -> str:
        """Bytes with units, and the ratio in words.

        >>> print(Memory(allocated=2**20, packed=2**19, dense=3 * 2**20, tokens={"FP16": 68, "INT4": 900}))
        1.00 MiB allocated (512.0 KiB needed), 3.00 MiB if uncompressed: 3.00 times smaller; tokens: 68 FP16, 900 INT4
        """  # noqa: E501
        how = compared(self.dense, self.own) or "nothing held"
        text = f"{size(self.own)} allocated ({size(self.packed)} needed)"
        text += f", {size(self.host)} more in host memory" if self.host else ""
        text += f", {size(self.dense)} if uncompressed: {how}"
        if self.tables > self.own // 64:
            text += f"; {size(self.tables)} of tables that all caches of the model share"
        tokens = ", ".join(f"{count:g} {tier}" for tier, count in self.tokens.items())
        return text + (f"; tokens: {tokens}" if tokens else "")


def layer_sizes(layer: KVLayer) -> tuple[int, int, dict[str, int]]:
    """(packed bytes, dense bytes, tokens by tier) of a tiered layer."""
    if not layer.is_initialized:
        return 0, 0, {}
    keys = layer.dense["key"]
    batch, heads, vector = keys.shape[0], keys.shape[1], keys.shape[3] * keys.element_size()
    seen = int((layer.token_positions.logical >= 0).sum())
    tokens = {Tier.FP16.name: int((layer.dense_positions() >= 0).sum())}
    packed = tokens[Tier.FP16.name] * layer.dense.record_bytes
    if layer.middle is not None:
        for tier in layer.middle.tiers:
            tokens[tier.name] = int((layer.middle.position(tier) >= 0).sum())
            packed += tokens[tier.name] * tier.records.record_bytes
        means = layer.middle.means
        packed += means["mean"].nbytes if means.count else 0
        index = layer.middle.buffers().get("index")
        packed += index.count * index.record_bytes * keys.shape[0] if index else 0
        tokens[Tier.EVICTED.name] = seen - sum(tokens.values())
    return packed, batch * layer.length * heads * 2 * vector, tokens


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of every distinct storage behind some tensors."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def selected(layers: list[KVLayer]) -> Selected | None:
    """What queries have read of the middle of some layers. Waits for the device."""
    stores = [layer.middle for layer in layers if layer.has_middle and layer.config.select is not None]
    counted = torch.stack([x.counted.cpu() for x in stores]).sum(0).tolist() if stores else [0]
    if not counted[0]:
        return None
    rows = stores[0].tiers[0].records.tensors["key_codes"].shape[0]
    held = sum(int((x.position(x.tiers[0]) >= 0).sum()) for x in stores) / len(stores) / rows
    return Selected(counted[0], counted[1] / counted[0], held, *counted[2:])


def of(layers: list, others: list[Tensor]) -> Memory:
    """The record of a cache of `layers`: `KVLayer`, or others with `tensors()`; `others` it holds besides."""
    tiered = [layer for layer in layers if isinstance(layer, KVLayer)]
    in_host = [x for layer in tiered for x in layer.host_tensors()]
    pointers = {x.untyped_storage().data_ptr() for x in in_host}
    held = [x for layer in layers for x in layer.tensors()] + others
    held = [x for x in held if x.untyped_storage().data_ptr() not in pointers]
    rest = sum(x.nbytes for layer in layers if not isinstance(layer, KVLayer) for x in layer.tensors())
    sizes = [layer_sizes(layer) for layer in tiered]
    names = dict.fromkeys(tier for _, _, tokens in sizes for tier in tokens)
    tokens = {name: sum(counts.get(name, 0) for _, _, counts in sizes) / len(sizes) for name in names}
    return Memory(
        allocated=storage_bytes(held),
        packed=rest + sum(packed for packed, _, _ in sizes),
        dense=rest + sum(dense for _, dense, _ in sizes),
        tokens={name: int(x) if x == int(x) else x for name, x in tokens.items()},
        tables=storage_bytes([x for layer in tiered for x in layer.format.tensors()]),
        host=storage_bytes(in_host),
        selected=selected(tiered),
    )


class StorageMeter(TorchDispatchMode):
    """Bytes of the storages that operators made and that still exist: `now`, and `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.known:
                    self.known[storage._cdata] = size = storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
                    self.now += size
                    self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self.known.pop(key)
