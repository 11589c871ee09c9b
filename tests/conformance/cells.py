"""One cell of the matrix: a family decodes in a mode.

The results are compared with `DynamicCache`, and with a reference run on the same codes as dense tensors.
"""

import re
import warnings
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

import fade_fast
from fade_ref.config import FadeConfig

from .families import Family
from .modes import MODES, PADS, PROMPT, Mode, Run, padded
from .twins import read_dense

SMALL = dict(recent_window=16, block_size=8)
OFF = FadeConfig(recent_window=None)
SAFE = FadeConfig(**SMALL)
#: Keys alone at 8 bits in even layers; odd layers are not compressed.
BY_LAYER = FadeConfig(**SMALL, layer_bits=lambda layer, layers: (16, 16) if layer % 2 else (8, 16))
MATCHED = FadeConfig(**SMALL, quant_backend="matched")
#: Every token is kept, a query reads one page of the middle, and two pages are on the GPU.
CHOOSING = FadeConfig(**SMALL, select=8, cold="host", resident=16)
CONFIGS = ("off", "safe", "evicting", "choosing", "by layer", "matched")
EQUAL, THEIRS, OURS = "equal", "refused by transformers", "refused"

#: Cells that transformers refuses with its own DynamicCache: (family, mode), and the text of the error.
STATEFUL = "is not supported with stateful models"
REFUSED_BY_TRANSFORMERS = {
    ("Qwen3-Next", "prompt look-up"): STATEFUL,
    ("Qwen3.5", "prompt look-up"): STATEFUL,
}
#: Cells that fade_fast refuses, and the text of the error.
REFUSED_BY_US: dict[tuple[str, str], str] = {}


@dataclass(frozen=True)
class Outcome:
    """The outcome of a cell: `EQUAL`, `THEIRS` or `OURS`, and the message of a refusal."""

    status: str
    words: str = ""


def create(model, config: FadeConfig):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some models do not dispatch their attention
        return fade_fast.create_cache(model, config, verify=False)  # a separate test verifies every family


def configs(family: Family) -> dict[str, FadeConfig]:
    """The configurations with compression for a family."""
    served = {"safe": SAFE}
    if family.dispatches:
        positions = "original" if family.renumbers else None
        served["evicting"] = FadeConfig(**SMALL, int4_budget=8, positions=positions)
        served["choosing"] = CHOOSING
    if family.name == "Llama":
        served["by layer"], served["matched"] = BY_LAYER, MATCHED
    return served


def twin(family: Family, mode: Mode, config: FadeConfig) -> Tensor:
    """The output of a reference run, which decodes the same codes to dense keys and values.

    The attention of transformers reads the dense tensors if possible. With padding it cannot, since it does
    not know the positions of padding. Some models also drop the cache if fade_fast is not attached.
    """
    model = family.model()
    cache = create(model, config)
    if mode.padded or family.drops_cache or config.select:
        with read_dense():
            return mode.run(Run(model, lambda: cache, plain=True))
    fade_fast.detach(model)
    for layer in cache.layers:
        layer.shows_survivors = True
    return mode.run(Run(model, lambda: cache, plain=True))


def compressed(cache) -> float:
    return sum(n for name, n in cache.memory().tokens.items() if name not in ("FP16", "EVICTED"))


def check_equal(found: Tensor, expected: Tensor, what: str) -> None:
    """Check that tokens are equal, or that logits are equal within rounding. NaN is never equal."""
    assert found.shape == expected.shape, what
    if found.is_floating_point():
        near = 1e-7 * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=near, msg=lambda text: f"{what}: {text}")
    else:
        assert torch.equal(found, expected), f"{what}: {found.tolist()} is not {expected.tolist()}"


def run_cell(family: Family, mode: Mode, names: tuple[str, ...] = CONFIGS) -> Outcome:
    """Decode and compare. Raises `AssertionError` after a difference or an unexpected refusal.

    Args:
        family: the model.
        mode: the way to decode.
        names: the configurations to test, some of `CONFIGS`. A family may not support "evicting".
    """
    key = family.name, mode.name
    if family.refused:
        return _refusal(lambda: create(family.model(), SAFE), family.refused)
    model = family.model()
    reference = Run(model, lambda: DynamicCache(config=model.config), plain=True)
    if key in REFUSED_BY_TRANSFORMERS:
        try:
            mode.run(reference)
        except (ValueError, NotImplementedError) as error:
            assert re.search(REFUSED_BY_TRANSFORMERS[key], str(error)), error
            return Outcome(THEIRS, str(error))
        raise AssertionError(f"{key} is no longer refused by transformers")
    if key in REFUSED_BY_US:
        return _refusal(lambda: _ours(family, mode, SAFE), REFUSED_BY_US[key])
    if "off" in names:
        found, cache = _ours(family, mode, OFF)
        check_meaningful(found)
        check_equal(found, mode.run(reference), "compression off against DynamicCache")
        assert compressed(cache) == 0
        if mode is MODES["greedy, left-padded"]:
            check_rows_alone(family, found)
    for name, config in configs(family).items():
        if name not in names:
            continue
        found, cache = _ours(family, mode, config)
        check_meaningful(found)
        assert compressed(cache) > 0, "no compressed token was attended"
        assert cache.memory().tokens["EVICTED"] > 0 or not config.evicts
        if config.select:
            check_chosen(cache)
        check_equal(found, twin(family, mode, config), f"{name} against its dense twin")
    return Outcome(EQUAL)


def check_chosen(cache) -> None:
    """Check that queries read fewer tokens of the middle than there were: one page each."""
    for layer in cache.tiered:
        queries, read, *_ = layer.middle.counted.tolist()
        assert queries > 0 and 0 < read <= 8 * queries and layer.middle.count > 8, "every token was read"


def _ours(family: Family, mode: Mode, config: FadeConfig):
    """(output, cache) after decoding in a mode with a tiered cache."""
    model = family.model()
    run = Run(model, lambda: create(model, config), plain=not family.dispatches)
    return mode.run(run), run.cache


def check_meaningful(output: Tensor) -> None:
    """Check that a comparison with this output is meaningful."""
    assert output.isfinite().all() and output.unique().numel() > 2, "a cell that shows nothing"


def check_rows_alone(family: Family, together: Tensor) -> None:
    """Check that each left-padded row equals the same row alone in a DynamicCache without padding."""
    inputs = padded()
    for b, n in enumerate(PADS):
        model = family.model()
        alone = {name: x[b : b + 1, n:] for name, x in inputs.items()}
        if family.state_of_batch:
            continue
        row = Run(model, lambda model=model: DynamicCache(config=model.config)).generate(alone)
        check_equal(together[b : b + 1, PROMPT:], row[:, PROMPT - n :], f"row {b} alone")


def _refusal(call, words: str) -> Outcome:
    """The outcome of a call that must raise a `ValueError` with this message."""
    with nullcontext():
        try:
            call()
        except ValueError as error:
            assert re.search(words, str(error)), error
            return Outcome(OURS, str(error))
    raise AssertionError(f"not refused: {words}")
