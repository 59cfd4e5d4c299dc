"""The tables of the preference store. Whoever changes them adds a migration; a test compares the two.

Times are seconds since 1970 (UTC), the same on SQLite and PostgreSQL.
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import (
    JSON,
    CheckConstraint,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from nemo_rlhf.feedback.records import MAX_NAME, VERDICTS

_MARK = "\x1a"
_UNSTORABLE = re.compile("[\x00\x1a\ud800-\udfff]")
_MARKED = re.compile(f"{_MARK}([0-9a-f]{{4}})")


class AnyText(TypeDecorator[str]):
    """Text with any characters: models write NULs, which PostgreSQL does not take, and half surrogate pairs, which no
    UTF-8 does. Each of these is kept as U+001A and four hexadecimal digits."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else _UNSTORABLE.sub(lambda found: f"{_MARK}{ord(found[0]):04x}", value)

    def process_result_value(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else _MARKED.sub(lambda found: chr(int(found[1], 16)), value)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Run(Base):
    __tablename__ = "runs"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(Text, unique=True)  # absolute path of the run directory, or what was given
    guidelines: Mapped[str] = mapped_column(AnyText)
    answers_wanted: Mapped[int] = mapped_column(Integer)  # by task
    undo_s: Mapped[float] = mapped_column(Float)  # how long an answer can be taken back
    created_at: Mapped[float] = mapped_column(Float)


class Annotator(Base):
    __tablename__ = "annotators"
    __table_args__ = (UniqueConstraint("run_id", "name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"))
    name: Mapped[str] = mapped_column(String(MAX_NAME))
    token_hash: Mapped[str | None] = mapped_column(String(64), unique=True)  # SHA-256; null: nobody signs in as this
    is_admin: Mapped[bool]
    simulated: Mapped[bool]
    created_at: Mapped[float] = mapped_column(Float)
    revoked_at: Mapped[float | None] = mapped_column(Float)
    sign_outs: Mapped[int] = mapped_column(Integer, server_default="0")  # each ends the sessions before it


class Prompt(Base):
    __tablename__ = "prompts"
    __table_args__ = (UniqueConstraint("run_id", "digest"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"))
    digest: Mapped[str] = mapped_column(String(64))  # SHA-256 of the text
    text: Mapped[str] = mapped_column(AnyText)


class Candidate(Base):
    """An answer of the policy."""

    __tablename__ = "candidates"

    id: Mapped[int] = mapped_column(primary_key=True)
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompts.id"), index=True)
    step: Mapped[int] = mapped_column(Integer)  # of the policy that wrote it; -1: imported
    text: Mapped[str] = mapped_column(AnyText)


class Task(Base):
    """Two candidates to compare. While somebody is at it, ``lease_*`` say who, since when and until when."""

    __tablename__ = "tasks"
    # The index holds all that tells whether a task can be leased, in the order of leasing.
    __table_args__ = (UniqueConstraint("run_id", "key"), Index(None, "run_id", "is_open", "rank", "id", "lease_until"))

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"))
    key: Mapped[str] = mapped_column(String(MAX_NAME))
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompts.id"))
    first_id: Mapped[int] = mapped_column(ForeignKey("candidates.id"))
    second_id: Mapped[int] = mapped_column(ForeignKey("candidates.id"))
    rank: Mapped[float] = mapped_column(Float)  # the lowest is shown first: minus the priority
    details: Mapped[dict[str, Any]] = mapped_column(JSON)  # metadata of whoever added it
    created_at: Mapped[float] = mapped_column(Float)
    is_open: Mapped[bool]
    num_answers: Mapped[int] = mapped_column(Integer)
    lease_holder: Mapped[int | None] = mapped_column(ForeignKey("annotators.id"), index=True)
    lease_token: Mapped[str | None] = mapped_column(String(64))
    lease_swapped: Mapped[bool | None]
    lease_from: Mapped[float | None] = mapped_column(Float)
    lease_until: Mapped[float | None] = mapped_column(Float)


class ComparisonRow(Base):
    """One annotator's word on one task; "skip" is none, and keeps the task from coming back to the same annotator."""

    __tablename__ = "comparisons"
    __table_args__ = (
        UniqueConstraint("annotator_id", "task_id"),
        Index(None, "annotator_id", "answered_at"),
        CheckConstraint(f"verdict IN {(*VERDICTS, 'skip')}", name="verdict"),
        # An id is never given twice, also after an answer was taken back.
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"), index=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id"), index=True)
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"))
    verdict: Mapped[str] = mapped_column(String(16))
    seconds: Mapped[float] = mapped_column(Float)
    note: Mapped[str] = mapped_column(AnyText)
    answered_at: Mapped[float] = mapped_column(Float)
    settles_at: Mapped[float] = mapped_column(Float)  # from then on it stays


class RefreshRow(Base):
    """A refresh of the reward model, as the run reports it."""

    __tablename__ = "refreshes"
    __table_args__ = (UniqueConstraint("run_id", "number"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"))
    number: Mapped[int] = mapped_column(Integer)
    step: Mapped[int] = mapped_column(Integer)
    comparisons: Mapped[int] = mapped_column(Integer)
    held_out: Mapped[int] = mapped_column(Integer)
    accuracy_before: Mapped[float | None] = mapped_column(Float)
    accuracy_after: Mapped[float | None] = mapped_column(Float)
    accepted: Mapped[bool]
    created_at: Mapped[float] = mapped_column(Float)


class Export(Base):
    """What was taken out of the store, when and in which form."""

    __tablename__ = "exports"

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"))
    form: Mapped[str] = mapped_column(String(16))
    pairs: Mapped[int] = mapped_column(Integer)
    last_comparison: Mapped[int | None] = mapped_column(Integer)  # highest id that was in it
    created_at: Mapped[float] = mapped_column(Float)
