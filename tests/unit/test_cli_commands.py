"""The command line: what it prints, for people and programs, and how it fails."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import stamina
import typer.main
from typer.core import TyperGroup
from typer.testing import CliRunner

from gnomon import _command_parts, cli
from gnomon._job_view import show_job
from gnomon.errors import NotFound
from gnomon.metrics import DensityHistogram, DictionaryMetrics, Histogram, RowFvu
from gnomon.resources import Job
from gnomon.specs import JobRequest
from gnomon_service import commands, logs
from gnomon_service.local import embedded
from gnomon_service.settings import load_settings
from gnomon_storage.layout import ProjectLayout
from tests.support.activation_stores import make_counted_store
from tests.support.metrics import make_alignment
from tests.support.sdk_server import (
    HARVEST,
    HARVEST_RESULT,
    JOB_ID,
    KEY,
    NOW,
    URL,
    Script,
    answer,
    client_of,
    dictionary,
    event,
    job,
    problem,
    sse,
)

Run = Callable[..., tuple[int, str, str]]
DONE = event(4, "state", **{"from": "running", "to": "succeeded"})
SUCCEEDED = job(state="succeeded", result=HARVEST_RESULT)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run one command line against a scripted server; returns exit code, output and errors."""
    stamina.set_testing(True, attempts=2)
    monkeypatch.setenv("GNOMON_HOME", "/nonexistent")
    monkeypatch.setenv("COLUMNS", "200")

    def run_line(line: str, *answers: Any) -> tuple[int, str, str]:
        script = Script(*answers)
        monkeypatch.setattr(_command_parts, "Client", lambda _: client_of(script))
        code = cli.run(line.split())
        assert script.is_over
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run_line
    stamina.set_testing(False)


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    """A spec on disk."""
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(HARVEST))
    return path


def test_submit_prints_the_id_alone(run: Run, spec_file: Path) -> None:
    assert run(f"submit {spec_file} --name x", answer(job(), 201)) == (0, f"{JOB_ID}\n", "")


def test_submit_reads_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(HARVEST)))
    code, out, _ = run("submit - --json", answer(job(), 201))
    assert code == 0
    assert json.loads(out)["id"] == JOB_ID


@pytest.mark.parametrize("whole", [False, True])
def test_submit_asks_for_a_trace(run: Run, tmp_path: Path, whole: bool) -> None:
    train = {"kind": "train", "activations": {"kind": "store", "id": "act_" + "0" * 32}, "d_sae": 64}
    train |= {"token_budget": 10_000}
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"spec": train} if whole else train))
    sent: list[dict[str, Any]] = []

    def keep(request: httpx2.Request) -> httpx2.Response:
        sent.append(json.loads(request.content))
        return answer(job(), 201)

    assert run(f"submit {file} --profile 5", keep)[0] == 0
    assert sent[0]["spec"]["profile_steps"] == 5


def test_submit_and_wait_shows_the_result(run: Run, spec_file: Path) -> None:
    answers = [answer(job(), 201), answer(job()), sse(event(1), DONE), answer(SUCCEEDED)]
    code, out, err = run(f"submit {spec_file} --wait", *answers)
    assert code == 0
    assert str(HARVEST_RESULT["store_id"]) in out
    assert JOB_ID in err


def test_waiting_for_a_job_that_fails_is_exit_code_1_with_the_reason(run: Run) -> None:
    failed = job(state="failed", error={"code": "empty_corpus", "message": "no text in 'a.txt'"})
    code, out, err = run(f"watch {JOB_ID}", answer(failed), answer(failed))
    assert (code, out) == (1, "")
    assert "no text in 'a.txt'" in err
    assert "Traceback" not in err


def test_ctrl_c_detaches_and_says_that_the_job_goes_on(run: Run) -> None:
    def interrupt(_: httpx2.Request) -> httpx2.Response:
        raise KeyboardInterrupt

    code, _, err = run(f"watch {JOB_ID}", answer(job()), answer(job()), interrupt)
    assert code == 130
    assert f"job {JOB_ID} goes on" in err
    assert f"gnomon cancel {JOB_ID}" in err


