"""What the server costs: `fade bench serve`.

**A token.** The same text is decoded by `model.generate()` and through the server, in turns, so that both see
the same machine. The server's time includes its HTTP interface, the sampler and the client's connection; the
client is another process. Both give the wall time and the CPU time of this process. On a machine that also
does other work only the CPU time compares well.

**A second turn.** A chat whose first message has `--prompt` tokens is read, answered, and continued. The time
to the first token of the second turn is compared with that of the same chat where nothing is kept.
"""

import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

import fade_fast
from fade_fast.hf import loading
from fade_fast.hf.models import CACHE_NAME
from fade_fast.measure import texts
from fade_fast.serve import http
from fade_fast.serve.engine import Engine, Options

from .parsers.serve import arguments

#: Reads a streamed answer, and prints the times of its first and its last token and their number.
CLIENT = """
import http.client, json, sys, time
host, port = sys.argv[1], int(sys.argv[2])
connection = http.client.HTTPConnection(host, port, timeout=3600)
start, times, usage = time.perf_counter(), [], None
connection.request("POST", "/v1/completions" if "prompt" in sys.argv[3] else "/v1/chat/completions",
                   open(sys.argv[4], "rb"), {"Content-Type": "application/json"})
answer, text = connection.getresponse(), ""
for line in answer:
    if line.startswith(b"data: {"):
        part = json.loads(line[6:])
        if part.get("error"): raise SystemExit(part["error"]["message"])
        usage = part.get("usage") or usage
        for choice in part["choices"]:
            said = choice.get("text") or choice.get("delta", {}).get("content") or ""
            if said:
                times.append(time.perf_counter() - start)
                text += said
print(json.dumps(dict(first=times[0], last=times[-1], text=text, usage=usage)))
"""


@dataclass
class Token:
    """Seconds of decoding a token, by wall clock and by the CPU time of this process."""

    how: str
    wall: float
    cpu: float


@dataclass
class SecondTurn:
    """Seconds to the first token of a second turn, and tokens that were read for it."""

    how: str
    prompt: int
    cached: int
    first_token: float


class Times(BaseStreamer):
    """Wall and CPU time at each token of generate()."""

    def __init__(self):
        self.at = []

    def put(self, value) -> None:
        """Called with the prompt, then with every token."""
        self.at.append((time.perf_counter(), time.process_time()))

    def end(self) -> None:
        """Called at the end."""


class Server:
    """A server in this process, and requests of another process to it."""

    def __init__(self, engine: Engine, folder: Path):
        self.engine, self.folder = engine, folder
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.server = http.server(engine, "model")
        self.thread = threading.Thread(target=self.server.run, kwargs=dict(sockets=[self.listening]))

    def __enter__(self) -> "Server":
        self.engine.start()
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *exception) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.listening.close()
        self.engine.close()

    def ask(self, **fields) -> dict:
        """What the client prints for a request."""
        body = self.folder / "request.json"
        body.write_text(json.dumps(fields | dict(stream=True, stream_options=dict(include_usage=True))))
        host, port = self.listening.getsockname()
        kind = "prompt" if "prompt" in fields else "chat"
        command = [sys.executable, "-c", CLIENT, host, str(port), kind, str(body)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-2000:])
        return json.loads(done.stdout)

    def settle(self) -> None:
        """Wait until the engine has nothing to do."""
        while not self.engine.idle:
            time.sleep(0.01)


def a_token(model, tokenizer, config, folder: Path, new: int, rounds: int) -> list[Token]:
    """The time of a token, by generate() and through the server, in turns."""
    ids = tokenizer(texts.built_in(200), return_tensors="pt").input_ids[:, :128]
    found: dict[str, list] = {"generate": [], "server": []}
    with Server(Engine(model, tokenizer, config, Options(reuse="off", max_sessions=0)), folder) as server:
        for round in range(rounds + 1):
            by_generate = _by_generate(model, config, ids, new)
            by_server, text = _by_server(server, ids, new)
            if round:  # the first one warms up
                found["generate"].append(by_generate)
                found["server"].append(by_server)
            assert len(text) > new // 2
    return [
        Token(how, *(statistics.median(x[i] for x in each) for i in (0, 1))) for how, each in found.items()
    ]


