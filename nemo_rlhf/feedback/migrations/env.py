"""Runs migrations for alembic, on the connection of whoever opens the store."""

from alembic import context

from nemo_rlhf.feedback.database import VERSION_TABLE
from nemo_rlhf.feedback.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
