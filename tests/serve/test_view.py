"""What is shown of a cache: right, without an effect on answers, and free when nobody looks."""

import collections
import dataclasses
import json
import re

import pytest

import fade_fast
from fade_fast.cache.select_store import SelectStore
from fade_fast.cli.command import main
from fade_fast.saved import chosen as chosen_pages
from fade_fast.saved import telemetry
from fade_fast.serve import report, view

from ..marks import slow_but
from ..models import EVICTING, SAFE, compressed_tokens, generate, new_cache, prompt, tiny_llama
from .engines import alone, ask, engine, tokens

H2O = fade_fast.FadeConfig(recent_window=16, block_size=8, int4_budget=24, eviction_policy="h2o")


@pytest.fixture(scope="module")
def model():
    return tiny_llama(heads=1, head_dim=32)


CONFIGS = dict(h2o=H2O, safe=SAFE, evicting=EVICTING)


@pytest.mark.parametrize("name", slow_but(CONFIGS, "h2o"))
def test_looking_changes_no_answer(model, name, monkeypatch):
    config = CONFIGS[name]
    monkeypatch.setattr(view, "FRAME", 0.0)
    monkeypatch.setattr(view, "MAP", 0.0)
    frames = []
    with engine(model, config) as running:
        running.view.subscribe(frames.append)
        answer = ask(running, tokens(70), new=40, ignore_eos=True).wait()
    assert answer.told == alone(model, tokens(70), new=40, config=config, ignore_eos=True)
    assert len(frames) >= 40 and frames[-1]["generated"] == 40
    json.dumps(frames)
    last = frames[-1]
    for layer in last["map"]["layers"]:
        held = sum(stop - start for ranges in layer["tiers"].values() for start, stop in ranges)
        assert held == last["length"] - last["tokens"]["EVICTED"]
        assert ("attention" in layer) == (config is H2O)
        if config is H2O:
            assert max(layer["attention"]) == 1.0 and min(layer["attention"]) == 0.0
    seen = {event["event"] for frame in frames for event in frame["events"]}
    assert "demotion" in seen and (config is SAFE or "eviction" in seen)


RECALL = fade_fast.FadeConfig(recent_window=16, block_size=16, select=16, select_page=8)
CHOOSING = dict(
    all_on_gpu=RECALL,
    host=dataclasses.replace(RECALL, cold="host", resident=24),
    share=dataclasses.replace(RECALL, select=0.5, select_max=24, cold="host", resident=24),
)


