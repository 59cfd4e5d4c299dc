"""A real PostgreSQL of one's own: in a temporary directory, on a free port of this machine, gone at the end."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest


def binaries() -> Path | None:
    """Where initdb and postgres are: on the path, or where Debian keeps them."""
    found = [Path(where).parent for name in ("initdb",) if (where := shutil.which(name))]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in found if (place / "initdb").exists() and (place / "postgres").exists()), None)


@contextmanager
def running_postgres() -> Iterator[str]:
    """The URL of a server that has just been made, without the name of a database. Skips where none is installed."""
    bin_dir = binaries()
    if bin_dir is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # which PostgreSQL refuses
        if not known("postgres"):
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        user = {"user": "postgres", "group": "postgres", "extra_groups": []}
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        if user:
            shutil.chown(name, "postgres")
        data, log = Path(name) / "data", Path(name) / "log"
        init = [
            bin_dir / "initdb",
            "-D",
            data,
            "-U",
            "postgres",
            "-A",
            "trust",
            "--no-sync",
            "-E",
            "UTF8",
            "--locale=C",
        ]
        made = subprocess.run(init, check=False, cwd=name, capture_output=True, text=True, **user)
        assert made.returncode == 0, made.stderr
        serve = [bin_dir / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", name]
        with log.open("wb") as out:
            server = subprocess.Popen(serve, cwd=name, stdout=out, stderr=out, **user)
        try:
            url = f"postgresql://postgres@127.0.0.1:{port}"
            deadline = time.monotonic() + 60
            while not answers(f"{url}/postgres"):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield url
        finally:
            server.send_signal(signal.SIGINT)  # ends connections, too
            server.wait(30)


def new_database(url: str) -> str:
    """The URL of an empty database of the server."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(f"{url}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{url}/{name}"


def known(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def answers(url: str) -> bool:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
