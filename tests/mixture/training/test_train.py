"""Training: it learns what it should, touches nothing else, and resumes to the same bits."""

import json
from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, experts_for, llama, saved_experts, tokens

from lora_merge.errors import MethodError, OutputError
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.runtime.call.in_force import Decision
from lora_merge.mixture.training.checkpoint import add_metrics, cut_metrics
from lora_merge.mixture.training.data import DataError, Example, batches, collate, read_examples
from lora_merge.mixture.training.loop import mean_loss
from lora_merge.mixture.training.losses import GateLosses
from lora_merge.mixture.training.settings import TrainSettings
from lora_merge.mixture.training.train import train_gate

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning",
    "ignore:None of the inputs have requires_grad:UserWarning",
)
LEARNED = ("xlora", "meteora", "smora", "phatgoose")


def styles(model: torch.nn.Module, mixture: Mixture, rows: int = 24) -> list[Example]:
    """Rows that expert e wrote itself, from disjoint first tokens: the gate can tell them apart."""
    handle = load_mixture(model, mixture, name="author")
    examples = []
    for expert, name in enumerate(mixture.names):
        handle.set_gate(weights={name: 1.0})
        random = torch.Generator().manual_seed(expert)
        low = 2 + expert * 19
        starts = torch.randint(low, low + 19, (rows, 4), generator=random)
        torch.manual_seed(expert)
        written = model.generate(starts, max_new_tokens=12, do_sample=True, temperature=0.7)
        examples += [Example(tuple(row.tolist()), 4, expert) for row in written]
    handle.detach()
    return examples


@pytest.fixture(scope="module")
def setting() -> tuple[torch.nn.Module, list[Example]]:
    model = llama()
    with torch.no_grad():  # larger weights, so that experts write differently
        for parameter in model.parameters():
            parameter.mul_(4)
    return model, styles(model, Mixture(loud(model), "request"))


def loud(model: torch.nn.Module) -> list:
    from tiny import shapes_of

    from builders import make_adapter

    shapes = shapes_of(model)
    return [make_adapter(f"e{i}", r=4, alpha=60, seed=i, shapes=shapes) for i in range(3)]


@pytest.mark.parametrize("preset", LEARNED)
def test_training_lowers_the_loss_and_leaves_the_model_alone(setting, preset: str) -> None:
    model, examples = setting
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    mixture = Mixture(loud(model), preset)
    history = []
    trained = train_gate(
        model,
        mixture,
        examples,
        TrainSettings(
            steps=40, batch_size=24, lr=0.004 if preset in ("smora", "phatgoose") else 0.02
        ),
        on_step=history.append,
    )
    assert trained.spec.trained and set(trained.gate) == set(mixture.gate)
    assert not hasattr(model, "mixture") and not model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)

    def loss_with(one: Mixture) -> float:
        handle = load_mixture(model, one)
        value = mean_loss(model, examples)
        handle.detach()
        return value

    if preset == "phatgoose":  # trained on another objective: each expert's own rows
        assert history[-1]["loss"] < history[0]["loss"] - 0.02
    else:
        assert loss_with(trained) < loss_with(mixture) - 0.02
    assert [m["step"] for m in history] == list(range(1, 41))


