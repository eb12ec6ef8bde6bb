"""What one decoded token costs the host, by part.

    python benchmarks/host_token.py [--device cuda] [--layers 8] [--out DIR]

Widths are small, as the host's work does not depend on them, and a call is timed until it returns,
not until the device is done. Per token:

    generate    transformers' loop around the model: inputs, masks, the choice of the token
    python      the model's modules and our hooks: what is asked, not what is launched
    operators   the same calls of torch alone, one after another: what they are made of, launched
    launches    kernels, copies and graphs that reach a GPU

With `--device cuda` the same models once more with `graph=True`, whose step is one launch; the base
under the same graph is a mixture that is switched off. The numbers of a CPU hold for the parts in
Python; its operators do their (small) work before they return.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_cases import Case
from kernel_work import build, forced, implementations, mixture_of, setting_of, tokens, twin
from torch.overrides import TorchFunctionMode
from transformers import StaticCache, logging

from lora_merge.kernels.gated_stack import dispatch
from lora_merge.mixture.runtime.attach import load_mixture

PROMPT, NEW = 16, 24


class Noted(TorchFunctionMode):
    """Notes every call of torch that the model's Python makes, attributes aside."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Callable[[], Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__":
            self.made.append(lambda: func(*args, **kwargs))
        return func(*args, **kwargs)


def median_us(call: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Microseconds until the call returns; the device is idle when it begins."""
    seconds = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


def launches(call: Callable[[], object]) -> int:
    """Kernels, copies and graphs that a call sends to the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        call()
    sent = ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset", "cudaGraphLaunch")
    return sum(event.count for event in record.key_averages() if event.key.startswith(sent))


@torch.no_grad()
def parts_of(model: Any, prompt: torch.Tensor, how: str, rounds: int) -> dict[str, float]:
    """Microseconds per token by part."""
    device = prompt.device
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
    token = prompt[:, :1].clone()
    mask = torch.zeros(1, 1, 1, PROMPT + NEW, dtype=torch.bool, device=device)
    mask[..., : PROMPT + 1] = True
    with forced(how if how in dispatch.NAMES else "auto"):
        model(input_ids=prompt, past_key_values=cache)
        position = torch.full_like(token, PROMPT)

        def step() -> Any:
            for layer in cache.layers:
                layer.cumulative_length.fill_(PROMPT)  # the same token again and again
            return model(
                input_ids=token, past_key_values=cache, position_ids=position,
                attention_mask=mask, use_cache=True,
            )  # fmt: skip

        for _ in range(3):
            step()
        forward = median_us(step, rounds, device)
        noted = Noted()
        if getattr(getattr(model, "mixture", None), "graphs", None) is None:
            with noted:
                step()
        operators = median_us(lambda: [one() for one in noted.made], rounds, device)

        def generate(new: int) -> Callable[[], Any]:
            ones = torch.ones_like(prompt)
            return lambda: model.generate(
                input_ids=prompt, attention_mask=ones, do_sample=False, max_new_tokens=new,
                min_new_tokens=new, cache_implementation="static", disable_compile=True,
            )  # fmt: skip

        generate(NEW)()
        short, long = (median_us(generate(new), max(3, rounds // 8), device) for new in (4, NEW))
        sent = launches(step) if device.type == "cuda" else 0
    whole = (long - short) / (NEW - 4)
    found = {"generate": max(0.0, whole - forward), "python": forward - operators}
    return {**found, "operators": operators, "token": whole, "count": len(noted.made),
            "launches": sent}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, help="folder for the file; default: keep none")
    options = parser.parse_args()
    options.small, options.compile, options.profile_all = True, False, False
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    rows: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        setting = setting_of(options, Path(folder))
        case = Case("host", "host", "decode", 8, 16, 0.0)
        mixture, prompt = mixture_of(setting, case), tokens(setting, 1, PROMPT)
        graphs = [False, True] if setting.device.type == "cuda" else [False]
        hows = ["base", *(how for how in implementations(setting) if how != "border")]
        for graph in graphs:
            for how in hows:
                model = twin(build(setting), share=False)
                layout = "rows" if how in ("rows", "joined") else "stack"
                if how != "base" or graph:
                    load_mixture(model, mixture, layout=layout, graph=graph)
                if how == "base" and graph:
                    model.mixture.set_gate(weights=[0.0] * case.experts)
                name = f"{how}, graph" if graph else how
                parts = parts_of(model, prompt, how, options.rounds)
                rows[name] = {part: round(value) for part, value in parts.items()}
                each = "  ".join(f"{part} {value}" for part, value in rows[name].items())
                print(f"{name}: {each}", flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        document = {"device": dispatch.device_name(setting.device), "layers": options.layers,
                    "experts": case.experts, "rank": case.rank, "us per token": rows}  # fmt: skip
        path = options.out / f"host-{document['device']}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
