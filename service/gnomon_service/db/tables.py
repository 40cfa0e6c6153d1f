"""The tables. Times are seconds since 1970 by the database's clock; JSON is kept as text in both dialects."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

LEGAL_TRANSITIONS: tuple[tuple[str, str], ...] = (
    ("queued", "scheduled"),  # claimed
    ("queued", "succeeded"),  # there was nothing to do: the store is sealed
    ("queued", "failed"),  # deadline, or a dependency failed
    ("queued", "cancelled"),
    ("scheduled", "running"),
    ("scheduled", "queued"),  # lost before it ran
    ("scheduled", "failed"),
    ("scheduled", "cancelled"),
    ("running", "queued"),  # lost
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "cancelled"),
    ("failed", "queued"),  # resumed
    ("cancelled", "queued"),
)
"""Every change of a job's state that the database lets pass; copied into the table of the same name."""

legal_transitions = Table(
    "legal_transitions",
    metadata,
    Column("from_state", String(16), primary_key=True),
    Column("to_state", String(16), primary_key=True),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("project", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("name", String(128), nullable=False, default=""),
    Column("state", String(16), nullable=False, default="queued"),
    Column("job_class", String(8), nullable=False, server_default="normal"),  # as gnomon.specs.JobClass
    Column("priority", Integer, nullable=False, default=0),
    Column("spec", JSON, nullable=False),
    Column("store_id", String(40), nullable=False),
    Column("dictionary_id", String(40)),
    Column("made_for", String(40)),  # the job that this harvest was made for, if nobody asked for it by itself
    Column("attempt", Integer, nullable=False, default=0),
    Column("max_attempts", Integer, nullable=False),
    Column("n_losses", Integer, nullable=False, server_default="0"),  # in a row, since anything was committed
    Column("not_before", Float, nullable=False, default=0.0),
    Column("deadline_at", Float),
    Column("cancel_requested", Boolean, nullable=False, default=False),
    Column("paused_by", String(128)),  # a key; the job waits until somebody resumes it
    Column("leave_why", String),  # its attempt was asked to save what it has and leave; NULL = it was not
    Column("places", JSON(none_as_null=True)),  # node of each device that the attempt holds
    Column("places_wanted", JSON(none_as_null=True)),  # those that it shall hold, where they are others
    Column("mesh", JSON(none_as_null=True)),  # [dp, features], fixed by the first attempt of a training
    Column("expected_s", Float),  # how long a training is expected to run, as it was planned
    Column("guest_until", Float),  # it holds room that is promised to another job from then on
    Column("waits_in_queue", JSON(none_as_null=True)),  # position, ahead and reason, as the scheduler saw it last
    Column("lease_owner", String(128)),
    Column("lease_until", Float),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("progress", JSON(none_as_null=True)),
    Column("error_code", String(64)),
    Column("error_message", String),
    Column("result", JSON(none_as_null=True)),
    Column("n_events", Integer, nullable=False, default=0),
    Column("idempotency_key", String(255)),
    Column("body_hash", String(64)),
    Column("leftovers", String(8), nullable=False, server_default="kept"),  # in the store: kept, deleting or deleted
    UniqueConstraint("project", "idempotency_key"),
    Index("ix_jobs_ready", "state", "priority", "created_at"),
    Index("ix_jobs_of_project", "project", "created_at", "id"),
    Index("ix_jobs_of_store", "project", "store_id"),
)

job_events = Table(
    "job_events",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("id", Integer, primary_key=True, autoincrement=False),  # 1, 2, 3, ... within the job; some of them go
    Column("attempt", Integer, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("data", JSON, nullable=False),
)

job_dependencies = Table(
    "job_dependencies",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("depends_on", ForeignKey("jobs.id"), primary_key=True, index=True),
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("lease_owner", String(128), nullable=False),
    Column("state", String(16), nullable=False),  # live, succeeded, failed, lost, left or cancelled
    Column("last_report_seq", Integer, nullable=False, default=0),
    Column("n_devices", Integer, nullable=False, server_default="0"),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float),
    Column("released", Boolean, nullable=False, default=False),  # nothing of it is left on the cluster
    Column("code", String(64)),
    Column("message", String),
    Index("ix_attempts_unreleased", "released", "ended_at"),
)

activation_stores = Table(
    "activation_stores",
    metadata,
    Column("project", String(64), primary_key=True),
    Column("id", String(40), primary_key=True),
    Column("state", String(16), nullable=False),  # as gnomon.resources.StoreState
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("n_rows", BigInteger),
    Column("n_held_out_rows", BigInteger),
    Column("n_bytes", BigInteger),
    Column("hooks", JSON, nullable=False),
    Column("location", String, nullable=False),
    Column("spec", JSON, nullable=False),
    Column("deleted_why", String),
)

dictionaries = Table(
    "dictionaries",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("project", String(64), nullable=False),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("name", String(128), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("store_id", String(40), nullable=False),
    Column("hook_name", String(256), nullable=False),
    Column("d_in", Integer, nullable=False),
    Column("d_sae", Integer, nullable=False),
    Column("activation", String(32), nullable=False),
    Column("alignment", String(16), nullable=False),
    Column("location", String, nullable=False),
    Column("files", JSON, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("state", String(16), nullable=False, server_default="published"),  # as gnomon.resources.DictionaryState
    Column("deleted_why", String),
    Column("purge_at", Float),  # from then on its files are deleted
    ForeignKeyConstraint(["project", "store_id"], ["activation_stores.project", "activation_stores.id"]),
    Index("ix_dictionaries_of_project", "project", "created_at", "id"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("project", String(64), nullable=False),
    Column("name", String(128), nullable=False),
    Column("secret_hash", String(64), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
)

cluster = Table(
    "cluster",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # always 1
    Column("seen_at", Float),  # when the cluster answered last; NULL = never
    Column("n_cpus", Float, nullable=False, default=0.0),
    Column("n_gpus", Float, nullable=False, default=0.0),
    Column("n_nodes", Integer, nullable=False, default=0),
    Column("dispatcher_at", Float),  # when a dispatcher's loop last came round
    Column("leader", String(128)),  # the dispatcher that decides what is started
    Column("leader_until", Float),
    Column("drained_by", String(128)),  # a key; nothing is started until somebody ends that
    Column("collected_at", Float),  # when the leader last looked for what may be deleted
    Column("collected", JSON(none_as_null=True)),  # what it deleted last
)

nodes = Table(
    "nodes",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(255), nullable=False),
    Column("n_cpus", Float, nullable=False),
    Column("n_gpus", Float, nullable=False),
    Column("memory_bytes", BigInteger),
    Column("gpu_memory_bytes", BigInteger),  # of one of its GPUs
    Column("seen_at", Float, nullable=False),  # older than the cluster's own: it is gone
    Column("drained_by", String(128)),
)

projects = Table(
    "projects",
    metadata,
    Column("name", String(64), primary_key=True),  # one that is absent has what is written here by default
    Column("weight", Float, nullable=False, server_default="1"),
    Column("n_jobs_most", Integer),
    Column("n_devices_most", Integer),
    Column("n_store_bytes_most", BigInteger),  # above it, the stores that were not used for longest go
    Column("held_by", String(128)),  # a key; nothing of the project is started until somebody ends that
)