@pytest.mark.parametrize(
    ("line", "page", "words"),
    [
        ("jobs --state running", [job(state="running")], [JOB_ID, "harvest", "running"]),
        ("dictionaries", [dictionary(metrics={"fvu": 0.1812})], ["model.layers.1", "0.1812", "orth"]),
        (
            "activations",
            [
                {
                    "id": "act_" + "0" * 32,
                    "state": "sealed",
                    "job_id": JOB_ID,
                    "created_at": NOW,
                    "n_rows": 12345,
                    "n_bytes": 2_000_000_000,
                    "hooks": {"model.layers.1": 128},
                    "location": "file:///x",
                    "spec": HARVEST,
                }
            ],
            ["sealed", "12,345", "2.00", "model.layers.1 (128)"],
        ),
        (
            "keys list",
            [{"id": "k1", "name": "laptop", "scopes": ["read"], "created_at": NOW}],
            ["k1", "laptop", "read"],
        ),
    ],
)
def test_lists_for_people_and_programs(run: Run, line: str, page: list[Any], words: list[str]) -> None:
    code, out, _ = run(line, answer({"items": page}))
    assert code == 0
    assert all(word in out for word in words)
    code, out, _ = run(f"{line} --json", answer({"items": page}))
    assert [item["id"] for item in json.loads(out)] == [item["id"] for item in page]


def test_job_shows_error_and_metrics(run: Run) -> None:
    failed = job(state="failed", error={"code": "x", "message": "disk full"}, name="[red]name")
    code, out, _ = run(f"job {JOB_ID}", answer(failed))
    assert code == 0
    assert "disk full (x)" in out
    assert "[red]name" in out


def test_job_with_variants_shows_each_dictionary(run: Run) -> None:
    made = {name: {"dictionary_id": f"dict_{name}", "metrics": {"fvu": fvu}} for name, fvu in (("a", 0.25), ("b", 0.5))}
    result = {
        "dictionary_id": "dict_a",
        "store_id": "act_a",
        "n_steps": 7,
        "metrics": {"fvu": 0.25},
        "dictionaries": made,
    }
    code, out, _ = run(f"job {JOB_ID}", answer(job(kind="train", state="succeeded", result=result)))
    assert code == 0 and "n_steps" in out
    assert [line.split() for line in out.splitlines()[-2:]] == [["a", "dict_a", "0.2500"], ["b", "dict_b", "0.5000"]]
    assert out.count("dict_a") == 1


def test_job_shows_the_gist_of_its_metrics_and_all_of_them_as_json(run: Run) -> None:
    many = tuple(n / 81 for n in range(82))
    metrics = DictionaryMetrics(
        fvu=0.18123456789,
        n_tokens=2048,
        density_histogram=DensityHistogram(log10_edges=many, counts=tuple(range(81))),
        row_fvu=RowFvu(p10=0.123456789, median=0.5, p90=1.0),
        alignment=make_alignment(histogram=Histogram(edges=many, counts=(1.0,) * 81)),
        tokens_per_s={"train": 4321.987654, "harvest": None},
    ).model_dump(mode="json")
    result = {"dictionary_id": "dict_a", "store_id": "act_a", "n_steps": 7, "metrics": metrics}
    found = job(kind="train", state="succeeded", result=result)
    _, out, _ = run(f"job {JOB_ID}", answer(found))
    lines = {line.split()[0]: line.split(None, 1)[1].strip() for line in out.splitlines()}
    assert lines["fvu"] == "0.181235" and lines["dictionary_id"] == "dict_a" and lines["n_steps"] == "7"
    assert lines["density_histogram"] == "count=3240.0 low=0.0123457 median=0.709877 high=1.0"
    assert lines["alignment"] == "1.0000000 to 1.0000000, median 1.0000000"
    assert lines["row_fvu"] == "p10=0.123457 median=0.5 p90=1.0"
    assert lines["tokens_per_s"] == "{train=4321.99, harvest=None}"
    assert max(map(len, out.splitlines())) < 120
    assert json.loads(run(f"job {JOB_ID} --json", answer(found))[1])["result"]["metrics"] == metrics


