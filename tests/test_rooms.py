"""The shape of the house: arrows between rooms go one way, and heavy libraries stay outside."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lora_merge

SOURCE = Path(lora_merge.__file__).parent
# From the ground up; a room may import only rooms on lower lines: those of one line are strangers.
FLOORS = [
    ["errors", "_version"],
    ["printing", "options", "notebook"],
    ["arguments", "planning"],
    ["machine", "files", "linalg"],
    ["ranks"],
    ["adapters"],
    ["analysis", "reshape", "merge", "kernels"],
    ["mixture"],
    ["evaluation"],
    ["api"],
    ["cli"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# The ground floor is there to be used, for one name too; an arrow higher up wants more reason.
GROUND = {room for floor in FLOORS[: FLOORS.index(["ranks"])] for room in floor}
# Two files that are one until the pass of a model is decided in one place.
CIRCLES: set[tuple[str, str]] = set()
# Library → rooms that may import it at all.
ALLOWED = {
    "click": {"cli"},
    "rich": {"cli"},
    "huggingface_hub": {"files", "adapters"},
    "pydantic": {"merge", "files"},
    "pandas": {"printing"},
    "matplotlib": {"files", "analysis", "mixture"},
    "peft": {"adapters", "mixture"},
    "transformers": {"mixture"},
    "triton": {"kernels"},
    "ray": {"merge"},
    "gguf": {"files", "reshape"},
}
# Libraries that may be imported only inside functions.
LAZY = {
    "pandas",
    "matplotlib",
    "peft",
    "transformers",
    "triton",
    "sklearn",
    "accelerate",
    "pydantic",
    "ray",
    "gguf",
}
# What a reader can hold in mind; `cli/commands` is a list.
MOST_FILES, MOST_LINES = 14, 420
FILES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The dotted name below `lora_merge`."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


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
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                ours = whole.removeprefix("lora_merge.") in MODULES
                found.append((whole if ours else node.module or "", id(node) not in inside))
    return found


def house_imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, inside functions and for types too."""
    found = {module for module, _ in imports(ast.parse(path.read_text()))}
    return {m.removeprefix("lora_merge.") for m in found if m.startswith("lora_merge.")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_arrows_point_down(path: Path) -> None:
    room = name_of(path).split(".")[0]
    if not room:
        return
    for other in sorted(house_imports(path)):
        there = other.split(".")[0]
        if there != room:
            assert LEVEL[there] < LEVEL[room], f"{room} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_heavy_libraries_stay_where_they_belong(path: Path) -> None:
    room = name_of(path).split(".")[0]
    for module, at_top in imports(ast.parse(path.read_text())):
        head = module.split(".")[0]
        if head in ALLOWED:
            assert room in ALLOWED[head], f"{room} imports {module}"
        if head in LAZY and not path.name.startswith(f"_{head}"):  # themselves lazy
            assert not at_top, f"{module} is imported at the top"


def test_no_arrow_up_the_house_for_one_name() -> None:
    names: dict[tuple[str, str], set[str]] = {}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.ImportFrom) and module.startswith("lora_merge."):
                arrow = name.split(".")[0], module.split(".")[1]
                names.setdefault(arrow, set()).update(alias.name for alias in node.names)
    thin = {
        (here, there): found
        for (here, there), found in names.items()
        if len(found) == 1 and here not in ("", "__main__", there) and there not in GROUND
    }
    assert not thin


def test_no_circle_of_files() -> None:
    arrows = {name: house_imports(path) - {name} for name, path in MODULES.items() if name}
    for one, other in CIRCLES:
        assert other in arrows[one] and one in arrows[other], "no circle any more: take it out"
        arrows[one].remove(other)
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_folders_and_files_fit_in_a_readers_mind() -> None:
    folders = {p.parent for p in FILES}
    crowded = {
        str(folder.relative_to(SOURCE)): n
        for folder in folders
        if (n := len(list(folder.glob("*.py"))) - 1) > MOST_FILES
    }
    crowded.pop("cli/commands", None)
    assert not crowded
    long = {
        name: n for name, p in MODULES.items() if (n := len(p.read_text().split("\n"))) > MOST_LINES
    }
    assert not long


def test_public_names_resolve() -> None:
    for name in lora_merge.__all__:
        assert getattr(lora_merge, name) is not None
    assert set(lora_merge.__all__) <= set(dir(lora_merge))
    with pytest.raises(AttributeError):
        lora_merge.nothing  # noqa: B018
