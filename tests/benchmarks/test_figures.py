"""benchmarks.figures: pages quote the stored numbers, and pictures are drawn of what is stored."""

import json
from dataclasses import asdict, replace

import pytest

from benchmarks import figures
from fade_fast.measure import free, memory, needles, pictures, quality, ruler
from fade_fast.measure import report as reports

REPORTS = figures.stored_reports()


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda p: p.name)
def test_pages_say_what_is_stored(page):
    text = page.read_text(encoding="utf-8")
    assert figures.BLOCK.search(text)
    assert figures.filled(text, page) == text, "python -m benchmarks.figures"


@pytest.mark.parametrize("name", REPORTS)
def test_stored_reports_are_honest(name):
    """Each says what it ran on, has a picture, and its compressed rows read compressed tokens."""
    report = REPORTS[name]
    assert {"model", "device", "dtype", "torch", "transformers"} <= set(report)
    assert (figures.FIGURES / f"{name}.png").is_file()
    if report["kind"] == "quality":
        results = [quality.Result(**r) for r in report["results"]]
        ran = [r for r in results if not r.failed]
        assert all(len(r.nll) == len(r.kl) == len(r.top1) == report["windows"] for r in ran)
        assert all(r.read > 0 for r in ran if r.does == "compresses")
        assert all(r.evicted > 0 for r in ran if r.does == "evicts")


#: Stored reports that have a table alone, by name.
TABLES = {
    path.stem: report
    for path in sorted(figures.RESULTS.glob("*.json"))
    if (report := json.loads(path.read_text(encoding="utf-8"))).get("kind") in figures.TABLES
}


@pytest.mark.parametrize("name", TABLES)
def test_stored_tables_are_honest(name):
    """Each says what it ran on, has a number for each window, prompt or example, and compressed rows read."""
    report = TABLES[name]
    assert {"model", "device", "torch", "transformers"} <= set(report)
    if report["kind"] == "choose":  # random keys, so no text
        ran = [r for r in report["rows"] if not r["failed"] and r["part"] != "prefill"]
        prompts = [r for r in report["rows"] if r["part"] == "prefill"]
        assert ran or {"dynamic"} < {r["method"] for r in prompts}
        assert all(0 < r["first_token_s"] for r in prompts) and all(0 < r["read"] <= r["held"] for r in ran)
        assert all((r["read"] < r["held"]) == ("select" in r["method"]) and r["captured"] for r in ran)
        return
    assert {"dtype", "text"} <= set(report)
    assert "/" not in report["text"] or ":" in report["text"]
    if report["kind"] == "simulation" and "suite" in report:
        assert all(len(r["nll"]) == len(r["kls"]) == report["windows"] for r in report["results"])
        assert all(r["read"] > 0 and r["kl"] > 0 and r["key_bytes"] > 0 for r in report["results"])
        for mask in {r["mask"] for r in report["results"]}:
            assert len({r["read"] for r in report["results"] if r["mask"] == mask}) == 1
    if report["kind"] == "free":
        _, results, answers = free.parsed(report)
        ran = [r for r in results if not r.failed]
        assert all(len(r.length) == len(r.kl) == len(r.gaps) == len(ran[0].length) for r in ran)
        assert all(r.read > 0 and max(r.kl) > 0 for r in ran if r.does == "compresses")
        exact = next(r for r in ran if r.method == "dynamic")
        assert set(exact.length) == set(exact.same) == {report["new"]}
        assert all(a.failed or a.trials == len(a.scores) for a in answers)
    if report["kind"] == "report":
        for part, rows in reports.parsed(report).items():
            ran = [r for r in rows if not r.failed]
            assert {r.method for r in ran} <= set(report["configs"]), part
            assert all(
                (r.read or getattr(r, "evicted", 0)) for r in ran if r.method not in ("dynamic", "off")
            )
    if report["kind"] == "ruler":
        ran = [r for r in ruler.parsed(report) if not r.failed]
        assert all(r.trials == len(r.scores) == ran[0].trials for r in ran)
        assert all((r.read > 0 or r.evicted > 0) == (r.method not in ("dynamic", "off")) for r in ran)


