"""The Dockerfile's steps, run without docker: the files it copies, the wheel it builds, the installation, the start.

Each COPY is done below a temporary root, and each RUN of pip with a fresh virtual environment in the place of the base
image. The step that makes the user is for root in a container. Building needs the build backend and installing the
dependencies, so this talks to the package index as the real build does.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def instructions() -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", " ", (ROOT / "docker" / "Dockerfile").read_text())
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def inside(root: Path, path: str, workdir: str) -> Path:
    return root / os.path.normpath(os.path.join(workdir, path)).lstrip("/")


def rooted(command: str, root: Path) -> str:
    """The command with the absolute paths of the image moved below `root`."""
    return re.sub(r"(?<=\s)/(?=[a-z])", f"{shlex.quote(str(root))}/", command)


def test_the_steps_give_a_daemon_that_starts(tmp_path: Path) -> None:
    roots: list[Path] = []
    workdir = "/"
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_CACHE_DIR="0")
    for word, rest in instructions():
        if word == "FROM":
            root = tmp_path / f"stage{len(roots)}"
            roots.append(root)
            workdir = "/"
            venv.create(root / "usr", with_pip=True, symlinks=True)
            environment["PATH"] = f"{root / 'usr' / 'bin'}:{os.environ['PATH']}"
        elif word == "WORKDIR":
            workdir = rest
            inside(roots[-1], workdir, "/").mkdir(parents=True)
        elif word == "COPY":
            copy(rest, roots, workdir)
        elif word == "RUN" and "useradd" not in rest:
            run(rest.replace(" --no-cache-dir", ""), roots[-1], workdir, environment)
    program = roots[-1] / "usr" / "bin" / "latticad"
    shown = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("latticad ")
    leftovers = [name for name in ("wheels",) if (roots[-1] / name).exists()]
    assert not leftovers
    home = tmp_path / "home"
    listen = ["--listen", "/ip4/127.0.0.1/tcp/0"]
    daemon = subprocess.Popen([str(program), "--home", str(home), "--json", *listen], stdout=subprocess.PIPE)
    try:
        assert daemon.stdout is not None
        assert b"peer_id" in daemon.stdout.readline()
        status = [str(program.with_name("lattica")), "status", "--json", "--home", str(home)]  # the HEALTHCHECK
        assert subprocess.run(status, capture_output=True, check=False).returncode == 0
        daemon.terminate()
        assert daemon.wait(20) == 0
    finally:
        daemon.kill()
        daemon.wait()
        if daemon.stdout is not None:
            daemon.stdout.close()


def copy(rest: str, roots: list[Path], workdir: str) -> None:
    words = rest.split()
    source = ROOT
    if words[0].startswith("--from="):
        source = roots[0]
        words = [words[1].lstrip("/"), words[2]]
    target = inside(roots[-1], words[-1], workdir)
    for name in words[:-1]:
        origin = source / name
        if origin.is_dir():
            shutil.copytree(origin, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, target / name)


def run(command: str, root: Path, workdir: str, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["sh", "-ec", rooted(command, root)],
        cwd=inside(root, workdir, "/"),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "No matching distribution" in done.stderr + done.stdout and sys.platform != "linux":
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
