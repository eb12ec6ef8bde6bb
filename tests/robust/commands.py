"""Every command that reads or writes files, on the corpus."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One command line.

    Attributes:
        damaged: Places of the corpus of which a file may be damaged.
        words: The command line. `{name}` is a place, `OUT` the output, `OUT.csv` a file beside it.
        work: What a run that ends early may leave beside its output, to go on from.
        beside: A place of which a copy lies beside the output, and what its name ends in.
    """

    damaged: tuple[str, ...]
    words: str
    work: tuple[str, ...] = ()
    beside: tuple[str, str] | None = None

    @property
    def writes(self) -> bool:
        """Whether it makes a directory or a file."""
        return "OUT" in self.words

    @property
    def changes(self) -> bool:
        """Whether it changes an output that is there."""
        return self.beside is not None and not self.beside[1]

    @property
    def makes_files(self) -> bool:
        """Whether its outputs are single files."""
        return "OUT." in self.words


_TEXTS = "--base {model} --data {rows} --device cpu"
_SEARCH = "--over scale --sampler random"
_TRAINING = ("out.training", "out.training.metrics.jsonl")

COMMANDS: dict[str, Line] = {
    "info": Line(("a", "sora"), "info {sora} --json"),
    "info of one": Line(("a",), "info {a}"),
    "info for vLLM": Line(("a",), "info {a} --target vllm --json"),
    "info for MLX": Line(("mlx",), "info {mlx} --target mlx"),
    "spectra": Line(("a", "bare"), "spectra {a} {bare} --alpha 4 --json"),
    "spectra in full": Line(("a",), "spectra {a} --module *.0.mlp.up_proj"),
    "spectra as files": Line(("a",), "spectra {a} --csv OUT.csv --svg OUT.svg --html OUT.html"),
    "spectra beside a base": Line(
        ("a", "base", "cache"), "spectra {a} --base {base} --intruders --json"
    ),
    "compare": Line(("a",), "compare {a} {b} --json"),
    "compare three": Line(("a", "c"), "compare {a} {b} {c} --cluster auto"),
    "report": Line(("a", "c"), "report {a} {c} -o OUT.html"),
    "cat": Line(("a", "b"), "merge {a} {b} -M cat -w 0.5 -w -2 -o OUT"),
    "ties": Line(("a",), "merge {a} {b} -M ties --dtype float16 -o OUT"),
    "merge by energy": Line(("a",), "merge {a} {b} -M svd --rank energy:0.9 -o OUT"),
    "sce": Line(("a",), "merge {a} {b} -M sce -o OUT"),
    "wudi": Line(("a",), "merge {a} {b} -M wudi -o OUT"),
    "auto": Line(("a", "c"), "merge {a} {b} {c} -M auto --scale auto -o OUT"),
    "dry run": Line(("a",), "merge {a} {b} -M knots-ties --dry-run --json"),
    "cluster": Line(("a", "sora"), "cluster {a} {sora} --rank 4 -o OUT"),
    "data": Line(("statistics",), "merge {a} {b} -M regmean --statistics {statistics} -o OUT"),
    "join": Line(("sharded",), "join OUT --keep", ("out.shards",), beside=("sharded", ".shards")),
    "merge that goes on": Line(
        ("half",),
        "merge {a} {b} {c} -M ties --scale 1 --rank energy:0.9 --resume -o OUT",
        ("out.shards",),
        beside=("half", ".shards"),
    ),
    "pack --append": Line(
        ("index", "c"), "pack {c} --name c --append -o OUT", beside=("library", "")
    ),
    "info of a library": Line(("library",), "info {library} --json"),
    "info of GGUF": Line(("gguf",), "info {gguf} --json"),
    "run in full": Line(("full_recipe",), "run {full_recipe} -o OUT"),
    "experts": Line(("moe", "experts"), "merge {moe} {experts} -M svd --rank 2 -o OUT"),
    "convert experts": Line(
        ("moe", "moe_base"), "convert {moe} --experts stacked --base {moe_base} -o OUT"
    ),
    "resize by Fisher": Line(("fisher",), "resize {a} --energy 0.9 --fisher {fisher} -o OUT"),
    "compare as files": Line(("a",), "compare {a} {b} {c} --svg OUT.svg --html OUT.html --json"),
    "pack": Line(("a",), "pack {a} {b} {c} -o OUT"),
    "pack --check": Line(("library",), "pack {library} --check --json"),
    "merge a library": Line(("library",), "merge {library} -M svd --rank 3 -o OUT"),
    "arrive": Line(("slots", "c"), "arrive {c} --into OUT --slots 2", beside=("slots", "")),
    "run": Line(("recipe",), "run {recipe} -o OUT"),
    "resize": Line(("a", "sora"), "resize {a} --rank 2 -o OUT"),
    "resize by gates": Line(("sora",), "resize {sora} --prune-gates -o OUT"),
    "resize by data": Line(("moments",), "resize {a} --energy 0.9 --bottleneck {moments} -o OUT"),
    "fuse": Line(("a", "base"), "fuse {a} --base {base} -o OUT"),
    "extract": Line(("base", "tuned"), "extract --base {base} --tuned {tuned} --rank 2 -o OUT"),
    "convert": Line(("a",), "convert {a} -o OUT"),
    "convert to kohya": Line(("picture",), "convert {picture} --to kohya --component unet -o OUT"),
    "convert to diffusers": Line(
        ("picture",), "convert {picture} --to diffusers --component unet -o OUT"
    ),
    "convert to ComfyUI": Line(
        ("picture",), "convert {picture} --to comfyui --component unet -o OUT"
    ),
    "convert to MLX": Line(("b",), "convert {b} --to mlx --dtype float32 -o OUT"),
    "resize of kohya's": Line(("kohya",), "resize {kohya} --rank 2 -o OUT"),
    "convert from diffusers": Line(("diffusers",), "convert {diffusers} --to peft -o OUT"),
    "convert from ComfyUI": Line(("comfyui",), "convert {comfyui} --to peft -o OUT"),
    "convert from MLX": Line(("mlx",), "convert {mlx} --to peft -o OUT"),
    "convert to GGUF": Line(("one", "model"), "convert {one} --to gguf --base {model} -o OUT"),
    "convert from GGUF": Line(("gguf", "model"), "convert {gguf} --to peft --base {model} -o OUT"),
    "convert a LoHa": Line(("loha",), "convert {loha} --rank 4 -o OUT"),
    "convert an IA3": Line(("ia3", "base"), "convert {ia3} --base {base} --energy 0.9 -o OUT"),
    "gate": Line(("a",), "gate {a} {b} --preset arrow -o OUT"),
    "gate into": Line(("mixture",), "gate {c} --into {mixture} -o OUT"),
    "gate from X-LoRA": Line(("xlora",), "gate {a} {b} --from {xlora} -o OUT"),
    "gate from MeteoRA": Line(("meteora",), "gate {a} {b} --from {meteora} -o OUT"),
    "export static": Line(("mixture",), "export {mixture} --to static --rank 4 -o OUT"),
    "export experts": Line(("mixture",), "export {mixture} --to experts -o OUT"),
    "export X-LoRA": Line(
        ("classified", "model"), "export {classified} --to xlora --base {model} -o OUT"
    ),
    "evaluate": Line(
        ("one", "routed", "rows", "model", "cache"), f"evaluate {{one}} {{routed}} {_TEXTS} --json"
    ),
    "search": Line(
        ("one", "rows"),
        f"search {{one}} {{two}} {_TEXTS} --over scale --trials 2 --sampler random -o OUT",
        ("out.search",),
    ),
    "search that goes on": Line(
        ("studied", "studied", "two"),
        f"search {{one}} {{two}} {_TEXTS} {_SEARCH} --trials 2 -o OUT",
        ("out.search",),
        beside=("studied", ".search"),
    ),
    "soup": Line(("one", "rows"), f"soup {{one}} {{two}} {_TEXTS} -o OUT"),
    "sweep": Line(("a",), "sweep {a} {b} --rank 2 --count 2 -o OUT"),
    "sweep over all": Line(("a",), "sweep {a} {b} --over scale,weights --rank 2 --count 2 -o OUT"),
    "evaluate choices": Line(
        ("choices", "one"), "evaluate {one} --base {model} --data {choices} --device cpu --json"
    ),
    "evaluate by text": Line(("retrieved", "rows"), f"evaluate {{retrieved}} {_TEXTS}"),
    "train ranks": Line(
        ("ranked", "rows"),
        f"train {{ranked}} {_TEXTS} --steps 1 --save-every 0 -o OUT",
        _TRAINING,
    ),
    "train experts": Line(
        ("routed", "rows"),
        f"train {{routed}} {_TEXTS} --steps 1 --train-experts --save-every 0 -o OUT",
        _TRAINING,
    ),
    "train that goes on": Line(
        ("checkpoint", "checkpoint", "routed"),
        f"train {{routed}} {_TEXTS} --steps 2 --save-every 1 --resume -o OUT",
        _TRAINING,
        beside=("checkpoint", ".training"),
    ),
    "prune": Line(
        ("routed", "rows"),
        f"train {{routed}} {_TEXTS} --steps 2 --rank-l1 1e-3 --save-every 0 -o OUT",
        _TRAINING,
    ),
    "train by text": Line(
        ("retrieving", "rows"), f"train {{retrieving}} {_TEXTS} -o OUT", _TRAINING
    ),
    "train": Line(
        ("routed", "rows"),
        f"train {{routed}} {_TEXTS} --steps 2 --save-every 1 -o OUT",
        _TRAINING,
    ),
    "usage": Line(("routed", "rows"), f"usage {{routed}} {_TEXTS} --plot OUT.png --json"),
    "consolidate": Line(("routed",), f"consolidate {{routed}} {_TEXTS} -o OUT"),
    "describe": Line(("routed", "rows"), f"describe {{routed}} {_TEXTS} --rank 2 -o OUT"),
    "novelty": Line(("described", "rows"), f"novelty {{described}} {_TEXTS} --json"),
}
