"""Subcommands of `fade`: sessions that go on in another process, pictures, what is passed on."""

import argparse
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import fade_fast
from fade_fast.cli import calibrate, command, options, plots, serve, session
from fade_fast.cli.command import main
from fade_fast.hf import calibration, capacity, loading
from fade_fast.measure import texts
from fade_fast.measure.parsers import paged_attention
from fade_fast.saved import checkpoint, snapshot, telemetry
from fade_fast.serve import engine
from fade_fast.vllm import pages
from fade_ref.config import FadeConfig
from parity import __main__ as parity
from parity import twins

from ..models import compressed_tokens, generate, prompt, tiny_llama
from .test_demo import loud_again, no_hub, offline, one_line, refused, tiny  # noqa: F401

CONFIG = "recent_window=16,block_size=8"


PASSED = ("parity", "bench", "quality", "memory", "needles", "ruler")


@pytest.mark.parametrize("command", [(), *((name,) for name in (*command.COMMANDS, *PASSED))], ids=str)
def test_help_fits_a_screen(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    said = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0 and 5 < len(said) <= 45
    assert said[0].startswith(" ".join(["usage: fade", *command])) and max(map(len, said)) <= 100


@pytest.mark.parametrize("name", command.COMMANDS)
def test_the_help_of_all_commands_is_that_of_each(name):
    """`fade --help` imports no command, so it has a copy of the first line of each module."""
    assert command.COMMANDS[name][1] == command.module_of(name).__doc__.partition("\n")[0]


def test_what_options_copy_to_spare_an_import():
    """The options are parsed without torch. What their choices and defaults repeat is still the same."""
    assert serve.REUSE == engine.REUSE and calibrate.TOKENS == calibration.TOKENS
    assert paged_attention.PREFERRED == pages.PREFERRED and parity.COMPILED == tuple(twins.CHOICES)
    with pytest.raises(RuntimeError) as said:
        torch.device("abacus")
    known = str(said.value).removeprefix("Expected one of ").partition(" device type")[0]
    assert {"cpu", "cuda"} <= set(known.split(", ")) == set(fade_fast.arguments.DEVICES)
    for name in ("cuda:01", "cuda:", "cuda:-1", "Cuda", "", "cpu "):
        with pytest.raises(RuntimeError):
            torch.device(name)
        with pytest.raises(argparse.ArgumentTypeError, match="is not the name of a device"):
            fade_fast.arguments.device(name)
    assert [fade_fast.arguments.device(name) for name in ("cpu", "cuda:0", "cuda:12")] == [
        "cpu",
        "cuda:0",
        "cuda:12",
    ]


def test_every_command_of_the_issue_is_there(capsys):
    names = "demo check generate quality memory bench parity inspect plot calibrate serve report"
    names += " warm plan train-policy vllm-calibrate needles ruler"
    assert {*command.COMMANDS, *command.PASSED} == set(names.split())


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("document") / "document.txt"
    path.write_text(texts.built_in()[:1500], encoding="utf-8")
    return str(path)


@pytest.fixture
def common(tiny):  # noqa: F811
    return ["--model", tiny, "--device", "cpu", "--dtype", "fp32", "--max-new-tokens", "12"]


@pytest.mark.slow
def test_a_session_goes_on_in_another_process(tiny, document, tmp_path, common):  # noqa: F811
    """Save here; answer in a new process, to the token as after a fresh prefill, compressed."""
    saved, out = tmp_path / "document.fade", tmp_path / "out.json"
    events = tmp_path / "events.jsonl"
    arguments = [*common, "--config", CONFIG, "--document", document]
    assert main(["generate", *arguments, "--save", str(saved), "--telemetry", str(events)]) == 0
    model, _ = loading.load(tiny, "cpu", "fp32")
    cache, ids = session.resume(saved, model)
    assert compressed_tokens(cache) > 300 and cache.get_seq_length() == ids.shape[1] > 400
    told = [e for e in telemetry.read(events) if e["event"] == "demotion"]
    assert sum(e["tokens"] for e in told) == compressed_tokens(cache) * len(cache.tiered)
    question = ["--prompt", "What is an object?", "--compare", "--json", str(out)]
    command = [sys.executable, "-m", "fade_fast", "generate", *common, "--resume", str(saved), *question]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["same"] and found["read_tokens"] == ids.shape[1]
    assert 0 < found["first_token_s"] and 0 < found["fresh_first_token_s"]
    assert 0 < found["new_tokens"] <= 12 and found["text"].strip() in done.stdout


def test_the_ids_of_a_document_do_not_depend_on_the_question(tiny):  # noqa: F811
    _, tokenizer = loading.load(tiny, "cpu")
    for template in (None, "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>"):
        tokenizer.chat_template = template
        (read, rest), (again, other) = (
            session.encode(tokenizer, "Some text.", q) for q in ("Why?", "How so?")
        )
        assert torch.equal(read, again) and not torch.equal(rest, other)
        said = tokenizer.decode(session.joined(read, rest)[0])
        assert said.startswith("<u>Some text." if template else "Some text.")
        assert said.endswith("Why?</u><a>" if template else "Why?")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to do"),
        (["--prompt", "a", "--prompt-file", "{doc}"], "give one of them"),
        (["--prompt", "a", "--save", "{tmp}/c"], "--save stores what was read of a --document"),
        (["--prompt", "a", "--compare"], "--compare needs --resume"),
        (["--prompt", "a", "--resume", "{doc}", "--document", "{doc}"], "leave out --document"),
        (["--prompt", "a", "--resume", "{doc}"], "is not a stored cache, or is damaged"),
    ],
)
def test_what_generate_refuses(arguments, says, document, common, tmp_path, capsys):
    arguments = [x.format(doc=document, tmp=tmp_path) for x in arguments]
    assert main(["generate", *common, *arguments]) == 2
    assert says in one_line(capsys) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("frugal", "unknown preset 'frugal'"),
        ("colour=3", "has no field 'colour'"),
        ("n_sink=-1", "n_sink=-1: an integer of at least 0"),
        ("n_sink=1=2", "FIELD=VALUE,... is allowed"),
    ],
)
def test_configurations_that_are_refused(text, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["check", "--config", text])
    assert stopped.value.code == 2 and says in one_line(capsys)