def test_a_harvest_that_nobody_named_is_listed_with_the_job_that_needs_it(run: Run) -> None:
    _, out, _ = run("jobs", answer({"items": [job(made_for="job_x"), job(name="mine", made_for="job_x"), job()]}))
    assert [line.split()[5:] for line in out.splitlines()[1:]] == [["for", "job_x"], ["mine"], []]


def test_text_from_elsewhere_cannot_drive_the_terminal(run: Run) -> None:
    _, out, _ = run("jobs", answer({"items": [job(name="\x9b31m\u202eevil")]}))
    assert "\x9b" not in out
    assert "\u202e" not in out
    assert "evil" in out


def test_logs_are_one_line_each(run: Run) -> None:
    times = {"gemm": 1 / 3, "parts": [2 / 3, 5]}
    measured = event(3, "metrics", loss=0.25, times_s=times)
    page = {"items": [event(1, "log", message="resuming\nfrom step 5"), event(2), measured]}
    code, out, _ = run(f"logs {JOB_ID}", answer(page))
    assert code == 0
    assert len(out.splitlines()) == 2
    assert "loss=0.25 times_s={gemm=0.333333, parts=[0.666667, 5]}" in out
    assert len(run(f"logs {JOB_ID} --all", answer(page))[1].splitlines()) == 3


def test_logs_follow_as_json_lines(run: Run) -> None:
    code, out, _ = run(f"logs {JOB_ID} --follow --json", sse(event(1), DONE))
    assert code == 0
    assert [json.loads(line)["id"] for line in out.splitlines()] == [1, 4]


def test_cancel_says_what_happens(run: Run) -> None:
    assert "asked to stop" in run(f"cancel {JOB_ID}", answer(job(cancel_requested=True)))[1]
    assert "has ended: succeeded" in run(f"cancel {JOB_ID}", answer(SUCCEEDED))[1]


def test_download_prints_the_folder(run: Run, tmp_path: Path) -> None:
    files = [answer(dictionary(files={"cfg.json": 2})), httpx2.Response(200, content=b"{}")]
    code, out, _ = run(f"download dict_x {tmp_path / 'out'}", *files)
    assert (code, out.strip()) == (0, str(tmp_path / "out"))
    assert (tmp_path / "out/cfg.json").read_bytes() == b"{}"


def test_key_is_issued_and_revoked(run: Run) -> None:
    made = {"id": "k1", "name": "n", "scopes": ["read"], "created_at": NOW, "key": "gnm_k1_secret"}
    assert run("keys issue n --scope read", answer(made, 201))[1] == "gnm_k1_secret\n"
    assert "k1 is revoked" in run("keys revoke k1", httpx2.Response(204))[1]


NODE = {"id": "f0", "name": "host-a", "n_cpus": 8, "n_gpus": 2, "memory_bytes": 2**35, "drained_by": None}
CLUSTER = {"seen_at": NOW, "n_cpus": 8, "n_gpus": 2, "n_nodes": 1, "nodes": [NODE]}


def test_a_job_that_waits_says_where_and_why(run: Run) -> None:
    place = {"position": 2, "ahead": ["job_x"], "code": "no_room", "message": "needs 4 GPUs, 2 free of 8"}
    code, out, _ = run(f"job {JOB_ID}", answer(job(queue=place, job_class="spare", priority=3)))
    assert code == 0
    assert "place 2: needs 4 GPUs, 2 free of 8" in out
    assert "spare, priority 3" in out
    _, out, _ = run("jobs", answer({"items": [job(queue=place)]}))
    assert "place 2: no_room" in out


