"""The HTTP side of ``nemo-rlhf serve-reward``: requests in, tokenised texts on a queue, scores out (docs/rewards.md).

Connections have a thread each; whoever owns the model takes what has come together and answers all of it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import socket
import socketserver
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_rlhf.cli.reward_connections import BODY_S, BoundedHandler, BoundedServer
from nemo_rlhf.config.server import ServerConfig, is_local
from nemo_rlhf.untrusted import parse_json

Scores = Future[list[float]]
Encode = Callable[[str, str, str], tuple[int, ...]]  # prompt, response, and where they stand, for an error

_GRACE_S = 3.0  # for answers that are on their way when the server ends
_REMEMBERED = 256  # requests whose answer a retry gets without being scored again


class Refused(Exception):
    """An answer that is not 200: status and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Job:
    """The texts of one request, and where its scores will be."""

    texts: list[tuple[int, ...]]
    scores: Scores = field(default_factory=Future)


class Jobs:
    """Requests that wait to be scored. A request that is sent again is the same job, not another one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._known: OrderedDict[bytes, Scores] = OrderedDict()
        self._closed = False

    def submit(self, key: bytes, texts: list[tuple[int, ...]]) -> Scores:
        """Those of the request that ``key`` identifies. Raises Refused (503) once the server ends."""
        with self._changed:
            if self._closed:
                raise Refused(503, "The server is ending.")
            if key not in self._known:
                job = Job(texts)
                self._known[key] = job.scores
                self._waiting.append(job)
                if len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
                self._changed.notify()
            return self._known[key]

    def take(self, num_texts: int, timeout_s: float) -> list[Job]:
        """The requests that came first, as many as it takes for ``num_texts``; none where none comes in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting, timeout_s)
            taken: list[Job] = []
            while self._waiting and sum(len(job.texts) for job in taken) < num_texts:
                taken.append(self._waiting.pop(0))
            return taken

    def close(self) -> None:
        """What still waits, and what comes from now on, is refused."""
        with self._changed:
            self._closed = True
            for job in self._waiting:
                job.scores.set_exception(Refused(503, "The server is ending."))
            self._waiting.clear()


class RewardServer:
    """Listens from ``start`` on; until then the port is taken, and refuses connections."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises ValueError when the token is missing or the port cannot be had."""
        self.jobs = Jobs()
        self._config = config
        self._http = _Http(config, _token(config), self.jobs)
        with self._port_errors():
            self._http.server_bind()
        self.url = f"http://{_reachable(config.host)}:{self._http.server_address[1]}/score"

    def start(self, encode: Encode) -> None:
        """Answer from now on. Raises ValueError when another program took the port or the file cannot be written."""
        with self._port_errors():
            self._http.server_activate()
        self._http.encode = encode
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        if self._config.url_file is not None:
            _write(Path(self._config.url_file), self.url)

    @contextmanager
    def _port_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._http.server_close()
            raise ValueError(
                f"server.host={self._config.host} with server.port={self._config.port} cannot be listened on "
                f"({error.strerror}): choose another port (0: a free one) or host."
            ) from None

    def close(self) -> None:
        """Refuse what has not been scored, and let what has go out."""
        if self._config.url_file is not None:
            _remove(Path(self._config.url_file), self.url)
        self.jobs.close()
        if self._http.encode is not None:
            self._http.shutdown()
        deadline = time.monotonic() + _GRACE_S
        while self._http.num_busy and time.monotonic() < deadline:
            time.sleep(0.01)
        self._http.server_close()


