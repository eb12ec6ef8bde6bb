"""One module in full: every singular value, the energy curve, and where each rule would cut."""

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.text import Text

from lora_merge.adapters.measured.spectra import ModuleSpectrum
from lora_merge.cli.views.format import number
from lora_merge.cli.views.glyphs import bar
from lora_merge.cli.views.grid import grid
from lora_merge.ranks.choose import choose_ranks
from lora_merge.ranks.measures import Measures, tail_energy

_RULES = ("energy:0.9", "energy:0.95", "energy:0.99", "elbow", "erank", "nuclear:0.95")


def module_view(
    module: ModuleSpectrum, *, width: int, top: int | None, plain: bool
) -> RenderableType:
    """Facts and bars; at most `top` values, but always those where a rule cuts."""
    spec, measures = module.spec, module.measures
    head = Text(module.name, style="bold")
    shape = f"{spec.d_out} x {spec.d_in}, rank {spec.rank}, scaling {spec.scaling:g}, {spec.dtype}"
    head.append(f"\n{shape}", style="not bold")
    if measures is None or module.status != "ok":
        detail = f": {module.detail}" if module.detail else ""
        return Group(head, Text(f"{module.status}{detail}", style="red"))
    cuts: dict[int, list[str]] = {}
    for rule in _RULES:
        plan = choose_ranks({"m": module.values}, {"m": spec.d_in + spec.d_out}, rule)
        cuts.setdefault(plan.ranks["m"], []).append(rule)
    facts = Text(_facts(measures, len(module.values)))
    return Group(head, facts, Text(""), _bars(module, cuts, width, top, plain))


def _facts(m: Measures, size: int) -> str:
    if m.noise_tail == size > 2:
        plateau = "all values lie as close together as those of random factors"
    elif m.noise_tail:
        plateau = f"the last {m.noise_tail} of {size} lie as close together as random factors'"
    else:
        plateau = "no tail as flat as that of random factors"
    return (
        f"norms    Frobenius {number(m.frobenius)}, spectral {number(m.spectral)}, "
        f"nuclear {number(m.nuclear)}; condition {number(m.condition)}\n"
        f"ranks    stable {m.stable_rank:.2f}, participation {m.participation_ratio:.2f}, "
        f"Roy-Vetterli {m.effective_rank:.2f}, numerical {m.numerical_rank}\n"
        f"plateau  {plateau}"
    )


def _bars(
    module: ModuleSpectrum,
    cuts: Mapping[int, list[str]],
    width: int,
    top: int | None,
    plain: bool,
) -> Text:
    values = module.values
    energy = 1 - tail_energy(values)[1:] / float(values.square().sum())
    arrow = "< " if plain else "◂ "
    marks = {rank: arrow + ", ".join(rules) for rank, rules in cuts.items()}
    # The index, the value, the per cent and five gaps take 23 columns.
    length = max(6, (width - 23 - max(map(len, marks.values()))) // 2)
    rows: list[list[str | Text]] = []
    for i, (value, share) in enumerate(zip(values.tolist(), energy.tolist(), strict=True), 1):
        if top and i > top and i not in cuts:
            continue
        rows.append(
            [
                str(i),
                number(value),
                Text(bar(value / float(values[0]), length, ascii_only=plain), style="cyan"),
                f"{100 * share:.1f} %",
                Text(bar(share, length, ascii_only=plain), style="yellow"),
                marks.get(i, ""),
            ]
        )
    heads = ["i", "s_i", "s_i / s_1"[:length].ljust(length), "energy", "up to i".ljust(length)]
    heads.append("a rule's cut")
    return grid(heads, rows, left=(2, 4, 5), plain=plain)
