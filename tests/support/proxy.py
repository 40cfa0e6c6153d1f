"""A way to a server that can be closed for a while: what is behind it is then away, or hangs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit


class Proxy:
    """Passes bytes between 127.0.0.1 and a server; a context manager."""

    def __init__(self, target: str | Path) -> None:
        """target is an http URL, or the path of a socket."""
        self._target = target
        self._listener = self._listen(0)
        self._port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._is_hanging = False
        self._cut_after: int | None = None
        self._cut_at: bytes | None = None
        self._hang_after: int | None = None
        self.n_cut = 0
        """Connections that were cut while both ends held them."""
        self.n_cut_at = 0
        """Connections that were cut at what their server sent."""
        self.n_bytes_back = 0
        """What the server's answers had so far, heads and all."""
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    @property
    def url(self) -> str:
        """Where the server is reached through this."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def port(self) -> int:
        """The same, for what is not HTTP."""
        return self._port

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Cut all connections, and refuse new ones."""
        self._close()
        try:
            yield
        finally:
            self._listener = self._listen(self._port)
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Accept connections, and never answer."""
        self._is_hanging = True
        try:
            yield
        finally:
            self._is_hanging = False
            self._cut()

    @contextmanager
    def cutting(self, after: int) -> Iterator[None]:
        """Cut every connection once the server has sent so many bytes through it."""
        self._cut_after = after
        try:
            yield
        finally:
            self._cut_after = None

    @contextmanager
    def cutting_at(self, words: bytes) -> Iterator[None]:
        """Cut every connection once the server has sent these, which do not pass."""
        self._cut_at = words
        try:
            yield
        finally:
            self._cut_at = None

    @contextmanager
    def sticking(self, after: int) -> Iterator[None]:
        """Pass nothing on once the server has sent so many bytes through a connection, and hold it open."""
        self._hang_after = after
        try:
            yield
        finally:
            self._hang_after = None
            self._cut()

    def _listen(self, port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
        return listener

    def _close(self) -> None:
        with suppress(OSError):  # wakes the thread that waits for a connection
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._cut()

    def _cut(self) -> None:
        with self._lock:
            self.n_cut += len(self._open) // 2
            for end in self._open:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _connect(self) -> socket.socket:
        if isinstance(self._target, Path):
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(self._target))
            return server
        parts = urlsplit(self._target)
        return socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 80))

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client, self._connect() as server:
            with self._lock:
                self._open |= {client, server}
            back = threading.Thread(target=self._pass_back, args=(server, client), daemon=True)
            back.start()
            self._pass(client, server)
            back.join()
            with self._lock:
                self._open -= {client, server}

    def _pass_back(self, server: socket.socket, client: socket.socket) -> None:
        n_left = self._cut_after if self._cut_after is not None else self._hang_after
        if self._cut_at is not None:
            n_left = 0
            self._pass_until(server, client, self._cut_at)
        with suppress(OSError):
            while n_left is not None and n_left > 0 and (data := server.recv(min(1 << 16, n_left))):
                client.sendall(data)
                n_left -= len(data)
                self._count(data)
            while self._hang_after is not None and n_left == 0:
                threading.Event().wait(0.05)
        if n_left is None:
            self._pass(server, client, self._count)
        for end in (server, client):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _pass_until(self, server: socket.socket, client: socket.socket, words: bytes) -> None:
        seen = b""
        with suppress(OSError):
            while data := server.recv(1 << 16):
                seen = seen[-len(words) :] + data
                if words in seen:
                    with self._lock:
                        self.n_cut_at += 1
                    return
                client.sendall(data)

    def _count(self, data: bytes) -> None:
        with self._lock:
            self.n_bytes_back += len(data)

    def _pass(
        self, source: socket.socket, sink: socket.socket, passed: Callable[[bytes], None] = lambda _: None
    ) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                while self._is_hanging:
                    threading.Event().wait(0.05)
                sink.sendall(data)
                passed(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
