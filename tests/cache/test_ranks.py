"""What processes of a tensor-parallel model tell each other, in a group of one process."""

import copy

import pytest
import torch
import torch.distributed as dist

from fade_fast.cache.ranks import Ranks

CPU = torch.device("cpu")


@pytest.fixture
def ranks(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield Ranks(dist.group.WORLD)
    dist.destroy_process_group()


def test_one_process_agrees_with_itself(ranks):
    x = torch.arange(12.0, dtype=torch.float64).view(2, 3, 2).mT  # not contiguous
    assert torch.equal(ranks.all_heads(x), x) and torch.equal(ranks.of_first(x, CPU), x)
    assert ranks.agree(True, CPU) and not ranks.agree(False, CPU)
    assert (ranks.rank, ranks.size) == (0, 1)


def test_only_nccl_can_be_captured(ranks, monkeypatch):
    assert not ranks.captures
    for config, captures in (
        ("cuda:nccl", True),
        ("cpu:gloo,cuda:nccl", True),
        ("cpu:gloo,cuda:gloo", False),
    ):
        monkeypatch.setattr(dist, "get_backend_config", lambda group, config=config: config)
        assert ranks.captures == captures


def test_a_copied_cache_has_the_same_processes(ranks):
    assert copy.deepcopy(dict(ranks=ranks))["ranks"] is ranks