@pytest.mark.parametrize("preset", LEARNED)
def test_a_killed_run_resumes_to_the_same_bits(setting, preset: str, tmp_path: Path) -> None:
    model, examples = setting
    mixture = Mixture(loud(model), preset, top_k=2)
    settings = TrainSettings(
        steps=9, batch_size=5, accumulate=2, save_every=3, bias_rate=0.01, task_loss=0.1,
        z_loss=0.01,
    )  # fmt: skip
    if preset in ("smora", "phatgoose"):
        settings = TrainSettings(**{**vars(settings), "task_loss": 0.0})
    whole = train_gate(model, mixture, examples, settings, work=tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(metrics: dict) -> None:
        if metrics["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        train_gate(model, mixture, examples, settings, work=tmp_path / "cut", on_step=kill)
    assert not hasattr(model, "mixture")
    steps = []
    resumed = train_gate(
        model, mixture, examples, settings, work=tmp_path / "cut", resume=True, on_step=steps.append
    )
    assert [m["step"] for m in steps] == [4, 5, 6, 7, 8, 9]
    for name, tensor in whole.gate.items():
        assert torch.equal(tensor, resumed.gate[name]), name
        assert not torch.equal(tensor, mixture.gate[name]), name

    def lines(name: str) -> list[dict]:
        rows = (tmp_path / f"{name}.metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(r).items() if k != "tokens_per_second"} for r in rows]

    assert lines("cut") == lines("whole")
    with pytest.raises(MethodError, match=r"other settings \(lr\)"):
        train_gate(
            model, mixture, examples, TrainSettings(**{**vars(settings), "lr": 1.0}),
            work=tmp_path / "cut", resume=True,
        )  # fmt: skip
    state = tmp_path / "cut" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(MethodError, match="cannot be read"):
        train_gate(model, mixture, examples, settings, work=tmp_path / "cut", resume=True)


def test_accumulation_is_one_large_batch(setting) -> None:
    model, examples = setting
    mixture = Mixture(loud(model), "meteora")
    whole = train_gate(model, mixture, examples, TrainSettings(steps=3, batch_size=12, warmup=0))
    parts = train_gate(
        model, mixture, examples, TrainSettings(steps=3, batch_size=4, accumulate=3, warmup=0)
    )
    for name, tensor in whole.gate.items():
        torch.testing.assert_close(tensor, parts.gate[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("preset", ["meteora", "xlora"])
def test_the_task_loss_is_the_gates_cross_entropy(preset: str) -> None:
    model = llama()
    mixture = Mixture(experts_for(model), preset)
    handle = load_mixture(model, mixture)
    losses = GateLosses()
    ids, mask = tokens(3, 6), torch.ones(3, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    owner = torch.tensor([0, 1, -1])[:, None].repeat(1, 6)
    owner[0, 3:] = 2  # a row that changes its task
    seen = []
    losses.begin(mask, owner)

    def observe(one: Decision) -> None:
        for place, member in enumerate(range(one.start, one.stop)):
            if one.scores is not None:
                seen.append((one.scores[:, place], one.group.experts[member]))
        losses.observe(one)

    def observe_hidden(scores, weights, present) -> None:
        seen.append((scores, present))
        losses.add(scores, weights, present)

    with handle.using(observe=observe, observe_hidden=observe_hidden):
        model(ids, attention_mask=mask)
    per_gate, z = [], []
    for scores, present in seen:
        terms = []
        for token in range(18):
            row, place = divmod(token, 6)
            if mask[row, place]:
                z.append(torch.logsumexp(scores[token], -1) ** 2)
                if int(owner[row, place]) in present:
                    target = present.index(int(owner[row, place]))
                    terms.append(-torch.log_softmax(scores[token], -1)[target])
        if terms:
            per_gate.append(sum(terms) / len(terms))
    assert len(seen) == 14
    torch.testing.assert_close(losses.mean("task"), sum(per_gate) / len(per_gate))
    torch.testing.assert_close(losses.mean("z"), sum(z) / len(z))


def test_the_selection_bias_evens_out_the_load(setting) -> None:
    model, examples = setting
    mixture = Mixture(loud(model), "smora", top_k=2)

    def spread(one: Mixture) -> float:
        handle = load_mixture(model, one)
        losses = GateLosses()
        batch = collate(examples)
        losses.begin(batch.mask, batch.owners)
        with handle.using(observe=losses.observe):
            model(batch.ids, attention_mask=batch.mask)
        handle.detach()
        loads = torch.stack(list(losses.loads.values()))
        return float((loads / loads.mean()).std())

    steps = TrainSettings(steps=30, batch_size=24, lr=1e-9, bias_rate=0.05, schedule="constant")
    even = train_gate(model, mixture, examples, steps)
    assert spread(even) < 0.7 * spread(mixture)


def test_gradients_of_a_gate_are_right() -> None:
    """Finite differences in float64, through shrink, gate and expand."""
    model = llama(dtype=torch.float64)
    load_mixture(model, Mixture(experts_for(model), "meteora").with_gate(
        Mixture(experts_for(model), "meteora").gate, top_k=None))  # fmt: skip
    target = model.get_submodule("model.layers.0.self_attn.q_proj")
    group = next(g for g in model.mixture.groups if "q_proj" in g.names[0])
    group.weight.requires_grad_(True)
    group.siblings.together = False
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)

    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            kept = group.weight.clone()
        try:
            return torch.func.functional_call(target, {}, (x,)) + 0 * weight.sum()
        finally:
            assert torch.equal(kept, group.weight)

    assert torch.autograd.gradcheck(lambda a: target(a), (x,))
    (target(x) ** 2).sum().backward()
    place = (1, 5)
    step, values = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            group.weight[place] += sign * step
            values.append(float((target(x) ** 2).sum()))
            group.weight[place] -= sign * step
    numeric = (values[0] - values[1]) / (2 * step)
    assert float(group.weight.grad[place]) == pytest.approx(numeric, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("preset", "reentrant"), [("xlora", False), ("meteora", False), ("meteora", True)]
)
def test_gradient_checkpointing_gives_the_same_gradients(preset: str, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = llama()
        handle = load_mixture(model, Mixture(experts_for(model), preset))
        parameters = handle.train_gate_only()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        ids = tokens()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in parameters])
    for plain, saved in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, saved)


def test_bf16_trains(setting) -> None:
    model, examples = setting
    mixture = Mixture(loud(model), "meteora")
    settings = TrainSettings(steps=30, batch_size=24, lr=0.02, bf16=True)
    trained = train_gate(model, mixture, examples, settings)
    losses = []
    for one in (mixture, trained):
        handle = load_mixture(model, one)
        losses.append(mean_loss(model, examples))
        handle.detach()
    assert losses[1] < losses[0] - 0.02


class Letters:
    """A tokenizer of one token per character."""

    eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [2 + ord(c) % (VOCABULARY - 2) for c in text]}


def test_rows_are_read_and_faults_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"text": "abc"}\n\n{"prompt": "ab", "response": "cd", "expert": "math"}\n{"text": 3}\n'
        'not json\n[1]\n{"text": "x", "expert": "law"}\n{"text": ""}\n'
    )
    data = read_examples(path, Letters(), experts=["code", "math"])
    assert [(len(e.ids), e.skipped, e.expert) for e in data.examples] == [(4, 0, -1), (5, 2, 1)]
    assert [f.split(":")[0] for f in data.faults] == [f"line {n}" for n in (4, 5, 6, 7, 8)]
    assert "no expert is called 'law'" in data.faults[3]
    with pytest.raises(DataError, match=r"5 bad rows:\n  line 4: neither text"):
        read_examples(path, Letters(), experts=["code", "math"], strict=True)
    path.write_text("\n")
    with pytest.raises(DataError, match="no usable row"):
        read_examples(path, Letters())
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(tmp_path / "nowhere", Letters())
    labels = collate(data.examples).labels
    assert labels.tolist()[0][4] == -100 and labels.tolist()[1][:2] == [-100, -100]