def test_a_job_that_runs_says_on_what_and_how_long_still(run: Run) -> None:
    left = {"expected": 600.0, "least": 480.0, "most": 1200.0}
    _, out, _ = run(f"job {JOB_ID}", answer(job(state="running", n_devices=4, mesh=[1, 4], remaining_s=left)))
    assert "4 devices, mesh 1 x 4; 10 min (8 min to 20 min) left of this phase" in out
    _, out, _ = run(f"job {JOB_ID}", answer(job(state="running", leave_why="paused by ann")))
    assert "asked to leave: paused by ann" in out


def test_pause_says_what_comes_next(run: Run) -> None:
    code, out, _ = run(f"pause {JOB_ID}", answer(job(paused_by="me")))
    assert (code, out) == (0, f"{JOB_ID} is paused; `gnomon resume {JOB_ID}` lets it go on\n")
    _, out, _ = run(f"pause {JOB_ID}", answer(job(state="running", paused_by="me")))
    assert out.startswith(f"{JOB_ID} saves what it has, and is then paused")
    code, _, err = run(f"pause {JOB_ID}", problem(409, "job_ended", "job has ended as failed and cannot be paused"))
    assert code == 1
    assert "has ended as failed" in err


def test_change_sends_what_is_given(run: Run) -> None:
    code, out, _ = run(f"change {JOB_ID} --class spare", answer(job(job_class="spare")))
    assert (code, out) == (0, f"{JOB_ID} is of class spare and priority 0\n")
    code, _, err = run(f"change {JOB_ID}")
    assert code == 1
    assert "give --class or --priority" in err


def test_clone_changes_fields_of_the_spec(run: Run) -> None:
    sent: list[Any] = []

    def submit(request: httpx2.Request) -> httpx2.Response:
        sent.append(json.loads(request.content)["spec"])
        return answer(job(), 201)

    code, out, _ = run(f"clone {JOB_ID} --set model.dtype=float32 --set token_budget=8192", answer(job()), submit)
    assert (code, out) == (0, f"{JOB_ID}\n")
    assert (sent[0]["model"]["source"], sent[0]["model"]["dtype"]) == ("/models/tiny", "float32")
    assert (sent[0]["token_budget"], sent[0]["hooks"]) == (8192, HARVEST["hooks"])
    code, _, err = run(f"clone {JOB_ID} --set k")
    assert code == 1
    assert "FIELD=VALUE" in err


def test_hold_and_drain_say_how_things_are_now(run: Run) -> None:
    _, out, _ = run("hold", answer({"name": "p", "held_by": "ann (k)"}))
    assert out == "project p is held by ann (k): nothing of it is started\n"
    _, out, _ = run("hold --off", answer({"name": "p"}))
    assert out == "project p is not held\n"
    _, out, _ = run("drain", answer(CLUSTER | {"drained_by": "ann (k)"}))
    assert "ann (k)" in out


def test_a_node_is_drained_by_name_or_id(run: Run) -> None:
    drained = CLUSTER | {"nodes": [NODE | {"drained_by": "ann (k)"}]}
    for name in ("f0", "host-a"):
        code, out, _ = run(f"drain --node {name}", answer(CLUSTER), answer(drained))
        assert code == 0
        assert "32 GiB" in out
    code, _, err = run("drain --node elsewhere", answer(CLUSTER))
    assert code == 1
    assert "f0 (host-a)" in err


def test_cluster_is_shown(run: Run) -> None:
    seen = {"seen_at": NOW, "n_cpus": 16, "n_gpus": 1, "n_nodes": 2}
    assert "16" in run("cluster", answer(seen))[1]
    assert json.loads(run("cluster --json", answer(seen))[1])["n_gpus"] == 1


