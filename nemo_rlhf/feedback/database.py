"""The database under the store: SQLite or PostgreSQL, brought up to date, with transactions that suit each."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, func, inspect, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError

from nemo_rlhf.config.dumping import masked
from nemo_rlhf.feedback.tables import Base

VERSION_TABLE = "feedback_version"
_MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 0x6E656D6F  # of PostgreSQL's advisory locks, the one that exclusive transactions take
_BUSY_S = 60.0  # that a SQLite transaction waits for the one before it
# Of libpq; what the URL says counts before it. A network that is gone without a word is noticed within half a minute,
# whether this side waits for an acknowledgement or for an answer, and a statement waits for others as in SQLite.
_POSTGRESQL_LIMITS = {
    "connect_timeout": 10,  # s
    "tcp_user_timeout": 30_000,  # ms
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "options": f"-c statement_timeout={_BUSY_S:.0f}s",
}


class Unreachable(ValueError):
    """The database does not answer; it may later."""


class Database:
    """Connections to one database. Safe to share between threads; each process opens its own."""

    def __init__(self, url: str) -> None:
        self.url = parse_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        # Threads queue up here; at the file they would sleep and try again, for as long as luck has it.
        self._writer: AbstractContextManager[Any] = threading.Lock() if self.is_sqlite else nullcontext()
        self.engine = _sqlite_engine(self.url) if self.is_sqlite else _postgresql_engine(self.url)
        try:
            self._upgrade()
        except OperationalError as error:
            self.engine.dispose()
            reason = str(error.orig).strip()
            raise Unreachable(f"The store {self.shown_url} cannot be opened: {reason}.") from error
        except DatabaseError as error:
            self.engine.dispose()
            kind = ValueError if self.is_sqlite else Unreachable  # a server may be mended meanwhile
            raise kind(self.reason(error)) from error
        except ValueError:
            self.engine.dispose()
            raise

    @property
    def shown_url(self) -> str:
        """For messages: without the password."""
        return masked(self.url.render_as_string(hide_password=True))

    def reason(self, error: DatabaseError) -> str:
        """In one sentence, why the database refused or failed."""
        said = " ".join(str(error.orig).split()).rstrip(".")
        if "not a database" in said:
            return f"{self.url.database} is not a SQLite file: name another one."
        if self.is_sqlite and not isinstance(error, OperationalError):
            return f"{self.url.database} is damaged ({said}): restore it from a backup, or name another file."
        return f"The store {self.shown_url} cannot be used: {said}."

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self, *, exclusive: bool = False) -> Iterator[Connection]:
        """A transaction that is durable when this is left, and undone by an exception.

        On SQLite there is only one at a time. On PostgreSQL rows are locked as they are asked for, and ``exclusive``
        ones keep out each other.
        """
        with (
            self._writer,
            self.engine.connect().execution_options(writes=True) as connection,
            connection.begin(),
        ):
            if exclusive and not self.is_sqlite:
                connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
            yield connection

    def now(self, connection: Connection) -> float:
        """Seconds since 1970: of the database server, which all writers share, or of this machine for a file."""
        if self.is_sqlite:
            return time.time()
        return float(connection.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one())

    def _upgrade(self) -> None:
        """Bring the tables to the version of this code. Quick where they are, as they mostly are."""
        scripts = ScriptDirectory(str(_MIGRATIONS))
        with self.read() as connection:
            if _version(connection) == scripts.get_current_head():
                return
        with self.write(exclusive=True) as connection:
            self._check_version(connection, scripts)
            config = Config()
            config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def _check_version(self, connection: Connection, scripts: ScriptDirectory) -> None:
        version = _version(connection)
        if version is not None and version not in {script.revision for script in scripts.walk_revisions()}:
            raise ValueError(
                f"The store {self.shown_url} was written by a newer nemo_rlhf (its tables are of version {version}): "
                "update this one."
            )
        names = set(inspect(connection).get_table_names())
        if version is None and (strange := sorted(names & set(Base.metadata.tables))):
            raise ValueError(
                f"{self.shown_url} has a table {strange[0]} that is not ours: give the store a database of its own."
            )


def parse_url(url: str) -> URL:
    """Raises ValueError for what is neither a path nor a URL of SQLite or PostgreSQL."""
    if "://" not in url:
        parsed = URL.create("sqlite", database=url)
    else:
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError) as error:
            raise ValueError(f"{masked(url)!r} is no URL of a store, such as sqlite:///feedback.db.") from error
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise ValueError(f"A store is a SQLite file (sqlite:///FILE) or a postgresql:// URL, not {backend}.")
    if not parsed.database or parsed.database == ":memory:" or parsed.query:
        raise ValueError("A store in SQLite is a file: sqlite:///feedback.db, or sqlite:////absolute/feedback.db.")
    path = Path(parsed.database).expanduser().absolute()
    if not path.parent.is_dir():
        raise ValueError(f"There is no directory {path.parent} for the store {path.name}: create it first.")
    if path.is_dir():
        raise ValueError(f"The store {path} is a directory: name a file in it.")
    return parsed.set(database=str(path))


def _version(connection: Connection) -> str | None:
    return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()


def _sqlite_engine(url: URL) -> Engine:
    with suppress(OSError):  # SQLite says it better
        # What people wrote is nobody else's to read, unless the file's owner says otherwise.
        os.close(os.open(str(url.database), os.O_RDWR | os.O_CREAT, 0o600))
    engine = create_engine(url, connect_args={"timeout": _BUSY_S}, pool_size=20)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say so, below
        _use_wal(connection)
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A deferred writer could find that another one was quicker, too late to wait for it.
        writes = connection.get_execution_options().get("writes", False)
        connection.execute(text("BEGIN IMMEDIATE" if writes else "BEGIN"))

    return engine


def _use_wal(connection: sqlite3.Connection) -> None:
    """The file stays in this mode. SQLite does not always wait for other connections when it is changed."""
    deadline = time.monotonic() + _BUSY_S
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _postgresql_engine(url: URL) -> Engine:
    limits = {name: value for name, value in _POSTGRESQL_LIMITS.items() if name not in url.query}
    return create_engine(url, pool_size=20, pool_pre_ping=True, connect_args=limits)
