"""A load test of a running server with locust: `locust -f benchmarks/serve_load.py --host http://127.0.0.1:8000`.

    pip install "fade-fast[load]"
    fade serve &
    locust -f benchmarks/serve_load.py --host http://127.0.0.1:8000 --headless -u 20 -r 5 -t 60s --csv load

Users chat about one of three documents, ask again about what they have just read, or send what a server must
refuse. Some go before their answer has come. A full queue (429) is right; users wait then, and ask again.
Failures in locust's table are wrong answers: another status, a broken stream, an answer to the same greedy
request that differs from the first one. Besides the time of each request, the table has the time to the first
token (`first token`) and the time between tokens (`a token`).
"""

import json
import random
import time

from locust import HttpUser, between, events, task

DOCUMENTS = [
    " ".join(
        f"{name} {i} was opened in {1700 + i * 7 % 290} and has {i * 13 % 97} rooms." for i in range(1, 40)
    )
    for name in ("House", "Hotel", "School")
]
#: The first answer to each greedy request. All later ones must be the same.
ANSWERS: dict[str, str] = {}


class Chatter(HttpUser):
    """Somebody who chats."""

    wait_time = between(0.1, 1.0)

    @task(6)
    def ask(self) -> None:
        """Ask about a document, and then once more."""
        document = random.choice(DOCUMENTS)
        said = [dict(role="user", content=f"{document}\nWhat about number {random.randrange(1, 6)}?")]
        answer = self.stream(said, "first turn")
        if answer:
            said.append(dict(role="assistant", content=answer))
            said.append(dict(role="user", content="And the next one?"))
            self.stream(said, "second turn")

    @task(2)
    def leave(self) -> None:
        """Go before the answer has come."""
        said = [dict(role="user", content=random.choice(DOCUMENTS) + "\nTell me everything.")]
        self.stream(said, "left", most=200, leave_after=random.randrange(1, 8))

    @task(1)
    def nonsense(self) -> None:
        """Send what must be refused."""
        for body in (b"{", b'{"messages": 3}', b'{"messages": [], "temperature": 9}'):
            headers = {"Content-Type": "application/json"}
            with self.client.post(
                "/v1/chat/completions", data=body, headers=headers, name="nonsense", catch_response=True
            ) as response:
                if response.status_code == 400:
                    response.success()
                else:
                    response.failure(f"status {response.status_code}")

    def stream(self, messages: list, name: str, most: int = 24, leave_after: int | None = None) -> str | None:
        """The answer to a chat. None if it was refused, or left."""
        body = dict(messages=messages, max_tokens=most, temperature=0, stream=True, user=str(id(self)))
        start, times, answer = time.perf_counter(), [], ""
        with self.client.post(
            "/v1/chat/completions", json=body, name=name, stream=True, catch_response=True
        ) as response:
            if response.status_code == 429:
                response.success()
                time.sleep(float(response.headers.get("Retry-After", 1)))
                return None
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                return None
            ended = False
            for line in response.iter_lines():
                if line == b"data: [DONE]":
                    ended = True
                elif line.startswith(b"data: "):
                    part = json.loads(line[6:])
                    if "error" in part:
                        response.failure(part["error"]["message"])
                        return None
                    text = part["choices"][0]["delta"].get("content")
                    if text:
                        times.append(time.perf_counter() - start)
                        answer += text
                if leave_after is not None and len(times) >= leave_after:
                    response.close()
                    response.success()
                    return None
            if not ended:
                response.failure("the stream has no end")
                return None
            if ANSWERS.setdefault(json.dumps(body["messages"]), answer) != answer:
                response.failure("another answer to the same request")
                return None
            response.success()
        self.report("first token", times[:1])
        if len(times) > 1:
            self.report("a token", [(times[-1] - times[0]) / (len(times) - 1)])
        return answer

    def report(self, name: str, seconds: list[float]) -> None:
        """Add times to locust's table."""
        for x in seconds:
            events.request.fire(
                request_type="TIME", name=name, response_time=x * 1e3, response_length=0, exception=None,
                context={},
            )  # fmt: skip