@pytest.mark.parametrize("name", slow_but(CHOOSING, "host"))
def test_a_frame_names_the_pages_that_were_chosen(name, monkeypatch):
    """After every token, against the choice itself."""
    monkeypatch.setattr(view, "FRAME", 0.0)
    monkeypatch.setattr(view, "MAP", 0.0)
    model, config, choose = tiny_llama(), CHOOSING[name], SelectStore.choose
    chosen, told = {}, []

    def watched(store, *args, **options):
        chosen[id(store)] = choose(store, *args, **options)
        return chosen[id(store)]

    monkeypatch.setattr(SelectStore, "choose", watched)
    with engine(model, config) as running:

        def look(frame):
            layers = running.view._cache.tiered
            truth = [(chosen.get(id(layer.middle)), layer.middle.counted.tolist()) for layer in layers]
            told.append((frame, truth))

        running.view.subscribe(look)
        answer = ask(running, tokens(90), new=40, ignore_eos=True).wait()
    assert answer.told == alone(model, tokens(90), new=40, config=config, ignore_eos=True)
    json.dumps([frame for frame, _ in told])
    decoded = [(frame, truth) for frame, truth in told if frame["generated"] > 0]
    assert len(decoded) == 40 and decoded[0][0]["reads"]["page"] == 8
    for (_, before), (frame, truth) in zip(decoded, decoded[1:]):
        assert frame["reads"]["length"] == frame["length"]
        for shown, (choice, counted), (_, old), about in zip(
            frame["reads"]["layers"], truth, before, frame["map"]["layers"], strict=True
        ):
            index, keep = (None if x is None else x[0, :, -1] for x in choice[:2])
            heads = [
                x.tolist() if keep is None else x[k].tolist()
                for x, k in zip(index, keep if keep is not None else index)
            ]
            expected = collections.Counter(page for head in heads for page in head)
            found = collections.Counter()
            for start, stop, n, fetched in shown["ranges"]:
                assert (start - 4) % 8 == 0 and (stop - start) % 8 == 0 and 0 <= fetched <= n <= 2
                found.update({(at - 4) // 8: n for at in range(start, stop, 8)})
            assert found == expected and max(found) < shown["held"]
            assert shown["read"] == expected.total() / 2 < shown["held"]
            compressed = [x for tier, x in about["tiers"].items() if tier != "FP16"]
            assert compressed == [[[4, 4 + 8 * shown["held"]]]]  # the map is right
            assert (shown["hits"], shown["misses"]) == (counted[2] - old[2], counted[3] - old[3])
            fetched = sum((stop - start) // 8 * far for start, stop, _, far in shown["ranges"])
            assert fetched == shown["misses"]
    hits, misses = (
        sum(x[name] for f, _ in decoded for x in f["reads"]["layers"]) for name in ("hits", "misses")
    )
    assert (hits > 0 and misses > 0) == (config.cold is not None)
    assert ("host" in decoded[-1][0]) and (decoded[-1][0]["host"] > 0) == (config.cold is not None)


def test_a_prompt_that_reads_everything_is_told_so(monkeypatch):
    monkeypatch.setattr(view, "FRAME", 0.0)
    monkeypatch.setattr(view, "MAP", 0.0)
    frames = []
    with engine(tiny_llama(), RECALL, chunk=32) as running:
        running.view.subscribe(frames.append)
        ask(running, tokens(100), new=2).wait()
    reads = [frame["reads"] for frame in frames if "reads" in frame]
    assert [layer["ranges"] is None for layer in reads[0]["layers"]] == [True, True]
    assert reads[0]["layers"][0]["read"] == reads[0]["layers"][0]["held"] > 0
    assert all(layer["ranges"] for layer in reads[-1]["layers"])
    with engine(tiny_llama(), SAFE) as running:
        running.view.subscribe(frames.append)
        ask(running, tokens(60), new=2).wait()
    assert "map" in frames[-1] and "reads" not in frames[-1]


def test_many_chosen_pages_are_joined(monkeypatch):
    model = tiny_llama()
    cache = new_cache(model, dataclasses.replace(RECALL, select=64, recent_window=8, block_size=8))
    with cache.listen(lambda event: None):
        generate(model, cache, prompt(300), new=2)
        layer = cache.tiered[0]
        whole = chosen_pages.of(layer)
        monkeypatch.setattr(chosen_pages, "MAX_RANGES", 3)
        few = chosen_pages.of(layer)
    assert len(whole["ranges"]) > 3 >= len(few["ranges"])
    assert {**whole, "ranges": 0} == {**few, "ranges": 0}
    covered = [
        any(a <= start and stop <= b and n <= m for a, b, m, _ in few["ranges"])
        for start, stop, n, _ in whole["ranges"]
    ]
    assert all(covered) and few["ranges"][-1][1] <= 4 + layer.middle.count


def test_nothing_is_computed_when_nobody_looks(model, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("it was computed")

    monkeypatch.setattr(view, "tier_map", forbidden)
    monkeypatch.setattr(view.View, "_frame", forbidden)
    monkeypatch.setattr(telemetry, "listen", forbidden)
    with engine(model) as running:
        number = running.view.subscribe(lambda frame: None)
        running.view.drop(number)
        assert ask(running, tokens(40)).wait().last.completion > 0
    monkeypatch.setattr(SelectStore, "_keep_newest", forbidden)
    monkeypatch.setattr(chosen_pages, "of", forbidden)
    with engine(model, RECALL) as running:
        assert ask(running, tokens(90), new=9).wait().last.completion > 0
        cache = running.prefixes.entries[0].cache
        assert compressed_tokens(cache) > 0 and not any(layer.middle.newest for layer in cache.tiered)


def test_a_picture_that_fails_fails_no_answer(model, monkeypatch):
    def broken(*args):
        raise RuntimeError("no picture")

    monkeypatch.setattr(view, "FRAME", 0.0)
    monkeypatch.setattr(view, "tier_map", broken)
    with engine(model) as running:
        running.view.subscribe(lambda frame: None)
        assert ask(running, tokens(40)).wait().last.completion > 0


def test_a_watcher_that_raises_is_dropped(model, monkeypatch):
    monkeypatch.setattr(view, "FRAME", 0.0)

    def gone(frame):
        raise OSError("closed")

    with engine(model) as running:
        running.view.subscribe(gone)
        assert ask(running, tokens(40)).wait().last.completion > 0
        assert not running.view.watched


def test_attention_received_is_that_of_the_policy():
    model = tiny_llama()
    cache = new_cache(model, H2O)
    generate(model, cache, prompt(60), new=20)
    layer = cache.tiered[0]
    found = view.attention_received(layer, 79)
    scores = {}
    for store, position in [(layer.dense, layer.dense_positions())] + [
        (tier.records, layer.middle.position(tier)) for tier in layer.held_tiers()
    ]:
        stats = store.narrow(0, store.count)
        score = stats["mass"].double() / stats["queries"].clamp_min(1)
        for at, x in zip(position[0, 0].tolist(), score[0].amax(0).tolist()):
            scores[at] = max(x, 0.0)
    assert len(found) == 79 and len(scores) < 79
    for at, share in enumerate(found):
        assert share == pytest.approx(scores.get(at, 0.0) / max(scores.values()), abs=6e-4)


def test_many_ranges_are_joined(monkeypatch):
    monkeypatch.setattr(view, "MAX_RANGES", 3)
    ranges = [[0, 1], [2, 3], [10, 11], [12, 13], [30, 31], [90, 95]]
    joined = view._joined(ranges)
    assert len(joined) <= 3 and joined == [[0, 13], [30, 31], [90, 95]]


# -- reports


def events_of(tmp_path, config, new=40):
    tmp_path.mkdir(exist_ok=True)
    path, model = tmp_path / "events.jsonl", tiny_llama()
    cache = new_cache(model, config)
    with cache.listen(path):
        generate(model, cache, prompt(60), new=new)
    return path, cache


@pytest.mark.parametrize("config", [SAFE, EVICTING], ids=["safe", "evicting"])
def test_a_report_shows_what_the_cache_held(tmp_path, config, capsys):
    path, cache = events_of(tmp_path, config)
    cache.memory()
    assert main(["report", str(path), "-o", str(tmp_path / "page.html"), "--title", "<b>a & b</b>"]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;a &amp; b" in page and "<b>" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page.replace("http-equiv", "")
    data = json.loads(re.search(r'id="report">(.*?)</script>', page, re.S)[1])
    held = {name: n for name, n in cache.memory().tokens.items() if n}
    last = data["points"][-1]
    shown = {name: n for name, n in last["tokens"].items() if n}
    assert {name: shown[name] for name in held if name != "FP16"} == {
        name: n for name, n in held.items() if name != "FP16"
    }
    for layer in data["map"]["layers"]:
        counts = {
            name: sum(stop - start for start, stop in ranges) for name, ranges in layer["tiers"].items()
        }
        assert {name: counts[name] for name in held if name not in ("FP16", "EVICTED")} == {
            name: n for name, n in held.items() if name not in ("FP16", "EVICTED")
        }
    assert data["bytes"][0][1] < data["bytes"][1][1]


@pytest.mark.parametrize("name", ["host", "all_on_gpu"])
def test_a_report_shows_what_the_newest_token_read(name, tmp_path):
    path, cache = events_of(tmp_path, CHOOSING[name])
    events = telemetry.read(path)
    data = report.contents(events)
    last = {event["layer"]: event for event in events if event["event"] == "selection"}
    assert data["reads"]["length"] == last[0]["seen"] <= cache.get_seq_length()
    for layer in data["reads"]["layers"]:
        event = last[layer["layer"]]
        assert layer["ranges"] == event["newest"] and layer["read"] == 2 < layer["held"] == event["pages"]
        assert layer["hits"] + layer["misses"] == (4 if name == "host" else 0)
        assert (event["hits"] + event["misses"] > 0) == (name == "host")
    assert any("queries" in event and event["tokens"] == 16 * event["queries"] for event in data["events"])
    before = [{k: x for k, x in event.items() if k not in ("newest", "page", "pages")} for event in events]
    assert report.contents(before)["reads"] is None  # a file of an earlier version
    path, _ = events_of(tmp_path / "safe", SAFE)
    assert report.contents(telemetry.read(path))["reads"] is None


def test_a_title_and_data_cannot_break_the_page():
    def event(**fields):
        base = dict(event="demotion", time=0.0, layer=0, seen=90, first=4, columns=64, tokens=64, rows=1)
        base |= dict(into="INT4", planned=False, bytes_before=100, bytes_after=30, seconds=0.1)
        return base | fields

    page = report.page_of([event(into="</script><script>alert(1)</script>@JS@")], "@DATA@ @JS@")
    assert page.count("<script") == 2 and "alert(1)</script" not in page
    assert page.count('"use strict"') == 1


def test_a_report_of_nothing_is_refused(tmp_path, capsys):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    assert main(["report", str(path)]) == 2
    assert "nothing to show" in capsys.readouterr().err
    path.write_text("no json\n")
    assert main(["report", str(path)]) == 2
