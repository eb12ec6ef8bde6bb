"""`graph=True`: a decoding step is recorded once, and a replay is what the model would do."""

import copy
import gc
from collections.abc import Iterator

import pytest
import torch
from tape import TapeRecorder
from tiny import llama, sharp, tokens
from transformers import StaticCache

from lora_merge.errors import LoraMergeWarning, MethodError
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.runtime.graph import step_graphs

ALONE = ("constant", "request", "arrow", "meteora", "smora", "spectr")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[TapeRecorder]:
    """Steps are recorded on a tape, on the CPU."""
    tape = TapeRecorder()
    monkeypatch.setattr(step_graphs, "recorder_for", lambda device: tape)
    yield tape


def pair(preset: str, **how: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(a model that records, one that does not)."""
    plain, recording = llama(), llama()
    mixture = sharp(plain, preset)
    load_mixture(plain, mixture)
    load_mixture(recording, mixture, graph=True, **how)
    return recording, plain


def said(model: torch.nn.Module, batch: int = 2, **how: object) -> torch.Tensor:
    """Logits of every generated token."""
    out = model.generate(
        tokens(batch), max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **how,
    )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize("preset", ALONE)
@pytest.mark.parametrize("layout", ["stack", "rows"])
def test_a_replay_says_what_the_model_says(
    preset: str, layout: str, recorder: TapeRecorder
) -> None:
    recording, plain = pair(preset, layout=layout)
    if preset == "request":
        for model in (recording, plain):
            model.mixture.set_gate(requests=["expert0", "expert2"])
    expected = said(plain)
    torch.testing.assert_close(said(recording), expected, atol=2e-5, rtol=1e-4)
    assert recording.mixture.graphs.recorded == 1
    assert [tape.replays for tape in recorder.tapes] == [5]  # all but the prompt's
    torch.testing.assert_close(said(recording), expected, atol=2e-5, rtol=1e-4)
    assert [tape.replays for tape in recorder.tapes] == [10]  # another cache, the same recording


def test_another_batch_gate_or_weight_is_recorded_anew(recorder: TapeRecorder) -> None:
    recording, plain = pair("meteora")
    said(recording)

    def check(number: int, batch: int = 2) -> None:
        torch.testing.assert_close(said(recording, batch), said(plain, batch), atol=2e-5, rtol=1e-4)
        assert len(recorder.tapes) == number

    check(1)
    check(2, batch=1)
    for model in (recording, plain):
        model.mixture.set_gate(top_k=1)
    check(3)
    with torch.no_grad():
        for model in (recording, plain):
            model.lm_head.weight.mul_(2)
    check(4)
    for model in (recording, plain):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() / 3)
    check(5)
    with recording.mixture.disabled(), plain.mixture.disabled():
        check(6)
    recording.to(torch.float64).to(torch.float32)  # the same numbers elsewhere
    check(7)
    assert recording.mixture.graphs.recorded <= 4


def test_two_generations_do_not_meet_in_one_cache(recorder: TapeRecorder) -> None:
    """While the cache that was recorded lives, another has a recording of its own."""
    recording, plain = pair("meteora")

    @torch.no_grad()
    def steps(model: torch.nn.Module, caches: list[StaticCache]) -> list[torch.Tensor]:
        for place, cache in enumerate(caches):
            model(input_ids=tokens(1, 4, seed=place), past_key_values=cache)
        return [
            model(input_ids=tokens(1, 1, seed=10 * turn + place), past_key_values=cache).logits
            for turn in range(1, 4)
            for place, cache in enumerate(caches)
        ]

    made = [[StaticCache(config=plain.config, max_cache_len=12) for _ in range(2)] for _ in "ab"]
    for ours, theirs in zip(steps(recording, made[0]), steps(plain, made[1]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert len(recorder.tapes) == 2 and recording.mixture.graphs.recorded == 2


def test_what_is_no_step_runs_as_ever(recorder: TapeRecorder) -> None:
    recording, plain = pair("meteora")
    ids = tokens(1, 5)
    torch.testing.assert_close(recording(input_ids=ids).logits, plain(input_ids=ids).logits)
    with recording.mixture.watch() as usage:
        said(recording)
    assert usage.rows() and not recorder.tapes
    for cache in ("dynamic", None):
        how = {"cache_implementation": cache} if cache else {"use_cache": False}
        torch.testing.assert_close(said(recording, **how), said(plain), atol=2e-5, rtol=1e-4)
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    ours, theirs = recording.generate(ids, **beams), plain.generate(ids, **beams)
    assert ours.tolist() == theirs.tolist()


def test_a_step_that_asks_the_host_runs_without_a_graph_and_says_so(
    recorder: TapeRecorder,
) -> None:
    recording, plain = pair("meteora")
    hook = recording.model.norm.register_forward_hook(lambda m, a, out: out * float(out.max() > -9))
    with pytest.warns(LoraMergeWarning, match="cannot be recorded .*not permitted when"):
        out = said(recording)
    torch.testing.assert_close(out, said(plain), atol=2e-5, rtol=1e-4)
    hook.remove()


def test_a_copy_records_its_own_and_detaching_leaves_no_trace(recorder: TapeRecorder) -> None:
    recording, plain = pair("meteora")
    said(recording)
    twin = copy.deepcopy(recording)
    torch.testing.assert_close(said(twin), said(plain), atol=2e-5, rtol=1e-4)
    own = twin.__dict__["forward"]
    assert own.model is twin and own is not recording.__dict__["forward"] and own.recorded == 1
    recording.mixture.detach()
    assert "forward" not in recording.__dict__
    gc.collect()
    torch.testing.assert_close(said(recording), said(llama()))


def test_two_mixtures_share_a_recorder(recorder: TapeRecorder) -> None:
    model, plain = llama(), llama()
    for each in (model, plain):
        load_mixture(each, sharp(each, "meteora"), graph=each is model)
        load_mixture(each, sharp(each, "arrow"), name="b", graph=each is model)
    both = [model.lora_mixtures["mixture_default"], model.lora_mixtures["mixture_b"]]
    torch.testing.assert_close(said(model), said(plain), atol=2e-5, rtol=1e-4)
    for each in (model, plain):
        each.lora_mixtures["mixture_default"].activate()
    torch.testing.assert_close(said(model), said(plain), atol=2e-5, rtol=1e-4)
    assert both[0].graphs is both[1].graphs and len(recorder.tapes) == 2
    for each in (model, plain):
        each.lora_mixtures["mixture_default"].detach()
    torch.testing.assert_close(said(model), said(plain), atol=2e-5, rtol=1e-4)
    assert "forward" in model.__dict__
    both[1].detach()
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("preset", ["xlora", "sequence"])
def test_gates_that_look_back_are_refused(preset: str, recorder: TapeRecorder) -> None:
    model = llama()
    with pytest.raises(MethodError, match=r"tokens before.*\n.*leave graph out"):
        load_mixture(model, sharp(model, preset), graph=True)
    assert not hasattr(model, "mixture") and "forward" not in model.__dict__


def test_without_a_gpu_it_is_refused_and_nothing_is_attached() -> None:
    model = llama()
    with pytest.raises(MethodError, match="records CUDA graphs, and the model is on cpu"):
        load_mixture(model, sharp(model, "meteora"), graph=True)
    assert not hasattr(model, "mixture") and "forward" not in model.__dict__
