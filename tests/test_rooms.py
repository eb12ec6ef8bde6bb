"""The shape of the house: arrows between rooms go one way, and heavy libraries stay outside."""

import ast
from pathlib import Path

import pytest

import lora_merge

SOURCE = Path(lora_merge.__file__).parent
# From the ground up; a room may import only rooms that stand before it.
ROOMS = ["errors", "_version", "linalg", "adapters", "analysis", "merge", "kernels", "mixture"]
ROOMS += ["cli", "__main__"]
# Library → rooms that may import it at all.
ALLOWED = {
    "click": {"cli"},
    "rich": {"cli"},
    "huggingface_hub": {"adapters", "analysis", "merge", "mixture"},
    "pydantic": {"merge"},
    "matplotlib": {"analysis", "mixture"},
    "peft": {"mixture"},
    "transformers": {"mixture"},
    "triton": {"kernels"},
}
# Libraries that may be imported only inside functions.
LAZY = {"matplotlib", "peft", "transformers", "triton", "sklearn", "accelerate", "pydantic"}
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    part = path.relative_to(SOURCE).parts[0]
    return part.removesuffix(".py")


def imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """(module, whether it is imported when the file is) of every import statement."""
    inside = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.If)
        for node in ast.walk(outer)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.append((node.module or "", id(node) not in inside))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_arrows_point_down(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for module, at_top in imports(ast.parse(path.read_text())):
        head = module.split(".")
        if head[0] == "lora_merge" and len(head) > 1 and head[1] != "__init__":
            assert ROOMS.index(head[1]) <= ROOMS.index(room), f"{room} imports {module}"
        if head[0] in ALLOWED:
            assert room in ALLOWED[head[0]], f"{room} imports {module}"
        if head[0] in LAZY and not path.name.startswith(f"_{head[0]}"):  # themselves lazy
            assert not at_top, f"{module} is imported at the top"


def test_files_fit_in_a_readers_mind() -> None:
    long = {
        str(p.relative_to(SOURCE)): n for p in FILES if (n := len(p.read_text().split("\n"))) > 420
    }
    assert not long


def test_public_names_resolve() -> None:
    for name in lora_merge.__all__:
        assert getattr(lora_merge, name) is not None
    assert set(lora_merge.__all__) <= set(dir(lora_merge))
    with pytest.raises(AttributeError):
        lora_merge.nothing  # noqa: B018
