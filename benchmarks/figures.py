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
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from fade_fast.hf import capacity
from fade_fast.measure import (
    choose,
    decode_attention,
    free,
    generate,
    memory,
    methods,
    needles,
    pictures,
    quality,
    ruler,
)
from fade_fast.measure import (
    report as reports,
)
from fade_ref.config import FadeConfig

from . import simulation

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURES = ROOT / "benchmarks/results", ROOT / "docs/figures"
PAGES = (ROOT / "README.md", ROOT / "docs/guide.md", ROOT / "docs/quality.md", ROOT / "docs/speed.md")
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
    "report": reports.show,
    "choose": choose.shown,
}

# -- text

#: Columns of the short table: what ran of these.
SHORT = (
    "lossless",
    "int8",
    "safe",
    "int4",
    "k4v4",
    "int3",
    "int3:quant_backend=matched",
    "k4v2:quant_backend=matched",
    "int2",
    "int2:quant_backend=matched",
    "quanto4",
    "hqq4",
    "balanced",
    "streaming",
    "position",
    "h2o",
    "learned",
)


#: What configurations are called in pages, by model. `safe` has 4 bits in every layer of these models.
NAMES = {"SmolLM2-135M-Instruct": {"int8": "lossless", "int4": "safe"}}


def stored(name: str) -> dict:
    """The stored report called `name`, as it was written."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def load(name: str) -> dict:
    """The same, with the names of `NAMES`. Formats keep theirs."""
    report = stored(name)
    names = NAMES.get(report.get("model"), {})
    for row in report.get("results", []) + report.get("answers", []) if names else ():
        if "method" in row:
            base, *changes = row["method"].split(":")
            row["method"] = ":".join([names.get(base, base), *changes])
    return report


def recall(model: str) -> dict[str, float] | None:
    """Share of the passkeys in 1024 tokens that each method finds, over all depths; None: not measured."""
    for path in sorted(RESULTS.glob("needles-*.json")):
        if (found := load(path.stem))["model"] == model:
            rows = [r for r in found["results"] if (r["task"], r["length"]) == ("passkey", 1024)]
            return {
                name: statistics.mean(r["exact"] for r in rows if r["method"] == name and not r["failed"])
                for name in dict.fromkeys(r["method"] for r in rows if not r["failed"])
            }
    return None


def short_table(results: list[quality.Result], recall: dict[str, float] | None = None) -> str:
    """Rows of numbers, with a column for each config of `SHORT` that ran."""
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
    if recall is not None:
        found = (quality.share(recall, name) for name in rows)
        lines.append("| facts found | " + " | ".join(found) + " |")
    return "\n".join(lines)


def agreement(of: str) -> str:
    """Table: the loss of formats on a model `of`, by an independent simulation, by ours, and through the
    cache.
    """
    kinds = [kind for kind in ("independent", "simulation", "quality") if has(kind, of)]
    sources = {kind: stored(f"{kind}-{of}") for kind in kinds}
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
    cases = generate.SHORT, generate.WIDE
    methods = [m for m in generate.METHODS if any(r.method == m and r.case == cases[-1] for r in results)]
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


#: Lengths, and the budget of every policy, of the table of policies.
POLICY_LENGTHS, POLICY_BUDGET = (3000, 8192, 32768), 2048


def policy_bytes() -> dict:
    """What caches of each policy hold on a GPU, made with `max_length`, for the shape of Llama-3.1-8B."""
    model = capacity.Architecture(
        "Llama-3.1-8B", (capacity.LayerShape(8, 128, True),) * 32, torch.bfloat16, 0, True, None
    )
    configs = {"every token at 4 bits": FadeConfig()}  # the codec of all policies
    configs |= {p: FadeConfig(int4_budget=POLICY_BUDGET, eviction_policy=p) for p in methods.POLICIES}
    rows = {name: [capacity.size(model, c, n).device for n in POLICY_LENGTHS] for name, c in configs.items()}
    rows = {"uncompressed": [capacity.uncompressed(model, n) for n in POLICY_LENGTHS]} | rows
    return dict(kind="policies", model=model.name, budget=POLICY_BUDGET, lengths=POLICY_LENGTHS, bytes=rows)


def policy_table(report: dict) -> str:
    """MiB of each policy by length. One that forgets and yet holds more than all tokens take is marked."""
    everything = report["bytes"]["every token at 4 bits"]
    head = ["cache", *(f"{n:,} tokens" for n in report["lengths"])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in report["bytes"].items():
        forgets = name in methods.POLICIES
        cells = [
            f"{n / 2**20:,.1f}" + (", **more than keeping everything**" if forgets and n >= whole else "")
            for n, whole in zip(row, everything)
        ]
        lines.append(f"| {f'`{name}`' if forgets else name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    if report["kind"] == "policies":
        return policy_table(report)
    if report["kind"] in TABLES:
        return TABLES[report["kind"]](report)
    _, title, module = KINDS[report["kind"]]
    picture = os.path.relpath(FIGURES / f"{name}.png", page.parent).replace(os.sep, "/")
    results = [module.Result(**r) for r in report["results"]]
    if report["kind"] == "quality":
        told = quality.headline(report).split(", in chunks")[0] if short else quality.headline(report)
    else:
        told = "{model}, {dtype}, {device}, torch {torch}, transformers {transformers}".format(**report)
    known = recall(report["model"]) if module in (quality, memory) else None
    known = known if any(r.method in (known or ()) for r in results if r.method != "dynamic") else None
    if module is needles:
        table = needles.table(results)
    else:
        table = short_table(results, known) if short else module.table(results, known)
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
    (RESULTS / "policies-llama.json").write_text(json.dumps(policy_bytes()) + "\n", encoding="utf-8")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(filled(text, page), encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {len(BLOCK.findall(text))} blocks")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
