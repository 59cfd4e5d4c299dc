"""The tables of the first version."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    _runs()
    _texts()
    _comparisons()


def _runs() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("guidelines", sa.Text(), nullable=False),
        sa.Column("answers_wanted", sa.Integer(), nullable=False),
        sa.Column("undo_s", sa.Float(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
        sa.UniqueConstraint("name", name="uq_runs_name"),
    )
    op.create_table(
        "annotators",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("token_hash", sa.String(length=64), nullable=True),
        sa.Column("is_admin", sa.Boolean(), nullable=False),
        sa.Column("simulated", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("revoked_at", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_annotators_run_id"),
        sa.PrimaryKeyConstraint("id", name="pk_annotators"),
        sa.UniqueConstraint("run_id", "name", name="uq_annotators_run_id_name"),
        sa.UniqueConstraint("token_hash", name="uq_annotators_token_hash"),
    )
    op.create_table(
        "refreshes",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("comparisons", sa.Integer(), nullable=False),
        sa.Column("held_out", sa.Integer(), nullable=False),
        sa.Column("accuracy_before", sa.Float(), nullable=True),
        sa.Column("accuracy_after", sa.Float(), nullable=True),
        sa.Column("accepted", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_refreshes_run_id"),
        sa.PrimaryKeyConstraint("id", name="pk_refreshes"),
        sa.UniqueConstraint("run_id", "number", name="uq_refreshes_run_id_number"),
    )
    op.create_table(
        "exports",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("form", sa.String(length=16), nullable=False),
        sa.Column("pairs", sa.Integer(), nullable=False),
        sa.Column("last_comparison", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_exports_run_id"),
        sa.PrimaryKeyConstraint("id", name="pk_exports"),
    )


def _texts() -> None:
    op.create_table(
        "prompts",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_prompts_run_id"),
        sa.PrimaryKeyConstraint("id", name="pk_prompts"),
        sa.UniqueConstraint("run_id", "digest", name="uq_prompts_run_id_digest"),
    )
    op.create_table(
        "candidates",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("prompt_id", sa.Integer(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["prompt_id"], ["prompts.id"], name="fk_candidates_prompt_id"),
        sa.PrimaryKeyConstraint("id", name="pk_candidates"),
    )
    op.create_index("ix_candidates_prompt_id", "candidates", ["prompt_id"])


def _comparisons() -> None:
    op.create_table(
        "tasks",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(length=200), nullable=False),
        sa.Column("prompt_id", sa.Integer(), nullable=False),
        sa.Column("first_id", sa.Integer(), nullable=False),
        sa.Column("second_id", sa.Integer(), nullable=False),
        sa.Column("rank", sa.Float(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("is_open", sa.Boolean(), nullable=False),
        sa.Column("num_answers", sa.Integer(), nullable=False),
        sa.Column("lease_holder", sa.Integer(), nullable=True),
        sa.Column("lease_token", sa.String(length=64), nullable=True),
        sa.Column("lease_swapped", sa.Boolean(), nullable=True),
        sa.Column("lease_from", sa.Float(), nullable=True),
        sa.Column("lease_until", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(["first_id"], ["candidates.id"], name="fk_tasks_first_id"),
        sa.ForeignKeyConstraint(["lease_holder"], ["annotators.id"], name="fk_tasks_lease_holder"),
        sa.ForeignKeyConstraint(["prompt_id"], ["prompts.id"], name="fk_tasks_prompt_id"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_tasks_run_id"),
        sa.ForeignKeyConstraint(["second_id"], ["candidates.id"], name="fk_tasks_second_id"),
        sa.PrimaryKeyConstraint("id", name="pk_tasks"),
        sa.UniqueConstraint("run_id", "key", name="uq_tasks_run_id_key"),
    )
    op.create_index("ix_tasks_lease_holder", "tasks", ["lease_holder"])
    op.create_index(
        "ix_tasks_run_id_is_open_rank_id_lease_until", "tasks", ["run_id", "is_open", "rank", "id", "lease_until"]
    )
    op.create_table(
        "comparisons",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("task_id", sa.Integer(), nullable=False),
        sa.Column("annotator_id", sa.Integer(), nullable=False),
        sa.Column("verdict", sa.String(length=16), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("answered_at", sa.Float(), nullable=False),
        sa.Column("settles_at", sa.Float(), nullable=False),
        sa.CheckConstraint("verdict IN ('first', 'second', 'tie', 'both_bad', 'skip')", name="ck_comparisons_verdict"),
        sa.ForeignKeyConstraint(["annotator_id"], ["annotators.id"], name="fk_comparisons_annotator_id"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_comparisons_run_id"),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name="fk_comparisons_task_id"),
        sa.PrimaryKeyConstraint("id", name="pk_comparisons"),
        sa.UniqueConstraint("annotator_id", "task_id", name="uq_comparisons_annotator_id_task_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_comparisons_annotator_id_answered_at", "comparisons", ["annotator_id", "answered_at"])
    op.create_index("ix_comparisons_run_id", "comparisons", ["run_id"])
    op.create_index("ix_comparisons_task_id", "comparisons", ["task_id"])
