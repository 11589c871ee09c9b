"""`python -m tests.conformance`: run the matrix, and write the table that the docs show.

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

Written by `python -m tests.conformance --markdown docs/compatibility.md` with torch {torch} and
transformers {transformers}; the same cells are tests (`pytest tests/conformance`). Every model is tiny
and random. A cell is passed if

- without compression, its tokens equal those of `DynamicCache`;
- with compression (16 recent tokens, INT4), with and without eviction, its tokens, or logits where it
  yields those, equal those of a twin that stores the same codes and reads them back dense; and
- compressed tokens were attended.

✓ passed, T refused by transformers with its own cache too, R refused by `fade_fast` with a `ValueError`.
"""


def test(family: Family, mode: Mode) -> Outcome:
    """The outcome of a cell, `FAILS` with the words of the error included."""
    try:
        return run_cell(family, mode)
    except Exception as error:  # noqa: BLE001 - the table has to say so
        traceback.print_exc(limit=-3)
        return Outcome(FAILS, f"{type(error).__name__}: {error}")


def row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def eviction(family: Family) -> str:
    """What a table says of eviction in a family."""
    if family.refused:
        return "-"
    if not family.dispatches:
        return "refused: attention cannot be replaced"
    return f"own positions: {family.renumbers}" if family.renumbers else "renumbered"


def table(found: dict[tuple[str, str], Outcome]) -> list[str]:
    """Lines of Markdown."""
    everywhere = [mode for mode in MODES.values() if mode.everywhere]
    names = ["family", "tiered layers", "decode", "eviction", *(mode.name for mode in everywhere)]
    lines = ["## Families", "", row(names), row(["---"] * len(names))]
    for family in FAMILIES.values():
        signs = []
        for mode in everywhere:
            outcome = found.get((family.name, mode.name))
            signs.append(SIGNS[outcome.status] if outcome else "-")
        tiered = f"{len(family.tiered)} of {family.layers}"
        decode = "-" if family.refused else "packed" if family.dispatches else "dense"
        lines.append(row([family.name, tiered, decode, eviction(family), *signs]))
    lines += ["", "## Decoding modes, on Llama", "", row(["mode", ""]), row(["---", "---"])]
    for mode in MODES.values():
        outcome = found.get(("Llama", mode.name))
        if outcome:
            lines.append(row([mode.name, SIGNS[outcome.status]]))
    reasons, notes = {}, [(f.name, f.note) for f in FAMILIES.values() if f.note]
    for (family, mode), outcome in found.items():
        if outcome.words:
            kept = " ".join(outcome.words.split())
            reasons.setdefault((family, outcome.status, kept), []).append(mode)
    if reasons or notes:
        lines += ["", "## Reasons and remarks", ""]
        for (family, status, words), modes in reasons.items():
            where = "every mode" if FAMILIES[family].refused else ", ".join(modes)
            lines.append(f"- {family}, {where}: {status}: {words}")
        lines += [f"- {name}: {note}." for name, note in notes]
    return lines


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", type=Path, help="where to write the table; default: standard output")
    parser.add_argument("--family", default="", help="only families whose name contains this")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    started, found = time.monotonic(), {}
    for family in FAMILIES.values():
        if options.family not in family.name:
            continue
        for mode in MODES.values():
            if mode.applies_to(family):
                outcome = found[family.name, mode.name] = test(family, mode)
                print(f"{family.name}: {mode.name}: {outcome.status}", file=sys.stderr)
    head = HEAD.format(torch=torch.__version__.split("+")[0], transformers=transformers.__version__)
    text = "\n".join([head, *table(found), ""])
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    else:
        print(text)
    statuses = [outcome.status for outcome in found.values()]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in SIGNS)
    print(f"{counts}; {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 1 if FAILS in statuses else 0


if __name__ == "__main__":
    sys.exit(main())
