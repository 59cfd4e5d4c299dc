"""Signing out ends sessions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("annotators", sa.Column("sign_outs", sa.Integer(), nullable=False, server_default="0"))
