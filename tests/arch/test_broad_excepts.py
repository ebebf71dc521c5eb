"""A broad `except` says why it takes everything, and what it took goes somewhere."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BROAD = {"Exception", "BaseException"}


def broad_handlers(tree: ast.AST) -> list[ast.ExceptHandler]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and _names(node) & BROAD]


def _names(handler: ast.ExceptHandler) -> set[str]:
    if handler.type is None:
        return {"BaseException"}
    return {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}


def has_reason(handler: ast.ExceptHandler, lines: list[str]) -> bool:
    """A comment at its first line or at the line below."""
    return any("#" in line for line in lines[handler.lineno - 1 : handler.body[0].lineno])


def goes_somewhere(handler: ast.ExceptHandler) -> bool:
    """It is raised again, or its name is used, or it is logged with its traceback."""
    for node in ast.walk(ast.Module(handler.body, [])):
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Name) and node.id == handler.name:
            return True
        if isinstance(node, ast.Attribute) and node.attr in ("exception", "print_exc"):
            return True
    return False


@pytest.mark.parametrize("package", ["protocols", "lattica", "daemon", "cli", "examples", "tests"])
def test_a_broad_except_has_a_reason_and_swallows_nothing(package: str) -> None:
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        text = path.read_text()
        for handler in broad_handlers(ast.parse(text)):
            place = f"{path.relative_to(ROOT)}:{handler.lineno}"
            wrong += [] if has_reason(handler, text.splitlines()) else [f"{place} does not say why"]
            wrong += [] if goes_somewhere(handler) else [f"{place} swallows what it took"]
    assert not wrong


@pytest.mark.parametrize(
    ("body", "reason", "kept"),
    [
        ("except Exception:\n    pass", False, False),
        ("except (ValueError, Exception):  # of a plug-in\n    pass", True, False),
        ("except:\n    # raised again\n    raise", True, True),
        ("except BaseException as error:\n    failures.append(error)", False, True),
    ],
)
def test_what_is_found(body: str, reason: bool, kept: bool) -> None:
    text = f"try:\n    f()\n{body}"
    (handler,) = broad_handlers(ast.parse(text))
    assert has_reason(handler, text.splitlines()) == reason
    assert goes_somewhere(handler) == kept
