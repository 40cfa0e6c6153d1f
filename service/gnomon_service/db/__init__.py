"""The database: tables, migrations, and transactions on SQLite and PostgreSQL alike."""
