"""All cases by subject, and the registries that the cases must cover."""

import torch

from fade_ref import config, policies, rope
from fade_ref.tiers import Tier

from ..case import Case, Found
from . import attention, captured, checkpoints, codecs, life, plans, positions

MODULES = (codecs, attention, plans, positions, life, checkpoints, captured)


def registries() -> dict[str, list[str]]:
    """The names that need a case, as in `Case.covers`, for each registry that lists them."""
    return {
        "tiers": [f"tier {tier.name}" for tier in Tier],
        "codecs": [f"codec {name}" for name in config.CODECS],
        "policies": [f"policy {name}" for name in dict.fromkeys([*config.POLICIES, *policies.SCORES])],
        "RoPE schemes": [f"scheme {name}" for name in rope.SCHEMES],
        "positions": [f"positions {name}" for name in config.POSITIONS],
        "plan scopes": [f"plan scope {name}" for name in config.PLAN_SCOPES],
        "presets": [f"preset {name}" for name in config.PRESETS],
        "checkpoints": checkpoints.registry(),
    }


def collect(dtype: torch.dtype | None = None) -> list[Case]:
    """All cases. With `dtype`, the cases of this dtype and the cases without a dtype."""
    cases, broken = [], []
    for module in MODULES:
        try:
            cases += module.collect()
        except Exception as error:  # probably an entry of a registry without a case
            broken.append(_failing(module.__name__.rpartition(".")[2], error))
    covered = {name for case in cases for name in case.covers}
    registry = [
        Case("registry", "has cases", name, _lists(names, covered)) for name, names in registries().items()
    ]
    titles = [case.title for case in cases]
    assert len(titles) == len(set(titles)), "two cases of one name"
    return registry + broken + [case for case in cases if dtype in (None, case.dtype) or case.dtype is None]


def _lists(names: list[str], covered: set[str]):
    def run(found: Found, seed: int):
        for name in names:
            found.holds("registry", name in covered, f"{name} has no case")
        found.bits("registry", names)

    return run


def _failing(subject: str, error: Exception) -> Case:
    def run(found: Found, seed: int):
        raise error

    return Case("registry", "cases can be made", subject, run)
