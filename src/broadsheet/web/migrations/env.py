"""Alembic runs this: migrations on the connection that `db.migrate` hands over."""

from alembic import context
from sqlalchemy import text

from broadsheet.web.tables import Table

connection = context.config.attributes["connection"]
if connection.dialect.name == "postgresql":
    connection.execute(text("select pg_advisory_xact_lock(72)"))  # two that start at once: one waits, then finds all done
context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
