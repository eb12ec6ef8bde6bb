"""A progress bar that is the notebook's, where code runs in one."""

import sys
from collections.abc import Callable
from html import escape
from threading import Lock
from time import monotonic
from typing import Any

# Seconds between two pictures of a bar; shorter work needs none.
_PAUSE = 0.2


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this code; imports nothing."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def bar(what: str, total: int) -> Callable[[], None]:
    """A bar below the cell that runs, and what to call after each step; gone when all is done.

    Args:
        what: What is done.
        total: How many steps that has.
    """
    from IPython.display import HTML, display  # there is one: it runs this cell

    lock, shown, handle = Lock(), monotonic(), None
    done = 0

    def picture() -> Any:
        text = f"{escape(what)} {done} of {total}"
        return HTML(
            f'<progress value="{done}" max="{total}" aria-label="{text}"></progress> {text}'
        )

    def step() -> None:
        nonlocal done, shown, handle
        with lock:
            done += 1
            if done < total and monotonic() - shown < _PAUSE:
                return
            shown = monotonic()
            if done >= total:
                if handle is not None:
                    handle.update(HTML(""))
            elif handle is None:
                handle = display(picture(), display_id=True)
            else:
                handle.update(picture())

    return step