def test_an_interrupt_while_saving_leaves_no_file(document, common, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupt)
    saved = tmp_path / "document.fade"
    assert main(["generate", *common, "--document", document, "--save", str(saved)]) == 130
    assert not list(tmp_path.iterdir())


def test_check_says_no_with_its_exit_code(tiny, refused, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out.json"
    arguments = ["check", "--model", tiny, "--device", "cpu", "--length", "512", "--json", str(out)]
    assert main(arguments) == 0
    assert "2 of 2 layers are tiered" in capsys.readouterr().out
    assert json.loads(out.read_text())["length"] == 512
    assert main(["check", "--model", refused, "--device", "cpu", "--config", "balanced"]) == 1
    assert "refused: BloomForCausalLM does not dispatch its attention" in capsys.readouterr().out


@pytest.fixture
def saved(tmp_path):
    """A cache in a file, and the events that led to it."""
    model, path, events = tiny_llama(), tmp_path / "cache.fade", tmp_path / "events.jsonl"
    cache = fade_fast.create_cache(model, fade_fast.FadeConfig(recent_window=8, block_size=4, int4_budget=24))
    with cache.listen(events):
        generate(model, cache, prompt(60, batch=2, pads=(0, 5)), new=20)
        cache.memory()
    cache.save(path)
    return cache, path, events


def test_inspect_prints_without_loading(saved, tmp_path, capsys, monkeypatch):
    cache, path, _ = saved
    out = tmp_path / "out.json"
    monkeypatch.setattr(checkpoint, "read_tensors", lambda *args: pytest.fail("tensors are loaded"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the last tensor, so that a cache cannot be loaded
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.read(path)
    assert main(["inspect", str(path), "--json", str(out)]) == 0
    said = capsys.readouterr().out
    assert "model_type llama" in said and "layers 0 to 1: tiered" in said and "48 INT4" in said
    assert json.loads(out.read_text())["length"] == cache.get_seq_length()
    path.write_bytes(path.read_bytes()[:100])
    assert main(["inspect", str(path)]) == 2
    assert "damaged" in one_line(capsys)
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(path) + ".none"])
    assert stopped.value.code == 2 and "no such file" in one_line(capsys)


def test_pictures(saved, tmp_path, capsys):
    """What they show at the end is what the cache holds; every kind of file is drawn."""
    cache, path, events = saved
    columns, series = plots.tokens_over_time(telemetry.read(events))
    tokens = cache.memory().tokens
    assert columns[-1] <= cache.get_seq_length() and columns == sorted(columns)
    assert series["INT4"][-1] == tokens["INT4"] == 48 and series["EVICTED"][-1] == tokens["EVICTED"] > 0
    assert list(series) == ["FP16", "INT4", "EVICTED"]
    for n, column in enumerate(columns):
        assert sum(x[n] for x in series.values()) == 2 * column
    shot = tmp_path / "snapshot.json"
    shot.write_text(json.dumps(cache.snapshot()))
    for file in (path, events, shot):
        assert main(["plot", str(file)]) == 0
        assert file.with_name(file.name + ".png").read_bytes().startswith(b"\x89PNG")
    (axes,) = plots.of_file(path, row=1).axes
    drawn = {c.get_label(): c.get_paths() for c in axes.collections if not c.get_label().startswith("_")}
    held = snapshot.of_file(path, positions=True)["layers"][0]["tiers"]
    for name in ("FP16", "INT4"):
        spans = [[x.get_extents().x0, x.get_extents().x1] for x in drawn[name]]
        assert spans == held[name]["positions"][1]


def test_what_plot_refuses(saved, tmp_path, capsys):
    _, path, _ = saved
    wrong = tmp_path / "wrong"
    for text in ("{}", '{"event": "demotion"', "[1]", "\x00\x01"):
        wrong.write_text(text)
        assert main(["plot", str(wrong)]) == 2
        one_line(capsys)
    assert main(["plot", str(path), "--row", "2"]) == 2
    assert "row 2: from 0 to 1 is possible" in one_line(capsys)
    assert {x.name for x in tmp_path.iterdir()} == {"cache.fade", "events.jsonl", "wrong"}


def test_calibrate(tiny, document, tmp_path, capsys):  # noqa: F811
    """The file serves its model, and is that of the text."""
    common = ["calibrate", "--model", tiny, "--device", "cpu", "--dtype", "fp32"]
    for name, more in {"own": [], "text": ["--text", document, "--tokens", "100"]}.items():
        assert main([*common, "--out", str(tmp_path / name), *more]) == 0
        assert "2 layers" in capsys.readouterr().out
    model, tokenizer = loading.load(tiny, "cpu", "fp32")
    own, text = (calibration.load(tmp_path / name, model) for name in ("own", "text"))
    assert own.digest != text.digest and text.provenance["tokens"] == 100
    ids = tokenizer(Path(document).read_text()[:1600], return_tensors="pt").input_ids[:, :100]
    assert calibration.calibrate(model, ids, [0, 1]).digest == text.digest
    choices = own.provenance["choices"]
    assert len(choices) == 2 and all(choice["loss"] is not None for choice in choices.values())
    assert fade_fast.create_cache(model, "safe", calibration=own).choice.loss == next(
        choice["loss"] for name, choice in choices.items() if "matched" in name
    )
    config = FadeConfig(quant_backend="matched", recent_window=8, block_size=4)
    assert (
        fade_fast.create_cache(model, config, calibration=tmp_path / "text").calibration.digest == text.digest
    )


def test_a_command_that_is_gone_says_what_to_use(capsys):
    assert main(["train-codebook", "--text", "text.txt", "--out", "books"]) == 2
    said = one_line(capsys)
    assert said.startswith("fade train-codebook: error: caches no longer have product quantization: use ")
    config = FadeConfig(quant_backend="matched", middle_k_bits=2, middle_v_bits=2)
    assert options.config(said.split("--config ")[1].split(", which")[0]) == config


def test_commands_of_their_own_get_what_follows(tmp_path, monkeypatch, capsys):
    heard = []
    for name in ("fade_fast.measure.decode_attention", "fade_fast.measure.generate", "parity.__main__"):
        listen = lambda argv, name=name: heard.append((name, argv, sys.argv)) or 3  # noqa: E731
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(main=listen))
    assert main(["bench", "attention", "--only", "x"]) == 3
    assert main(["bench", "generate", "--list"]) == 3
    assert main(["parity", "compare", "a", "b"]) == 3
    assert [(name, argv) for name, argv, _ in heard] == [
        ("fade_fast.measure.decode_attention", ["--only", "x"]),
        ("fade_fast.measure.generate", ["--list"]),
        ("parity.__main__", ["compare", "a", "b"]),
    ]
    assert heard[0][2] == ["fade bench attention", "--only", "x"]
    monkeypatch.setitem(command.PASSED, "quality", ("fade_fast.measure.absent", ""))
    assert main(["quality"]) == 2
    assert "fade_fast.measure.absent is not part of this installation" in one_line(capsys)
    for package, cure in ("no_such_package", "which is not installed"), ("uvicorn", '"fade-fast[serve]"'):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
        (tmp_path / f"needs_{package}.py").write_text(f"import {package}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(command.PASSED, "quality", (f"needs_{package}", ""))
        assert main(["quality"]) == 2
        said = one_line(capsys)
        assert f"fade quality needs {package}" in said and cure in said


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("plan --gpu 24", "'24': a unit is missing; write 24GB"),
        ("memory --lengths 0", "'0': an integer of at least 1"),
        ("bench --length -1", "'-1': an integer of at least 1"),
        ("bench --length 64", "--length 64: lossless does nothing to so few tokens. Give at least 109"),
        ("quality --length 100", "--length 100: "),
        (
            "quality --suite report --length 512 --configs recall",
            "--length 512: recall does nothing to so few tokens",
        ),
        ("needles --lengths 2048 100", "--lengths 100: "),
        ("ruler --configs frugal", "no method 'frugal'"),
        ("bench --json {tmp}/none/a.json", "a.json cannot be written: there is no folder {tmp}/none"),
        ("quality --markdown {tmp}", "cannot be written: it is a folder"),
        ("quality --policy-weights {tmp}/none.safetensors", "none.safetensors: no such file"),
        ("bench --device abacus", "'abacus' is not the name of a device"),
        ("bench --text {tmp}/none.txt", "none.txt: no such file"),
        ("bench --text none.csv", "none.csv: no such file"),
        ("quality --show {tmp}/words.json", "words.json is no report that --json wrote"),
        ("quality --show {tmp}/bench.json", "bench.json is a report of the kind 'bench', not 'quality'"),
    ],
)
def test_measurements_refuse_in_one_line_before_any_work(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "words.json").write_text("some words")
    (tmp_path / "bench.json").write_text('{"kind": "bench"}')
    try:
        assert main(arguments.format(tmp=tmp_path).split()) == 2
    except SystemExit as stopped:
        assert stopped.code == 2
    said = one_line(capsys)
    assert said.startswith("fade ") and says.format(tmp=tmp_path) in said


