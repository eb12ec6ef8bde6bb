"""Mixtures in a model, on the kernels, against the same mixtures on plain PyTorch."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from builders import save_adapter
from lora_merge.kernels.gated_stack import dispatch
from lora_merge.kernels.gated_stack.gpu import _launch
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from mixture.tiny import experts_for, llama, shapes_of, tokens


def small_llama(device: str) -> torch.nn.Module:
    return llama(num_hidden_layers=1).to(device)


def saved_experts(folder: Path, model: torch.nn.Module) -> list[str]:
    """Experts on two modules that share their input and one alone."""
    shapes = shapes_of(model, "q_proj", "v_proj", "down_proj")
    return [
        str(save_adapter(folder / f"expert{i}", r=4, alpha=8, seed=10 + i, shapes=shapes))
        for i in range(3)
    ]


GATES = {
    "constant": {"weights": (0.5, 0.0, 2.0)},
    "request": {},
    "xlora": {"top_k": 2},
    "meteora": {"top_k": 2},
    "meteora-null": {"null_expert": True, "top_k": 2},
    "smora": {"top_k": 5},
    "arrow": {"top_k": 2},
    "arrow-null": {"null_expert": True, "null_score": 0.1},
    "spectr": {},
    "phatgoose": {},
    "sequence": {"top_k": 2},
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel ran; those that gate, with given weights or by their scores."""
    counts: Counter[str] = Counter()

    def count(name: str) -> None:
        launch = getattr(_launch, name)

        def counted(*args: object, **how: object) -> object:
            kind = "" if "gate" not in name else " given" if how.get("rule") is None else " routed"
            counts[name + kind] += 1
            return launch(*args, **how)

        monkeypatch.setattr(_launch, name, counted)

    for name in ("gate", "expand", "gate_expand"):
        count(name)
    return counts


@pytest.mark.parametrize("gate", GATES)
def test_every_gate(gate: str, device: str, calls, monkeypatch, tmp_path: Path) -> None:
    """Few tokens, many, and few where the base weights stand beside the experts."""
    model = small_llama(device)
    paths = saved_experts(tmp_path, model)

    def logits(how: str, layout: str, batch: int) -> torch.Tensor:
        mixture = Mixture(paths, gate.partition("-")[0], **GATES[gate])
        handle = load_mixture(model, mixture, layout=layout)
        if gate == "request":
            handle.set_gate(requests=["expert1", None])
        monkeypatch.setenv(dispatch.VARIABLE, how)
        calls.clear()
        with torch.no_grad():
            found = model(input_ids=tokens(2, batch).to(device)).logits
        handle.detach()
        return found

    plain = {batch: logits("eager", "stack", batch) for batch in (3, 9)}
    assert not calls
    kind = "routed" if gate.partition("-")[0] in ("meteora", "smora", "arrow") else "given"
    groups, modules = (0, 0) if gate == "spectr" else (2, 3)  # q and v share their input
    for how, layout, batch, expected in (
        ("triton", "stack", 3, {f"gate_expand {kind}": modules}),
        ("triton", "stack", 9, {f"gate {kind}": groups, "expand": modules}),
        ("joined", "rows", 3, {f"gate_expand {kind}": groups}),
        ("joined", "rows", 9, {f"gate {kind}": groups}),
    ):
        found = logits(how, layout, batch)
        torch.testing.assert_close(found, plain[batch], rtol=1e-4, atol=1e-4)
        assert calls == (Counter(expected) if groups else Counter())