def _by_generate(model, config, ids, new: int) -> tuple[float, float]:
    cache, times = fade_fast.create_cache(model, config), Times()
    greedy = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False)
    model.generate(
        input_ids=ids.to(model.device), attention_mask=torch.ones_like(ids).to(model.device),
        **{CACHE_NAME: cache}, generation_config=greedy, streamer=times,
    )  # fmt: skip
    return tuple((times.at[-1][i] - times.at[1][i]) / (new - 1) for i in (0, 1))


def _by_server(server: Server, ids, new: int) -> tuple[tuple[float, float], str]:
    """Wall time by the client; CPU time of this process from the first piece to the end."""
    cpu: list[float] = []
    advance = server.engine.metrics.count

    def count(name, by=1.0, **labels):
        if name == "generated_tokens":
            cpu.append(time.process_time())
        advance(name, by, **labels)

    server.engine.metrics.count = count
    try:
        answer = server.ask(prompt=ids[0].tolist(), max_tokens=new, temperature=0, ignore_eos=True)
    finally:
        server.engine.metrics.count = advance
    assert answer["usage"]["completion_tokens"] == new
    return ((answer["last"] - answer["first"]) / (new - 1), (cpu[-1] - cpu[0]) / (new - 1)), answer["text"]


def second_turn(model, tokenizer, config, folder: Path, prompt: int, ways) -> list[SecondTurn]:
    """The time to the first token of a second turn, with its first turn kept in each of the `ways`.

    The last way is "off", and is not the only one.
    """
    start = tokenizer(texts.built_in(prompt * 2), add_special_tokens=False).input_ids[: prompt - 64]
    said = [dict(role="user", content=tokenizer.decode(start) + "\n\nWhat is this text about?")]
    results, answer = [], None
    for how in ways:
        with Server(Engine(model, tokenizer, config, Options(reuse=how)), folder) as server:
            server.ask(messages=[dict(role="user", content="warm up")], max_tokens=2, temperature=0)
            if how != "off":
                answer = server.ask(messages=said, max_tokens=32, temperature=0)["text"]
                server.settle()
            turn = [*said, dict(role="assistant", content=answer)]
            turn += [dict(role="user", content="Which part of it matters most?")]
            got = server.ask(messages=turn, max_tokens=2, temperature=0)
            usage = got["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            results.append(SecondTurn(how, usage["prompt_tokens"], cached, got["first"]))
    return results


def main(argv=None) -> int:
    """Run both measurements and print them."""
    import tempfile

    args = arguments(argv)
    loading.quiet()
    model, tokenizer = loading.load(args.model)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(model, tokenizer, args, Path(folder))
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def measure(model, tokenizer, args, folder: Path) -> dict:
    """All results, as JSON values."""
    config = fade_fast.FadeConfig.preset(args.config)
    tokens, turns = [], []
    if args.only != "turns":
        tokens = a_token(model, tokenizer, config, folder, args.new, args.rounds)
    if args.only != "tokens":
        turns = second_turn(model, tokenizer, config, folder, args.prompt, [*args.ways, "off"])
    return dict(
        device=str(model.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        config=args.config,
        tokens=[asdict(x) for x in tokens],
        turns=[asdict(x) for x in turns],
    )


def table(report: dict) -> str:
    """The results as text."""
    lines = []
    if tokens := report["tokens"]:
        lines.append("a token       wall ms   CPU ms   CPU, more than generate()")
    for x in tokens:
        more = x["cpu"] / tokens[0]["cpu"] - 1
        lines.append(f"{x['how']:<12} {x['wall'] * 1e3:8.2f} {x['cpu'] * 1e3:8.2f}   {more:+.1%}")
    if turns := report["turns"]:
        lines.append("a second turn: tokens, of them kept, seconds to the first token, share of a fresh one")
    for x in turns:
        share = x["first_token"] / turns[-1]["first_token"]
        lines.append(f"{x['how']:<8} {x['prompt']:6} {x['cached']:6} {x['first_token']:8.3f} {share:6.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
