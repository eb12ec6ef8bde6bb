"""Every public function on three small adapters: `python examples/public_api.py`.

Needs `pip install 'lora-merge[peft]'` for the parts that run a model. Writes to a temporary folder.
"""

import tempfile
from pathlib import Path

import torch

import lora_merge

HERE = Path(__file__).resolve().parent
ADAPTERS = str(HERE / "adapters" / "*")
BASE = HERE / "base"
ROWS = HERE / "data" / "test.jsonl"
UPPER = HERE / "adapters" / "upper"


def look(folder: Path) -> None:
    """What adapters are, how they relate, what ranks to keep."""
    upper = lora_merge.open_adapter(UPPER)
    several = lora_merge.open_adapters([upper, str(HERE / "adapters" / "[dr]*")])
    print(lora_merge.info(upper))
    print(lora_merge.spectra(upper))
    print(lora_merge.plan_compare(several))
    print(lora_merge.plan_neighbours(several, count=1))
    print(lora_merge.neighbours(several, count=1))
    comparison = lora_merge.compare(several)
    print(comparison)
    print([verdict.kind for verdict in lora_merge.judge(comparison)])
    print(lora_merge.group(comparison, 2))
    found = [lora_merge.spectra(one) for one in several]
    print(lora_merge.draw(found, folder / "spectra.svg", metric="erank").name)
    print(lora_merge.draw(comparison, folder / "pairs.png").name)
    print(lora_merge.write_csv(found, folder / "spectra.csv").name)
    print(lora_merge.choose_ranks(upper, "budget:x0.5"))


def make(folder: Path) -> None:
    """Many adapters in, one out; one adapter at other ranks."""
    print(len(lora_merge.methods()), "methods")
    print(len(lora_merge.report(ADAPTERS, folder / "report.html").warnings), "warnings")
    print(lora_merge.plan_merge(ADAPTERS, method="ties", rank=8))
    merged = lora_merge.merge(ADAPTERS, method="ties", rank=8, parameters={"density": 0.4})
    print(merged.report)
    merged.save_pretrained(folder / "merged")
    print(lora_merge.plan_recipe(folder / "merged" / "lora_merge.yaml"))
    print(lora_merge.run_recipe(folder / "merged" / "lora_merge.yaml", folder / "again").report)
    for part in ("1/2", "2/2"):
        print(lora_merge.run_shard(folder / "merged" / "lora_merge.yaml", folder / "joined", part))
    print(lora_merge.join(folder / "joined").report)
    print(lora_merge.pack(ADAPTERS, folder / "library", tags=["kind=text"]))
    print(lora_merge.check_library(folder / "library") or "all is as packed")
    print(lora_merge.info(f"{folder / 'library'}:upper"))
    options = lora_merge.LegoOptions(units="normalized")
    print(lora_merge.cluster(ADAPTERS, 16, options=options))
    print(lora_merge.arrive(ADAPTERS, folder / "slots", slots=2))
    print(lora_merge.plan_resize(merged, "energy:0.9"))
    small = lora_merge.resize(merged, "energy:0.9")
    print(small.report)
    print(lora_merge.plan_convert(UPPER, to="mlx"))
    print(lora_merge.convert(UPPER, folder / "plain", to="peft").report)


def beside_a_model(folder: Path, model: torch.nn.Module) -> None:
    """Adapters and their base: fuse, extract, look at both."""
    print(lora_merge.spectra_beside_base(UPPER, BASE).missing)
    print(lora_merge.plan_fuse(UPPER, BASE))
    print(lora_merge.fuse(UPPER, BASE, folder / "tuned"))
    print(lora_merge.plan_extract(BASE, folder / "tuned", 8))
    again = lora_merge.extract(BASE, folder / "tuned", 8)
    print(again.report)
    live = again.to_peft(model, "again")
    print(lora_merge.open_adapters(live))


def mix(folder: Path, model: torch.nn.Module) -> None:
    """Adapters behind a gate: trained, used, made smaller, written for others."""
    arrow = lora_merge.Mixture([UPPER, HERE / "adapters" / "double"], "arrow")
    arrow = lora_merge.append_experts(arrow, HERE / "adapters" / "reverse")
    handle = lora_merge.load_mixture(model, arrow)
    handle.detach()
    print(lora_merge.fresh_mixture(str(BASE), 4).names)
    gate = lora_merge.Mixture(ADAPTERS, "meteora")
    print(lora_merge.train(gate, BASE, ROWS, lora_merge.TrainSettings(steps=2)))
    seen = lora_merge.usage(arrow, BASE, ROWS)
    print(lora_merge.consolidate(arrow, seen, experts=2).groups)
    print(lora_merge.consolidate(arrow, base=BASE, data=ROWS, rank=8, out=folder / "one"))
    known = lora_merge.describe(arrow, BASE, ROWS)
    print(lora_merge.novelty(known, BASE, ROWS).is_new)
    print(lora_merge.export(arrow, folder / "static", "static", weights=seen, rank=8))
    print(len(lora_merge.tune(arrow, device="cpu", tokens=[1], rounds=1, dry_run=True)), "cases")
    refused = (
        lambda: lora_merge.import_mixture(folder / "nothing"),
        lambda: lora_merge.check_kernels("cuda:99"),  # without an argument it takes minutes
    )
    for call in refused:
        try:
            call()
        except lora_merge.LoraMergeError as error:
            print(error)


def measure(folder: Path, model: torch.nn.Module) -> None:
    """Statistics of activations, for the methods that need them."""
    texts = [torch.arange(start, start + 12)[None] for start in range(1, 5)]
    statistics = lora_merge.collect_statistics(
        model, ADAPTERS, [texts] * 3, folder / "statistics.safetensors"
    )
    print(lora_merge.plan_merge(ADAPTERS, method="ties", rank=8))
    merged = lora_merge.merge(ADAPTERS, method="ssr", statistics=str(statistics.path))
    print(merged)
    start = {"merge_method": "svd", "adapters": [ADAPTERS], "rank": 8}
    found = lora_merge.search(start, base=BASE, data=ROWS, metric="loss", trials=2)
    print(found.best.values)
    print(lora_merge.soup(ADAPTERS, base=BASE, data=ROWS, metric="loss"))
    print(lora_merge.sweep({**start, "scale": 0.5}, folder / "sweep", count=2))
    print(len(lora_merge.evaluate(ADAPTERS, base=BASE, data=ROWS, cache=False).lines), "scored")


def main() -> None:
    """Call them all."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        look(folder)
        make(folder)
        beside_a_model(folder, AutoModelForCausalLM.from_pretrained(BASE))
        mix(folder, AutoModelForCausalLM.from_pretrained(BASE))
        measure(folder, AutoModelForCausalLM.from_pretrained(BASE))
    print("every public function was called")


if __name__ == "__main__":
    main()