@pytest.mark.parametrize("count", [1, 20])
def test_a_float32_gate_beside_bfloat16_weights(
    count: int, device: str, calls, monkeypatch, tmp_path
) -> None:
    """Its rows stand in the matrix in three pieces, and follow what training makes of it."""
    model = small_llama(device).bfloat16()
    handle = load_mixture(
        model, Mixture(saved_experts(tmp_path, model), "meteora", top_k=1), layout="rows"
    )
    ids = tokens(1, count).to(device)

    def logits(how: str) -> torch.Tensor:
        monkeypatch.setenv(dispatch.VARIABLE, how)
        with torch.no_grad():
            return model(input_ids=ids).logits.float()

    first = logits("eager")
    torch.testing.assert_close(logits("joined"), first, rtol=0, atol=0.02)
    assert calls == {"gate_expand routed" if count == 1 else "gate routed": 2}
    with torch.no_grad():
        for group in handle.parts:
            group.weight.neg_()  # the least expert is the first choice now
    second = logits("eager")
    assert (second - first).abs().max() > 0.1
    torch.testing.assert_close(logits("joined"), second, rtol=0, atol=0.02)


def test_a_gate_that_is_converted_with_its_model(device: str, monkeypatch, tmp_path: Path) -> None:
    """Its rows stand in the matrix as they are then, not in pieces."""
    model = small_llama(device)
    load_mixture(model, Mixture(saved_experts(tmp_path, model), "meteora"), layout="rows")
    model.bfloat16()
    outputs = {}
    for how in ("eager", "joined"):
        monkeypatch.setenv(dispatch.VARIABLE, how)
        with torch.no_grad():
            outputs[how] = model(input_ids=tokens(1, 3).to(device)).logits.float()
    torch.testing.assert_close(outputs["joined"], outputs["eager"], rtol=0, atol=0.02)


def test_auto_asks_the_table(device: str, calls, monkeypatch, tmp_path: Path) -> None:
    """A row for one case alone: the top-k gate of the module that shares its input with nobody."""
    model = small_llama(device)
    load_mixture(model, Mixture(saved_experts(tmp_path, model), "meteora"))
    width = model.config.intermediate_size
    name = dispatch.device_name(torch.device(device))
    case = dispatch.Case(name, width, 32, 12, 3, "float32", "top-k", 3, 2)
    table = {case.key: {"triton": 1.0, "eager": 2.0}}
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    dispatch.forget()
    monkeypatch.setattr(dispatch, "table", lambda _: table)
    with torch.no_grad():
        model(input_ids=tokens(1, 3).to(device))
        assert calls == {"gate_expand routed": 1}
        model(input_ids=tokens(1, 9).to(device))  # nobody measured nine tokens
    assert calls == {"gate_expand routed": 1}
    monkeypatch.undo()
    dispatch.forget()


