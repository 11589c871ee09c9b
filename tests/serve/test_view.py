"""What is shown of a cache: right, without an effect on answers, and free when nobody looks."""

import json
import re

import pytest

import fade_fast
from fade_fast.cli.command import main
from fade_fast.saved import telemetry
from fade_fast.serve import report, view

from ..marks import slow_but
from ..models import CODED, EVICTING, SAFE, generate, new_cache, prompt, tiny_llama
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
    path, model = tmp_path / "events.jsonl", tiny_llama()
    cache = new_cache(model, config)
    with cache.listen(path):
        generate(model, cache, prompt(60), new=new)
    return path, cache


@pytest.mark.parametrize("config", [SAFE, EVICTING, CODED], ids=["safe", "evicting", "product"])
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
