"""Who may compare: people come in by an invitation, and only the hash of its token is stored."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

from sqlalchemy import Connection, insert, select, update

from nemo_rlhf.feedback.records import MAX_NAME, Account
from nemo_rlhf.feedback.store import Store
from nemo_rlhf.feedback.tables import Annotator


def invite(store: Store, run_id: int, name: str, *, admin: bool = False) -> str:
    """A new token with which ``name`` signs in, shown this once. It ends the one of before, and its sessions.

    Raises:
        ValueError: the name is none, or that of a simulated annotator.
    """
    check_name(name)
    token = secrets.token_urlsafe(32)
    values: dict[str, Any] = {"token_hash": _hash(token), "is_admin": admin, "revoked_at": None}
    with store.database.write(exclusive=True) as connection:
        known = _find(connection, run_id, name)
        if known is not None and known.simulated:
            raise ValueError(f"The annotator {name} is simulated: invite people under other names.")
        if known is not None:
            connection.execute(update(Annotator).where(Annotator.id == known.id).values(**values))
        else:
            now = store.database.now(connection)
            connection.execute(
                insert(Annotator).values(run_id=run_id, name=name, simulated=False, created_at=now, **values)
            )
    return token


def revoke(store: Store, run_id: int, name: str) -> None:
    """End the access of ``name``, at once; the answers stay. Raises ValueError for a name that nobody has."""
    with store.database.write(exclusive=True) as connection:
        known = _find(connection, run_id, name)
        if known is None:
            raise ValueError(f"The run has no annotator {name}.")
        connection.execute(
            update(Annotator)
            .where(Annotator.id == known.id)
            .values(token_hash=None, revoked_at=store.database.now(connection))
        )


def sign_in(store: Store, run_id: int, token: str) -> Account | None:
    """Whose token this is in this run; None: nobody's, or that of one whose access has ended."""
    with store.database.read() as connection:
        row = connection.execute(
            select(Annotator).where(Annotator.run_id == run_id, Annotator.token_hash == _hash(token))
        ).one_or_none()
    return None if row is None else _account(row)


def signed_in(store: Store, run_id: int, annotator_id: int, token_id: str) -> Account | None:
    """The account of a session, looked up at each of its requests; None: its access has ended since."""
    with store.database.read() as connection:
        row = connection.execute(
            select(Annotator).where(Annotator.run_id == run_id, Annotator.id == annotator_id)
        ).one_or_none()
    if row is None or row.token_hash is None or not secrets.compare_digest(_token_id(row), token_id):
        return None
    return _account(row)


def sign_out(store: Store, account: Account) -> None:
    """End all sessions of this account, those whose cookies somebody has kept, too. Its token stays good."""
    with store.database.write() as connection:
        connection.execute(
            update(Annotator).where(Annotator.id == account.id).values(sign_outs=Annotator.sign_outs + 1)
        )


def without_access(store: Store, run_id: int, name: str, *, simulated: bool) -> int:
    """The id of an annotator who never signs in: a simulated one, or one whose answers are imported.

    Raises:
        ValueError: the name is none, or one that is simulated where this one is not, or the other way round.
    """
    check_name(name)
    with store.database.write(exclusive=True) as connection:
        return annotator_id(connection, store, run_id, name, simulated=simulated)


def annotator_id(connection: Connection, store: Store, run_id: int, name: str, *, simulated: bool) -> int:
    """As ``without_access``, within a transaction and with a name that was checked."""
    known = _find(connection, run_id, name)
    if known is None:
        now = store.database.now(connection)
        made = insert(Annotator).values(run_id=run_id, name=name, simulated=simulated, is_admin=False, created_at=now)
        return int(connection.execute(made.returning(Annotator.id)).scalar_one())
    if known.simulated != simulated:
        raise ValueError(f"The annotator {name} is {'simulated' if known.simulated else 'a person'}: use another name.")
    return int(known.id)


def accounts(store: Store, run_id: int) -> list[tuple[Account, bool]]:
    """All annotators of the run by name, and whether they can sign in."""
    with store.database.read() as connection:
        rows = connection.execute(select(Annotator).where(Annotator.run_id == run_id).order_by(Annotator.name))
        return [(_account(row), row.token_hash is not None) for row in rows]


def check_name(name: str) -> None:
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"The name of an annotator has 1 to {MAX_NAME} printable characters, not {str(name)[:80]!r}.")


def _find(connection: Connection, run_id: int, name: str) -> Any:
    return connection.execute(select(Annotator).where(Annotator.run_id == run_id, Annotator.name == name)).one_or_none()


def _account(row: Any) -> Account:
    return Account(row.id, row.run_id, row.name, row.is_admin, row.simulated, _token_id(row))


def _token_id(row: Any) -> str:
    return f"{(row.token_hash or '')[:16]}-{row.sign_outs}"


def _hash(token: str) -> str:
    # Of 32 random bytes; a slow hash is for passwords, which can be guessed.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
