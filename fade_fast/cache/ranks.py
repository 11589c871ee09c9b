"""The processes between which the KV heads of a model are split (tensor parallelism).

Each process has a cache of its own heads. Most of a cache needs nothing of the other processes. `Ranks` is
for what all of them must decide in the same way.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes of one model. All of them must call a method, in the same order.

    Args:
        group: their process group, `torch.distributed.ProcessGroup`.
    """

    def __init__(self, group):
        self.group = group

    def __deepcopy__(self, memo: dict) -> "Ranks":
        return self  # a process group cannot be copied

    @property
    def size(self) -> int:
        """Number of processes."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Number of this process."""
        return dist.get_rank(self.group)

    @property
    def captures(self) -> bool:
        """Whether a CUDA graph can contain what these processes tell each other within a step."""
        return "cuda:nccl" in dist.get_backend_config(self.group)  # a group may have a backend by device

    def all_heads(self, x: Tensor) -> Tensor:
        """`x` [B, H of this process, n] of every process, one after another: [B, H of all, n].

        All processes get the same bits, so what they compute from the result is the same.
        """
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)

    def agree(self, yes: bool, device: torch.device) -> bool:
        """Whether every process says yes. The host waits for `device`, which is the one of the model."""
        votes = torch.tensor([int(yes)], device=device)
        dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=self.group)
        return bool(votes.item())

    def of_first(self, x: Tensor, device: torch.device) -> Tensor:
        """`x` of the first process, of the same shape and dtype in all of them. `device` is as in `agree`."""
        told = x.to(device, copy=True)
        dist.broadcast(told, group=self.group, group_src=0)
        return told.to(x.device)
