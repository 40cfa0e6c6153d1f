"""Where the service is and which key opens it: arguments, environment, or the file `gnomon up` writes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from gnomon.errors import InvalidRequest

CLIENT_FILE = "client.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """One server and how to talk to it."""

    url: str
    key: str | None = field(default=None, repr=False)
    """API key; never shown."""
    timeout_s: float = 30.0
    """Longest wait for a connection or for bytes."""
    n_attempts: int = 4
    """Times a request that may be repeated is sent at most."""

    @property
    def is_loopback(self) -> bool:
        """The server is on this machine."""
        return urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")


def home() -> Path:
    """Folder of files for this user: $GNOMON_HOME, or ~/.gnomon."""
    return Path(os.environ.get("GNOMON_HOME") or Path.home() / ".gnomon")


def resolve_settings(
    url: str | None = None, key: str | None = None, *, timeout_s: float = 30.0, n_attempts: int = 4
) -> ClientSettings:
    """Settings from arguments, GNOMON_URL and GNOMON_API_KEY, and client.json, in this order.

    The key in the file is used for the URL in the file only: it is never sent to another server.
    Raises InvalidRequest where there is no URL, or a value cannot be used.
    """
    stored = _read_client_file(home() / CLIENT_FILE)
    found = _clean_url(url or os.environ.get("GNOMON_URL") or stored.get("url"))
    key = key or os.environ.get("GNOMON_API_KEY") or None
    if key is None and stored.get("url", "").rstrip("/") == found:
        key = stored.get("key")
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise InvalidRequest("the API key contains characters that no key has; copy it again", code="bad_key")
    return ClientSettings(url=found, key=key, timeout_s=timeout_s, n_attempts=n_attempts)


def _clean_url(url: str | None) -> str:
    if not url:
        raise InvalidRequest(
            "no service URL: pass url= (in the command line --url), set GNOMON_URL, or start a service here with "
            "`gnomon up`",
            code="not_configured",
        )
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidRequest(f"{url!r} is not the URL of a service; wanted http(s)://host[:port]", code="bad_url")
    return url.rstrip("/")


def _read_client_file(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"{str(path)!r} cannot be read ({error}); fix or remove it", code="not_configured"
        ) from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"{str(path)!r} is not a JSON object; fix or remove it", code="not_configured")
    return {name: value for name, value in content.items() if isinstance(value, str)}
