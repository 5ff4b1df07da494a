"""A server of `moeq serve`, and a client that asks it for everything it should do."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import openai

from moeq.embedded import model_folder

TEMPLATE = """{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}\
{% if add_generation_prompt %}{{ '\n' }}{% endif %}"""
KEY = "a key"
QUESTION = "def fibonacci(n):"


@dataclass(frozen=True)
class Server:
    """One that runs.

    Attributes:
        url: of its API.
        name: of its model.
        process: of `moeq serve`.
        said: what it printed up to where it was ready.
    """

    url: str
    name: str
    process: subprocess.Popen[str]
    said: list[str]

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)


def with_template(target: Path) -> Path:
    """The embedded model, with a template for chats."""
    shutil.copytree(model_folder(), target)
    file = target / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return target


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


@contextlib.contextmanager
def serving(
    python: Path, folder: Path, arguments: Sequence[str], environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """`moeq serve` on a port of its own, killed at the end if it still runs."""
    port = free_port()
    command = [str(python), "-m", "moeq.cli", "serve", str(folder), "--port", str(port), *arguments]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"MOEQ_API_KEY": KEY} | (environment or {}),
    )
    said = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if line.startswith("ready on "):
                break
        assert said, "it said nothing"
        assert said[-1].startswith(f"ready on http://127.0.0.1:{port}"), "".join(said)
        # Nobody reads on: a full pipe would stop the server
        with ThreadPoolExecutor(1) as reader:
            reader.submit(process.stdout.read)
            try:
                yield Server(f"http://127.0.0.1:{port}", folder.name, process, said)
            finally:
                process.terminate()  # and with it what it started, which holds the pipe too
    finally:
        process.terminate()
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


def check_answers(server: Server) -> None:
    """Completion, chat, streams of both, a client that leaves, many at once, and a wrong key."""
    with server.client() as client:
        _check_answers(server, client)
    with server.client("another key") as stranger, contextlib.suppress(openai.AuthenticationError):
        stranger.models.list()
        raise AssertionError("answered without the key")


def _check_answers(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [server.name]
    options = {"model": server.name, "temperature": 0, "max_tokens": 24}
    completion = client.completions.create(prompt=QUESTION, **options)
    text = completion.choices[0].text
    assert '"""' in text  # the model writes a docstring there
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 24
    chunks = client.completions.create(prompt=QUESTION, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == text
    rendered = client.completions.create(prompt=f"{QUESTION}\n", **options).choices[0].text
    messages = [{"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(messages=messages, **options)
    # transformers repeats what its template does not mark as the user's
    assert (chat.choices[0].message.content or "").endswith(rendered)
    stream = client.chat.completions.create(messages=messages, stream=True, **options)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces).endswith(rendered)
    assert len(pieces) > 3
    # One that leaves in the middle does not take the server along
    long = options | {"max_tokens": 150}
    leaving = client.completions.create(prompt=QUESTION, stream=True, **long)
    next(iter(leaving))
    leaving.close()
    with ThreadPoolExecutor(16) as pool:
        found = list(
            pool.map(lambda _: client.completions.create(prompt=QUESTION, **options), range(16))
        )
    assert {answer.choices[0].text for answer in found} == {text}


def check_end(server: Server, number: signal.Signals) -> float:
    """Ends a server while it answers; it has to, and to say that all is well.

    Returns:
        Seconds that it took.
    """
    with server.client() as client:
        options = {"model": server.name, "prompt": QUESTION, "max_tokens": 200}
        with client.completions.create(stream=True, **options) as stream:
            next(iter(stream))
            started = time.monotonic()
            server.process.send_signal(number)
            assert server.process.wait(20) == 0
            return time.monotonic() - started
