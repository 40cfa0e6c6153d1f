"""Every setting of the service, read once at start from GNOMON_* environment variables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from gnomon.errors import InvalidRequest

PLACEHOLDERS = frozenset(
    {"admin", "change-me", "change_me", "changeit", "changeme", "example", "password", "postgres", "secret"}
)
"""Passwords that stand in published examples; a database behind one of them is open to everyone."""

MIB = 2**20


class Settings(BaseSettings):
    """Settings of the API, the dispatcher and `gnomon up`; each field is GNOMON_<NAME> in the environment."""

    model_config = SettingsConfigDict(env_prefix="GNOMON_", frozen=True, use_attribute_docstrings=True)

    home: Path = Path("~/.gnomon")
    """Folder of everything that has no other place: database, store, inputs, logs, the CLI's key."""
    database_url: str = ""
    """sqlite:///path or postgresql://user:password@host/name; default: gnomon.db in the home folder."""
    storage_root: str = ""
    """URL under which activations and dictionaries lie; default: store/ in the home folder."""
    input_roots: Annotated[tuple[str, ...], NoDecode] = ()
    """Roots that text and local models may be read from, comma-separated or a JSON list; default: inputs/
    in the home folder, and the working directory."""
    host: str = "127.0.0.1"
    """Address the API listens on."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 7600
    """Port the API listens on; 0 = any free one."""
    ray_address: Annotated[str, StringConstraints(pattern=r"^[^\s:/]+:[0-9]{1,5}$")] | None = None
    """host:port of the Ray cluster; None = the one that `gnomon up` starts."""
    ray_namespace: Annotated[str, Field(min_length=1)] = "gnomon"
    """Namespace of the gangs on the Ray cluster."""
    n_cpus: Annotated[int, Field(ge=1)] | None = None
    """CPUs that a local Ray offers; None = all."""
    object_store_bytes: Annotated[int, Field(ge=80 * MIB)] = 512 * MIB
    """Shared memory that a local Ray may take; activations do not pass through it."""
    lease_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """A job whose lease was not renewed for this long may be taken over by another dispatcher."""
    beat_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between two renewals of a lease."""
    stall_s: Annotated[float, Field(gt=0)] = 600.0
    """Leases are no longer renewed when the dispatcher's loop has stood still for this long."""
    poll_s: Annotated[float, Field(gt=0)] = 0.5
    """Seconds between two looks at the queue and at running jobs."""
    retry_base_s: Annotated[float, Field(ge=0)] = 1.0
    """Pause before the second attempt; doubles with every attempt."""
    retry_cap_s: Annotated[float, Field(ge=0)] = 60.0
    """Longest pause between two attempts."""
    cancel_grace_s: Annotated[float, Field(ge=0)] = 5.0
    """Seconds a cancelled job has to stop by itself before it is killed."""
    leave_grace_s: Annotated[float, Field(ge=0)] = 120.0
    """Seconds a job that is paused or preempted has to save what it has; what it has not saved is done again."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = MIB
    """Largest request body."""
    max_json_depth: Annotated[int, Field(ge=4, le=200)] = 32
    """Deepest nesting of a request body."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Longest time a client may take to send a body."""
    reading_s: Annotated[float, Field(gt=0)] = 20.0
    """Longest time a submit waits while the model and text that it names are read; then it is told to ask again."""
    requests_per_s: Annotated[float, Field(gt=0)] = 200.0
    """Requests that one key may send to one API process, on average; two seconds' worth of them at once."""
    resumable_days: Annotated[float, Field(ge=0, le=36_500)] = 30.0
    """Days for which what failed and cancelled jobs left in the store is kept for `gnomon resume`; 0 = for ever."""
    store_days: Annotated[float, Field(ge=0, le=36_500)] = 0.0
    """Days after their last use after which activation stores are deleted; 0 = they are kept."""
    dictionary_grace_days: Annotated[float, Field(ge=0, le=36_500)] = 7.0
    """Days between the deletion of a dictionary and that of its files; it can be restored until then."""
    events_days: Annotated[float, Field(ge=0, le=36_500)] = 90.0
    """Days for which events of a job that has ended are kept, beside its states; 0 = for ever."""
    price_gpu_hour: Annotated[float, Field(ge=0)] | None = None
    """What an hour of a GPU costs; plans then tell what jobs would cost. None = they do not."""
    price_cpu_hour: Annotated[float, Field(ge=0)] | None = None
    """What an hour of a core costs, where jobs run on cores."""
    currency: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]{1,16}$")] | None = None
    """Of the prices, as it is to be shown: "EUR", say."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severity that is logged."""

    @field_validator("input_roots", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @field_validator("database_url")
    @classmethod
    def _check_database_url(cls, value: str) -> str:
        if not value:
            return value
        scheme = value.partition(":")[0]
        if scheme not in ("sqlite", "postgresql", "postgresql+psycopg"):
            raise ValueError(f"scheme {scheme!r} is not supported; use sqlite:///path or postgresql://...")
        password = unquote(urlsplit(value).password or "")
        if password.lower() in PLACEHOLDERS or (password.startswith("<") and password.endswith(">")):
            raise ValueError("the database password is a placeholder; set one of your own")
        return value

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        values = dict(values)
        home = Path(str(values.get("home") or "~/.gnomon")).expanduser().absolute()
        values["home"] = home
        values["database_url"] = values.get("database_url") or f"sqlite:///{home / 'gnomon.db'}"
        values["storage_root"] = (values.get("storage_root") or f"file://{home / 'store'}").rstrip("/")
        values["input_roots"] = values.get("input_roots") or (str(home / "inputs"), str(Path.cwd()))
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beat_s * 2 > self.lease_s:
            raise ValueError(
                f"beat_s={self.beat_s:g} leaves a lease of lease_s={self.lease_s:g} no second chance; "
                "use a beat of at most half the lease"
            )
        if self.home == Path(self.home.anchor):
            raise ValueError("home is the root of the file system; name a folder")
        return self

    @property
    def project_root(self) -> str:
        """URL of the folder that holds all projects' bytes."""
        return f"{self.storage_root}/projects"

    def make_folders(self) -> None:
        """Create the home folder, for its owner only, and what lies in it."""
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in ("inputs", "logs"):
            (self.home / name).mkdir(exist_ok=True)


def load_settings(**overrides: Any) -> Settings:
    """Settings from the environment, with overrides; raises InvalidRequest, naming the variable at fault."""
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        raise InvalidRequest(_describe(error), code="invalid_settings") from error


def _describe(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        name = "_".join(str(part) for part in item["loc"]).upper()
        lines.append(f"GNOMON_{name}: {item['msg']}" if name else item["msg"].removeprefix("Value error, "))
    return "; ".join(lines)
