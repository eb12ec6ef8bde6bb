"""A gate is signal x granularity x activation. The presets are rows of one table.

| axis        | values                                                                          |
| ----------- | ------------------------------------------------------------------------------- |
| signal      | what is looked at: nothing (`constant`), the caller (`request`), the last        |
|             | hidden state of a first pass (`hidden`), a learned row per weight on the         |
|             | module's input (`input`), the expert's top singular direction (`prototype`),     |
|             | how strongly the expert would act (`spectrum`), or the words of the prompt       |
|             | beside those of each expert's texts (`text`)                                     |
| granularity | one weight per expert for the `model`, per `module`, or one per single `rank`    |
| activation  | how scores become weights: `value`, `top_k`, `temperature`                       |
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from lora_merge.arguments import nearest
from lora_merge.errors import MethodError
from lora_merge.kernels.gate_rule import Rule, Value
from lora_merge.options import option

Signal = Literal["constant", "request", "hidden", "input", "prototype", "spectrum", "text"]
Granularity = Literal["model", "module", "rank"]

_ROW = "the preset's"  # what a setting is that is not given
# Of a classifier; a file may say more than there is memory for.
_DEEPEST, _WIDEST = 100, 1 << 20


@dataclass(frozen=True)
class GateSpec:
    """Everything about a gate that is not a tensor.

    Attributes:
        preset: Name of the row of the table it started from.
        signal: What the gate looks at.
        granularity: What one weight covers.
        value: Weights of the kept scores. `softmax` over the kept; `softmax_all` over all and then
            cut, not renormalised (X-LoRA); `softmax_twice` (X-LoRA with `enable_softmax_topk`);
            `sigmoid`, `raw` and `binary` entry by entry.
        top_k: How many scores are kept; None keeps all.
        temperature: Divides the scores before a softmax or sigmoid.
        scale: Multiplies every weight (X-LoRA's `global_scaling_weight`). None means 1, but `top_k`
            (or R) for rank gates under a softmax: the kept ranks then have weight 1 on average.
        standardise: Compare input and row after LayerNorm, divided by sqrt(d) (PHATGOOSE).
        sequence: Scores are averaged over the prompt, decided at prefill and kept.
        memory: Scores of earlier tokens that count at the next one, 0 to below 1: the score of a
            token is its own plus `memory` times that of the token before, sum_j memory^j s_(t-j).
        null_expert: A weight that belongs to no expert: the gate can abstain.
        null_score: Its score where the gate has no learned row for it.
        weights: Weight of each expert (`constant`).
        depth: Linear layers of the classifier (`hidden`).
        width: Hidden width of the classifier.
        bypass: First pass without experts; False keeps them on at weight 1 / N.
        trained: False while the gate still has its initial weights and needs training.
    """

    preset: str
    signal: Signal
    granularity: Granularity = option(
        "module", "xlora: one set of weights for the model, or one per module", unset=_ROW
    )
    value: Value = option("softmax", "how kept scores become weights", unset=_ROW)
    top_k: int | None = option(None, "experts (or ranks) kept per token", low=1, unset=_ROW)
    temperature: float = option(1.0, "divides the scores", above=0, unset=_ROW)
    scale: float | None = option(None, "multiplies every weight", unset=_ROW)
    standardise: bool = False
    sequence: bool = option(False, "decide once per sequence, at prefill")
    memory: float = option(
        0.0,
        "share of the previous token's scores that counts at the next",
        low=0,
        below=1,
        unset=_ROW,
    )
    null_expert: bool = option(False, "let the gate abstain: the base model")
    null_score: float = option(0.0, "score of abstaining, where none is learned", unset=_ROW)
    weights: tuple[float, ...] = option(
        (), "constant: weights of the experts", flags=("-w", "--weight")
    )
    depth: int = option(1, "xlora: layers of the classifier", low=1, high=_DEEPEST, unset=_ROW)
    width: int = option(2048, "xlora: its hidden width", low=1, high=_WIDEST, unset=_ROW)
    bypass: bool = True
    trained: bool = True

    def __post_init__(self) -> None:
        """Refuse settings that cannot mean anything."""
        if not isinstance(self.preset, str):
            raise MethodError(f"the gate's preset is {self.preset!r:.50}", "give its name")
        for name, choices in (("signal", Signal), ("granularity", Granularity), ("value", Value)):
            if getattr(self, name) not in get_args(choices):
                raise MethodError(
                    f"gate {self.preset}: {name} is {getattr(self, name)!r}",
                    f"one of {', '.join(get_args(choices))}",
                )
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise MethodError(f"gate {self.preset}: top_k is {self.top_k}", "at least 1")
        if not 0 < self.temperature < math.inf:
            raise MethodError(f"gate {self.preset}: temperature {self.temperature}", "above 0")
        for name, numbers in (
            ("scale", (self.scale or 0.0,)),
            ("null_score", (self.null_score,)),
            ("weights", self.weights),
        ):
            if not all(map(math.isfinite, numbers)):
                shown = ", ".join(map(str, numbers))
                raise MethodError(f"gate {self.preset}: {name} {shown}", "finite numbers")
        if not 1 <= self.depth <= _DEEPEST or not 1 <= self.width <= _WIDEST:
            raise MethodError(
                f"gate {self.preset}: depth {self.depth}, width {self.width}",
                f"from 1 to {_DEEPEST} and {_WIDEST}",
            )
        by_rank = self.signal in ("input", "spectrum")
        if self.granularity == "rank" and (not by_rank or self.null_expert):
            raise MethodError(
                f"gate {self.preset}: single ranks are gated by the module's input, "
                "and have no null expert",
                "use the presets smora or hilora",
            )
        if not 0 <= self.memory < 1:
            raise MethodError(f"gate {self.preset}: memory {self.memory}", "from 0 to below 1")
        if self.memory and (self.sequence or self.signal in ("constant", "request")):
            raise MethodError(
                f"gate {self.preset}: there are no scores per token to remember",
                "use memory with gates that decide per token",
            )
        if self.signal == "text" and not (self.sequence and self.granularity == "model"):
            raise MethodError(
                f"gate {self.preset}: it decides once per prompt, for the whole model",
                "leave sequence and granularity as they are",
            )
        if self.sequence and self.signal not in ("input", "prototype", "spectrum", "text"):
            raise MethodError(
                f"gate {self.preset}: {self.signal} cannot be averaged over a prompt",
                "use it with arrow, spectr, meteora or phatgoose",
            )

    @property
    def is_local(self) -> bool:
        """Whether each module computes its own weights from its own input."""
        return self.signal in ("input", "prototype", "spectrum")

    @property
    def has_rows(self) -> bool:
        """Whether the gate's scores are inner products of the input with stored rows."""
        return self.signal in ("input", "prototype")

    @property
    def is_learned(self) -> bool:
        """Whether rows to train on change the gate."""
        return self.signal in ("hidden", "input", "text")

    @property
    def is_open(self) -> bool:
        """Whether an expert may come or go without changing what the gate knows of the others."""
        return self.signal in ("request", "prototype", "spectrum", "text")

    @property
    def decides_before(self) -> bool:
        """Whether the weights of all modules are known before the first of them runs."""
        return self.signal in ("hidden", "text")

    def factor(self, num_scores: int) -> float:
        """What every weight is multiplied by, given how many scores there are."""
        if self.scale is not None:
            return self.scale
        if self.granularity == "rank" and self.value.startswith("softmax"):
            return float(min(self.top_k or num_scores, num_scores))
        return 1.0

    def rule(self, num_scores: int) -> Rule:
        """How a module's scores become weights, for a kernel.

        Args:
            num_scores: Rows of the gate, a learned null expert's among them.
        """
        constant_null = self.null_expert and self.signal not in ("hidden", "input")
        return Rule(
            self.value,
            self.top_k,
            self.temperature,
            self.factor(num_scores + constant_null),
            absolute=self.signal == "prototype",
            null_row=self.null_expert and not constant_null,
            null_score=self.null_score if constant_null else None,
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "weights": list(self.weights)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "GateSpec":
        """Inverse of `to_json`; unknown fields are refused, since they would change the result."""
        unknown = sorted(set(raw) - {field.name for field in fields(cls)})
        if unknown:
            raise MethodError(
                f"the gate has settings this version does not know: {', '.join(unknown)}",
                "update lora-merge",
            )
        switches = [f.name for f in fields(cls) if isinstance(f.default, bool)]
        wrong = [name for name in switches if not isinstance(raw.get(name, False), bool)]
        if wrong:
            raise MethodError(f"the gate's {wrong[0]} is {raw[wrong[0]]!r:.50}", "true or false")
        try:
            return cls(**{**raw, "weights": tuple(raw.get("weights", ()))})
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise MethodError(f"the gate's settings do not fit: {error}", "repair them") from error


# preset -> (what it is, its settings). Sources: X-LoRA 2402.07148, MeteoRA 2405.13053,
# SMoRA 2501.15103, HiLoRA 2510.12266, Arrow 2405.11157, SpectR 2504.03454,
# PHATGOOSE 2402.05859, S-LoRA 2311.03285, LoraRetriever 2402.09997, LORAUTER 2601.21795.
PRESETS: dict[str, tuple[str, GateSpec]] = {
    spec.preset: (text, spec)
    for text, spec in (
        ("fixed weights, the same for every token", GateSpec("constant", "constant", "model")),
        ("one expert per batch row, named by the caller", GateSpec("request", "request", "model")),
        (
            "a classifier on the base model's last hidden state, per token and module (X-LoRA)",
            GateSpec("xlora", "hidden", value="softmax_all", trained=False),
        ),
        (
            "one decision per token for the whole model, from the base's hidden state and the "
            "tokens before",
            GateSpec("recall", "hidden", "model", memory=0.9, depth=2, width=128, trained=False),
        ),
        (
            "a linear gate in each module, top-k, softmax over the kept (MeteoRA)",
            GateSpec("meteora", "input", top_k=2, trained=False),
        ),
        (
            "a linear gate over single ranks, top-k of ranks (SMoRA)",
            GateSpec("smora", "input", "rank", top_k=16, trained=False),
        ),
        (
            "similarity to each expert's top singular direction; no training (Arrow)",
            GateSpec("arrow", "prototype", top_k=3),
        ),
        (
            "how strongly each expert would act; no training (SpectR)",
            GateSpec("spectr", "spectrum"),
        ),
        (
            "the single ranks that would act most, whoever's they are; no training (after HiLoRA)",
            GateSpec("hilora", "spectrum", "rank", value="binary", top_k=16),
        ),
        (
            "a gate vector per expert, each trained on its own data (PHATGOOSE)",
            GateSpec("phatgoose", "input", top_k=2, standardise=True, trained=False),
        ),
        (
            "Arrow decided once per sequence, at prefill; no training",
            GateSpec("sequence", "prototype", top_k=3, sequence=True),
        ),
        (
            "the expert whose texts are most like the prompt, for hundreds of experts (after "
            "LORAUTER)",
            GateSpec(
                "retrieve", "text", "model", top_k=1, temperature=0.1, sequence=True, trained=False
            ),
        ),
    )
}


def gate_spec(preset: str, **settings: Any) -> GateSpec:
    """A preset with some of its settings changed; a setting of None keeps the preset's.

    Raises:
        MethodError: If there is no such preset or setting.
    """
    if preset not in PRESETS:
        raise MethodError(f"no gate preset is called {preset!r}", nearest(preset, PRESETS))
    known = {field.name for field in fields(GateSpec)}
    for name in settings:
        if name not in known:
            raise MethodError(f"gate {preset}: no setting {name!r}", nearest(name, known))
    row, given = PRESETS[preset][1], {k: v for k, v in settings.items() if v is not None}
    for name, signal in (("depth", "hidden"), ("width", "hidden"), ("weights", "constant")):
        if given.get(name) and row.signal != signal:
            raise MethodError(
                f"gate {preset}: it has no {name}",
                f"leave it out, or use {' or '.join(_with_signal(signal))}",
            )
    return replace(row, **given)


def _with_signal(signal: str) -> list[str]:
    return [name for name, (_, spec) in PRESETS.items() if spec.signal == signal]
