"""The HTTP interface, as its clients see it: the `openai` package, raw sockets, a browser's requests."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi", reason='the extra "serve" is not installed')
pytest.importorskip("uvicorn", reason='the extra "serve" is not installed')
httpx = pytest.importorskip("httpx", reason="httpx is not installed")

from fade_fast.serve import http  # noqa: E402
from fade_fast.serve import limits as limiting  # noqa: E402

from ..models import tiny_llama  # noqa: E402
from .engines import engine, tokens  # noqa: E402


@contextlib.contextmanager
def served(running, **options):
    """The address of a server for an engine that was not started."""
    listening = socket.create_server(("127.0.0.1", 0))
    with running:
        server = http.server(running, "tiny", **options)
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listening]), daemon=True)
        thread.start()
        end = time.monotonic() + 20
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)
        try:
            yield http.address_of(listening)
        finally:
            server.should_exit = server.force_exit = True
            thread.join(20)
            listening.close()
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def running():
    return engine(tiny_llama(heads=1, head_dim=32), max_queue=16)


@pytest.fixture(scope="module")
def address(running):
    with served(running, max_body=200_000) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


def chat(text="hello there", **fields):
    return dict(messages=[dict(role="user", content=text)], temperature=0, max_tokens=12) | fields


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def events(response) -> list:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


# -- the openai package


@pytest.fixture(scope="module")
def openai_client(address):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_chat_by_the_openai_package(openai_client):
    asked = dict(model="tiny", messages=[dict(role="user", content="hello " * 12)], temperature=0)
    whole = openai_client.chat.completions.create(**asked, max_tokens=20)
    assert whole.choices[0].finish_reason in ("length", "stop") and whole.choices[0].message.content
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    parts = list(
        openai_client.chat.completions.create(
            **asked, max_tokens=20, stream=True, stream_options=dict(include_usage=True)
        )
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content and parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].usage.prompt_tokens_details.cached_tokens > 0  # the second time
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len(parts) > 5 and {part.id for part in parts} == {parts[0].id}


def test_completions_by_the_openai_package(openai_client):
    text = openai_client.completions.create(
        model="tiny", prompt=["one " * 9, "two " * 9], n=2, max_tokens=9, seed=1, logprobs=2
    )
    assert [choice.index for choice in text.choices] == [0, 1, 2, 3]
    assert text.usage.prompt_tokens == 72 and text.usage.completion_tokens <= 36
    assert all(len(choice.logprobs.top_logprobs[0]) <= 3 for choice in text.choices)
    by_tokens = openai_client.completions.create(model="tiny", prompt=list(tokens(30)), max_tokens=3)
    assert by_tokens.usage.prompt_tokens == 30
    assert [model.id for model in openai_client.models.list()] == ["tiny"]
    assert openai_client.models.retrieve("tiny").id == "tiny"


def test_log_probabilities_of_a_chat(openai_client):
    answer = openai_client.chat.completions.create(
        model="tiny", messages=[dict(role="user", content="hello")], max_tokens=5, temperature=0,
        logprobs=True, top_logprobs=3,
    )  # fmt: skip
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert all(len(x.top_logprobs) == 3 and x.top_logprobs[0].logprob == x.logprob < 0 for x in content)


def test_errors_by_the_openai_package(openai_client):
    import openai

    messages = [dict(role="user", content="hello")]
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        openai_client.chat.completions.create(model="other", messages=messages)
    with pytest.raises(openai.BadRequestError, match="tools") as refused:
        openai_client.chat.completions.create(
            model="tiny", messages=messages, tools=[dict(type="function", function=dict(name="f"))]
        )
    assert refused.value.code == "unsupported_parameter" and refused.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="at most 16384 are possible") as refused:
        openai_client.completions.create(model="tiny", prompt="x" * 16384, max_tokens=1)
    assert refused.value.code == "context_length_exceeded"


# -- single requests


def test_a_seed_repeats_an_answer_and_stop_ends_it(client):
    sampled = chat(temperature=1.0, seed=5, max_tokens=30)
    first, again = (client.post("/v1/chat/completions", json=sampled).json() for _ in range(2))
    text = first["choices"][0]["message"]["content"]
    assert text == again["choices"][0]["message"]["content"]
    stopped = client.post("/v1/chat/completions", json=sampled | dict(stop=[text[5:7]])).json()["choices"][0]
    assert stopped["message"]["content"] == text[: text.index(text[5:7])]
    assert stopped["finish_reason"] == "stop"


def test_streamed_answers_of_several(client):
    response = client.post(
        "/v1/completions", json=dict(prompt="hello", n=3, seed=1, max_tokens=8, stream=True)
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = events(response)
    for index in range(3):
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert own[-1]["finish_reason"] and all(part["finish_reason"] is None for part in own[:-1])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "no JSON"),
        (b"[]", "no JSON object"),
        (b'{"messages": [], "temperature": NaN}', "NaN is no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"{}", "messages"),
        (dict(messages=[dict(role="tool", content="x")]), "messages[0]"),
        (dict(messages=[dict(role="user", content=[dict(type="image_url")])]), "only be text"),
        (chat(temperature=3), "temperature: a number from 0 to 2 is allowed, not '3'"),
        (chat(temperature="hot"), "temperature"),
        (chat(top_p=0), "top_p: a number above 0"),
        (chat(n=True), "n: an integer"),
        (chat(n=17), "n: an integer from 1 to 16"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_tokens=10**6), "at most 16384 are possible"),
        (chat(stop=[""]), "stop"),
        (chat(logit_bias={"300": 5}), "logit_bias has tokens"),
        (chat(logit_bias=[1]), "logit_bias"),
        (chat(top_logprobs=2), "needs logprobs=true"),
        (chat(stream_options=dict(include_usage=True)), "needs stream=true"),
        (chat(response_format=dict(type="json_object")), "response_format"),
        (chat(nonsense=1), "nonsense: this server does not support it"),
        (chat(stream="yes"), "stream: true or false"),
    ],
    ids=str,
)
def test_what_is_refused(client, body, said):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400 and said in error["message"]
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}


def test_what_asks_for_nothing_is_accepted(client):
    body = chat(tools=[], tool_choice="auto", response_format=dict(type="text"), metadata=None, user="me")
    assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_health_metrics_and_unknown_paths(client):
    assert client.get("/health").json() == dict(status="ok")
    client.post("/v1/chat/completions", json=chat())
    text = client.get("/metrics").text
    assert 'fade_requests_total{outcome="answered"}' in text and "fade_kept_caches " in text
    assert all(line.startswith(("#", "fade_")) for line in text.splitlines())
    prometheus = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")
    names = {family.name for family in prometheus.text_string_to_metric_families(text)}
    assert {"fade_requests", "fade_time_to_first_token_seconds", "fade_waiting_requests"} <= names
    for path in ("/v1", "/v1/models/x", "/page.py", "/docs", "/openapi.json"):
        response = client.get(path)
        assert response.status_code == 404 and response.json()["error"]["message"]
    assert client.get("/v1/chat/completions").status_code == 405


@pytest.mark.parametrize(
    "path",
    ["/../app.py", "/page/../../app.py", "/%2e%2e/app.py", "//etc/passwd", "/v1/models/../../etc/passwd"],
)
def test_no_path_leads_to_a_file(address, path):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        said = b"".join(iter(lambda: raw.recv(65536), b""))
    assert b" 404 " in said.split(b"\r\n")[0] and b"root:" not in said and b"import" not in said


# -- limits


def raw_request(address, head: str, body: bytes = b"", wait: float = 20) -> bytes:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as raw:
        raw.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        with contextlib.suppress(OSError):
            raw.sendall(body)
        with contextlib.suppress(OSError):
            return b"".join(iter(lambda: raw.recv(65536), b""))
    return b""


POST = "POST /v1/chat/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"


def test_a_large_body_is_refused_unread(address, client):
    said = raw_request(address, POST + "Content-Length: 4294967296")
    assert b"413" in said.split(b"\r\n")[0] and b"more than 200000 bytes" in said
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    said = raw_request(address, POST + "Transfer-Encoding: chunked", chunk * 8)
    assert b"413" in said.split(b"\r\n")[0]
    assert raw_request(address, POST + "Content-Length: -1").split(b"\r\n")[0].split()[1] in (b"400", b"413")
    assert client.get("/health").status_code == 200


HALF = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-"


def read_all(raw) -> bytes:
    with contextlib.suppress(ConnectionResetError):
        return b"".join(iter(lambda: raw.recv(65536), b""))
    return b""


def test_a_slow_head_is_given_up_while_others_are_served():
    with served(engine(tiny_llama(heads=1, head_dim=32)), head_seconds=1.0) as address:
        host, port = address.removeprefix("http://").split(":")
        with contextlib.ExitStack() as opened:
            began = time.monotonic()
            raws = [
                opened.enter_context(socket.create_connection((host, int(port)), timeout=20))
                for _ in range(3)
            ]
            raws[0].sendall(HALF)  # raws[1] sends nothing
            raws[2].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert raws[2].recv(65536).startswith(b"HTTP/1.1 200") and raws[2].sendall(HALF) is None
            with httpx.Client(base_url=address, timeout=20) as client:
                answered = 0
                while time.monotonic() - began < 0.8:
                    raws[0].sendall(b"X")  # a byte now and then does not help
                    assert (
                        client.post("/v1/completions", json=dict(prompt="abc", max_tokens=2)).status_code
                        == 200
                    )
                    answered += 1
                    time.sleep(0.05)
                said = [read_all(raw) for raw in raws]
                took = time.monotonic() - began
                assert client.get("/health").status_code == 200
        assert answered > 2 and 0.9 < took < 5
        assert said[1] == b""
        for answer in said[0], said[2].removeprefix(b'{"status":"ok"}'):
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ") and b"Connection: close" in head
            assert "head of the request" in json.loads(body)["error"]["message"]


@pytest.mark.slow
def test_two_hundred_slow_heads_keep_nobody_out():
    with served(engine(tiny_llama(heads=1, head_dim=32)), head_seconds=1.0) as address:
        host, port = address.removeprefix("http://").split(":")
        with contextlib.ExitStack() as opened:
            raws = [
                opened.enter_context(socket.create_connection((host, int(port)), timeout=20))
                for _ in range(200)
            ]
            for raw in raws:
                raw.sendall(HALF)
            asked = httpx.post(f"{address}/v1/completions", json=dict(prompt="abc", max_tokens=2), timeout=20)
            assert asked.status_code == 200
            assert all(read_all(raw).startswith(b"HTTP/1.1 408") for raw in raws)


@pytest.mark.slow
def test_a_slow_body_and_a_slow_answer_are_no_slow_head():
    with served(engine(tiny_llama(heads=1, head_dim=32)), head_seconds=0.3) as address:
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps(dict(prompt="abc", max_tokens=30, ignore_eos=True)).encode()
        with socket.create_connection((host, int(port)), timeout=20) as raw:
            raw.sendall(HALF + b"Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body))
            time.sleep(0.6)
            raw.sendall(body)
            assert raw.recv(65536).startswith(b"HTTP/1.1 200")
            time.sleep(0.6)  # between requests, the longer time of uvicorn holds
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert b"HTTP/1.1 200" in read_all(raw)


def test_a_slow_body_is_given_up(address, monkeypatch, running):
    app = limiting.Limiter(None, limiting.Limits(body_seconds=0.05))
    sent = []

    async def slow():
        await asyncio.sleep(1)

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"5")]
    scope = dict(type="http", method="POST", path="/v1/completions", headers=headers)
    asyncio.run(app(scope, slow, send))
    assert sent[0]["status"] == 408 and b"did not arrive in time" in sent[1]["body"]


def test_a_client_that_does_not_read_is_given_up():
    async def answer(scope, receive, send):
        await send(dict(type="http.response.start", status=200, headers=[]))
        raise AssertionError("it went on")

    async def stuck(message):
        await asyncio.sleep(10)

    app = limiting.Limiter(answer, limiting.Limits(write_seconds=0.05))
    scope = dict(type="http", method="GET", path="/health", headers=[(b"host", b"localhost")])
    began = time.monotonic()
    asyncio.run(app(scope, None, stuck))
    assert time.monotonic() - began < 5


def test_pages_of_other_sites_cannot_ask(client):
    text = json.dumps(chat())
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = client.post("/v1/chat/completions", content=text, headers={"Content-Type": kind})
        assert response.status_code == 415
    response = client.get("/v1/models", headers={"Host": "evil.example:8000"})
    assert response.status_code == 421 and "evil.example" in response.json()["error"]["message"]
    assert client.get("/v1/models", headers={"Host": "[::1]:8000"}).status_code == 200
    assert "access-control-allow-origin" not in client.get("/v1/models").headers


def test_an_api_key():
    with served(engine(tiny_llama(heads=1, head_dim=32)), api_key="secret") as address:
        with httpx.Client(base_url=address, timeout=30) as client:
            for path in ("/v1/models", "/metrics", "/view"):
                response = client.get(path)
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert client.get("/v1/models", headers={"Authorization": "Bearer secre"}).status_code == 401
            assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
            assert client.get("/").status_code == client.get("/health").status_code == 200


def test_too_many_requests_get_429():
    running = engine(tiny_llama(heads=1, head_dim=32), max_queue=2, max_active=1)
    with served(running) as address, httpx.Client(base_url=address, timeout=60) as client:
        long = chat(max_tokens=6000, ignore_eos=True, stream=True)
        with contextlib.ExitStack() as streams:
            for _ in range(3):
                opened = streams.enter_context(client.stream("POST", "/v1/chat/completions", json=long))
                assert opened.status_code == 200
                wait_until(lambda: running.active)
            response = client.post("/v1/chat/completions", json=chat())
            assert response.status_code == 429 and response.headers["retry-after"] == "1"
            assert response.json()["error"]["type"] == "rate_limit_error"
        # The clients are gone, so their requests end, those that wait included.
        wait_until(lambda: running.idle)
        assert running.metrics.total("requests", outcome="cancelled") == 3
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200


def test_a_client_that_goes_ends_its_answer(address, running):
    before = running.metrics.total("requests", outcome="cancelled")
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{address}/v1/chat/completions", json=chat(max_tokens=9000, ignore_eos=True), timeout=0.4)
    wait_until(lambda: running.metrics.total("requests", outcome="cancelled") == before + 1)
    wait_until(lambda: running.idle)


@pytest.mark.slow
def test_two_hundred_connections(address):
    async def ask_all():
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
            return await asyncio.gather(
                *(
                    client.post("/v1/completions", json=dict(prompt=f"{i} " * 4, max_tokens=2))
                    for i in range(200)
                )
            )

    found = [response.status_code for response in asyncio.run(ask_all())]
    assert set(found) <= {200, 429} and found.count(200) >= 12
    assert httpx.get(f"{address}/health").status_code == 200


def test_failures_tell_no_details(client, running, monkeypatch):
    def broken(*args):
        raise RuntimeError("a secret path")

    monkeypatch.setattr("fade_fast.serve.engine.advance", broken)
    response = client.post("/v1/chat/completions", json=chat())
    assert response.status_code == 500 and "secret" not in response.text
    parts = client.post("/v1/chat/completions", json=chat(stream=True)).text
    assert '"error"' in parts and "secret" not in parts and "[DONE]" not in parts
    assert client.get("/health").status_code == 200


# -- the page


def test_the_page_loads_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    whole = page.text + client.get("/page.js").text + client.get("/page.css").text
    assert "http://" not in whole.replace("http://www.w3.org", "") and "https://" not in whole
    assert "style=" not in page.text and "onclick" not in page.text


def test_the_feed_of_the_page(address, running, client):
    assert not running.view.watched
    with httpx.stream("GET", f"{address}/view", timeout=30) as feed:
        lines = feed.iter_lines()
        assert json.loads(next(lines)[6:])["type"] == "totals" and running.view.watched
        ask = threading.Thread(target=client.post, args=("/v1/chat/completions",), kwargs=dict(
            json=chat("word " * 30, max_tokens=120, ignore_eos=True)))  # fmt: skip
        ask.start()
        frames = []
        for line in lines:
            if line and (frame := json.loads(line[6:]))["type"] == "state":
                frames.append(frame)
                if "map" in frame and frame["generated"] > 5 and frame["tokens_per_s"]:
                    break
        ask.join()
    last = frames[-1]
    assert last["tokens"]["INT4"] > 0 and last["allocated"] > 0 and last["dense"] > 0
    assert last["map"]["length"] == last["length"] and len(last["map"]["layers"]) == 2
    held = [stop - start for ranges in last["map"]["layers"][0]["tiers"].values() for start, stop in ranges]
    assert sum(held) == last["length"]
    assert any(event["event"] == "demotion" for frame in frames for event in frame["events"])
    wait_until(lambda: not running.view.watched and running.idle)
    assert running.view._listener is None


def test_a_server_that_ends_ends_the_feed_of_a_page(caplog, monkeypatch):
    servers, make = [], http.server
    monkeypatch.setattr(http, "server", lambda *a, **k: servers.append(make(*a, **k)) or servers[-1])
    with contextlib.ExitStack() as opened:
        running = engine(tiny_llama(heads=1, head_dim=32))
        with served(running) as address:
            feed = opened.enter_context(httpx.stream("GET", f"{address}/view", timeout=30))
            assert next(feed.iter_lines()).startswith("data:")
            servers[0].should_exit = True
            began = time.monotonic()
            wait_until(lambda: not running.view.watched)
            assert time.monotonic() - began < 2.5
    assert "Traceback" not in caplog.text