class _Http(BoundedServer):
    def __init__(self, config: ServerConfig, token: str | None, jobs: Jobs) -> None:
        super().__init__((config.host, config.port), _Handler)
        self.token, self.jobs, self.max_body = token, jobs, config.max_body_mib << 20
        self.encode: Encode | None = None
        self.encoding = threading.Lock()  # a fast tokenizer must not be called by two threads at a time
        self.num_busy = 0
        self.counting = threading.Lock()

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # the parent's asks for the host's full name, which may take long
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class _Handler(BoundedHandler):
    server: _Http
    server_version, sys_version = "nemo-rlhf", ""

    def do_GET(self) -> None:
        if what := self.what_is_ambiguous():
            self._end(Refused(400, f"The request has {what}."))
        elif self.path == "/health":
            self._answer(200, {"status": "ok"})
        else:
            self._answer(404, {"error": f"There is nothing at {self.path}: GET /health or POST /score."})

    def do_POST(self) -> None:
        with self.server.counting:
            self.server.num_busy += 1
        try:
            if refused := self._head():
                self._end(refused)
                return
            self._answer(200, {"rewards": self._rewards(self._body())})
            self.is_known = True
        except Refused as refused:
            self._answer(refused.status, {"error": str(refused)})
        except OSError:  # a client that went away is no news
            self.close_connection = True
        except Exception:
            traceback.print_exc()
            self._answer(500, {"error": "The server failed; its log says how."})
        finally:
            with self.server.counting:
                self.server.num_busy -= 1

    def _head(self) -> Refused | None:
        """What is wrong before the body is read, of which nothing is taken then."""
        length = self.headers.get("Content-Length", "")
        if what := self.what_is_ambiguous():
            return Refused(400, f"The request has {what}.")
        if not (length.isascii() and length.isdecimal() and len(length) < 16):
            return Refused(411, "Send the body with a Content-Length.")
        if self.path != "/score":
            return Refused(404, f"There is nothing at {self.path}: POST /score.")
        if not self._is_allowed():
            return Refused(401, "Send the server's token as Authorization: Bearer TOKEN.")
        if int(length) > self.server.max_body:
            mib = self.server.max_body >> 20
            return Refused(413, f"The body has {length} bytes, and the server takes {mib} MiB: send fewer samples.")
        return None

    def _end(self, refused: Refused) -> None:
        """Say so, and end the connection: where the next request would begin is not known."""
        self.close_connection = True
        with suppress(OSError):
            self._answer(refused.status, {"error": str(refused)})
        self.linger()

    def _body(self) -> bytes:
        length = int(self.headers["Content-Length"])
        self.server.expect(self.connection, BODY_S + (length >> 20), is_known=True)
        body = self.rfile.read(length)
        self.server.expect_nothing(self.connection)
        if len(body) < length:
            raise ConnectionError("half a body")
        return body

    def _is_allowed(self) -> bool:
        if self.server.token is None:
            return True
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")  # as http.server has decoded it
        return hmac.compare_digest(given, f"Bearer {self.server.token}".encode())

    def _rewards(self, body: bytes) -> list[float]:
        assert self.server.encode is not None
        samples = _samples(body)
        try:
            with self.server.encoding:
                texts = [
                    self.server.encode(sample["prompt"], sample["response"], f"samples[{index}]")
                    for index, sample in enumerate(samples)
                ]
        except ValueError as error:
            raise Refused(400, str(error)) from None
        scores = self.server.jobs.submit(hashlib.sha256(body).digest(), texts).result()
        wrong = [index for index, score in enumerate(scores) if not math.isfinite(score)]
        if wrong:
            raise Refused(422, f"The reward model's score of samples[{wrong[0]}] is not finite.")
        return scores

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if status == 503:
            self.send_header("Retry-After", "5")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)


def _samples(body: bytes) -> Sequence[dict[str, str]]:
    """Raises Refused (400), which names what is wrong."""
    try:
        value = parse_json(body, "the body")
    except ValueError:
        raise Refused(400, 'The body is not JSON: send {"samples": [{"prompt": ..., "response": ...}]}.') from None
    samples = value.get("samples") if isinstance(value, dict) else None
    if not isinstance(samples, list):
        raise Refused(400, 'The body has no list "samples": send {"samples": [{"prompt": ..., "response": ...}]}.')
    for index, sample in enumerate(samples):
        for name in ("prompt", "response"):
            text = sample.get(name) if isinstance(sample, dict) else None
            if not isinstance(text, str):
                raise Refused(400, f'samples[{index}] has no text "{name}".')
            try:
                text.encode()
            except UnicodeEncodeError:
                raise Refused(400, f'samples[{index}]: "{name}" holds half a surrogate pair.') from None
    return samples


def _token(config: ServerConfig) -> str | None:
    if config.token_env is None:
        return None
    token = os.environ.get(config.token_env, "")
    if not token.strip():
        raise ValueError(
            f"server.token_env={config.token_env} names an environment variable that is not set or empty: set it to "
            "the token that clients must send."
        )
    return token.strip()


def _reachable(host: str) -> str:
    """The name under which other machines, or at least this one, find ``host``."""
    if is_local(host):
        return "127.0.0.1" if host == "localhost" else host
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname() if host in ("0.0.0.0", "") else host


def _write(path: Path, text: str) -> None:
    """Whole, or not at all: whoever reads the file at any time finds an address."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text + "\n")
        partial.replace(path)
    except OSError as error:
        raise ValueError(f"server.url_file={path} cannot be written ({error.strerror}): name another file.") from None


def _remove(path: Path, text: str) -> None:
    """Unless another server has written its own address since."""
    if path.is_file() and path.read_text().strip() == text:
        path.unlink(missing_ok=True)
