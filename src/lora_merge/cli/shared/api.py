"""Call a public function from a command, with progress and notes shown."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_merge.adapters.adapter import Adapter
    from lora_merge.cli.shared.output import Output
    from lora_merge.planning import Plan, Progress


@contextmanager
def shown_progress(output: "Output", now: Callable[[], str] = lambda: "") -> "Iterator[Progress]":
    """A bar for each part of the work, `now` beside it; yields what to call after each step."""
    with ExitStack() as bars:
        steps: dict[str, Callable[[], None]] = {}

        def advance(what: str, total: int) -> None:
            if what not in steps:
                bars.close()
                steps[what] = bars.enter_context(output.progress(what, total, now))
            steps[what]()

        yield advance


def show_notes(output: "Output", report: Any, shown: Sequence[str] = ()) -> None:
    """What a plan or report says that was not shown yet."""
    for note in getattr(report, "notes", ()):
        if note not in shown:
            output.note(note)


def show_notes_of(output: "Output", adapters: Iterable["Adapter"]) -> None:
    """What is odd about adapters, trained files beside them among it."""
    for adapter in adapters:
        for note in adapter.notes:
            output.note(f"{adapter.name}: {note}")


def run_shown(output: "Output", function: Callable[..., Any], *given: Any, **more: Any) -> Any:
    """What a function that plans and runs makes; notes and progress are shown."""
    notes: list[str] = []

    def show(plan: "Plan[Any]") -> None:
        from lora_merge.cli.shared.malloc import return_large_blocks

        return_large_blocks(plan.peak_bytes)
        show_notes(output, plan)
        notes.extend(plan.notes)

    with shown_progress(output) as progress:
        made = function(*given, **more, on_plan=show, progress=progress)
    show_notes(output, getattr(made, "report", made), notes)
    return made
