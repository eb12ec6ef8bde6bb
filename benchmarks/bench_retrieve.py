"""What it costs to choose one expert of hundreds by the prompt, and to run it, beside the base.

All candidates run in turn, round after round, timed by the processor time of the one computing
thread, so that a busy machine slows none of them. Experts are random: this is about time alone.

    python benchmarks/bench_retrieve.py [--experts 200] [--rank 8] [--rounds 5] [--out FILE]
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import mixture_models
import torch
from bench_mixture import measure
from mixture_models import build, save_experts
from transformers import logging

from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.runtime.call import bank
from lora_merge.mixture.runtime.call.by_text import ByText

PROMPT, NEW, VOCABULARY = 128, 32, 32000


def timed(method: Callable[..., None], spent: list[float]) -> Callable[..., None]:
    """A method that notes what each of its calls took."""

    def run(self: ByText, *args: object) -> None:
        start = time.thread_time()
        method(self, *args)
        spent.append(time.thread_time() - start)

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experts", type=int, default=200)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="the table, as Markdown")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    mixture_models.EXPERTS, mixture_models.RANK = options.experts, options.rank
    random = torch.Generator().manual_seed(2)
    prompt = torch.randint(1, VOCABULARY, (1, PROMPT), generator=random)
    with tempfile.TemporaryDirectory() as folder:
        base = build(VOCABULARY)
        paths = save_experts(base, Path(folder))
        mixture = Mixture(paths, "retrieve", hidden_size=512)
        for name, tensor in mixture.gate.items():
            mixture.gate[name] = torch.rand(tensor.shape, generator=random) + 0.1
        chosen = build(VOCABULARY)
        load_mixture(chosen, mixture)
        one = build(VOCABULARY)
        load_mixture(one, Mixture(paths[:1], "constant", weights=(1.0,)))
        models = {"base": base, "one expert alone": one, f"retrieve of {options.experts}": chosen}

        @torch.no_grad()
        def generate(model: torch.nn.Module) -> object:
            mask = torch.ones_like(prompt)
            kept = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
            return model.generate(input_ids=prompt, attention_mask=mask, **kept)

        @torch.no_grad()
        def forward(model: torch.nn.Module) -> object:
            return model(input_ids=prompt)

        rows, spent = [], []
        before, ByText.before = ByText.before, timed(ByText.before, spent)
        for title, work in ((f"pass of {PROMPT}", forward), (f"{PROMPT} + {NEW}", generate)):
            spent.clear()
            found = measure(models, work, options.rounds, time.thread_time)
            names, seconds = list(found), [statistics.median(v) for v in found.values()]
            turns = options.rounds + 1  # the first, which makes the expert ready, is not counted
            share = sum(spent[len(spent) // turns :]) / options.rounds / seconds[-1]
            for name, value in zip(names, seconds, strict=True):
                routing = f"{share:.2%}" if name == names[-1] else ""
                cells = (title, name, f"{value * 1e3:.1f}", f"{value / seconds[0]:.3f}", routing)
                rows.append(f"| {' | '.join(cells)} |")
        ByText.before = before
        bank._FEW = options.experts + 1  # all experts run, and one of them acts
        found = measure({"all": chosen}, forward, 2, time.thread_time)
        value = statistics.median(found["all"])
        rows.append(f"| pass of {PROMPT} | all {options.experts} run | {value * 1e3:.1f} | | |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    text = "\n".join(
        [
            "# One expert of hundreds, by the prompt",
            "",
            f"`python benchmarks/bench_retrieve.py --experts {options.experts} "
            f"--rank {options.rank} --rounds {options.rounds}`:",
            f"hidden 512, 8 layers, processor time of one thread, {versions}.",
            "",
            "| work | | ms | x base | choosing, of the pass |",
            "| - | - | - | - | - |",
            *rows,
            "",
        ]
    )
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
