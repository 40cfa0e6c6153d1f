"""API keys: gnm_<id>_<secret>. The secret is 32 random bytes and a checksum; only its hash is stored."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal, get_args

from sqlalchemy import RowMapping, case, func, insert, not_, or_, select, update

from gnomon.errors import Forbidden, InvalidRequest, NotFound, Unauthenticated
from gnomon.resources import ApiKey, NewApiKey
from gnomon_service.db.engine import Database, database_now
from gnomon_service.db.reads import with_times
from gnomon_service.db.tables import api_keys

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_PROJECT = "default"
LONGEST_LIFE_S: Final = 10**9
"""Of a key that expires: thirty years."""

_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_CHARS, _SECRET_CHARS, _CHECK_CHARS = 12, 43, 6
_KEY = re.compile(rf"gnm_([0-9A-Za-z]{{{_ID_CHARS}}})_([0-9A-Za-z]{{{_SECRET_CHARS + _CHECK_CHARS}}})")
_NO_HASH = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who is asking, as their key tells."""

    key_id: str
    project: str
    scopes: frozenset[str]
    label: str = ""
    """The key's name, given by people."""

    @property
    def name(self) -> str:
        """How others are told who it was: the key's name and id."""
        return f"{self.label} ({self.key_id})" if self.label else self.key_id

    def require(self, scope: Scope) -> None:
        """Raise Forbidden if the key lacks a scope; admin implies all, write implies read."""
        implied = {"read": {"read", "write", "admin"}, "write": {"write", "admin"}, "admin": {"admin"}}
        if not self.scopes & implied[scope]:
            raise Forbidden(
                f"this needs scope {scope!r}; key {self.key_id!r} has {', '.join(sorted(self.scopes))}",
                code="missing_scope",
            )


class Keys:
    """API keys in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self, *, project: str, name: str, scopes: tuple[Scope, ...], expires_in_s: float | None = None
    ) -> NewApiKey:
        """Make a key; the only time its text is known. Raises InvalidRequest where it would live too long."""
        if expires_in_s is not None and not abs(expires_in_s) <= LONGEST_LIFE_S:  # NaN is refused as well
            raise InvalidRequest(
                f"expires_in_s={expires_in_s!r}, wanted {LONGEST_LIFE_S} at most; leave it out for a key that does not "
                "expire"
            )
        key_id, text = _make_key()
        values = {
            "id": key_id,
            "project": project,
            "name": name,
            "secret_hash": _hash(text),
            "scopes": list(scopes),
            "created_at": database_now(),
            "expires_at": None if expires_in_s is None else database_now() + expires_in_s,
        }
        with self._database.write() as connection:
            row = connection.execute(insert(api_keys).values(values).returning(api_keys)).mappings().one()
            return NewApiKey.read({**with_times(row), "key": text})  # what cannot be read is not committed

    def list(self, project: str) -> list[ApiKey]:
        """Every key of a project, newest first, revoked and expired ones included."""
        statement = select(api_keys).where(api_keys.c.project == project)
        with self._database.read() as connection:
            rows = connection.execute(statement.order_by(api_keys.c.created_at.desc(), api_keys.c.id)).mappings().all()
        return [ApiKey.read(with_times(row)) for row in rows]

    def revoke(self, project: str, key_id: str) -> None:
        """Refuse a key from now on; harmless if it was revoked before. Raises NotFound."""
        revoked_at = case((api_keys.c.revoked_at.is_(None), database_now()), else_=api_keys.c.revoked_at)
        statement = (
            update(api_keys).where(api_keys.c.id == key_id, api_keys.c.project == project).values(revoked_at=revoked_at)
        )
        with self._database.write() as connection:
            if not connection.execute(statement).rowcount:
                raise NotFound(f"no key {key_id!r} in this project; list the keys", code="key_not_found")

    def authenticate(self, text: str | None) -> Principal:
        """Who holds this key; raises Unauthenticated. Nothing is cached: a revocation counts at once."""
        if not text:
            raise Unauthenticated("no API key; send the header 'Authorization: Bearer gnm_...'", code="missing_key")
        match = _KEY.fullmatch(text)
        row = self._find(match.group(1)) if match and _is_checked(match.group(2)) else None
        # Compared whether or not the key exists, so that neither time nor answer tells which part is wrong.
        is_right = hmac.compare_digest(_hash(text), row["secret_hash"] if row is not None else _NO_HASH)
        if row is None or not is_right or row["revoked_at"] is not None:
            raise Unauthenticated(
                "this API key is not valid here; check that it was copied whole, or make a new one",
                code="invalid_key",
            )
        if row["is_expired"]:
            raise Unauthenticated(f"API key {row['id']!r} has expired; make a new one", code="expired_key")
        scopes = frozenset(row["scopes"])
        return Principal(key_id=row["id"], project=row["project"], scopes=scopes, label=row["name"][:80])

    def valid(self, key_ids: Collection[str]) -> set[str]:
        """Those of keys that were right before which still are: neither revoked nor expired."""
        is_over = or_(api_keys.c.revoked_at.is_not(None), func.coalesce(api_keys.c.expires_at <= database_now(), False))
        statement = select(api_keys.c.id).where(api_keys.c.id.in_(key_ids), not_(is_over))
        with self._database.read() as connection:
            return set(connection.execute(statement).scalars())

    def _find(self, key_id: str) -> RowMapping | None:
        is_expired = case((api_keys.c.expires_at <= database_now(), True), else_=False).label("is_expired")
        with self._database.read() as connection:
            statement = select(api_keys, is_expired).where(api_keys.c.id == key_id)
            return connection.execute(statement).mappings().one_or_none()


def _make_key() -> tuple[str, str]:
    key_id = "".join(secrets.choice(_BASE62) for _ in range(_ID_CHARS))
    secret = _base62(int.from_bytes(secrets.token_bytes(32)), _SECRET_CHARS)
    return key_id, f"gnm_{key_id}_{secret}{_checksum(secret)}"


def _base62(number: int, n_chars: int) -> str:
    digits = []
    for _ in range(n_chars):
        number, digit = divmod(number, 62)
        digits.append(_BASE62[digit])
    return "".join(reversed(digits))


def _checksum(secret: str) -> str:
    return _base62(zlib.crc32(secret.encode()), _CHECK_CHARS)


def _is_checked(secret: str) -> bool:
    return _checksum(secret[:_SECRET_CHARS]) == secret[_SECRET_CHARS:]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
