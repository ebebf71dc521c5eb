"""Install the other implementations, each from its registry into a place of its own below `.venv-peers`.

* Go: `p2pd` (go-libp2p) is a static binary inside the hivemind wheel; nothing of hivemind itself is installed. And
  go-libp2p as a library for Python (`libp2p-go`), for CPython 3.11 only.
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
P2PD, OLD_P2PD = "1.1.12", "1.0.0"
"""Versions of hivemind. The older one is of January 2022 and knows no QUIC v1."""
RUST_LATTICA, OLD_RUST_LATTICA = "1.0.21", "1.0.10"
GO_LIBRARY = ("libp2p-go==0.1.4", "multiaddr==0.0.9", "msgpack==1.2.4")
OLD_JS = ("0.46", "2.10")
"""Each with a `package-VERSION.json` in `js/`."""
PY_LIBP2P = "libp2p==0.8.1"


def _pip(python: Path | str, *args: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *args]
    subprocess.run(command, check=True, timeout=600, stdin=subprocess.DEVNULL)


def install_p2pd(version: str = P2PD) -> Path:
    """The path of the Go daemon in that version of hivemind."""
    binary = PEERS / f"p2pd-{version}"
    if not binary.exists():
        wheels = PEERS / "wheels"
        wheels.mkdir(parents=True, exist_ok=True)
        _pip(
            sys.executable, "download", "--no-deps", "--only-binary=:all:", "--platform=manylinux2014_x86_64",
            "--platform=any", "-d", str(wheels), f"hivemind=={version}",
        )  # fmt: skip
        (wheel,) = wheels.glob(f"hivemind-{version}-*.whl")
        partial = binary.with_name(f"{binary.name}.partial")
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read("hivemind/hivemind_cli/p2pd"))
        partial.chmod(0o755)
        partial.rename(binary)
    return binary


def install_go_library() -> Path:
    """The python of an environment with go-libp2p as a library. It needs to run on CPython 3.11."""
    return _environment("go", *GO_LIBRARY)


def install_rust_lattica(version: str = RUST_LATTICA) -> Path:
    """The python of an environment with the Rust wheel."""
    return _environment(f"rust-{version}", "--only-binary=lattica", f"lattica=={version}")


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
    return _node_modules("js", "package.json", "js_worker.mjs")


def install_old_js_libp2p(version: str) -> Path:
    """The same for an older one."""
    return _node_modules(f"js-{version}", f"package-{version}.json", "old_worker.mjs")


def _node_modules(name: str, package: str, worker: str) -> Path:
    home = PEERS / name
    home.mkdir(parents=True, exist_ok=True)
    sources = Path(__file__).with_name("js")
    installed = home / "package.json"
    wanted = (sources / package).read_bytes()
    for script in (worker, "obey.mjs"):
        shutil.copy(sources / script, home)
    if not (installed.exists() and installed.read_bytes() == wanted and (home / ".done").exists()):
        (home / ".done").unlink(missing_ok=True)
        installed.write_bytes(wanted)
        command = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(command, cwd=home, check=True, timeout=600, stdin=subprocess.DEVNULL)
        (home / ".done").touch()
    return home


def main() -> None:
    for version in (P2PD, OLD_P2PD):
        sys.stdout.write(f"{install_p2pd(version)}\n")
    for version in (RUST_LATTICA, OLD_RUST_LATTICA):
        sys.stdout.write(f"{install_rust_lattica(version)}\n")
    for version in OLD_JS:
        sys.stdout.write(f"{install_old_js_libp2p(version)}\n")
    for install in (install_py_libp2p, install_js_libp2p, install_go_library):
        sys.stdout.write(f"{install()}\n")


if __name__ == "__main__":
    main()