def test_a_reader_may_leave(monkeypatch, capsys):
    """`fade plan | head -1` ends without a traceback."""

    def run(args):
        raise BrokenPipeError

    monkeypatch.setattr(command, "module_of", lambda name: types.SimpleNamespace(
        run=run, __doc__="", add_arguments=lambda parser: None
    ))  # fmt: skip
    assert main(["plan"]) == 141
    assert capsys.readouterr() == ("", "")


def test_plan_needs_no_weights(tiny, tmp_path, capsys):  # noqa: F811
    """A folder with nothing but a configuration is enough, and the figures are those of `capacity`."""
    folder, out = tmp_path / "model", tmp_path / "plan.json"
    folder.mkdir()
    (folder / "config.json").write_bytes((Path(tiny) / "config.json").read_bytes())
    asked = ["plan", "--model", str(folder), "--gpu", "50MB", "--length", "900", "--json", str(out)]
    assert main([*asked, "--config", "safe", "recall", "int4_budget=64,eviction_policy=h2o"]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text(encoding="utf-8"))
    assert "GiB of weights (from the configuration)" in said and "every layer" in said
    plain, safe, recall, h2o = found["caches"]
    assert plain["bytes"] == 900 * 2 * 2 * 64 * 2 and plain["bytes"] > safe["bytes"] > h2o["bytes"]
    assert found["room"] == 50_000_000 - found["weights"] - 5_000_000
    assert recall["host"] > 0 and safe["host"] == 0
    assert (
        h2o["forgets"] and not safe["forgets"] and h2o["sequences"] > safe["sequences"] > plain["sequences"]
    )
    assert "any length" in said and "part of the text" in said, said


