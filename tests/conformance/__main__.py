"""`python -m tests.conformance`: run the matrix, and write the page docs/compatibility.md.

python -m tests.conformance --markdown docs/compatibility.md
"""

import argparse
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers

from .cells import EQUAL, OURS, THEIRS, Outcome, run_cell
from .families import FAMILIES, Family
from .modes import MODES, Mode

FAILS = "fails"
SIGNS = {EQUAL: "✓", THEIRS: "T", OURS: "R", FAILS: "✗"}

HEAD = """# Compatibility

`python -m tests.conformance --markdown docs/compatibility.md` writes this page, here with torch {torch} and
transformers {transformers}. Each cell is also a test (`pytest tests/conformance`). Every model is tiny and random.
A cell passes if three conditions hold:

- Without compression, the tokens equal the tokens of `DynamicCache`.
- With compression (16 recent tokens, INT4), the tokens equal the tokens of a reference run. The reference run
  stores the same codes and decodes them to dense keys and values. This holds with and without eviction, and
  where a query reads some pages only: the reference run then reads the pages that `fade_ref.select` chooses.
  If a mode returns logits, the logits are compared instead of the tokens.
- The queries attended to compressed tokens.

✓ means passed. T means that transformers refuses the mode with its own cache too. R means that `fade_fast`
refuses it with a `ValueError`.
"""  # noqa: E501


def test(family: Family, mode: Mode) -> Outcome:
    """The outcome of a cell. After an error it is `FAILS` with the error message."""
    try:
        return run_cell(family, mode)
    except Exception as error:  # noqa: BLE001 - the table must show it
        traceback.print_exc(limit=-3)
        return Outcome(FAILS, f"{type(error).__name__}: {error}")


def row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def eviction(family: Family) -> str:
    """The text of the column "eviction" for a family."""
    if family.refused:
        return "-"
    if not family.dispatches:
        return "refused: attention cannot be replaced"
    return f"own positions: {family.renumbers}" if family.renumbers else "renumbered"


def table(outcomes: dict[tuple[str, str], Outcome]) -> list[str]:
    """The tables as lines of Markdown."""
    everywhere = [mode for mode in MODES.values() if mode.everywhere]
    names = ["family", "tiered layers", "decode", "eviction", *(mode.name for mode in everywhere)]
    lines = ["## Families", "", row(names), row(["---"] * len(names))]
    for family in FAMILIES.values():
        signs = []
        for mode in everywhere:
            outcome = outcomes.get((family.name, mode.name))
            signs.append(SIGNS[outcome.status] if outcome else "-")
        tiered = f"{len(family.tiered)} of {family.layers}"
        decode = "-" if family.refused else "packed" if family.dispatches else "dense"
        lines.append(row([family.name, tiered, decode, eviction(family), *signs]))
    lines += ["", "## Decoding modes, on Llama", "", row(["mode", ""]), row(["---", "---"])]
    for mode in MODES.values():
        outcome = outcomes.get(("Llama", mode.name))
        if outcome:
            lines.append(row([mode.name, SIGNS[outcome.status]]))
    reasons, notes = {}, [(f.name, f.note) for f in FAMILIES.values() if f.note]
    for (family, mode), outcome in outcomes.items():
        if outcome.words:
            message = " ".join(outcome.words.split())
            reasons.setdefault((family, outcome.status, message), []).append(mode)
    if reasons or notes:
        lines += ["", "## Reasons and remarks", ""]
        for (family, status, words), modes in reasons.items():
            where = "every mode" if FAMILIES[family].refused else ", ".join(modes)
            lines.append(f"- {family}, {where}: {status}: {words}")
        lines += [f"- {name}: {note}." for name, note in notes]
    return lines


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", type=Path, help="file for the page. The default is standard output.")
    parser.add_argument("--family", default="", help="run only families whose name contains this text")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    started, outcomes = time.monotonic(), {}
    for family in FAMILIES.values():
        if options.family not in family.name:
            continue
        for mode in MODES.values():
            if mode.applies_to(family):
                outcome = outcomes[family.name, mode.name] = test(family, mode)
                print(f"{family.name}: {mode.name}: {outcome.status}", file=sys.stderr)
    head = HEAD.format(torch=torch.__version__.split("+")[0], transformers=transformers.__version__)
    text = "\n".join([head, *table(outcomes), ""])
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    else:
        print(text)
    statuses = [outcome.status for outcome in outcomes.values()]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in SIGNS)
    print(f"{counts}; {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 1 if FAILS in statuses else 0


if __name__ == "__main__":
    sys.exit(main())