def test_a_row_ends_where_the_line_ends(tmp_path: Path) -> None:
    """JSON may hold characters that are line breaks to Python, but not to anyone else."""
    text = "one\u2028two\x85three"
    rows = [json.dumps({"text": text}, ensure_ascii=False), json.dumps({"text": "four"})]
    (tmp_path / "rows.jsonl").write_bytes("\r\n".join(rows).encode())
    data = read_examples(tmp_path / "rows.jsonl", Letters())
    assert data.faults == () and len(data.examples) == 2
    assert len(data.examples[0].ids) >= len(text)


def test_rows_may_change_their_task(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    part = '{"text": "abc", "expert": "math"}, {"text": "de"}'
    path.write_text(
        f'{{"parts": [{part}, {{"text": "f", "expert": "code"}}]}}\n'
        '{"parts": [{"text": 1}]}\n{"parts": [{"text": "a", "expert": "law"}]}\n'
    )
    data = read_examples(path, Letters(), experts=["code", "math"])
    assert [e.owners for e in data.examples] == [(1, 1, 1, -1, -1, 0, 0)]  # the end is the last's
    assert data.examples[0].is_labelled and not Example((1, 2), 0, -1).is_labelled
    assert data.faults[0] == "line 2: part 1 has no text" and "'law'" in data.faults[1]
    batch = collate([*data.examples, Example((3, 4), 0, 1)])
    assert batch.owners[1].tolist() == [1, 1, -1, -1, -1, -1, -1]
    cut = read_examples(path, Letters(), experts=["code", "math"], max_length=4)
    assert cut.examples[0].owners == (1, 1, 1, -1)


def test_processes_share_the_batch_that_one_would_have_seen() -> None:
    rows = [Example((i, i), 0, -1) for i in range(2, 12)]
    whole = batches(rows, 5, seed=3)
    shares = [batches(rows, 5, seed=3, rank=rank, of=2) for rank in range(2)]
    for _ in range(5):
        parts = [next(share).ids for share in shares]
        assert sorted(torch.cat(parts).tolist()) == sorted(next(whole).ids.tolist())


def test_batches_depend_on_their_number_alone() -> None:
    rows = [Example((i, i), 0, -1) for i in range(2, 12)]
    stream, later = batches(rows, 3, seed=5), batches(rows, 3, seed=5, start=4)
    first = [next(stream).ids.tolist() for _ in range(7)]
    assert [next(later).ids.tolist() for _ in range(3)] == first[4:]
    assert sorted(x[0] for batch in first[:3] for x in batch) == sorted(
        {x[0] for batch in first[:3] for x in batch}
    )


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lr", "expert_lr", "rank_l1", "rank_lr", "z_loss", "clip"])
def test_settings_that_train_uphill_or_nowhere_are_refused(name: str, value: float) -> None:
    with pytest.raises(MethodError, match=f"{name} is {value!r}"):
        TrainSettings(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 0), ("batch_size", 0), ("accumulate", -1), ("schedule", "linear")]
)
def test_settings_without_a_meaning_are_refused(name: str, value: object) -> None:
    with pytest.raises(MethodError, match=f"{name} is {value!r}"):
        TrainSettings(**{name: value})


