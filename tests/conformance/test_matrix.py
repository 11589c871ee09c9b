"""The matrix of families and modes: each cell decodes correctly, or is refused with a reason."""

import os

import pytest

from ..marks import FULL
from .cells import CONFIGS, EQUAL, configs, run_cell
from .families import FAMILIES, KINDS
from .modes import MODES

#: The modes of every family with a second version of transformers. The first mode is quick for one family
#: of each kind.
BRIEF = ("greedy, left-padded", "beam")
#: The quick modes of Llama. Its other modes are slow.
QUICK = (
    "greedy",
    "greedy, left-padded",
    "chunked prefill, left-padded",
    "sampling",
    "beam",
    "prompt look-up",
    "two turns on one cache",
    "deepcopy",
)
#: "short" runs fewer cells, for a second version of transformers. "full" compiles the steps of every family,
#: as `python -m tests.conformance` does. By default only the steps of Llama are compiled.
FORM = os.environ.get("FADE_CONFORMANCE", "")


def cells() -> list:
    """All cells as parameters: family, mode, and the names of the configurations.

    Quick cells and cells of Llama use all configurations. The other cells use one, in turn, so that each
    family and each mode occurs with all. The first mode of `BRIEF` always includes "off", since it also
    compares padded rows with rows alone. With `FADE_GRID=full` or a `FORM`, all cells use all configurations.
    """
    cases = []
    for i, family in enumerate(FAMILIES.values()):
        available = ("off", *configs(family))
        for j, mode in enumerate(mode for mode in MODES.values() if mode.applies_to(family)):
            is_llama = family.name == "Llama"
            if mode.slow and not is_llama and FORM != "full":
                continue
            if FORM == "short" and (mode.slow or not is_llama and mode.name not in BRIEF):
                continue
            quick = is_llama and mode.name in QUICK or family.name in KINDS and mode.name == BRIEF[0]
            marks = [] if quick else [pytest.mark.slow]
            every = is_llama or quick or FULL or FORM
            names = CONFIGS if every else (available[(i + j) % len(available)],)
            if mode.name == BRIEF[0]:
                names = tuple(dict.fromkeys(("off", *names)))
            cases.append(pytest.param(family, mode, names, id=f"{family.name}-{mode.name}", marks=marks))
    return cases


@pytest.mark.parametrize("family, mode, names", cells())
def test_cell(family, mode, names):
    outcome = run_cell(family, mode, names)
    assert outcome.status == EQUAL or outcome.words