def test_env_prints_exports_for_a_shell(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNOMON_URL", URL)
    monkeypatch.setenv("GNOMON_API_KEY", KEY + "'; rm -rf /".replace(" ", ""))
    code, out, _ = run("env")
    assert code == 0
    shell = subprocess.run(
        ["sh", "-c", out + 'printf %s "$GNOMON_API_KEY"'], capture_output=True, text=True, check=True
    )
    assert shell.stdout == KEY + "';rm-rf/"


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (problem(401, "unauthenticated", "no key"), ["no key", "hint:", "gnomon keys create"]),
        (problem(404, "not_found", "no job 'x'"), ["no job 'x'"]),
        (problem(422, "unknown_hook", "hook 'a' does not exist"), ["hook 'a'"]),
        (httpx2.Response(500, text="<html>"), ["not a Gnomon answer"]),
    ],
)
def test_refusals_are_one_line_and_exit_code_1(run: Run, response: httpx2.Response, words: list[str]) -> None:
    code, out, err = run("job x", response)
    assert (code, out) == (1, "")
    assert all(word in err for word in words)
    assert "Traceback" not in err


def test_service_that_is_not_there_is_no_traceback(run: Run) -> None:
    code, _, err = run("jobs", *[httpx2.ConnectError("refused")] * 2)
    assert code == 1
    assert "gnomon up" in err


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "\x00", "[" * 100_000])
def test_file_that_is_no_spec_is_named(run: Run, spec_file: Path, content: str) -> None:
    spec_file.write_text(content)
    code, _, err = run(f"submit {spec_file}")
    assert code == 1
    assert "spec.json" in err


@pytest.mark.parametrize("line", ["submit", "submit /nonexistent", "jobs --limit 0", "jobs --state x", "jobz", "--x"])
def test_wrong_usage_is_exit_code_2(run: Run, line: str) -> None:
    code, out, err = run(line)
    assert (code, out) == (2, "")
    assert "Usage" in err or "Error" in err


def test_unexpected_error_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(cli, "show_table", explode)
    code, _, err = run("jobs", answer({"items": []}))
    assert code == 1
    assert "unexpected RuntimeError: boom" in err
    assert "GNOMON_DEBUG" in err


def test_version_and_help(run: Run) -> None:
    code, out, _ = run("--version")
    assert (code, out.split()[0]) == (0, "gnomon")
    code, out, _ = run("--help")
    assert code == 0
    assert "gnomon demo" in out
    assert "Example" in run("submit --help")[1]


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"fastapi", "sqlalchemy", "pydantic_settings", "ray", "torch"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from gnomon.cli import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["up", "api", "dispatcher", "demo"])
def test_service_commands_say_what_to_install(command: str, tmp_path: Path) -> None:
    line = [sys.executable, "-c", BLOCKED, command]
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "in your checkout of Gnomon, pip install '.[all]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_sdk_commands_work_without_the_service(tmp_path: Path) -> None:
    line = [sys.executable, "-c", BLOCKED, "--help"]
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert "submit" in done.stdout


def test_no_command_of_the_host_is_hidden_behind_one_of_the_client() -> None:
    """Both may be installed: a name that both have would be reachable in one of them alone."""
    own, host = typer.main.get_group(cli.app).commands, typer.main.get_group(commands.app).commands
    for name, command in host.items():
        mine = own.get(name)
        if isinstance(mine, TyperGroup) and isinstance(command, TyperGroup):
            assert not set(mine.commands) & set(command.commands), name
        else:
            assert mine is None, name