@pytest.mark.slow
def test_the_bytes_of_policies_are_those_of_today():
    assert figures.stored("policies-llama") == json.loads(json.dumps(figures.policy_bytes()))


def test_a_policy_that_holds_more_than_everything_is_marked():
    table = figures.policy_table(figures.stored("policies-llama"))
    marked = [line.split(" | ")[0] for line in table.splitlines() if "more than keeping everything" in line]
    assert marked == ["| `snapkv`"]


def test_configurations_have_the_names_of_presets():
    """A preset and its width are never two rows, and all pages call it by one name."""
    for name in ("quality-smollm2", "needles-smollm2", "memory-smollm2", "memory-h100"):
        names = {row["method"] for row in figures.load(name)["results"]}
        assert not names & {"int8", "int4"}, name
        assert {row["method"] for row in figures.stored(name)["results"]} & {"int8", "int4", "k4v4"}, name


def test_the_readme_says_what_is_found():
    """Its table of presets has the share of facts that needles-smollm2 found."""
    found = figures.recall("SmolLM2-135M-Instruct")
    lines = (figures.ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for name in ("lossless", "safe", "balanced", "aggressive"):
        line = next(x for x in lines if x.startswith(f"| `{name}` |"))
        assert line.endswith(f"| {found[name]:.2f} |"), name


DYNAMIC = quality.Result(
    "dynamic", "exact", nll=[3.0, 3.2], kl=[0.0, 0.0], top1=[1.0, 1.0], read=0, bytes=8000, dense=8000
)
INT4 = replace(DYNAMIC, method="int4", does="compresses", nll=[3.1, 3.2], kl=[0.01, 0.03], read=9, bytes=2000)
GONE = quality.Result("quanto4", "compresses", failed="quanto is not installed")
ABOUT = dict(model="m", device="CPU", dtype="fp32", torch="2", transformers="5")


def test_numbers_of_a_table():
    rows = quality.summaries([DYNAMIC, INT4, GONE])
    assert set(rows) == {"dynamic", "int4"}
    s = rows["int4"]
    assert s.ratio == pytest.approx(2.718281828**0.05) and s.kl == pytest.approx(0.02) and s.smaller == 4
    assert s.ratio_se == pytest.approx(s.ratio * 0.05) and s.kl_se == pytest.approx(0.01)
    lines = [
        "| | `int4` |",
        "|---|---|",
        "| allocated | 1/4.0 |",
        "| perplexity ratio | 1.051 |",
        "| mean KL | 0.0200 |",
    ]
    assert figures.short_table([DYNAMIC, INT4, GONE]).splitlines() == lines


def test_the_front():
    points = {"a": (1, 3), "b": (2, 2), "c": (3, 2.5), "d": (4, 1), "e": (4, 1.5)}
    assert pictures.front(points) == ["a", "b", "d"]
    assert quality.best_trades([DYNAMIC, INT4, GONE]).endswith("than: int4, dynamic.")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results, and its folder of pictures."""
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "FIGURES", tmp_path / "docs/figures")


def test_blocks(results, tmp_path):
    report = dict(ABOUT, kind="quality", text="t", windows=2, length=64, chunk=8)
    report["results"] = [asdict(r) for r in (DYNAMIC, INT4, GONE)]
    (tmp_path / "quality-x.json").write_text(json.dumps(report))
    page, stale = tmp_path / "docs/page.md", "a\n<!-- results quality-x short -->\nold\n<!-- end -->\nb\n"
    text = figures.filled(stale, page)
    assert text.startswith(
        "a\n<!-- results quality-x short -->\n![Quality against bytes](figures/quality-x.png)\n"
    )
    assert "old" not in text and text.endswith("<!-- end -->\nb\n") and "1.051" in text
    assert figures.filled(text, page) == text
    missing = "<!-- results needles-x -->\n<!-- end -->"
    assert "Not measured yet." in figures.filled(missing, page)


def test_blocks_of_tables(results, tmp_path):
    about = dict(ABOUT, text="t", seconds=1.0)
    tails = dict(
        format="kivi2", mask="last", ratio=1.2, kl=0.125, top1=0.8, nll=[3.0], kls=[0.125], read=70.0
    )
    tails |= dict(key_bytes=24.0, value_bytes=20.5, tables=0, source="")
    other = tails | dict(format="int2:quant_backend=matched", tables=3 * 2**20)
    report = about | dict(kind="simulation", suite="tails", windows=1, length=256, n_sink=4, recent_window=64)
    (tmp_path / "tails-x.json").write_text(json.dumps(report | dict(results=[tails, other])))
    found = figures.block("tails-x", tmp_path / "page.md")
    assert "| kivi2 | 24 + 20.5 | - | 1.2000 | 0.12500 | 0.1250 | 0.8000 |" in found
    assert "| 3.0 MiB |" in found and "1 window of 256" in found and "70 tokens quantized" in found
    written = free.Result("int2", "compresses", length=[5, 20], same=[3, 20], near=[0.9, 1.0], kl=[0.1, 0.3])
    report = about | dict(kind="free", prompt=64, new=20, margin=0.1, seed=0, answers=[])
    written = replace(written, read=30.0, gaps=[[[5, 0.4]], []])
    (tmp_path / "free-x.json").write_text(json.dumps(report | dict(results=[asdict(written)])))
    found = figures.block("free-x", tmp_path / "page.md")
    assert "| int2 | 12 ± 8 | 1 of 2 | 12 | 0.950 | 0.20000 | - | 30 |" in found
    assert "2 prompts of 64 tokens" in found and "near-ties within 0.1" in found
    answered = ruler.Result("vt", 1024, "int2", 2, 0.5, 0.0, [0.4, 0.6], 900.0, 0.0)
    report = about | dict(kind="ruler", chunk=512, most=None, results=[asdict(answered)])
    (tmp_path / "ruler-x.json").write_text(json.dumps(report))
    found = figures.block("ruler-x", tmp_path / "page.md")
    assert "| int2 | 0.50 | 0.50 | 900 |" in found and "1024 tokens, 2 examples a task" in found


def test_agreement_compares_the_same_windows(results, tmp_path):
    independent = dict(windows=1, results=[dict(format="int4", ratio=1.1, kl=0.012)])
    (tmp_path / "independent-x.json").write_text(json.dumps(independent))
    report = dict(windows=2, results=[asdict(r) for r in (DYNAMIC, INT4)])
    (tmp_path / "quality-x.json").write_text(json.dumps(report))
    simulated = [
        dict(format="int4", mask=mask, ratio=r, kl=0.01) for mask, r in (("last", 1.1), ("blocks", 1.09))
    ]
    (tmp_path / "simulation-x.json").write_text(json.dumps(dict(windows=1, results=simulated)))
    head, _, row = figures.agreement("x").splitlines()
    assert head.endswith("| cache, 1 window |") and head.count("|") == 6
    assert row == "| int4 | 1.1000, KL 0.0120 | 1.1000, KL 0.0100 | 1.0900, KL 0.0100 | 1.1052, KL 0.0100 |"


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    cells = [needles.Result("passkey", 512, d, m, 2, d / 100) for d in (5, 95) for m in ("dynamic", "int4")]
    sizes = [memory.Result(m, n, n * k) for n in (1024, 2048) for m, k in (("dynamic", 4), ("int4", 1))]
    for kind, results in (("quality", [DYNAMIC, INT4, GONE]), ("needles", cells), ("memory", sizes)):
        draw, file = figures.KINDS[kind][0], tmp_path / f"{kind}.png"
        draw(dict(ABOUT, kind=kind, results=[asdict(r) for r in results]), file)
        assert file.read_bytes().startswith(b"\x89PNG")
