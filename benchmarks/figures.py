"""Pictures and tables of stored results: `python -m benchmarks.figures`.

Runs of benchmarks write JSON files to benchmarks/results. Those of `KINDS` become a picture of the same name
in docs/figures. Those of `TABLES` have only a table. README.md, docs/quality.md and docs/speed.md have blocks
between `<!-- results NAME -->` (or `<!-- results NAME short -->`) and `<!-- end -->`. Each block is written
again with picture, circumstances and table, so no number there is typed. Needs the extra `docs` (matplotlib).
"""

import argparse
import json
import os
import re
from dataclasses import replace
from pathlib import Path

from fade_fast.measure import decode_attention, free, generate, memory, needles, pictures, quality, ruler

from . import simulation

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURES = ROOT / "benchmarks/results", ROOT / "docs/figures"
PAGES = (ROOT / "README.md", ROOT / "docs/quality.md", ROOT / "docs/speed.md")
BLOCK = re.compile(r"<!-- results (?P<name>[\w.-]+)(?P<short> short)? -->.*?<!-- end -->", re.DOTALL)

# -- pictures


def _pareto(report: dict, path: Path) -> None:
    pictures.pareto(quality.summaries([quality.Result(**r) for r in report["results"]]), path)


def _heat_map(report: dict, path: Path) -> None:
    pictures.heat_map([needles.Result(**r) for r in report["results"]], path)


def _memory_curves(report: dict, path: Path) -> None:
    pictures.memory_curves([memory.Result(**r) for r in report["results"]], path)


#: kind of a report -> how it is drawn, the picture's title, and its table
KINDS = {
    "quality": (_pareto, "Quality against bytes", quality),
    "needles": (_heat_map, "Facts asked for again", needles),
    "memory": (_memory_curves, "Bytes against length", memory),
}

#: kind of a report -> its circumstances and table
TABLES = {
    "free": free.show,
    "ruler": lambda report: f"{ruler.headline(report)}.\n\n{ruler.table(ruler.parsed(report))}",
    "simulation": simulation.shown,
}

# -- text

#: Columns of the short table: what ran of these.
SHORT = (
    "int8",
    "int4",
    "int3",
    "k4v2",
    "int2",
    "quanto4",
    "balanced",
    "streaming",
    "position",
    "h2o",
    "learned",
)


