"""Time several ways to do one thing, turn by turn, so that a busy machine slows all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median: Of all rounds.
        low: First quartile.
        high: Third quartile.
        rounds: How many.
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """From the seconds of each round."""
        if len(seconds) < 2:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(statistics.median(seconds), low, high, len(seconds))


def measure(
    work: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 9,
    least: float = 0.02,
    graph: bool = False,
) -> dict[str, Timing]:
    """Seconds of one call of each, all of them in every round.

    Args:
        work: What to time, by name.
        device: Where it runs; a GPU is timed by its own events.
        rounds: How often all are timed.
        least: Seconds that a timed stretch of calls should at least take.
        graph: Record the calls in a CUDA graph and time its replay (GPU only).
    """
    on_gpu = device.type == "cuda"
    timed = {}
    for name, call in work.items():
        for _ in range(WARM_UP):
            call()
        run = _captured(call) if graph and on_gpu else call
        once = _stretch(run, 1, on_gpu)
        timed[name] = (run, max(1, min(1000, round(least / max(once, 1e-7)))))
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, (run, calls) in timed.items():
            seconds[name].append(_stretch(run, calls, on_gpu) / calls)
    return {name: Timing.of(values) for name, values in seconds.items()}


def _stretch(call: Callable[[], object], calls: int, on_gpu: bool) -> float:
    """Seconds of some calls one after another."""
    if not on_gpu:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - start
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """Replay of a CUDA graph of the call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