def test_a_checkpoint_does_not_replace_what_is_none(setting, tmp_path: Path) -> None:
    model, examples = setting
    (tmp_path / "config.json").write_text("precious")
    with pytest.raises(OutputError, match="no training checkpoint"):
        train_gate(model, Mixture(loud(model), "meteora"), examples, work=tmp_path)
    assert (tmp_path / "config.json").read_text() == "precious"


def test_what_cannot_be_trained_is_said_first(setting, tmp_path: Path) -> None:
    model, examples = setting
    with pytest.raises(MethodError, match="arrow gate has nothing to train"):
        train_gate(model, Mixture(loud(model), "arrow"), examples)
    plain = [Example(e.ids, 0, -1) for e in examples]
    with pytest.raises(DataError, match="72 rows do not name their expert"):
        train_gate(model, Mixture(loud(model), "phatgoose"), plain)
    with pytest.raises(DataError, match="task_loss needs rows"):
        train_gate(model, Mixture(loud(model), "meteora"), plain, TrainSettings(task_loss=1))
    assert not hasattr(model, "mixture")
    assert saved_experts(tmp_path, model)


def test_a_file_of_steps_that_is_somebody_elses_stays(tmp_path: Path) -> None:
    path = tmp_path / "work.metrics.jsonl"
    for text in ("my notes\n", "[1]\n"):
        path.write_text(text)
        with pytest.raises(OutputError, match="did not write it"):
            cut_metrics(tmp_path / "work", 0)
        assert path.read_text() == text
    path.unlink()
    for step in (1, 2, 3):
        add_metrics(tmp_path / "work", {"step": step})
    with path.open("a") as file:
        file.write('{"step": 4')  # a kill in the middle of a line
    cut_metrics(tmp_path / "work", 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
