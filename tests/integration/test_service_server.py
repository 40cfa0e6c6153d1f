"""What needs a real server and real sockets: streams that stay open, and bodies that stay away."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import uvicorn

from gnomon_service.rest.connections import Connection
from tests.support.service_api import Service, running_service
from tests.support.service_jobs import STORE_RESULT
from tests.support.waiting import LIMIT_S, wait_until


class Hasty(Connection):
    head_s = 1.0


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Service, str]]:
    with running_service(tmp_path, body_timeout_s=0.3) as service:
        config = uvicorn.Config(
            service.app, host="127.0.0.1", port=0, http=Hasty, log_config=None, timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        wait_until(lambda: server.started, "the server's start", every_s=0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield service, f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join()


def ids_of(answer: httpx2.Response) -> Iterator[int]:
    """The ids of the events of an open stream, as they come."""
    return (int(line[4:]) for line in answer.iter_lines() if line.startswith("id: "))


def test_a_stream_follows_a_job_and_resumes_where_it_broke(served: tuple[Service, str]) -> None:
    service, url = served
    job = service.submit(service.harvest())
    path = f"{url}/v1/jobs/{job.id}/events"
    headers = {"Authorization": f"Bearer {service.key}", "Accept": "text/event-stream"}
    with httpx2.stream("GET", path, headers=headers, timeout=LIMIT_S) as answer:
        ids = ids_of(answer)
        assert next(ids) == 1
        held = service.bench.claim()
        assert next(ids) == 2
    service.bench.leases.record(held.lease, [(1, "log", {"message": "while nobody listened"})])
    with httpx2.stream("GET", path, headers=headers | {"Last-Event-ID": "2"}, timeout=LIMIT_S) as answer:
        service.bench.leases.succeed(held.lease, STORE_RESULT)
        assert list(ids_of(answer)) == [3, 4, 5], "and then the stream ended by itself"


@pytest.mark.parametrize("head", ["", "GET /healthz HTTP/1.1\r\nHost: x\r\n"], ids=["nothing", "half a head"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_connection_that_does_not_ask_is_closed(served: tuple[Service, str], head: str, is_first: bool) -> None:
    _, url = served
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=LIMIT_S) as connection:
        if not is_first:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in connection.recv(1000)
        connection.sendall(head.encode())
        answers = b""
        while received := connection.recv(1000):
            answers += received
        assert b"HTTP/1.1 2" not in answers


def test_an_answer_may_take_longer_than_a_request(served: tuple[Service, str]) -> None:
    service, url = served
    job = service.submit(service.harvest())
    headers = {"Authorization": f"Bearer {service.key}", "Accept": "text/event-stream"}
    with httpx2.stream("GET", f"{url}/v1/jobs/{job.id}/events", headers=headers, timeout=LIMIT_S) as answer:
        ids = ids_of(answer)
        assert next(ids) == 1
        threading.Event().wait(2 * Hasty.head_s)
        service.bench.claim()
        assert next(ids) == 2


def test_a_body_that_does_not_arrive_is_given_up(served: tuple[Service, str]) -> None:
    service, url = served
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.key}\r\nContent-Length: 100\r\n\r\n{{"
    with socket.create_connection((host, int(port)), timeout=LIMIT_S) as connection:
        connection.sendall(head.encode())
        assert b" 408 " in connection.recv(1000)