def test_experts_that_leave_modules_out(device: str, monkeypatch) -> None:
    model = small_llama(device)
    load_mixture(model, Mixture(experts_for(model), "arrow", top_k=2))
    ids = tokens(1, 3).to(device)
    outputs = {}
    for how in ("eager", "triton"):
        monkeypatch.setenv(dispatch.VARIABLE, how)
        with torch.no_grad():
            outputs[how] = model(input_ids=ids).logits
    torch.testing.assert_close(outputs["triton"], outputs["eager"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", ["meteora", "phatgoose"])
def test_training_a_gate(gate: str, device: str, calls, monkeypatch, tmp_path: Path) -> None:
    model = small_llama(device)
    load_mixture(model, Mixture(saved_experts(tmp_path, model), gate))
    model.train()
    learned = model.mixture.train_gate_only()
    ids = tokens(1, 6).to(device)
    gradients = {}
    for how in ("eager", "triton"):
        monkeypatch.setenv(dispatch.VARIABLE, how)
        loss = model(input_ids=ids, labels=ids).loss
        gradients[how] = torch.autograd.grad(loss, learned)
    torch.testing.assert_close(gradients["triton"], gradients["eager"], rtol=1e-3, atol=1e-6)
    assert calls["gate given"] == len(model.mixture.parts)


def test_watching_and_generating(device: str, monkeypatch, tmp_path: Path) -> None:
    """An observer sees the weights, and a cache makes no difference."""
    model = small_llama(device)
    load_mixture(model, Mixture(saved_experts(tmp_path, model), "arrow", top_k=2))
    ids = tokens(1, 4).to(device)
    texts, seen = {}, {}
    for how in ("eager", "triton"):
        monkeypatch.setenv(dispatch.VARIABLE, how)
        with model.mixture.watch() as usage:
            model(input_ids=ids)
        seen[how] = usage.by(lambda _: "all")["all"]
        texts[how] = model.generate(input_ids=ids, max_new_tokens=2, do_sample=False).tolist()
    assert texts["triton"] == texts["eager"]
    torch.testing.assert_close(seen["triton"], seen["eager"], rtol=1e-4, atol=1e-4)


def test_compiled_modules(device: str, calls, monkeypatch, tmp_path: Path) -> None:
    model = small_llama(device)
    load_mixture(model, Mixture(saved_experts(tmp_path, model), "meteora"))
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    block = model.model.layers[0].mlp
    x = torch.randn(1, 5, 32, device=device)
    with torch.no_grad():
        expected = block(x)
        calls.clear()
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    assert calls["gate routed"] and calls["expand"]


@pytest.mark.skipif(_launch.INTERPRETED, reason="there are no CUDA graphs in the interpreter")
@pytest.mark.parametrize("gate", ["meteora", "smora", "arrow", "constant", "phatgoose"])
def test_in_a_cuda_graph(gate: str, device: str, monkeypatch, tmp_path: Path) -> None:
    """Recorded once, replayed on other tokens."""
    model = small_llama(device)
    settings = {"weights": (0.5, 0.0, 2.0)} if gate == "constant" else {}
    load_mixture(model, Mixture(saved_experts(tmp_path, model), gate, **settings))
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    block = model.model.layers[0].mlp
    x, other = torch.randn(2, 1, 3, 32, device=device)
    with torch.no_grad():
        expected = block(other)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            block(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = block(x)
        x.copy_(other)
        graph.replay()
    assert torch.equal(got, expected)


def test_what_is_planned_does_not_grow_with_every_length(
    device: str, monkeypatch, tmp_path
) -> None:
    """A server sees thousands of lengths; the table has a row for each power of two."""
    model = small_llama(device)
    paths = saved_experts(tmp_path, model)
    monkeypatch.setenv(dispatch.VARIABLE, "joined")
    handle = load_mixture(model, Mixture(paths, "meteora"), layout="rows")
    with torch.no_grad():
        for length in range(1, 24):
            model(input_ids=tokens(1, length).to(device))
    for joined in handle._joined:
        assert len(joined._plans) == 17  # each number up to 16, and the next power of two
    handle.detach()
    monkeypatch.setenv(dispatch.VARIABLE, "eager")
    handle = load_mixture(model, Mixture(paths, "meteora"))
    with torch.no_grad():
        for length in range(1, 24):
            model(input_ids=tokens(1, length).to(device))
    assert all(len(group.plans) <= 6 for group in handle.parts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")
@pytest.mark.parametrize("layout", ["stack", "rows"])
def test_generate_replays_one_graph_for_every_token(
    layout: str, device: str, monkeypatch, tmp_path
) -> None:
    said = []
    for graph in (False, True):
        model = small_llama(device)
        paths = saved_experts(tmp_path / str(graph), model)
        monkeypatch.setenv(dispatch.VARIABLE, "joined" if layout == "rows" else "triton")
        mixture = Mixture(paths, "meteora", top_k=2)
        handle = load_mixture(model, mixture, layout=layout, graph=graph)
        out = model.generate(
            tokens(2, 7).to(device), max_new_tokens=8, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        said.append(torch.stack(out.logits))
        assert not dispatch.failed()
    assert handle.graphs is not None and handle.graphs.recorded == 1
    torch.testing.assert_close(*said, atol=1e-4, rtol=1e-4)
