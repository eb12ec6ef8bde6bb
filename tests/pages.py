"""Run the commands of a page of documentation, and hold its output against what it shows.

    python tests/pages.py docs/tutorial.md    # write what the commands print into the page

In a ```console block, a line that starts with `$ ` is run; what follows is its output on stdout at
80 columns. A ```python block is run as it is, and a ```yaml block whose first line is `# NAME` is
that file. All in one folder, in which `examples` is.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?")
# What depends on the machine's speed; the line is there, its numbers are not compared.
_VOLATILE = ("tokens per second",)


@dataclass(frozen=True)
class Step:
    """One thing that a page does.

    Attributes:
        kind: console, python or yaml.
        text: The command line, the program, or the file.
        shown: Output that the page shows.
    """

    kind: str
    text: str
    shown: str = ""


def steps_of(page: str) -> list[Step]:
    """Everything in a page that runs, in order."""
    found = []
    for match in _BLOCK.finditer(page):
        kind, body = match[1], match[2]
        if kind in ("python", "yaml"):
            found.append(Step(kind, body))
        elif kind == "console":
            for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
                command, _, shown = part.partition("\n")
                while command.endswith("\\"):
                    more, _, shown = shown.partition("\n")
                    command = command[:-1] + more
                found.append(Step(kind, command, shown))
        else:
            raise AssertionError(f"a block of {kind!r} runs in no test")
    return found


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[None]:
    """A folder with the examples in it, as working directory, and caches of its own."""
    shutil.copytree(ROOT / "examples", folder / "examples", dirs_exist_ok=True)
    for seed, name in enumerate(("character", "style")):
        _kohya_file(folder / f"{name}.safetensors", seed)
    before, environment = Path.cwd(), dict(os.environ)
    os.environ.update(COLUMNS="80", XDG_CACHE_HOME=str(folder / ".cache"))
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)


def _kohya_file(path: Path, seed: int) -> None:
    """A LoRA of rank 4 on one attention block of a U-Net, as kohya's scripts name it."""
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for part in ("to_q", "to_k", "to_v", "to_out_0"):
        stem = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_{part}"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(4, 32, generator=draw) / 32**0.5
        tensors[f"{stem}.lora_up.weight"] = torch.randn(32, 4, generator=draw) / 10
        tensors[f"{stem}.alpha"] = torch.tensor(4.0)
    save_file(tensors, path, metadata={"ss_network_module": "networks.lora"})


def run_step(step: Step) -> str:
    """Do it and return what it printed."""
    if step.kind == "yaml":
        name = step.text.partition("\n")[0].removeprefix("# ")
        Path(name).write_text(step.text)
        return ""
    if step.kind == "python":
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(step.text, "page", "exec"), {"__name__": "page"})
        return printed.getvalue()
    from lora_merge.cli.app import cli

    program, *words = shlex.split(step.text)
    assert program == "lora-merge", step.text
    arguments = [name for word in words for name in _expanded(word)]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, f"{step.text}\n{result.output}"
    return result.stdout


def _expanded(word: str) -> list[str]:
    """What a shell makes of a pattern."""
    return sorted(map(str, Path().glob(word))) or [word] if "*" in word else [word]


def differences(shown: str, printed: str) -> list[str]:
    """Shown lines with numbers that are not printed, in that order.

    Words count in full, numbers to 5 %, 2 units or 2 last digits; sentences may be put anew.
    """
    lines, missing = iter(printed.split("\n")), []
    for line in shown.split("\n"):
        if _NUMBER.search(line) and not any(_alike(line, other) for other in lines):
            missing.append(line)
    return missing


def _alike(shown: str, printed: str) -> bool:
    if shown.split()[:3] == printed.split()[:3] and shown.strip().startswith(_VOLATILE):
        return True
    if "".join(_NUMBER.sub("#", shown).split()) != "".join(_NUMBER.sub("#", printed).split()):
        return False
    return all(
        abs(x - y) <= max(0.05 * abs(y), 2 if "." not in a or "%" in shown else 0.02)
        for a, b in zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=True)
        for x, y in [(float(a.replace(",", "")), float(b.replace(",", "")))]
    )


def rewrite(page: str) -> str:
    """The page with the output that its commands print now."""

    def block(match: re.Match[str]) -> str:
        if match[1] != "console":
            for step in steps_of(match[0]):
                run_step(step)
            return match[0]
        parts = []
        for step, source in zip(
            steps_of(match[0]), re.split(r"^\$ ", match[2], flags=re.MULTILINE)[1:], strict=True
        ):
            lines = source.split("\n")
            count = next(i for i, line in enumerate(lines) if not line.endswith("\\")) + 1
            command = "\n".join(lines[:count])
            parts.append(f"$ {command}\n{run_step(step).rstrip()}\n")
        return f"```console\n{''.join(parts)}```"

    return _BLOCK.sub(block, page)


if __name__ == "__main__":
    import tempfile

    for name in map(Path, sys.argv[1:]):
        target = name.resolve()
        with tempfile.TemporaryDirectory() as folder, workplace(Path(folder)):
            text = rewrite(target.read_text(encoding="utf-8"))
        target.write_text(text, encoding="utf-8")
