"""The process behind ``nemo-rlhf feedback serve``: its secret, its port, and its end."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from nemo_rlhf.config.feedback import ServeConfig
from nemo_rlhf.config.server import is_local
from nemo_rlhf.feedback.accounts import accounts
from nemo_rlhf.feedback.store import Store
from nemo_rlhf.feedback.web.app import make_app
from nemo_rlhf.feedback.web.connections import BACKLOG, Connection, quieten
from nemo_rlhf.feedback.web.security import Hosts

EXIT_DONE, EXIT_STOPPED = 0, 75
SECRET_VARIABLE = "NEMO_RLHF_FEEDBACK_SECRET"
_SECRET_CHARACTERS = 32  # at least
_LONGEST_SECRET = 4096
_GRACE_S = 5  # for answers that are on their way when the server ends


def serve(store: Store, run_id: int, config: ServeConfig) -> int:
    """Answer until SIGTERM or SIGUSR1 (exit code 75) or Ctrl-C (0). What was answered to a browser is in the store.

    Raises:
        ValueError: there is no secret where one is needed, or the port cannot be had.
    """
    secret = _given_secret(config) or _kept_secret(_secret_file(store, run_id))
    app = Hosts(make_app(store, run_id, secret), {config.host, *config.allow_hosts})
    with _listening(config.host, config.port) as listener:
        if not any(can_sign_in for _, can_sign_in in accounts(store, run_id)):
            print("nemo-rlhf: nobody can sign in yet: invite people with nemo-rlhf feedback invite.", file=sys.stderr)
        return _Server(app, config.host, listener).serve_until_signal()


def read_guidelines(file: Path) -> str:
    """Raises ValueError for a file that cannot be read; how long it may be is the store's to say."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--guidelines {file} cannot be read ({error}): name a text file, in Markdown.") from None


class _Server(uvicorn.Server):
    """uvicorn that says where it listens, and how it was ended."""

    def __init__(self, app: Any, host: str, listener: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=Connection,
                backlog=BACKLOG,
                log_config=None,
                log_level="error",  # a warning for each odd request could fill a disk
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,  # anybody on this machine can send them
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        self._host, self._listener = host, listener

    def serve_until_signal(self) -> int:
        noted: list[int] = []

        def note(number: int, frame: FrameType | None) -> None:
            noted.append(number)
            self.should_exit = True

        # uvicorn puts its own in place of the first two, and raises what came again when it is done
        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            self.run(sockets=[self._listener])
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return EXIT_DONE if set(noted) <= {signal.SIGINT} else EXIT_STOPPED

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        quieten(asyncio.get_running_loop())
        await super().startup(sockets)
        host = f"[{self._host}]" if ":" in self._host else self._host
        port = self._listener.getsockname()[1]
        print(f"nemo-rlhf: the comparison page is at http://{host}:{port}/", flush=True)

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # each second
            for connection in list(self.server_state.connections):
                assert isinstance(connection, Connection)
                connection.end_if_late()
        return await super().on_tick(counter)


def _listening(host: str, port: int) -> socket.socket:
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ValueError(
            f"--host {host} --port {port} cannot be listened on ({error.strerror}): choose another port (0: a free "
            "one) or host."
        ) from None
    return listener


def _given_secret(config: ServeConfig) -> str | None:
    """Of the file or else the environment. Raises ValueError where there is none and others can reach the page."""
    if config.secret_file is not None:
        where = f"--secret-file {config.secret_file}"
        try:
            return _long_enough(_own_secret(Path(config.secret_file), where), where)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} cannot be read ({error}).") from None
    if secret := os.environ.get(SECRET_VARIABLE, "").strip():
        return _long_enough(secret, SECRET_VARIABLE)
    if not is_local(config.host):
        raise ValueError(
            f"--host {config.host} lets other machines in: set {SECRET_VARIABLE} or --secret-file to a secret that "
            "signs the sessions (openssl rand -hex 32 makes one), or keep --host 127.0.0.1 and use an ssh tunnel."
        )
    return None


def _long_enough(secret: str, where: str) -> str:
    if len(secret) < _SECRET_CHARACTERS:
        raise ValueError(
            f"{where} holds {len(secret)} characters, and a secret has at least {_SECRET_CHARACTERS}: "
            "openssl rand -hex 32 makes one."
        )
    return secret


def _secret_file(store: Store, run_id: int) -> Path:
    """Where the secret is kept that nobody gave: beside a file, and for a database server in the run directory."""
    if store.database.is_sqlite:
        return Path(f"{store.database.url.database}.secret")
    directory = Path(store.info(run_id).name)
    if not directory.is_dir():
        raise ValueError(
            f"There is no directory {directory} to keep a secret in: set {SECRET_VARIABLE} or --secret-file."
        )
    return directory / "feedback.secret"


def _kept_secret(path: Path) -> str:
    """The secret in this file, which is made where it is missing, for its owner only."""
    try:
        if not path.exists():
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
            try:
                os.link(partial, path)  # unless another server was quicker
            except FileExistsError:
                pass
            finally:
                partial.unlink()
        return _long_enough(_own_secret(path, str(path)), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be kept ({error}): set {SECRET_VARIABLE} or --secret-file instead.") from None


def _own_secret(path: Path, where: str) -> str:
    """What the file holds. Raises ValueError where others could read or change it."""
    with path.open(encoding="utf-8") as file:
        found = os.fstat(file.fileno())
        if found.st_mode & 0o077:
            raise ValueError(f"{where} signs the sessions and can be read by others: chmod 600 it, or make another.")
        if found.st_uid not in (os.geteuid(), 0):
            raise ValueError(f"{where} signs the sessions and belongs to another user: make one of your own.")
        return file.read(_LONGEST_SECRET).strip()