def test_plan_knows_the_default_model_without_a_hub(no_hub, capsys):  # noqa: F811
    """Before it was ever fetched."""
    for more in ([], ["--model", "smollm2"]):
        assert main(["plan", "--gpu", "1GB", *more]) == 0
        said = capsys.readouterr().out
        assert "(LlamaForCausalLM), bf16" in said and "The model was made for 8,192 positions." in said
    assert not no_hub.exists()  # nothing was fetched
    assert main(["plan", "--gpu", "1GB", "--model", "somebody/something"]) == 2
    assert "no hub can be reached" in one_line(capsys)


@pytest.mark.real_model
def test_the_default_model_that_plan_knows_is_the_one_that_is_loaded(smollm2):
    known, real = LlamaConfig(**loading.SHAPE), smollm2[0].config
    assert {name: getattr(known, name) for name in loading.SHAPE} == {
        name: getattr(real, name) for name in loading.SHAPE
    }
    assert capacity.architecture(known) == capacity.architecture(real)


def test_what_plan_refuses(tmp_path, capsys, refused):  # noqa: F811
    for arguments, says in (
        (["--model", str(tmp_path)], "cannot read the configuration"),
        (["--model", refused, "--config", "frugal"], "unknown preset 'frugal'"),
    ):
        assert main(["plan", "--gpu", "1GB", *arguments]) == 2
        assert says in one_line(capsys)
    assert main(["plan", "--gpu", "1GB", "--model", refused, "--config", "balanced"]) == 0
    assert "not for this model: BloomForCausalLM does not let" in capsys.readouterr().out
