"""Alembic's environment; run by Database.migrate()."""
