"""`moeq serve` by transformers: a client's day, its end, and what it refuses before it loads."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

import openai
import pytest
from click.testing import CliRunner
from tests.cli.test_cli import moeq, refused
from tests.serving import check_answers, check_end, free_port, serving, with_template

from moeq.cli.serve import serve
from moeq.embedded import model_folder
from moeq.engines import serve as engine
from moeq.engines.serve import Address, choose_engine
from moeq.errors import ConfigError, DependencyError

INT8 = "int8_per_channel_weight_only"
PYTHON = Path(sys.executable)


def test_it_answers_and_ends(tmp_path: Path) -> None:
    folder = with_template(tmp_path / "tiny")
    with serving(PYTHON, folder, ["-q", INT8]) as server:
        said = "".join(server.said)
        assert "100% of expert weights quantized" in said
        assert said.index("experts ") < said.index("ready on")
        assert said.endswith(": tiny, by transformers\n")
        check_answers(server)
        check_end(server, signal.SIGTERM)


def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    with serving(PYTHON, with_template(tmp_path / "tiny"), ["-q", INT8]) as server:
        check_end(server, signal.SIGINT)


def test_help_shows_how() -> None:
    done = moeq("serve", "--help")
    assert done.returncode == 0
    assert "--engine vllm -- --tensor-parallel-size 2" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "0.0.0.0 can be reached from other machines, and there is no API"),
        (["--api-key", " "], "the API key is empty"),
        (["--engine", "vllm"], "vLLM is not installed in this environment"),
        (
            ["--engine", "transformers", "--", "--enforce-eager"],
            "--enforce-eager: arguments after --",
        ),
        (["--host", "no.such.host.invalid", "--api-key", "k"], "cannot listen on no.such.host"),
        (["--host", "192.0.2.1", "--api-key", "k"], "cannot listen on 192.0.2.1 port 8000: Cannot"),
    ],
)
def test_it_refuses_before_it_loads(arguments: list[str], says: str) -> None:
    done = moeq("serve", str(model_folder()), "-q", INT8, *arguments)
    refused(done, f"error: {says}")
    assert "hint:" in done.stderr or "empty" in done.stderr
    assert "quantized)" not in done.stderr


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = moeq("serve", str(model_folder()), "-q", INT8, "--port", port)
    refused(done, f"cannot listen on 127.0.0.1 port {port}: Address already in use", "--port")


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_no_scheme_for_an_unquantized_model(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before vLLM would serve it as it is."""
    monkeypatch.setattr("moeq.engines.serve.has_package", lambda name: True)
    with pytest.raises(ConfigError, match="is not quantized by moeq and no scheme is named"):
        CliRunner().invoke(
            serve,
            [str(model_folder()), "--engine", engine, "--port", str(free_port())],
            catch_exceptions=False,
        )


def test_a_chat_without_a_template_is_the_clients_mistake() -> None:
    with (
        serving(PYTHON, model_folder(), ["-q", INT8]) as server,
        server.client() as client,
        pytest.raises(openai.BadRequestError, match="chat_template is not set"),
    ):
        client.chat.completions.create(
            model=server.name, messages=[{"role": "user", "content": "hi"}]
        )


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.9.10"])
def test_hosts_of_this_machine_need_no_key(host: str) -> None:
    assert engine._is_local(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_other_hosts_do(host: str) -> None:
    with pytest.raises(ConfigError, match="API key"):
        Address(host, 1, None).check()


def test_the_engine_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "has_package", lambda name: False)
    assert choose_engine("auto", "cuda") == "transformers"
    monkeypatch.setattr(engine, "has_package", lambda name: True)
    assert choose_engine("auto", "cuda:1") == "vllm"
    assert choose_engine("auto", "cpu") == "transformers"
    assert choose_engine("vllm", "cpu") == "vllm"


def test_a_missing_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    with pytest.raises(DependencyError, match="transformers' server is not installed"):
        choose_engine("transformers", "cpu")
