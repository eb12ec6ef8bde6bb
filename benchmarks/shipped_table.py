"""Make the dispatch table that is shipped for Hopper GPUs, from measurements.

    python benchmarks/shipped_table.py

What was measured are whole decoding steps and prompts of 8 layers of Llama-3-8B's shape, all groups
of modules on one implementation: each of a layer's four groups takes the whole's seconds, of which
only the order counts. What failed, and what was not measured, is not in the table, and runs what it
would run without one.
"""

import json
from pathlib import Path
from typing import Any

from kernel_cases import CASES

from lora_merge.kernels.gated_stack import dispatch
from lora_merge.kernels.gated_stack.tune_cases import llama_shapes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Later files count where both have a row.
SOURCES = ("kernels-nvidia-h200-8-layers.json", "h200-gather-replaced-decode.json")
RAN = {"eager": "eager", "triton": "triton", "joined": "joined", "grouped": "grouped"}
CARDS = ("nvidia-h100", "nvidia-h200", "nvidia-gh200")  # beginnings of their names
TARGET = ROOT / "src/lora_merge/kernels/gated_stack/tables/nvidia-h200.json"


def rows_of(document: dict[str, Any]) -> dict[str, Any]:
    """Rows of a table, by key, from a file of bench_kernels.py."""
    cases, found = {case.name: case for case in CASES}, {}
    for row in document["rows"]:
        case = cases[row["case"]["name"]]
        if case.kind not in ("decode", "prefill"):
            continue
        seconds = {
            RAN[name]: float(f"{timing['median']:.4g}")
            for name, timing in row["seconds"].items()
            if name in RAN and name not in row["errors"]
        }
        for shape in llama_shapes(case.experts, case.rank):
            key = dispatch.Case(
                device="", d_in=shape.d_in, d_out=sum(shape.d_out),
                units=len(shape.d_out) * sum(shape.ranks), tokens=case.tokens, dtype="bfloat16",
                gate="top-k" if case.top_k else "dense", experts=case.experts,
                kept=case.top_k or 0,
            ).key  # fmt: skip
            found[key] = {"seconds": seconds}
    return found


def made() -> dict[str, Any]:
    """The table."""
    rows: dict[str, Any] = {}
    documents = [json.loads((RESULTS / name).read_text()) for name in SOURCES]
    for document in documents:
        rows |= rows_of(document)
    return {
        "device": documents[0]["device"], "cards": list(CARDS), "sources": list(SOURCES),
        "versions": documents[0]["versions"], "rows": rows,
    }  # fmt: skip


def main() -> None:
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(json.dumps(made(), indent=1) + "\n")
    print(TARGET)


if __name__ == "__main__":
    main()