def load(name: str) -> dict:
    """The stored report called `name`."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def short_table(results: list[quality.Result]) -> str:
    """Three rows of numbers, with a column for each config of `SHORT` that ran."""
    rows = quality.summaries(results)
    rows = {name: rows[name] for name in SHORT if name in rows}
    numbers = {
        "allocated": lambda s: "-" if s.smaller is None else f"1/{s.smaller:.1f}",
        "perplexity ratio": lambda s: f"{s.ratio:.3f}",
        "mean KL": lambda s: f"{s.kl:.4f}",
    }
    lines = ["| | " + " | ".join(f"`{name}`" for name in rows) + " |", "|---" * (1 + len(rows)) + "|"]
    for label, number in numbers.items():
        lines.append(f"| {label} | " + " | ".join(map(number, rows.values())) + " |")
    return "\n".join(lines)


def agreement(of: str) -> str:
    """Table: the loss of formats on a model `of`, by an independent simulation, by ours, and through the
    cache.
    """
    kinds = [kind for kind in ("independent", "simulation", "quality") if has(kind, of)]
    sources = {kind: load(f"{kind}-{of}") for kind in kinds}
    theirs = sources["independent"]
    columns = {f"independent, {theirs['windows']} windows": {r["format"]: r for r in theirs["results"]}}
    if found := sources.get("simulation"):
        for mask, label in (("last", "simulated, last 64 exact"), ("blocks", "simulated, as the cache")):
            rows = {r["format"]: r for r in found["results"] if r["mask"] == mask}
            columns[f"{label}, {found['windows']} window{'s' * (found['windows'] > 1)}"] = rows
    if found := sources.get("quality"):
        n = min(found["windows"], theirs["windows"])  # the same windows, as far as there are
        results = [quality.Result(**r) for r in found["results"]]
        results = [replace(r, nll=r.nll[:n], kl=r.kl[:n], top1=r.top1[:n]) for r in results]
        rows = {name: dict(ratio=s.ratio, kl=s.kl) for name, s in quality.summaries(results).items()}
        columns[f"cache, {n} window{'s' * (n > 1)}"] = rows
    lines = ["| format | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for r in theirs["results"]:
        found = (rows.get(r["format"]) for rows in columns.values())
        cells = ["-" if x is None else f"{x['ratio']:.4f}, KL {x['kl']:.4f}" for x in found]
        lines.append(f"| {r['format']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def generation(of: str, short: bool) -> str:
    """Table of `benchmarks.generate` on a device `of`. The short one has only milliseconds per step."""
    report = load(f"generate-{of}")
    results = [generate.Result(**r) for r in report["results"] if not r["failed"]]
    told = f"{report['device']}, torch {report['torch']}, transformers {report['transformers']}."
    if not short:
        return f"{told}\n\n{generate.tables(results)}"
    cases = generate.LONG, generate.WIDE
    methods = [m for m in generate.METHODS if any(r.method == m and r.case in cases for r in results)]
    head = [f"ms a step, {report['device']}", *(f"`{m}`" for m in methods)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for case in cases:
        found = {r.method: f"{r.ms:.1f}" for r in results if r.case == case}
        lines.append(f"| {case} | " + " | ".join(found.get(m, "-") for m in methods) + " |")
    return "\n".join(lines)


def attention(of: str) -> str:
    """Table of `benchmarks.decode_attention` on a device `of`, and its other measurements."""
    report = load(f"decode_attention-{of}")
    results = [decode_attention.Result(**r) for r in report["results"]]
    told = [f"{report['device']}, torch {report['torch']}.", decode_attention.table(results)]
    others = [name for name in ("lengths", "encode", "processes") if name in report]
    return "\n\n".join(told + [decode_attention.describe(name, report[name]) for name in others])


def has(kind: str, of: str) -> bool:
    return (RESULTS / f"{kind}-{of}.json").is_file()


def block(name: str, page: Path, short: bool = False) -> str:
    """The text between the marks of `name` in a page. `name` is a report, or agreement-MODEL."""
    kind, _, of = name.partition("-")
    if kind == "agreement":
        return agreement(of)
    if not has(kind, of):
        return "Not measured yet."
    if kind in ("generate", "decode_attention"):
        return generation(of, short) if kind == "generate" else attention(of)
    report = load(name)
    if report["kind"] in TABLES:
        return TABLES[report["kind"]](report)
    _, title, module = KINDS[report["kind"]]
    picture = os.path.relpath(FIGURES / f"{name}.png", page.parent).replace(os.sep, "/")
    results = [module.Result(**r) for r in report["results"]]
    if report["kind"] == "quality":
        told = quality.headline(report).split(", in chunks")[0] if short else quality.headline(report)
    else:
        told = "{model}, {dtype}, {device}, torch {torch}, transformers {transformers}".format(**report)
    table = short_table(results) if short else module.table(results)
    gap = "" if short else "\n"  # the README has few lines
    if report["kind"] == "quality" and not short:
        table += "\n\n" + quality.best_trades(results)
    return f"![{title}]({picture})\n{gap}{told}.\n\n{table}"


def filled(text: str, page: Path) -> str:
    """A page with all blocks filled from the stored numbers."""

    def replaced(found: re.Match) -> str:
        short = found["short"] or ""
        told = block(found["name"], page, bool(short))
        return f"<!-- results {found['name']}{short} -->\n{told}\n<!-- end -->"

    return BLOCK.sub(replaced, text)


def stored_reports() -> dict[str, dict]:
    """Every stored report that this module draws, by name."""
    found = {path.stem: load(path.stem) for path in sorted(RESULTS.glob("*.json"))}
    return {name: report for name, report in found.items() if report.get("kind") in KINDS}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help="write text only")
    args = parser.parse_args(argv)
    for name, report in stored_reports().items() if args.pictures else ():
        draw, _, _ = KINDS[report["kind"]]
        draw(report, FIGURES / f"{name}.png")
        print(f"docs/figures/{name}.png")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(filled(text, page), encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {len(BLOCK.findall(text))} blocks")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
