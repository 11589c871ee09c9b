"""Tensors in host memory that kernels of the GPU read and write, and buffers with some of their fields there.

On CUDA, the memory is pinned, and a CUDA tensor is an alias of it: any kernel, a captured one too, reads it
over PCIe, and no host waits. On a CPU, host memory is the memory there is, and the same code runs.
"""

import copy
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from ..formats.base import Field
from .buffers import Buffers


class HostMemoryError(RuntimeError):
    """Host memory cannot be had, or cannot be pinned."""


class _Interface:
    """Bytes of pinned memory as CUDA sees them. A tensor made of it keeps it, and so the memory, alive.

    PyTorch gives pinned memory that nobody holds to its next user at once, and that user may write to it
    while a kernel that was launched earlier still reads it. PyTorch does not know of such kernels, because
    they read the alias. So the memory is held until the device has finished.
    """

    def __init__(self, host: Tensor, device: torch.device):
        self.host, self.device = host, device
        self.__cuda_array_interface__ = dict(
            shape=tuple(host.shape), typestr="|u1", data=(host.data_ptr(), False), strides=None, version=3
        )

    def __del__(self):
        if not sys.is_finalizing():
            _release(self.host, self.device)


#: Memory that was dropped while a graph was captured, when nothing may wait.
_dropped: list[Tensor] = []


def _release(host: Tensor, device: torch.device) -> None:
    """Let go of pinned memory when `device` does not use it any more."""
    if torch.cuda.is_current_stream_capturing():
        _dropped.append(host)
        return
    torch.cuda.current_stream(device).synchronize()
    _dropped.clear()


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device) -> Tensor:
    """A tensor of zeros in host memory, which kernels on `device` can use.

    Raises `HostMemoryError` if the memory cannot be had.
    """
    device, size = torch.device(device), torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cuda" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True).zero_()
        alias = torch.as_tensor(_Interface(host, device), device=device)
    except (RuntimeError, MemoryError) as error:
        raise HostMemoryError(
            f"cold='host': {size} bytes of host memory cannot be pinned ({error}). No token is lost. Free "
            "host memory, raise the limit of locked memory (ulimit -l), use a smaller batch, or cold=None"
        ) from error
    if alias.data_ptr() != host.data_ptr():
        raise HostMemoryError(
            "cold='host': this version of torch copies pinned memory instead of sharing it: use cold=None"
        )
    return alias.view(dtype).view(shape)


class HostBuffers(Buffers):
    """Buffers whose fields `cold` lie in host memory; see `Buffers` for the other arguments.

    What is written to a field goes there at once, so that dropping a copy of it elsewhere costs nothing.
    """

    def __init__(self, fields: dict[str, Field], cold: tuple[str, ...], step: int, batch: int, device):
        self.cold = cold
        super().__init__(fields, step, batch, device)

    def _empty(self, name: str, batch: int, slots: int, device) -> Tensor:
        field = self.fields[name]
        if name not in self.cold:
            return super()._empty(name, batch, slots, device)
        return zeros(field.shape_of(batch, slots), field.dtype, device)

    def _home(self, x: Tensor) -> Tensor:
        """A copy of `x` in host memory."""
        home = zeros(tuple(x.shape), x.dtype, x.device)
        return home.copy_(x)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by `function` of it. New tensors on a GPU go back to host memory."""
        held = self.tensors
        super().map(function)
        for name in self.cold:
            if self.tensors[name] is not held[name] and self.tensors[name].is_cuda:
                self.tensors[name] = self._home(self.tensors[name])

    def __deepcopy__(self, memo: dict) -> "HostBuffers":
        memo[id(self)] = twin = type(self).__new__(type(self))
        for name in self.cold:  # copied by way of host memory, never of the GPU's
            memo[id(self.tensors[name])] = self._home(self.tensors[name])
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin
