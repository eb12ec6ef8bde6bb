"""`lora-merge` and `python -m lora_merge`: what a signal means, before anything that takes time."""

import gc
import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Entry point: 0 done, 1 the input is at fault, 2 wrong usage, 130 interrupted."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    # Importing torch makes a million objects that stay; looking through them for garbage again and
    # again took 8 % of a four-adapter merge.
    gc.set_threshold(200_000, 20, 20)
    from lora_merge.cli.app import run

    code = run(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said and done, Python only cleans up
    sys.exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    """End as an error does, so that temporary files are removed.

    Not while a module is loaded: there, C++ aborts at an exception, and Python may swallow it.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"\ninterrupted\n" if number == signal.SIGINT else b"")
            os._exit(128 + number)
        frame = frame.f_back
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