def host(home: Path, *words: str) -> str:
    """What a command of the host prints."""
    result = CliRunner().invoke(commands.app, [*words, "--home", str(home)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_keys_are_listed_and_revoked_on_the_host_without_the_api(tmp_path: Path) -> None:
    key_id = host(tmp_path, "keys", "create", "laptop").split("_")[1]
    titles, row = host(tmp_path, "db", "list-keys").splitlines()
    assert titles.split() == ["ID", "NAME", "SCOPES", "CREATED", "EXPIRES", "REVOKED"]
    assert row.split()[:4] == [key_id, "laptop", "read", "write"]
    assert json.loads(host(tmp_path, "db", "list-keys", "--json"))[0]["revoked_at"] is None
    assert host(tmp_path, "db", "revoke-key", key_id) == f"{key_id} is revoked\n"
    assert json.loads(host(tmp_path, "db", "list-keys", "--json"))[0]["revoked_at"] is not None


def test_a_store_is_verified_on_the_host(tmp_path: Path) -> None:
    store_id = "act_" + "0" * 32
    place = ProjectLayout.of(load_settings(home=tmp_path).project_root, "default").store(store_id)
    store = make_counted_store(place.url, sizes=(300, 300))
    host(tmp_path, "db", "verify-store", store_id)
    chunks = sorted(name for name in place.walk() if "layers.1/c" in name)
    for name in chunks[:2]:
        data = bytearray(place.child(name).read_bytes())
        data[5] ^= 1
        place.child(name).write_bytes(bytes(data))
    result = CliRunner().invoke(commands.app, ["db", "verify-store", store_id, "--home", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stdout.count("holds other bytes than were written") == 2
    assert f"{store.manifest.n_bytes:,} bytes were read: 2 damaged" in result.stderr
    absent = ["db", "verify-store", "act_" + "1" * 32, "--home", str(tmp_path)]
    assert isinstance(CliRunner().invoke(commands.app, absent).exception, NotFound)


def test_the_quota_of_a_project_s_stores_is_given_with_its_unit(tmp_path: Path) -> None:
    for text, n_bytes in {"2TB": 2 * 10**12, "1.5 GiB": 3 * 2**29, "12": 12, "0": None}.items():
        told = json.loads(host(tmp_path, "db", "set-project", "lab", "--max-store-bytes", text))
        assert told["n_store_bytes_most"] == n_bytes
    for text in ("many", "-5", "nan", "1e400GB", "9e18GB"):
        words = ["db", "set-project", "lab", "--max-store-bytes", text, "--home", str(tmp_path)]
        result = CliRunner().invoke(commands.app, words)
        assert (result.exit_code, "500GB" in result.output) == (2, True), result.output


def test_a_job_tells_losses_apart_from_attempts(capsys: pytest.CaptureFixture[str]) -> None:
    show_job(Job.read(job(attempt=7, n_losses=2, state="running", depends_on=["job_" + "1" * 26])))
    shown = capsys.readouterr().out
    assert "2 in a row, of at most 5" in shown
    assert "7 of 5" not in shown
    assert "made from" in shown
    assert "waits for" not in shown


def test_stopping_is_said_before_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        url = "http://127.0.0.1:1"

        def __init__(self, _: object) -> None: ...

        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *_: object) -> None:
            print("the children end")

    class Interrupted:
        def wait(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "Embedded", Slow)
    monkeypatch.setattr("gnomon_service.commands.serving.threading.Event", Interrupted)
    monkeypatch.setattr(logs, "setup_logging", lambda *_: None)
    said = CliRunner().invoke(commands.app, ["up", "--home", str(tmp_path)]).stdout.splitlines()
    assert said[-3:] == [
        "Stopping: running jobs are queued again, and go on at the next start ...",
        "the children end",
        "Stopped",
    ]


def test_help_states_the_defaults_that_hold() -> None:
    submit: Any = typer.main.get_group(cli.app).commands["submit"]
    options = {option.name: option.help for option in submit.params}
    for name in ("priority", "max_attempts"):
        assert f"default {JobRequest.model_fields[name].default}." in options[name]
    for host, path in ((cli.app, ["keys", "issue"]), (commands.app, ["keys", "create"])):
        group: Any = typer.main.get_group(host)
        for name in path:
            group = group.commands[name]
        assert "Default: read and write" in next(option.help for option in group.params if option.name == "scope")


@pytest.mark.parametrize(
    ("kind", "run_on", "words"),
    [
        (
            "train",
            {"mesh": {"dp": 1, "features": 2}, "device": "cpu", "d_in": 16, "tokens_per_s": 7070.4},
            "1 x 2 of cpu, 7,070 tokens/s",
        ),
        ("harvest", {"n_workers": 3, "device": "gpu", "n_parameters": 9}, "3 of gpu"),
    ],
)
def test_a_finished_job_says_what_it_ran_on(run: Run, kind: str, run_on: dict[str, Any], words: str) -> None:
    trained = {"dictionary_id": "dict_" + "0" * 26, "store_id": "act_" + "0" * 32, "n_steps": 1, "metrics": {}}
    result = (trained if kind == "train" else HARVEST_RESULT) | {"run": run_on}
    code, out, _ = run(f"job {JOB_ID}", answer(job(kind=kind, state="succeeded", result=result)))
    assert code == 0 and words in out and "n_parameters" not in out


def planned(**changes: Any) -> dict[str, Any]:
    """A plan as the service sends it."""
    training = {"tokens_per_s": 7070.0, "hours": 39.3, "error": 0.1, "n_jobs": 3, "device_hours": 78.6, "cost": 12.5}
    parts = {"weights": 3 << 30, "moments": 6 << 30, "process": 425 << 20, "exchange": 0}
    memory = {"n_bytes": sum(parts.values()), "parts": parts, "phase": "step", "variant": "k16"}
    meshes = [
        {"mesh": {"dp": 1, "features": n}, "n_ranks": n, "memory": memory, "fits": n == 2, "training": training}
        for n in (1, 2)
    ]
    return {
        "kind": "train",
        "store_id": "act_" + "0" * 32,
        "reuses": "harvest_under_way",
        "job_id": JOB_ID,
        "n_rows": 123_456,
        "disk": {
            "store_bytes": 5 << 30,
            "checkpoint_bytes": 9 << 30,
            "checkpoints_kept_bytes": 18 << 30,
            "checkpoints_peak_bytes": 27 << 30,
            "dictionary_bytes": 3 << 30,
        },
        "harvest": {"n_tokens": 130_000, "n_workers": 2, "running": training | {"n_jobs": 0}},
        "device": "gpu",
        "n_devices": 2,
        "meshes": meshes,
        "mesh": {"dp": 1, "features": 2},
        "why": "1 x 2 is 1.8 times as fast as 1 x 1",
        "currency": "EUR",
    } | changes


def test_a_plan_is_shown_with_the_mesh_that_it_would_run_on(run: Run, spec_file: Path) -> None:
    code, out, _ = run(f"plan {spec_file}", answer(planned()))
    assert code == 0
    for words in (
        f"are being harvested, by {JOB_ID}",
        "9 GiB each; 18 GiB kept, 27 GiB at most",
        "130,000 tokens, 2 workers",
        "1 x 2 is 1.8 times as fast as 1 x 1",
        "of variant k16: moments 6 GiB, weights 3 GiB, process 425 MiB",
        "learned from 3 finished jobs",
        "GPU-HOURS  COST EUR",
        "(too much)",
    ):
        assert words in out, words
    assert [line.split()[:4] for line in out.splitlines() if line.startswith("*")] == [["*", "1", "x", "2"]]
    assert "exchange" not in out


def test_a_plan_without_price_mesh_or_jobs_is_shown_too(run: Run, spec_file: Path) -> None:
    plain = planned(meshes=[], mesh=None, harvest=None, currency=None, reuses="nothing", job_id=None, disk={})
    code, out, _ = run(f"plan {spec_file}", answer(plain))
    assert code == 0 and "would be harvested" in out and "MESH" not in out


def test_a_plan_as_json_is_what_the_service_said(run: Run, spec_file: Path) -> None:
    code, out, _ = run(f"plan {spec_file} --json", answer(planned(later="field")))
    assert code == 0
    assert json.loads(out) == planned()


def test_a_refused_plan_is_an_error(run: Run, spec_file: Path) -> None:
    code, out, err = run(f"plan {spec_file}", problem(422, "does_not_fit", "W_dec alone needs 61 GiB"))
    assert (code, out) == (1, "") and "W_dec alone needs 61 GiB" in err
