"""Install the other implementations, each from its registry into a place of its own below `.venv-peers`.

* Go: `p2pd` (go-libp2p) is a static binary inside the hivemind wheel; nothing of hivemind itself is installed.
* Rust: the `lattica` wheel (rust-libp2p), in a virtual environment of its own because it would shadow our package.
* Python: py-libp2p, in a virtual environment of its own because of what it pins.
* JavaScript: js-libp2p from npm, with a Node.js of its own (from npm, too: it needs 22, which machines often lack).

Run directly (`python tests/interop/install_peers.py`) or through the fixtures; done once, repeated calls do nothing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers"
HIVEMIND = "hivemind==1.1.12"
RUST_LATTICA = "lattica==1.0.21"
PY_LIBP2P = "libp2p==0.8.1"


def _pip(python: Path | str, *args: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *args]
    subprocess.run(command, check=True, timeout=600, stdin=subprocess.DEVNULL)


def install_p2pd() -> Path:
    """The path of the Go daemon."""
    binary = PEERS / "p2pd"
    if not binary.exists():
        wheels = PEERS / "wheels"
        wheels.mkdir(parents=True, exist_ok=True)
        _pip(
            sys.executable, "download", "--no-deps", "--only-binary=:all:",
            "--platform=manylinux2014_x86_64", "-d", str(wheels), HIVEMIND,
        )  # fmt: skip
        (wheel,) = wheels.glob("hivemind-*.whl")
        partial = binary.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read("hivemind/hivemind_cli/p2pd"))
        partial.chmod(0o755)
        partial.rename(binary)
    return binary


def install_rust_lattica() -> Path:
    """The python of an environment with the Rust wheel."""
    return _environment("rust", "--only-binary=lattica", RUST_LATTICA)


def install_py_libp2p() -> Path:
    """The python of an environment with py-libp2p."""
    return _environment("py", PY_LIBP2P)


def _environment(name: str, *wanted: str) -> Path:
    home = PEERS / name
    python = home / "bin" / "python"
    done = home / ".done"
    if not done.exists():
        venv.create(home, with_pip=True, clear=True)
        _pip(python, "install", *wanted)
        done.touch()
    return python


def install_js_libp2p() -> Path:
    """The folder with `node_modules` and our worker. Raises `FileNotFoundError` where npm is missing."""
    home = PEERS / "js"
    home.mkdir(parents=True, exist_ok=True)
    sources = Path(__file__).with_name("js")
    installed = home / "package.json"
    wanted = (sources / "package.json").read_bytes()
    shutil.copy(sources / "js_worker.mjs", home)
    if not (installed.exists() and installed.read_bytes() == wanted and (home / ".done").exists()):
        (home / ".done").unlink(missing_ok=True)
        installed.write_bytes(wanted)
        command = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(command, cwd=home, check=True, timeout=600, stdin=subprocess.DEVNULL)
        (home / ".done").touch()
    return home


if __name__ == "__main__":
    for install in (install_p2pd, install_rust_lattica, install_py_libp2p, install_js_libp2p):
        sys.stdout.write(f"{install()}\n")
