"""The layer rule as it holds at run time: what does importing a layer really load?"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def loaded_by(statement: str) -> set[str]:
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(done.stdout))


def modules_of(package: Path, name: str) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        if path.name == "__main__.py":
            continue  # importing it runs the program
        parts = [name, *path.relative_to(package).with_suffix("").parts]
        found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def test_protocols_load_no_runtime() -> None:
    modules = modules_of(ROOT / "protocols" / "lattica_protocols", "lattica_protocols")
    # `replica` aside: the package `pycrdt` imports anyio for its network providers, of which we use none.
    loaded = loaded_by("import " + ", ".join(m for m in modules if not m.startswith("lattica_protocols.replica")))
    assert not {"trio", "anyio", "lattica", "lattica_daemon", "lattica_cli", "aioquic"} & loaded


@pytest.mark.parametrize(
    "module",
    [
        m
        for m in modules_of(ROOT / "protocols" / "lattica_protocols", "lattica_protocols")
        if not m.startswith(("lattica_protocols.kad", "lattica_protocols.replica"))
    ],
)
def test_a_protocol_module_loads_no_io(module: str) -> None:
    """Only two may: the packages `kademlia` and `pycrdt` import asyncio, and we use only their data structures."""
    assert "asyncio" not in loaded_by(f"import {module}")


def test_the_command_line_does_not_import_the_daemon() -> None:
    modules = modules_of(ROOT / "cli" / "lattica_cli", "lattica_cli")
    assert "lattica_daemon" not in loaded_by("import " + ", ".join(modules))


def test_import_lattica_is_light() -> None:
    assert not {"numpy", "trio", "anyio", "cryptography", "aioquic", "asyncio"} & loaded_by("import lattica")


def test_public_names_are_pinned() -> None:
    """Adding a public name is a decision: it changes this list and the documentation."""
    import lattica

    for name in lattica.__all__:
        assert getattr(lattica, name) is not None, name
    assert sorted(lattica.__all__) == lattica.__all__


@pytest.mark.parametrize("package", ["lattica", "protocols", "daemon", "cli", "examples"])
def test_nothing_executes_bytes_from_strangers(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = [node.func.id] if node.func.id in ("eval", "exec") else []
            banned = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "eval", "exec"} & set(names)
            assert not banned, f"{path}:{getattr(node, 'lineno', 0)} uses {banned}"
