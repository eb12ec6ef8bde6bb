"""Scores against plain loops, an adapter in a model against PEFT, and what rows may be."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders import adapter_parts, save_parts
from lora_merge.adapters.adapter import Adapter
from lora_merge.cli.app import run
from lora_merge.errors import AlignmentError, MethodError
from lora_merge.evaluation.applied import applied
from lora_merge.evaluation.evaluate import evaluate
from lora_merge.evaluation.metrics import MetricError, find_metric
from lora_merge.evaluation.rows import Rows, RowsError, read_rows
from lora_merge.files.lines import read_lines

EXAMPLES = Path(__file__).parents[2] / "examples"
BASE, ADAPTERS, TEST = EXAMPLES / "base", EXAMPLES / "adapters", EXAMPLES / "data" / "test.jsonl"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def write(path: Path, *rows: dict) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def read(path: Path, tokenizer, **how: int) -> Rows:
    return read_rows(read_lines(path, error=RowsError), tokenizer, **how)


def test_each_adapter_has_its_skill_and_no_other() -> None:
    found = evaluate(str(ADAPTERS / "*"), base=BASE, data=TEST, cache=False)
    assert found.metric == "exact-match" and found.tasks == ("double", "reverse", "upper")
    base, *adapters = found.lines
    assert base.scores["all"] == 0.0
    for line in adapters:
        own = Path(line.name).name
        assert line.scores[own] == 1.0
        assert all(line.scores[task] == 0.0 for task in found.tasks if task != own)
        assert line.normalised == pytest.approx(1 / 3)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@torch.no_grad()
def test_an_applied_adapter_gives_the_logits_of_peft(model) -> None:
    ids = torch.randint(32, 127, (3, 11), generator=torch.Generator().manual_seed(0))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with applied(model, Adapter.from_pretrained(ADAPTERS / "reverse")):
        ours = model(input_ids=ids).logits
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    fresh = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(fresh, ADAPTERS / "reverse").eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_another_model_changes_nothing(model, tmp_path) -> None:
    config, tensors = adapter_parts()
    other = Adapter.from_pretrained(save_parts(tmp_path / "other", config, tensors))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(AlignmentError, match=r"layers\.0.*in the model"), applied(model, other):
        pass
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@torch.no_grad()
def test_loss_and_exact_match_are_those_of_a_loop(model, tokenizer, tmp_path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        {"prompt": "copy: red cat >", "response": " red cat"},
        {"prompt": "last: one bird >", "response": " bird", "task": "last"},
        {"prompt": "swap: six two >", "response": " nonsense", "task": "last"},
    )
    rows = read(path, tokenizer)
    for batch_size in (1, 2, 8):
        loss = find_metric("loss", rows).score(model, tokenizer, rows, batch_size)
        exact = find_metric("exact-match", rows).score(model, tokenizer, rows, batch_size)
        for i, row in enumerate(rows.rows):
            (ids,), (skipped,) = row.options, row.skipped
            logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            told = sum(-float(logits[t - 1, ids[t]]) for t in range(skipped, len(ids)))
            assert loss.values[i] == pytest.approx(told, rel=1e-4, abs=1e-4)
            assert loss.weights[i] == len(ids) - skipped
            made = model.generate(
                input_ids=torch.tensor([ids[:skipped]]), max_new_tokens=20, do_sample=False
            )[0, skipped:].tolist()
            assert exact.values[i] == float(made[: len(ids) - skipped] == list(ids[skipped:]))
    assert exact.values == (1.0, 1.0, 0.0)


def test_choices_take_the_likeliest(tmp_path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        {"prompt": "first: red cat >", "choices": [" cat", " red", " dog"], "answer": 1},
        {"prompt": "first: red cat >", "choices": [" cat", " red", " dog"], "answer": 0},
    )
    found = evaluate([], base=BASE, data=path, cache=False)
    assert found.metric == "accuracy" and found.lines[0].scores == {"all": 0.5}


def test_labels_are_asked_of_the_head(tmp_path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(BASE, num_labels=3, dtype="float32")
    head = LlamaForSequenceClassification(config).eval()
    head.save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.save_pretrained(tmp_path / "base")
    texts = ["red", "blue bird", "one"]
    with torch.no_grad():
        right = [int(head(**tokenizer(t, return_tensors="pt")).logits.argmax()) for t in texts]
    rows = [{"text": t, "label": label} for t, label in zip(texts, right, strict=True)]
    rows[0]["label"] = (rows[0]["label"] + 1) % 3
    path = write(tmp_path / "rows.jsonl", *rows)
    found = evaluate([], base=tmp_path / "base", data=path, cache=False)
    assert found.lines[0].scores["all"] == pytest.approx(2 / 3)


def test_a_program_and_a_function_judge_what_is_generated(tmp_path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "copy: red cat >", "response": " red cat"})
    program = tmp_path / "score.py"
    program.write_text(
        "import json, sys\n"
        "rows = [json.loads(line) for line in sys.stdin]\n"
        "print('words', sum(r['output'].strip() == r['response'].strip() for r in rows))\n"
    )
    seen: list[dict[str, str]] = []

    def judge(rows: list[dict[str, str]]) -> float:
        seen.extend(rows)
        return 0.25

    for metric, value in ((f"command:python {program}", 1.0), (judge, 0.25)):
        found = evaluate([], base=BASE, data=path, metric=metric, cache=False)
        assert found.lines[0].scores["all"] == value
    assert seen == [{"prompt": "copy: red cat >", "response": " red cat", "output": " red cat"}]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "a"}, "neither a response nor a list of choices"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 2}, "answer 2 of 2 choices"),
        ({"prompt": "a", "choices": ["b", ""], "answer": 0}, "a choice without a token"),
        ({"text": "a", "label": True}, "True is no index"),
        ({"text": "a", "task": 3}, "no name"),
        ({"text": "a", "task": "all"}, "stands for all rows"),
        ({"text": "a", "label": float("nan")}, "not finite"),
        ([], "no JSON object"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(tmp_path, tokenizer, row, why) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "fine"}, row)
    with pytest.raises(RowsError, match=f"line 2.*{why}"):
        read(path, tokenizer)


def test_long_rows_and_mixed_kinds_are_refused(tmp_path, tokenizer) -> None:
    path = write(tmp_path / "long.jsonl", {"text": "a" * 50})
    with pytest.raises(RowsError, match="51 tokens, more than 40"):
        read(path, tokenizer, max_length=40)
    path = write(tmp_path / "mixed.jsonl", {"text": "a"}, {"prompt": "a", "response": "b"})
    with pytest.raises(RowsError, match="mixes rows of response and text"):
        read(path, tokenizer)


def test_a_pipe_is_read_whole_and_once(tmp_path) -> None:
    path, pipe = write(tmp_path / "rows.jsonl", {"text": "a b"}, {"text": "c"}), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(path.read_bytes()))
    writer.start()
    through = evaluate([], base=BASE, data=pipe, cache=False)
    writer.join()
    assert through.lines == evaluate([], base=BASE, data=path, cache=False).lines


def test_an_adapter_that_overflows_has_no_score(tmp_path) -> None:
    shapes = {f"model.layers.0.mlp.{name}_proj": (160, 64) for name in ("gate", "up")}
    config, tensors = adapter_parts(shapes=shapes, alpha=10**14)
    folder = save_parts(tmp_path / "huge", config, {n: t * 1e4 for n, t in tensors.items()})
    rows = [{"prompt": "a", "choices": ["b", "c"], "answer": 0}]
    with pytest.raises(MetricError, match=r"huge: .* NaN or infinite"):
        evaluate(folder, base=BASE, data=write(tmp_path / "rows.jsonl", *rows), cache=False)


def test_metrics_that_do_not_fit_are_refused(tmp_path, tokenizer) -> None:
    rows = read(write(tmp_path / "rows.jsonl", {"text": "a"}), tokenizer)
    with pytest.raises(MetricError, match=r"exact-match cannot .* text"):
        find_metric("exact-match", rows)
    with pytest.raises(MethodError, match="no metric 'bleu'"):
        find_metric("bleu", rows)


def test_scores_are_kept_until_a_file_changes(tmp_path, monkeypatch, capsys) -> None:
    from lora_merge.evaluation.bench import Bench

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured: list[object] = []
    original = Bench.score
    monkeypatch.setattr(Bench, "score", lambda b, what: measured.append(what) or original(b, what))
    path = write(tmp_path / "rows.jsonl", {"prompt": "copy: red cat >", "response": " red cat"})
    arguments = ["evaluate", str(ADAPTERS / "upper"), "--base", str(BASE), "--data", str(path)]
    tables = []
    for count in (2, 2):
        assert run([*arguments, "--json"]) == 0
        tables.append(json.loads(capsys.readouterr().out))
        assert len(measured) == count
    assert tables[0] == tables[1]
    write(path, {"prompt": "copy: red dog >", "response": " red dog"})
    assert run(arguments) == 0 and len(measured) == 4


def test_a_split_keeps_every_task(tokenizer) -> None:
    rows = read(TEST, tokenizer)
    chosen, held = rows.split(0.2)
    assert (len(chosen.rows), len(held.rows)) == (120, 30)
    assert all(sum(r.task == t for r in held.rows) == 10 for t in rows.tasks)
    assert rows.split(0.2) == (chosen, held)
