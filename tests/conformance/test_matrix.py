"""Family times mode: each decodes as it should, or is refused with a reason."""

import os

import pytest

from .cells import EQUAL, run_cell
from .families import FAMILIES, KINDS
from .modes import MODES

#: Of all families with a second version of transformers; the first, of a family of each kind, is quick.
BRIEF = ("greedy, left-padded", "beam")
#: "short" for a second version of transformers; "full" compiles steps of every family, not of Llama alone,
#: as `python -m tests.conformance` does.
FORM = os.environ.get("FADE_CONFORMANCE", "")


def cells() -> list:
    """All cells as parameters."""
    found = []
    for family in FAMILIES.values():
        for mode in MODES.values():
            whole = family.name == "Llama"
            if not mode.applies_to(family):
                continue
            if mode.slow and not whole and FORM != "full":
                continue
            if FORM == "short" and (mode.slow or not whole and mode.name not in BRIEF):
                continue
            quick = whole and not mode.slow or family.name in KINDS and mode.name == BRIEF[0]
            marks = [] if quick else [pytest.mark.slow]
            found.append(pytest.param(family, mode, id=f"{family.name}-{mode.name}", marks=marks))
    return found


@pytest.mark.parametrize("family, mode", cells())
def test_cell(family, mode):
    outcome = run_cell(family, mode)
    assert outcome.status == EQUAL or outcome.words
