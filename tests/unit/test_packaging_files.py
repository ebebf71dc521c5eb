"""The files around the code say what the code does: unit file, container files, README, Makefile."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_shows_the_examples_as_they_are() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in ("expert_server.py", "expert_client.py"):
        code = (ROOT / "examples" / name).read_text()
        assert code in readme, f"README.md shows another {name} than examples/ has"
        assert len(code.splitlines()) < 40


def test_the_readmes_two_commands_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_changelog_has_this_version() -> None:
    from lattica import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_unit_file_is_right(tmp_path: Path) -> None:
    """`systemd-analyze verify` where there is one, with a program in the place of the installed one."""
    unit = (ROOT / "daemon" / "lattica.service").read_text()
    for line in ("Type=notify", "DynamicUser=yes", "StateDirectory=lattica", "NoNewPrivileges=yes"):
        assert line in unit.splitlines()
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze here")
    copy = tmp_path / "lattica.service"
    copy.write_text(unit.replace("/opt/lattica/bin/latticad", shutil.which("true") or "/bin/true"))
    done = subprocess.run([program, "verify", str(copy)], capture_output=True, text=True, check=False)
    if "Failed to" in done.stderr and "lattica.service" not in done.stderr:
        pytest.skip(f"systemd-analyze cannot run here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "lattica.service" not in done.stderr, done.stderr


def test_the_drain_fits_into_the_time_that_systemd_and_docker_give() -> None:
    from lattica_daemon.settings import Settings

    drain = Settings().daemon.drain_seconds
    unit = (ROOT / "daemon" / "lattica.service").read_text()
    compose = (ROOT / "docker" / "compose.yaml").read_text()
    stop = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert stop is not None
    assert int(stop.group(1)) > drain
    for grace in re.findall(r"stop_grace_period: (\d+)s", compose):
        assert int(grace) > drain


def dockerfile_instructions() -> list[tuple[str, str]]:
    text = (ROOT / "docker" / "Dockerfile").read_text()
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_dockerfile_copies_what_a_wheel_needs() -> None:
    """Every package of the wheel and every file that pyproject.toml names is copied, and `.dockerignore` lets it in."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {path.split("/")[0] for path in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    needed |= {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    copied: set[str] = set()
    for word, rest in dockerfile_instructions():
        if word == "COPY" and not rest.startswith("--from"):
            copied |= set(rest.split()[:-1])
    assert needed <= copied
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    assert {f"!{name}" for name in needed} <= set(ignored)


def test_the_container_runs_as_a_user_and_serves_the_default_port() -> None:
    from lattica_daemon.settings import DEFAULT_PORT

    instructions = dockerfile_instructions()
    assert ("USER", "lattica") in instructions
    assert ("ENTRYPOINT", '["latticad"]') in instructions
    assert ("EXPOSE", f"{DEFAULT_PORT}/tcp {DEFAULT_PORT}/udp") in instructions
    assert instructions.index(("USER", "lattica")) > max(i for i, (word, _) in enumerate(instructions) if word == "RUN")


def test_the_compose_file_has_a_bootstrap_and_two_peers() -> None:
    yaml = pytest.importorskip("yaml")
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    assert set(compose["services"]) == {"bootstrap", "alice", "bob"}
    for name in ("alice", "bob"):
        service = compose["services"][name]
        assert service["depends_on"]["bootstrap"]["condition"] == "service_healthy"
        script = service["entrypoint"][-1].replace("$$", "$")
        assert subprocess.run(["sh", "-n", "-c", script], check=False).returncode == 0
    for service in compose["services"].values():
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        for volume in service["volumes"]:
            assert volume.split(":")[0] in compose["volumes"]
