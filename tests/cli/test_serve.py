"""`fade serve`: its options, what it refuses, and a server from start to end."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from fade_fast.cli import command, options, serve
from fade_fast.cli.command import main
from fade_fast.hf.loading import LoadError
from fade_ref.config import FadeConfig

from .test_demo import one_line, tiny  # noqa: F401


def parsed(*arguments: str):
    return command.parser("serve").parse_args(["serve", *arguments])


def test_every_field_is_an_option():
    args = parsed(
        "--config", "balanced", "--n-sink", "2", "--recent-window", "32", "--block-size", "16",
        "--int4-budget", "100", "--int2-budget", "None", "--eviction-policy", "h2o", "--middle-k-bits", "8",
        "--middle-v-bits", "4", "--quant-backend", "rotated", "--positions", "original",
        "--plan-scope", "layer", "--layer-bits", "0=8/8,3=16/16",
    )  # fmt: skip
    assert options.with_fields(args) == FadeConfig(
        n_sink=2, recent_window=32, block_size=16, int4_budget=100, int2_budget=None, eviction_policy="h2o",
        middle_k_bits=8, middle_v_bits=4, quant_backend="rotated", positions="original", plan_scope="layer",
        layer_bits={0: (8, 8), 3: (16, 16)},
    )  # fmt: skip
    others = parsed(
        "--select", "0.9", "--select-page", "16", "--select-max", "64", "--index", "k2", "--cold", "host",
        "--resident", "128",
    )  # fmt: skip
    assert options.with_fields(others) == FadeConfig(
        quant_backend="matched", select=0.9, select_page=16, select_max=64, index="k2", cold="host",
        resident=128,
    )  # fmt: skip
    bound = parsed("--loss-bound", "0.01")
    assert options.with_fields(bound) == FadeConfig(quant_backend="matched", loss_bound=0.01)
    names = {name for x in (args, others, bound) for name in options.fields_of(x)}
    assert names == set(FadeConfig.__dataclass_fields__)
    assert options.with_fields(parsed()) == FadeConfig.safe()
    assert options.with_fields(parsed("--int4-budget", "7")) == FadeConfig(
        quant_backend="matched", int4_budget=7
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--n-sink", "-1"], "n_sink=-1: an integer of at least 0"),
        (["--eviction-policy", "best"], "eviction_policy='best'"),
        (["--config", "frugal"], "unknown preset 'frugal'"),
        (["--memory-budget", "lots"], "'lots': a number of bytes such as 2GB"),
        (["--max-sessions", "-1"], "'-1': an integer of at least 0"),
        (["--layer-bits", "0=x/8"], "LAYER=KEYS/VALUES"),
        (["--host", "192.0.2.1", "--port", "80"], "cannot listen at 192.0.2.1, port 80"),
        (["--port", "70000"], "cannot listen at 127.0.0.1, port 70000"),
        (["--engine", "vllm"], "needs a --model"),
        (["--engine", "vllm", "--model", "x", "--config", "balanced"], "a page of vLLM keeps all its tokens"),
        (["--engine", "vllm", "--model", "x", "--n-sink", "8"], "--n-sink: a page of vLLM"),
        (["--chat"], "unrecognized arguments: --chat"),
    ],
    ids=str,
)
def test_what_is_refused(arguments, said, capsys):
    try:
        code = main(["serve", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and said in one_line(capsys)


def test_without_the_extra(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("fade_fast.serve.")]:
        if name.rpartition(".")[2] in ("http", "app"):
            monkeypatch.delitem(sys.modules, name)
    import fade_fast.serve

    monkeypatch.delattr(fade_fast.serve, "http", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--port", "0"]) == 2
    assert 'pip install "fade-fast[serve]"' in one_line(capsys)


def test_the_command_line_of_vllm(monkeypatch, capsys):
    args = parsed(
        "--engine", "vllm", "--model", "some/model", "--config", "lossless", "--layer-bits", "boundary",
        "--port", "81", "--api-key", "k", "--max-length", "4096", "--dtype", "fp16", "--name", "it",
    )  # fmt: skip
    line = serve.vllm_command(args)
    assert line[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    given = dict(zip(line[3::2], line[4::2]))
    assert json.loads(given.pop("--additional-config")) == dict(
        fade=dict(preset="lossless", layer_bits="boundary")
    )
    assert given == {
        "--model": "some/model", "--host": "127.0.0.1", "--port": "81", "--attention-backend": "CUSTOM",
        "--served-model-name": "it", "--max-model-len": "4096", "--dtype": "float16", "--api-key": "k",
    }  # fmt: skip
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match=r'pip install "fade-fast\[vllm\]"'):
        serve.start_vllm(args)
    started = []
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(serve.os, "execv", lambda path, line: started.append((path, line)))
    serve.start_vllm(args)
    assert started == [(sys.executable, line)]


@pytest.mark.slow
def test_from_start_to_end(tiny, tmp_path):  # noqa: F811
    pytest.importorskip("uvicorn", reason='the extra "serve" is not installed')
    pytest.importorskip("fastapi", reason='the extra "serve" is not installed')
    line = [sys.executable, "-m", "fade_fast", "serve", "--model", tiny, "--port", "0", "--device", "cpu"]
    line += ["--cache-dir", str(tmp_path / "caches"), "--name", "tiny", "--chunk", "16"]
    environment = os.environ | dict(FADE_API_KEY="secret")
    cached = []
    for _ in range(2):
        server = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            said = server.stdout.readline()
            assert said.startswith("tiny is served at http://127.0.0.1:"), said
            address = said.split()[4].rstrip(";")
            body = json.dumps(dict(prompt="a long text " * 12, max_tokens=4, temperature=0)).encode()
            headers = {"Content-Type": "application/json"}
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(urllib.request.Request(f"{address}/v1/completions", body, headers))
            headers["Authorization"] = "Bearer secret"
            asked = urllib.request.Request(f"{address}/v1/completions", body, headers)
            usage = json.load(urllib.request.urlopen(asked, timeout=60))["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(30)
        assert code == 0
    assert cached[0] == 0 < cached[1]  # the second server found what the first one has left
