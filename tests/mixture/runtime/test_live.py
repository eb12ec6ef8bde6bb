"""Experts that are added and removed while a mixture is attached."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop import Loop
from tiny import experts_for, in_threads, llama, shapes_of, sharp, tokens
from torch import Tensor, nn

from builders import make_adapter, save_adapter
from lora_merge.errors import LoraMergeError, MethodError
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import AttachedMixture, load_mixture

OPEN = ["arrow", "spectr", "hilora", "sequence", "request"]
GREEDY = {"max_new_tokens": 5, "do_sample": False}
SMALL = llama(num_hidden_layers=1)
POOL = experts_for(SMALL, (2, 4, 3))  # the last one leaves some modules out
GENERAL = [make_adapter("common", r=2, seed=9, shapes=shapes_of(SMALL, "q_proj", "up_proj"))]
NAMES = [adapter.name for adapter in POOL]


def of(names: list[str]) -> list:
    return [POOL[NAMES.index(name)] for name in names]


def state(handle: AttachedMixture) -> dict[str, Tensor]:
    found = {f"{n}": t for n, t in handle.groups.named_parameters()}
    return found | {f"{n}": t for n, t in handle.groups.named_buffers()}


@torch.no_grad()
@settings(max_examples=12, deadline=None)
@given(
    preset=st.sampled_from(OPEN),
    first=st.sampled_from(NAMES),
    changes=st.lists(st.sampled_from(NAMES), min_size=1, max_size=5),
    general=st.booleans(),
)
def test_any_adds_and_removes_are_a_mixture_built_at_once(
    preset: str, first: str, changes: list[str], general: bool
) -> None:
    common = GENERAL if general and preset == "arrow" else []
    model = llama(num_hidden_layers=1)
    live = load_mixture(model, Mixture(of([first]), preset, general=common), name="live")
    here = [first]
    for name in changes:
        if name not in here:
            assert live.add(of([name])) == [name]
            here.append(name)
        elif len(here) > 1:
            live.remove(name)
            here.remove(name)
        with pytest.raises(MethodError, match=r"only expert|no expert"):
            live.remove(here[0] if len(here) == 1 else "nobody")
    once = load_mixture(model, Mixture(of(here), preset, general=common), name="once")
    assert live.mixture.names == once.mixture.names == here
    assert live.mixture.gate.keys() == once.mixture.gate.keys()
    ours, theirs = state(live), state(once)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    out = []
    for handle in (live, once):
        handle.activate()
        wanted = {"requests": [here[-1]]} if preset == "request" else {}
        handle.set_gate(**wanted)
        out.append(model(tokens()).logits)
    live.detach()
    once.detach()
    assert torch.equal(*out) and not torch.equal(out[0], SMALL(tokens()).logits)


@torch.no_grad()
def test_threads_generate_while_experts_come_and_go() -> None:
    """Each under its own request, against the loop in float64."""
    base = llama(dtype=torch.float64, initializer_range=0.2)
    three, looped = experts_for(base), llama(dtype=torch.float64, initializer_range=0.2)
    loop = Loop(looped, base, Mixture(three, "request"))
    ids, expected = tokens(1), []
    for number in range(2):
        loop.requests = [number]
        expected.append(looped.generate(ids, use_cache=False, **GREEDY))
    assert not torch.equal(*expected)
    model = llama(dtype=torch.float64, initializer_range=0.2)
    handle = load_mixture(model, Mixture(three[:2], "request"))

    def write(number: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            for _ in range(2):
                with torch.no_grad(), handle.requests(f"expert{number}"):
                    out = model.generate(ids, **GREEDY)
                if not torch.equal(out, expected[number]):
                    break
            return out

        return run

    def change(seed: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            for _ in range(4):
                name = handle.add(three[2], names=[f"guest{seed}"])[0]
                handle.remove(name)
            return expected[0]

        return run

    jobs = [write(0), write(1), write(0), write(1), change(0), write(0)] * 2
    jobs[10] = change(1)
    for place, out in enumerate(in_threads(jobs)):
        assert isinstance(out, Tensor), out
        assert torch.equal(out, expected[int(place % 6 in (1, 3))])
    assert handle.mixture.names == ["expert0", "expert1"] and handle.switch.running == 0


@torch.no_grad()
def test_what_has_begun_keeps_its_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = load_mixture(SMALL, Mixture(POOL[:2], "arrow"))
    expected = SMALL.generate(tokens(1), **GREEDY)
    steps = 0

    def change(scores_of: Tensor, scores: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        handle.add(POOL[2]) if steps == 2 else None
        handle.remove("expert0") if steps == 3 else None
        return scores

    out = SMALL.generate(tokens(1), logits_processor=[change], **GREEDY)
    assert torch.equal(out, expected) and handle.mixture.names == ["expert1", "expert2"]
    with handle.requests("expert1"):
        before = SMALL(tokens()).logits
        handle.remove("expert1")
        assert torch.equal(SMALL(tokens()).logits, before)
    with pytest.raises(MethodError, match="no expert is called 'expert1'") as caught:
        handle.set_gate(weights={"expert1": 1.0})
    assert "expert2" in caught.value.remedy
    with handle.watch() as seen:
        handle.add(POOL[0])
        SMALL(tokens())
        with pytest.raises(MethodError, match="since the watch began"), handle.requests("expert0"):
            pass
    assert seen.experts == ("expert2",)
    handle.detach()


@torch.no_grad()
def test_two_hundred_cycles_leave_nothing_behind() -> None:
    few = [make_adapter(f"e{i}", r=2, seed=i, shapes=shapes_of(SMALL, "v_proj")) for i in range(2)]
    handle = load_mixture(SMALL, Mixture(few[:1], "arrow"))
    banks, sizes = [], []
    before = SMALL(tokens()).logits
    for cycle in range(200):
        handle.add(few[1])
        banks.append(weakref.ref(handle.bank))
        SMALL(tokens())
        handle.remove("e1")
        if cycle in (0, 199):
            gc.collect()
            sizes.append(sum(t.nbytes for t in gc.get_objects() if issubclass(type(t), Tensor)))
    assert sizes[0] == sizes[1] and not any(bank() for bank in banks)
    assert torch.equal(SMALL(tokens()).logits, before)
    handle.detach()


@torch.no_grad()
def test_requests_load_by_name_and_the_least_used_makes_room(tmp_path: Path) -> None:
    shapes = shapes_of(SMALL)
    for name in "abcd":
        save_adapter(tmp_path / name, r=2, seed=ord(name), alpha=4, shapes=shapes)
    first = Mixture(str(tmp_path / "a"), "request")
    handle = load_mixture(SMALL, first, max_experts=2, library=tmp_path)
    alone = {}
    for name in "abcd":
        other = load_mixture(SMALL, Mixture(str(tmp_path / name), "request"), name="alone")
        with other.requests(name):
            alone[name] = SMALL(tokens(1)).logits
        other.detach()
    for name, left in (("b", "ab"), ("a", "ab"), ("c", "ac"), ("c", "ac"), ("b", "cb")):
        with handle.requests(name):
            torch.testing.assert_close(SMALL(tokens(1)).logits, alone[name])
        assert sorted(handle.mixture.names) == sorted(left)
    handle.pin("c")
    with handle.requests("a"):
        assert handle.mixture.names == ["c", "a"]
    with pytest.raises(MethodError, match="room for 2"), handle.requests("a", "d"):
        pass
    handle.detach()


def test_there_is_no_room_and_no_way_out_of_the_library(tmp_path: Path) -> None:
    library = {}
    for name in "abc":
        folder = save_adapter(tmp_path / name, r=2, seed=1, shapes=shapes_of(SMALL))
        library[f"team/{name}"] = folder
    start = Mixture(POOL[:1], "request")
    handle = load_mixture(SMALL, start, max_experts=2, library=library)
    handle.pin("expert0")
    with handle.requests("team/a", None, {"team/a": 0.5, "expert0": 0.5}):
        assert handle.mixture.names == ["expert0", "team/a"]
    with pytest.raises(MethodError, match="room for 2"), handle.requests("team/a", "team/b"):
        pass
    handle.set_gate(requests=["team/a"])
    with pytest.raises(MethodError, match="room for 2"), handle.requests("team/b"):
        pass
    with pytest.raises(MethodError, match="set_gate has named"):
        handle.remove("team/a")
    with pytest.raises(MethodError, match="is pinned"):
        handle.remove("expert0")
    handle.set_gate()
    handle.remove("team/a")
    with pytest.raises(MethodError, match="no expert") as caught, handle.requests("team/x"):
        pass
    assert "team/a" in caught.value.remedy and "expert0" in caught.value.remedy
    with pytest.raises(MethodError, match="no expert"):
        handle.pin("team/a")
    handle.detach()
    handle = load_mixture(SMALL, start, library=tmp_path)
    for name in ("../a", "/etc", "b/../../x"):
        with pytest.raises(LoraMergeError, match="leads out"), handle.requests(name):
            pass
    handle.detach()
    with pytest.raises(MethodError, match="max_experts is 2"):
        load_mixture(SMALL, Mixture(POOL, "request"), max_experts=2)
    with pytest.raises(LoraMergeError, match="no such directory"):
        load_mixture(SMALL, start, library=tmp_path / "nowhere")
    assert not hasattr(SMALL, "mixture")


@pytest.mark.parametrize("preset", ["meteora", "xlora", "constant"])
def test_gates_made_for_their_experts_say_so(preset: str) -> None:
    mixture = sharp(SMALL, preset)
    handle = load_mixture(SMALL, mixture)
    why = "one weight for each" if preset == "constant" else "was trained for the experts it has"
    with pytest.raises(MethodError, match=why) as caught:
        handle.add(POOL[0], names=["more"])
    assert "arrow" in caught.value.remedy
    with pytest.raises(MethodError, match="another without expert0"):
        handle.remove("expert0")
    handle.detach()
    with pytest.raises(MethodError, match=why):
        load_mixture(SMALL, mixture, max_experts=9)


def test_joined_layouts_and_misfits_change_nothing() -> None:
    handle = load_mixture(SMALL, Mixture(POOL[:1], "arrow"), layout="rows")
    with pytest.raises(MethodError, match="one matrix"):
        handle.add(POOL[1])
    handle.detach()
    handle = load_mixture(SMALL, Mixture(POOL[:1], "arrow"))
    with torch.no_grad():
        before = SMALL(tokens()).logits
        wrong = make_adapter("wrong", r=2, seed=1, shapes={"model.layers.0.mlp.nowhere": (48, 32)})
        with pytest.raises(LoraMergeError, match="nowhere"):
            handle.add([POOL[1], wrong])
        assert handle.mixture.names == ["expert0"]
        assert torch.equal(SMALL(tokens()).logits, before)
    handle.detach()


@torch.no_grad()
def test_compiled_models_compile_again() -> None:
    model: nn.Module = llama(num_hidden_layers=1)
    handle = load_mixture(model, Mixture(POOL[:1], "arrow"))
    compiled = torch.compile(model, backend="eager")
    compiled(tokens(), use_cache=False)
    handle.add(POOL[1:])
    found = compiled(tokens(), use_cache=False).logits
    torch.testing.assert_close(found, model(tokens(), use_cache=False).logits)


def test_gates_stay_float32_whatever_gate_is_in_force() -> None:
    model = llama(num_hidden_layers=1, dtype=torch.bfloat16)
    handle = load_mixture(model, Mixture(POOL[:1], "arrow"))
    handle.set_gate(requests=["expert0"])
    handle.add(POOL[1])
    assert {group.weight.dtype for group in handle.parts} == {torch.float32}
    assert handle.switch.default.weights.tolist() == [[1.0, 0.0]]
