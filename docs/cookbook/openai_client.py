"""The server with the `openai` package: a streamed chat, and what the second turn does not read again.

Start `fade serve` first, or let this program start a server in its own process, as it does by default.
"""

import socket
import sys
import threading

import openai

import fade_fast
from fade_fast.serve import http
from fade_fast.serve.engine import Engine, Options

TEXT = " ".join(f"Shelf {shelf} holds {shelf * 3} books." for shelf in range(1, 50))


def chat(address, text=TEXT, questions=("How many books does shelf 7 hold?", "And shelf 9?"), new=30):
    """Ask the questions one after the other. Print the answers, and return them with their usage."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="not needed")
    model = client.models.list().data[0].id
    said, answers = [], []
    for question in questions:
        said.append(dict(role="user", content=question if said else f"{text}\n{question}"))
        answer, usage = "", None
        for part in client.chat.completions.create(
            model=model, messages=said, temperature=0, max_tokens=new,
            stream=True, stream_options=dict(include_usage=True),
        ):  # fmt: skip
            if part.choices:
                answer += part.choices[0].delta.content or ""
                print(part.choices[0].delta.content or "", end="", flush=True)
            usage = part.usage or usage
        print(f"\n({usage.prompt_tokens_details.cached_tokens} of {usage.prompt_tokens} tokens were kept)")
        said.append(dict(role="assistant", content=answer))
        answers.append((answer, usage))
    client.close()
    return answers


def main(model, tokenizer, options=Options(), **chat_options):  # noqa: B008
    """Serve the model on a free port of this machine while the chat goes on."""
    listening = socket.create_server(("127.0.0.1", 0))
    with Engine(model, tokenizer, fade_fast.FadeConfig.safe(), options) as engine:
        server = http.server(engine, "model")
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listening]))
        thread.start()
        try:
            return chat(http.address_of(listening), **chat_options)
        finally:
            server.should_exit = True
            thread.join()
            listening.close()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        chat(sys.argv[1])
    else:
        main(*fade_fast.loading.load())
