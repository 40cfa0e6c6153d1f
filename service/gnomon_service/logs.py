"""Logging: one JSON object per line on stderr."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

_MAX_CHARS = 4096
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonFormatter(logging.Formatter):
    """A record as one line of ASCII JSON: nothing in a field can start a new line or reach the terminal."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": _cut(record.getMessage()),
        }
        line |= {key: _cut(value) for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["exception"] = _cut(self.formatException(record.exc_info))
        return json.dumps(line, default=str)


def _cut(value: Any) -> Any:
    if isinstance(value, bool | int | float | None):
        return value
    text = str(value)
    if len(text) <= _MAX_CHARS:
        return text
    # the end of a trace says why, its beginning says where from
    return f"{text[: _MAX_CHARS // 4]}... ({len(text)} characters) ...{text[-3 * _MAX_CHARS // 4 :]}"


def setup_logging(process: str, level: str) -> None:
    """Send every logger of this process to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("alembic", "httpx2", "httpcore2", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
