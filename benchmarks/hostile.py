"""Does the service answer while it is fed what should hurt it, all at once?

    python benchmarks/hostile.py

Starts a service whose way to S3 hangs, and sends at once and again and again: jobs on a parquet of 1.3 kB that
unpacks to gigabytes, a text of 1.5 GB, a body with 500,000 wrong items, a file pattern with 24 stars, a checkpoint
that lists 8,000 modules with layers, and requests that look at the store. Meanwhile /healthz is asked for 50 times a
second, and the memory of the API process is watched. Prints how long /healthz took, the most memory, and what each
request was answered; ends with 1 where health took more than 50 ms (99th percentile) or memory more than 400 MiB.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx2
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from tests.support.models import make_glassllm, make_lists_of_layers
from tests.support.proxy import Proxy
from tests.support.seaweed import environment, new_place, s3_server

from gnomon_service.local.embedded import Embedded
from gnomon_service.settings import load_settings

WATCHED_S = 60.0
HEALTH_S = 0.05
MEMORY_MIB = 400


def main() -> int:
    """Run, and say how it went."""
    with tempfile.TemporaryDirectory(prefix="gnomon-hostile-") as folder:
        home = Path(folder)
        bodies = make_inputs(home / "inputs")
        (home / "weed").mkdir()
        with (
            s3_server(home / "weed") as variables,
            Proxy(variables["AWS_ENDPOINT_URL"]) as proxy,
            environment(variables | {"AWS_ENDPOINT_URL": proxy.url}),
        ):
            settings = load_settings(
                home=home, port=0, n_cpus=1, storage_root=new_place(), input_roots=(str(home / "inputs"),)
            )
            with Embedded(settings) as service, proxy.hanging():
                return watch(service.url, service.key, bodies)


def make_inputs(folder: Path) -> dict[str, bytes]:
    """Files that should hurt, and the bodies that name them, by what they are."""
    folder.mkdir()
    make_glassllm(folder / "model")
    column = pa.array(["x" * 60_000]).dictionary_encode()
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 70_000, pa.int32()), column.dictionary)
    pq.write_table(pa.table({"text": rows}), folder / "bomb.parquet", compression="zstd")
    with (folder / "long.txt").open("wb") as file:
        for _ in range(1500):
            file.write(b"all work and no play " * 50_000)
    (folder / "a.jsonl").write_text('{"text": "hello"}\n' * 100)
    make_lists_of_layers(folder / "lists")
    text = {"url": str(folder / "a.jsonl")}

    def body(model: str = "model", url: str | None = None) -> bytes:
        spec = {"kind": "harvest", "model": {"source": str(folder / model)}, "token_budget": 10_000}
        return json.dumps(
            {"spec": spec | {"text": [{"url": url} if url else text], "hooks": ["model.layers.1"]}}
        ).encode()

    wrong = {"spec": {"kind": "harvest", "hooks": [1] * 500_000}}
    return {
        "1.3 kB of parquet": body(url=str(folder / "bomb.parquet")),
        "1.5 GB of text": body(url=str(folder / "long.txt")),
        "500,000 wrong items": json.dumps(wrong, separators=(",", ":")).encode()[: 1 << 20],
        "24 stars": body(url=str(folder / ("*a" * 24 + "b.jsonl"))),
        "8,000 lists of layers": body("lists"),
    }


def watch(url: str, key: str, bodies: dict[str, bytes]) -> int:
    """Send everything, and look how the API bears it."""
    api = next(each for each in psutil.process_iter() if _is_api(each, url))
    until, answers = time.monotonic() + WATCHED_S, Counter[str]()

    def again(name: str, ask: Callable[[httpx2.Client], Any]) -> None:
        with httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120) as client:
            while time.monotonic() < until:
                try:
                    answer = ask(client)
                    code = answer.json().get("code", "") if answer.status_code >= 400 else ""
                    answers[f"{name}: {answer.status_code} {code}"] += 1
                except httpx2.TransportError as error:
                    answers[f"{name}: {type(error).__name__}"] += 1

    json_type = {"Content-Type": "application/json"}
    asks: list[tuple[str, Callable[[httpx2.Client], Any]]] = [
        (name, lambda client, body=body: client.post("/v1/jobs", content=body, headers=json_type))  # type: ignore[misc]
        for name, body in bodies.items()
    ]
    asks += [("/readyz", lambda client: client.get("/readyz"))] * 8
    threads = [threading.Thread(target=again, args=ask, daemon=True) for ask in asks]
    for thread in threads:
        thread.start()
    took_s, most_bytes = [], 0
    with httpx2.Client(base_url=url, timeout=60) as client:
        while time.monotonic() < until:
            began = time.monotonic()
            client.get("/healthz").raise_for_status()
            took_s.append(time.monotonic() - began)
            most_bytes = max(most_bytes, api.memory_info().rss)
            time.sleep(max(0.0, 0.02 - took_s[-1]))
    took_s.sort()
    slow_s = took_s[int(0.99 * len(took_s))]
    median, longest = (1e3 * took_s[at] for at in (len(took_s) // 2, -1))
    print(
        f"/healthz asked {len(took_s)} times: median {median:.1f} ms, 99th percentile {1e3 * slow_s:.1f} ms, longest "
        f"{longest:.1f} ms; API memory at most {most_bytes / 2**20:.0f} MiB"
    )
    for what, n_times in sorted(answers.items()):
        print(f"  {what}  x{n_times}")
    return int(slow_s > HEALTH_S or most_bytes > MEMORY_MIB * 2**20)


def _is_api(process: psutil.Process, url: str) -> bool:
    try:
        ports = {each.laddr.port for each in process.net_connections("tcp") if each.status == "LISTEN"}
    except psutil.Error:
        return False
    return int(url.rsplit(":", 1)[1]) in ports


if __name__ == "__main__":
    sys.exit(main())
