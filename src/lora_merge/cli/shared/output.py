"""Where commands put what they have to say: data on stdout, everything else on stderr."""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.segment import Segment

from lora_merge.cli.shared.command import is_quiet
from lora_merge.cli.shared.escape import for_terminal

# Where progress goes to a file or a pipe; what is done sooner has no such line.
_SECONDS_BETWEEN_LINES = 10.0


class _Console(Console):
    """Rich's console, for texts that hold names from files."""

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        return super()._render_buffer(
            one if one.control else one._replace(text=for_terminal(one.text)) for one in buffer
        )


class Output:
    """One command's output, for people or as one JSON document.

    Args:
        as_json: Print data as JSON and keep stderr free of progress.
        width: Columns; default: those of the terminal.
    """

    def __init__(self, as_json: bool, *, width: int | None = None) -> None:
        self.as_json = as_json
        self._out = _Console(highlight=False, soft_wrap=False, width=width)
        self._err = _Console(stderr=True, highlight=False)

    @property
    def width(self) -> int:
        """Columns there are."""
        return self._out.width

    @property
    def plain(self) -> bool:
        """Whether the terminal cannot show block characters."""
        return not self._out.encoding.startswith("utf")

    def data(
        self,
        data: Mapping[str, Any],
        *renderables: RenderableType,
        lists: Mapping[str, "LongList"] | None = None,
    ) -> None:
        """The result: `data` as JSON, with `lists` that are too long for it, or the renderables."""
        if self.as_json:
            text = json.dumps(data, indent=2, allow_nan=False)
            for name, items in (lists or {}).items():
                sys.stdout.write(text.removesuffix("\n}") + f',\n  "{name}": [\n')
                items.copy_to(sys.stdout)
                text = "\n  ]\n}"
            sys.stdout.write(text + "\n")
            return
        with self._out.capture() as captured:
            for renderable in renderables:
                # Sentences and paths are left whole where no terminal would break them in words.
                whole = isinstance(renderable, str) and not self._out.is_terminal
                self._out.print(renderable, soft_wrap=whole)
        # Tables fill their last column with spaces, begin and end with an empty line. That is cut,
        # and the rest written past rich, which would end the process when a reader goes away.
        lines = [line.rstrip() for line in captured.get().splitlines()]
        sys.stdout.write("\n".join(lines).strip("\n") + "\n")

    def note(self, text: str) -> None:
        """A remark for the person at the terminal."""
        if not self.as_json and not is_quiet():
            whole = not self._err.is_terminal
            self._err.print(f"note: {text}", style="dim", markup=False, soft_wrap=whole)

    @contextmanager
    def progress(
        self, what: str, total: int, now: Callable[[], str] = lambda: ""
    ) -> Iterator[Callable[[], None]]:
        """Progress on stderr: a bar on a terminal, a line now and then in a file or pipe.

        Args:
            what: Is done.
            total: Steps.
            now: What else is worth showing of the last step.

        Yields:
            What to call after each step.
        """
        if self.as_json or is_quiet():
            yield lambda: None
        elif sys.stderr.isatty():
            with self._bar(what, total, now) as advance:
                yield advance
        else:
            yield self._lines(what, total, now)

    @contextmanager
    def _bar(self, what: str, total: int, now: Callable[[], str]) -> Iterator[Callable[[], None]]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}"),
        )
        with Progress(*columns, console=self._err, transient=True) as bar:
            task = bar.add_task(what, total=total, now="")
            yield lambda: bar.update(task, advance=1, now=now())

    def _lines(self, what: str, total: int, now: Callable[[], str]) -> Callable[[], None]:
        begun = last = time.monotonic()
        done = 0

        def advance() -> None:
            nonlocal last, done
            done += 1
            if time.monotonic() - last < _SECONDS_BETWEEN_LINES:
                return
            last = time.monotonic()
            left = (last - begun) / done * max(total - done, 0)
            more = f", {text}" if (text := now()) else ""
            self._err.print(
                f"{what}: {done} of {total}{more}, {timedelta(seconds=round(left))} left",
                markup=False,
                soft_wrap=True,
            )

        return advance


class LongList:
    """Items of a JSON document that are too many for memory; they wait in a temporary file.

    Use as a context manager.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._size = 0

    def __enter__(self) -> "LongList":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, item: Mapping[str, Any]) -> None:
        """Take in one item, as JSON in a line."""
        self._file.write((",\n" if self._size else "") + json.dumps(item, allow_nan=False))
        self._size += 1

    def copy_to(self, stream: TextIO) -> None:
        """Write all items, separated by commas."""
        self._file.seek(0)
        shutil.copyfileobj(self._file, stream)


def percent(value: float | None) -> str:
    """A ratio as per cent for a table."""
    return "-" if value is None else f"{100 * value:.1f} %"


def size(num_bytes: int) -> str:
    """A number of bytes for a person."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
