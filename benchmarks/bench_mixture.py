"""Speed and memory of gated mixtures beside PEFT's, as ratios to the base model in one run.

Every candidate runs in turn, round after round, so that a busy machine slows all of them alike. Two
ratios are given: of medians, and of the fastest rounds, which a busy machine disturbs least.

On a machine that is very busy, `--cpu-time` counts what one thread itself computes instead of what
passes on the clock.

    python benchmarks/bench_mixture.py [--new-tokens 64] [--rounds 5] [--json FILE] [--out FILE]
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from mixture_memory import growth_table
from mixture_models import build, our_models, peft_models, save_experts
from transformers import logging

PROMPT = 128
# (work, candidate) -> at most so many times the base; or so many times faster than another.
AIMS = {
    ("generate", "arrow"): 1.2, ("generate", "meteora"): 1.2, ("generate", "smora"): 1.2,
    ("generate", "xlora"): 1.8,
    ("forward", "arrow"): 1.25, ("forward", "meteora"): 1.25, ("forward", "smora"): 1.25,
    ("forward", "xlora"): 2.3,
}  # fmt: skip
TRAINING_AIM = 3.0  # PEFT's X-LoRA step over ours


def measure(
    models: dict[str, torch.nn.Module],
    work: Callable[[torch.nn.Module], object],
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Seconds of every round of each, rounds interleaved, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            if turn and name == "peft xlora" and turn > max(2, rounds // 3):
                continue  # an order of magnitude slower; fewer rounds tell enough
            start = clock()
            work(model)
            if turn:
                times[name].append(clock() - start)
    return times


def training_step(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model.train()
    if hasattr(model, "mixture") or hasattr(model, "peft_config"):
        loss = model(input_ids=ids, labels=ids).loss
    else:  # the base with a gradient through every layer: what no gate can be trained below
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        loss = model(inputs_embeds=inputs, labels=ids).loss
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--json", type=Path, help="every time of every round")
    parser.add_argument("--out", type=Path, help="the tables, as Markdown")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, its own time")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
    how = (options.rounds, time.thread_time if options.cpu_time else time.perf_counter)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    random = torch.Generator().manual_seed(2)
    load = os.getloadavg()

    def ids(batch: int, length: int) -> torch.Tensor:
        return torch.randint(1, options.vocabulary, (batch, length), generator=random)

    with tempfile.TemporaryDirectory() as folder:
        base = build(options.vocabulary)
        paths = save_experts(base, Path(folder))
        models = {"base": base, **peft_models(options.vocabulary, paths)}
        models |= our_models(options.vocabulary, paths)
        prompt, long = ids(1, PROMPT), ids(1, 512)

        @torch.no_grad()
        def generate(model: torch.nn.Module) -> object:
            return model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                max_new_tokens=options.new_tokens, min_new_tokens=options.new_tokens,
            )  # fmt: skip

        @torch.no_grad()
        def forward(model: torch.nn.Module) -> object:
            return model(input_ids=long)

        results = {
            f"generate {PROMPT} + {options.new_tokens}": measure(models, generate, *how),
            "forward 512": measure(models, forward, *how),
        }
        batch = ids(4, PROMPT)
        wanted = ("base", "peft xlora", "xlora", "meteora", "smora")
        trained = {name: prepare(name, models[name]) for name in wanted}
        results["training step 4 x 128"] = measure(trained, lambda m: training_step(m, batch), *how)
        memory = "" if options.no_memory else growth_table(options.vocabulary, paths)
    text = "\n\n".join([*(table(title, times) for title, times in results.items()), memory])
    print(text)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    if options.out:
        options.out.write_text(f"{heading(load)}\n\n{text}\n")


def prepare(name: str, model: torch.nn.Module) -> torch.nn.Module:
    """Let gradients into the gate alone; the base gets one at its input (see `training_step`)."""
    if name.startswith("peft"):
        model.base_model.internal_xlora_classifier.requires_grad_(True)
        model.base_model.lora_model.model.config.use_cache = False
        return model
    model.requires_grad_(False)
    model.config.use_cache = False
    if name != "base":
        model.mixture.train_gate_only()
    return model


def table(title: str, seconds: dict[str, list[float]]) -> str:
    """One kind of work as a Markdown table."""
    rows = [
        f"## {title}",
        "",
        "| | median ms | x base | fastest x base | aim |",
        "| - |" + " - |" * 4,
    ]
    base = seconds["base"]
    for name, values in seconds.items():
        middle, best = statistics.median(values), min(values)
        aim = AIMS.get((title.split()[0], name.partition(",")[0]), "")
        ratio = middle / statistics.median(base)
        rows.append(
            f"| {name} | {middle * 1e3:.1f} | {ratio:.2f} | {best / min(base):.2f} | {aim} |"
        )
    if title.startswith("training"):
        times = statistics.median(seconds["peft xlora"]) / statistics.median(seconds["xlora"])
        rows += [
            "",
            f"PEFT's X-LoRA step takes {times:.2f} times as long as ours (aim {TRAINING_AIM}).",
        ]
    return "\n".join(rows)


def heading(load: tuple[float, ...]) -> str:
    """What was run, where, and how busy the machine was."""
    shown = [word for word in sys.argv[1:] if not word.startswith(("/", "--out", "--json"))]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return (
        "# Mixtures: speed and memory\n\n"
        f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(shown)}`\n\n"
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads, "
        f"{versions}. Load average before and after: {load[0]:.1f} and {os.getloadavg()[0]:.1f}: "
        "above the number of threads the machine was shared, and the ratios of the fastest rounds "
        "say more than the medians. `--cpu-time` is the time of the one computing thread, not of "
        "the clock."
    )


if __name__ == "__main__":
    main()
