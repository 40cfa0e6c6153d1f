"""Runs migrations in the transaction that Database.migrate() holds."""

from __future__ import annotations

from alembic import context

from gnomon_service.db.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
