"""docker-compose.yml as the real Compose reads it, and the Dockerfile as hadolint does."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gnomon_service.settings import Settings

ROOT = Path(__file__).parents[2]
SECRETS = ("POSTGRES_PASSWORD", "RAY_AUTH_TOKEN", "S3_ACCESS_KEY", "S3_SECRET_KEY")
ON_RAY = {"dispatcher", "ray-head", "ray-worker"}
OURS = ON_RAY | {"api"}


def tool(name: str) -> str:
    """A program that a Python package has put beside this interpreter."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is missing; install the dev dependency group"
    return found


def compose(secrets: dict[str, str], *files: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Ask Compose for the whole configuration."""
    command = [tool("docker-compose"), "--project-directory", str(ROOT)]
    for file in files or ("docker-compose.yml",):
        command += ["--file", str(ROOT / file)]
    command += ["config", "--format", "json"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder or ROOT)} | secrets
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def example_secrets() -> dict[str, str]:
    """A value for each secret."""
    return {name: f"{name.lower().replace('_', '')}1234567890" for name in SECRETS}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """The configuration with all secrets given."""
    run = compose(example_secrets())
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    return result


@pytest.mark.parametrize("missing", SECRETS)
def test_every_secret_must_be_given(missing: str) -> None:
    run = compose({name: value for name, value in example_secrets().items() if name != missing})
    assert run.returncode != 0
    assert f"{missing} is missing a value: run deploy/make-env" in run.stderr


def test_only_the_api_has_a_port_and_only_on_loopback(config: dict[str, Any]) -> None:
    published = {name: s["ports"] for name, s in config["services"].items() if s.get("ports")}
    assert list(published) == ["api"]
    assert [(p["host_ip"], p["target"]) for p in published["api"]] == [("127.0.0.1", 7600)]
    assert not any(s.get("network_mode") == "host" for s in config["services"].values())


def test_ray_and_data_live_on_a_network_without_a_way_out(config: dict[str, Any]) -> None:
    assert config["networks"]["backend"]["internal"] is True
    networks = {name: set(s.get("networks") or {}) for name, s in config["services"].items()}
    assert {"postgres", "seaweedfs", "ray-head", "bucket"} <= {
        name for name, of in networks.items() if of == {"backend"}
    }
    assert {name for name, of in networks.items() if "edge" in of} == {"api"}


def test_ray_never_runs_without_a_token(config: dict[str, Any]) -> None:
    for name in ON_RAY:
        environment = config["services"][name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN"] == example_secrets()["RAY_AUTH_TOKEN"]


def test_workers_have_no_database_credentials(config: dict[str, Any]) -> None:
    password = example_secrets()["POSTGRES_PASSWORD"]
    knowing = {name for name, s in config["services"].items() if password in json.dumps(s)}
    assert knowing == {"api", "dispatcher", "postgres"}


def test_images_are_pinned_and_ours_are_hardened(config: dict[str, Any]) -> None:
    for name, service in config["services"].items():
        assert re.search(r":[0-9]+\.[0-9]+", service["image"]), name
        assert not service.get("privileged"), name
        if name in OURS:
            assert service["cap_drop"] == ["ALL"], name
            assert "no-new-privileges:true" in service["security_opt"], name


def test_what_others_wait_for_has_a_healthcheck(config: dict[str, Any]) -> None:
    for name, service in config["services"].items():
        for dependency, wanted in service.get("depends_on", {}).items():
            if wanted["condition"] == "service_healthy":
                assert config["services"][dependency]["healthcheck"]["test"], f"{name} waits for {dependency}"
    assert all(config["services"][name].get("healthcheck") for name in OURS - {"dispatcher"})


def test_settings_of_the_services_exist_and_are_accepted(config: dict[str, Any]) -> None:
    for name in ("api", "dispatcher"):
        environment = config["services"][name]["environment"]
        fields = {key.removeprefix("GNOMON_").lower(): v for key, v in environment.items() if "GNOMON" in key}
        assert set(fields) <= set(Settings.model_fields)
        settings = Settings(**fields)
        assert settings.database_url.startswith("postgresql://")
        assert settings.storage_root == "s3://gnomon/store"


def test_object_store_has_one_identity_with_the_given_key(config: dict[str, Any]) -> None:
    identities = json.loads(config["configs"]["seaweedfs-s3"]["content"])["identities"]
    assert [identity["credentials"] for identity in identities] == [
        [
            {
                "accessKey": example_secrets()["S3_ACCESS_KEY"],
                "secretKey": example_secrets()["S3_SECRET_KEY"],
            }
        ]
    ]


def test_gpu_is_asked_for_unless_the_cpu_file_is_added(config: dict[str, Any]) -> None:
    devices = config["services"]["ray-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["capabilities"] == ["gpu"]
    run = compose(example_secrets(), "docker-compose.yml", "deploy/compose.cpu.yml")
    assert run.returncode == 0, run.stderr
    assert "nvidia" not in run.stdout


def test_make_env_writes_secrets_once_for_the_owner_only(tmp_path: Path) -> None:
    target = tmp_path / ".env"
    command = ["sh", str(ROOT / "deploy/make-env"), str(target)]
    subprocess.run(command, check=True, capture_output=True)
    secrets = dict(line.split("=", 1) for line in target.read_text().splitlines())
    assert set(secrets) == set(SECRETS)
    assert all(len(value) >= 20 and value.isalnum() for value in secrets.values())
    assert len(set(secrets.values())) == len(secrets)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert compose(secrets).returncode == 0
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert "exists already" in again.stderr


def test_dockerfile_passes_hadolint() -> None:
    command = [tool("hadolint"), "--no-color", str(ROOT / "deploy/Dockerfile")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "")


def test_images_do_not_run_as_root_and_hold_only_what_they_need() -> None:
    lines = (ROOT / "deploy/Dockerfile").read_text().splitlines()
    stages = " ".join(lines).split("FROM ")
    for target in ("api", "worker"):
        stage = next(stage for stage in stages if stage.startswith(f"base AS {target} "))
        assert "USER 10001:10001" in stage
    copied = {
        source for line in lines if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }  # fmt: skip
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
