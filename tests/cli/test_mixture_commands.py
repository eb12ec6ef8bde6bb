"""gate, train and usage from the command line, on a tiny model on disk."""

import json
from pathlib import Path

import pytest
import torch
from tiny import letters_model

from builders import save_adapter
from lora_merge.cli.app import run
from lora_merge.mixture.mixture import Mixture


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with a tokenizer of letters, three adapters and some text."""
    folder = tmp_path_factory.mktemp("world")
    model = letters_model(folder / "base")
    shapes = {
        n: (m.out_features, m.in_features) for n, m in model.named_modules() if n.endswith("_proj")
    }
    for seed, name in enumerate(("math", "code", "chat")):
        save_adapter(folder / name, r=4, seed=seed, shapes=shapes)
    rows = [{"text": "abc abc abc", "expert": "math"}, {"text": "xyz zyx", "expert": "code"}] * 4
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\nbroken\n")
    return folder


@pytest.fixture
def inside(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    monkeypatch.setenv("COLUMNS", "80")
    return world


def test_gate_says_what_it_made(inside: Path, capsys, tmp_path: Path) -> None:
    assert run(["gate", "math", "code", "chat", "-o", str(tmp_path / "mix"), "--top-k", "2"]) == 0
    shown = capsys.readouterr()
    assert "arrow: prototype, per module, softmax, top 2" in shown.out
    assert "R up to 12 on 14 modules" in shown.out and shown.err == ""
    mixture = Mixture.from_pretrained(tmp_path / "mix")
    assert mixture.names == ["math", "code", "chat"] and mixture.spec.top_k == 2
    arguments = ["gate", "math", "code", "--preset", "xlora", "--dry-run", "--json"]
    assert run([*arguments, "-o", str(tmp_path / "none")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["out"] is None and not (tmp_path / "none").exists()
    assert data["gate"]["trained"] is False and data["overhead"]["passes"] == 2
    assert run(["gate", "chat", "--into", str(tmp_path / "mix"), "-o", str(tmp_path / "more")]) == 0
    assert Mixture.from_pretrained(tmp_path / "more").names[-1] == "chat-2"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gate", "math", "nowhere"], 1, "nowhere"),
        (["gate", "math", "--preset", "moe"], 2, "moe"),
        (["gate", "math", "--preset", "constant", "-w", "1", "-w", "2"], 1, "2 weights for 1"),
        (["gate", "math", "--preset", "meteora", "--general", "code"], 1, "subtracted by arrow"),
        (["gate", "math", "--into", "x", "--top-k", "1"], 2, "keeps the gate that is there"),
        (["gate", "math", "--preset", "spectr", "--scale", "inf"], 1, "scale inf"),
        (["gate", "math", "--preset", "constant", "-w", "nan"], 1, "weights nan"),
        (["gate", "math", "--preset", "spectr", "--temperature", "inf"], 1, "temperature inf"),
        (["gate", "math", "--preset", "arrow", "--depth", "2"], 1, "it has no depth"),
        (["gate", "math", "--preset", "arrow", "-w", "1"], 1, "it has no weights"),
        (["train", "math", "--base", "base", "--data", "rows.jsonl"], 1, "no mixture_config"),
        (["usage", "nowhere", "--base", "base", "--data", "rows.jsonl"], 1, "no such mixture"),
        (["usage", "{mix}", "--base", "none", "--data", "rows.jsonl"], 1, "base model none: "),
        (["usage", "{mix}", "--base", "math", "--data", "rows.jsonl"], 1, "base model math: "),
        (["export", "{mix}", "--to", "xlora", "--base", "none"], 1, "base model none: "),
        (
            ["usage", "{mix}", "--base", "base", "--data", "none.jsonl"],
            1,
            "none.jsonl: no such file",
        ),
        (
            ["usage", "{mix}", "--base", "base", "--data", "rows.jsonl", "--device", "meta"],
            1,
            "auto",
        ),
        (["gate", "math", "--name", ""], 1, "give each a name"),
        (["export", "{mix}", "--to", "static", "-w", "nan", "-w", "1"], 1, "give finite numbers"),
        (["train", "{mix}", "--base", "none", "--data", "rows.jsonl", "--lr", "-1"], 2, "--lr"),
    ],
)
def test_bad_input_is_one_clear_message(
    inside: Path, capsys, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    out = [] if arguments[0] == "usage" else ["-o", str(tmp_path / "out")]
    mix = str(tmp_path / "mix")
    if "{mix}" in arguments:
        gate = ["gate", "math", "code", "--preset", "xlora", "--hidden-size", "32"]
        assert run([*gate, "-o", mix]) == 0
        capsys.readouterr()
    assert run([part.format(mix=mix) for part in (*arguments, *out)]) == code
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err and shown.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_train_resume_and_usage(inside: Path, capsys, tmp_path: Path) -> None:
    mix, out = str(tmp_path / "mix"), str(tmp_path / "trained")
    assert run(["gate", "math", "code", "chat", "--preset", "meteora", "-o", mix]) == 0
    assert "next: lora-merge train" in " ".join(capsys.readouterr().err.split())
    train = ["train", mix, "--base", "base", "--data", "rows.jsonl", "-o", out]
    train += ["--eval", "rows.jsonl", "--steps", "4", "--batch-size", "4", "--task-loss", "0.5"]
    assert run([*train, "--strict"]) == 1
    assert "line 9: it is not valid JSON" in capsys.readouterr().err
    assert run([*train, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["steps_run"] == 4 and data["left_out"][0].startswith("line 9")
    assert {"loss", "task", "eval_loss"} <= set(data["last"])
    metrics = (tmp_path / "trained.training.metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2, 3, 4]
    first = Mixture.from_pretrained(out)
    assert first.spec.trained
    assert run([*train, "--force", "--resume"]) == 0
    again = Mixture.from_pretrained(out)
    assert all(torch.equal(first.gate[k], again.gate[k]) for k in first.gate)
    said = capsys.readouterr().out
    assert "0 of them now" in said and "first step" not in said
    usage = ["usage", out, "--base", "base", "--data", "rows.jsonl"]
    page = tmp_path / "usage.html"
    assert run([*usage, "--plot", str(tmp_path / "usage.png"), "--html", str(page)]) == 0
    text = page.read_text()
    assert "By layer" in text and "By the row" in text and "default-src 'none'" in text
    shown = capsys.readouterr()
    assert "layers.1" in shown.out and "text of math" in shown.out and "line 9" in shown.err
    assert (tmp_path / "usage.png").read_bytes().startswith(b"\x89PNG")
    assert shown.out.splitlines()[-1].endswith("usage.png") and "wrote" in shown.out
    assert run([*usage, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["modules"]) == 14 and set(data["by_label"]) == {"math", "code"}


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        ("usage.xyz", "try: one of: png, svg, pdf"),
        ("usage", "no known format of pictures"),
        ("nowhere/usage.png", "nowhere does not exist"),
    ],
)
def test_a_picture_that_cannot_be_is_told_before_the_model_loads(
    inside: Path, capsys, plot: str, message: str
) -> None:
    usage = ["usage", "nowhere", "--base", "nowhere", "--data", "rows.jsonl"]
    assert run([*usage, "--plot", plot]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_pruning_and_training_experts(inside: Path, capsys, tmp_path: Path) -> None:
    mix, out = str(tmp_path / "mix"), str(tmp_path / "small")
    assert run(["gate", "math", "code", "chat", "--preset", "recall", "-o", mix]) == 0
    train = ["train", mix, "--base", "base", "--data", "rows.jsonl", "-o", out, "--steps", "6"]
    train += ["--batch-size", "4", "--train-experts", "--rank-l1", "0.001", "--json"]
    capsys.readouterr()
    assert run([*train, "--shard"]) == 2
    assert "start several" in capsys.readouterr().err
    assert run(train) == 0
    data = json.loads(capsys.readouterr().out)
    assert 0 < data["ranks"] < 3 * 14 * 4 and data["last"]["ranks"] <= data["ranks"]
    experts = Mixture.from_pretrained(out).experts
    assert data["ranks"] == sum(sum(e.adapter.ranks().elements()) for e in experts)
    assert data["trained"] == ["gate", "experts", "ranks"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("preset", "options", "said"),
    [
        ("meteora", [], "gate trained; 8 rows, 1 steps"),
        ("arrow", ["--train-experts"], "experts trained; 8 rows"),
        ("meteora", ["--train-experts"], "gate and experts trained; 8 rows"),
        ("arrow", ["--rank-l1", "10"], "ranks pruned from 168 to 168; 8 rows"),
    ],
)
def test_train_says_what_it_trained(
    inside: Path, capsys, tmp_path: Path, preset: str, options: list[str], said: str
) -> None:
    mix, out = str(tmp_path / "mix"), str(tmp_path / "out")
    assert run(["gate", "math", "code", "chat", "--preset", preset, "-o", mix]) == 0
    train = ["train", mix, "--base", "base", "--data", "rows.jsonl", "-o", out, "--steps", "1"]
    assert run([*train, "--warmup", "0", *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"wrote {out}: {said}")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_describe_and_novelty(inside: Path, capsys, tmp_path: Path) -> None:
    mix, out = str(tmp_path / "mix"), str(tmp_path / "described")
    assert run(["gate", "math", "code", "chat", "-o", mix]) == 0
    novelty = ["novelty", mix, "--base", "base", "--data", "rows.jsonl"]
    assert run(novelty) == 1
    assert "no expert is described" in capsys.readouterr().err
    rows = [
        {"text": "".join(letters[(i + j) % 5] for j in range(6 + i)), "expert": name}
        for name, letters in (("math", "abcde"), ("code", "vwxyz"))
        for i in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    describe = ["describe", mix, "--base", "base", "--data", str(tmp_path / "rows.jsonl")]
    assert run([*describe, "--rank", "3", "-o", out]) == 0
    assert "math, code described at 2 modules" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "new.jsonl").write_text('{"text": "klmnop klmnop"}')
    for file, new in (("rows.jsonl", None), ("new.jsonl", True)):
        novelty = ["novelty", out, "--base", "base", "--data", str(tmp_path / file)]
        assert run([*novelty, "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert new is None or data["new"] is new
        assert data["new"] == (2 * len(data["new_rows"]) > data["rows"])
    assert run(novelty) == 0
    shown = capsys.readouterr().out
    assert "a new expert is needed" in shown and "math" in shown
    assert "1 of 1 rows are new, most of all at" in shown and data["new_rows"] == [1]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_consolidate_to_two_and_to_one(inside: Path, capsys, tmp_path: Path) -> None:
    from lora_merge.adapters.adapter import Adapter

    mix = str(tmp_path / "mix")
    assert run(["gate", "math", "code", "chat", "-o", mix]) == 0
    capsys.readouterr()
    consolidate = ["consolidate", mix, "--base", "base", "--data", "rows.jsonl", "--rank", "3"]
    assert run([*consolidate, "--experts", "2", "-o", str(tmp_path / "two")]) == 0
    assert "a mixture of 2 experts" in capsys.readouterr().out
    small = Mixture.from_pretrained(tmp_path / "two")
    assert len(small.names) == 2 and max(small.experts[0].adapter.ranks()) == 3
    assert run([*consolidate, "-o", str(tmp_path / "one"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["groups"] == [["math", "code", "chat"]] and 0 < data["error"] < 1
    assert set(Adapter.from_pretrained(tmp_path / "one").ranks()) == {3}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_out_to_other_tools_and_back(inside: Path, capsys, tmp_path: Path) -> None:
    mix, back = str(tmp_path / "mix"), str(tmp_path / "back")
    assert run(["gate", "math", "code", "--preset", "xlora", "-o", mix]) == 0
    assert run(["export", mix, "--to", "xlora", "--base", "base", "-o", back]) == 0
    again = ["gate", "--from", back, "-o", str(tmp_path / "again")]
    capsys.readouterr()
    assert run(again) == 1
    assert "numbered as the base model's class" in capsys.readouterr().err
    assert run([*again, "--base", "base"]) == 0
    first, second = Mixture.from_pretrained(mix), Mixture.from_pretrained(tmp_path / "again")
    assert all(torch.equal(first.gate[k], second.gate[k]) for k in first.gate)
    capsys.readouterr()
    assert run(["export", mix, "--to", "experts", "-o", str(tmp_path / "apart")]) == 0
    assert (tmp_path / "apart" / "code" / "adapter_config.json").is_file()
    static = ["export", mix, "--to", "static", "-o", str(tmp_path / "one"), "--json"]
    assert run([*static, "-w", "1", "-w", "0.5", "--rank", "5"]) == 0
    assert 0 < json.loads(capsys.readouterr().out.split("code\n")[-1])["error"] < 1
    for wrong in (["--to", "experts", "--rank", "2"], ["--to", "xlora"]):
        assert run(["export", mix, *wrong, "-o", str(tmp_path / "no")]) == 2
    assert run(["gate", "-o", str(tmp_path / "no")]) == 2


def test_a_base_that_is_none(inside: Path, capsys, tmp_path: Path) -> None:
    mix = str(tmp_path / "mix")
    assert run(["gate", "math", "--preset", "meteora", "-o", mix]) == 0
    arguments = ["train", mix, "--base", "chat", "--data", "rows.jsonl", "-o", mix + "2"]
    assert run(arguments) == 1
    assert "base model chat" in capsys.readouterr().err


def test_every_command_says_what_a_mixture_is(inside: Path, capsys, tmp_path: Path) -> None:
    mix = str(tmp_path / "mix")
    assert run(["gate", "math", "code", "chat", "--preset", "meteora", "-o", mix]) == 0
    capsys.readouterr()
    assert run(["info", mix]) == 0
    shown = capsys.readouterr().out
    assert "a mixture of 3 experts" in shown and "meteora: input" in shown and "math" in shown
    assert "untrained" in shown
    assert run(["info", mix, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [e["name"] for e in data["experts"]] == ["math", "code", "chat"]
    assert run(["info", mix, "math"]) == 2
    assert "math is no mixture" in capsys.readouterr().err
    out = ["-o", str(tmp_path / "out")]
    for command in (
        ["spectra", mix], ["compare", mix, "math"], ["resize", mix, "--rank", "2", *out],
        ["convert", mix, "--to", "peft", *out], ["merge", mix, "math", *out],
        ["cluster", mix, "math", "--rank", "4", *out], ["fuse", mix, "--base", "base", *out],
        ["gate", mix, *out],
    ):  # fmt: skip
        assert run(command) == 1, command
        said = " ".join(capsys.readouterr().err.split())
        assert "is a mixture of adapters behind a gate, not one adapter" in said
        assert not (tmp_path / "out").exists()
    assert f"{mix}/experts/*" in said and f"lora-merge export {mix} --to static" in said
    assert run(["compare", f"{mix}/experts/*"]) == 0
    assert run(["export", mix, "--to", "static", *out]) == 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_retrieve_reads_each_experts_texts(inside: Path, capsys, tmp_path: Path) -> None:
    mix, out, rows = (str(tmp_path / name) for name in ("mix", "out", "rows.jsonl"))
    assert run(["gate", "math", "code", "--preset", "retrieve", "-o", mix]) == 0
    texts = [{"text": "abcabc", "expert": "math"}, {"text": "xyzzy", "expert": "cod"}]
    train = ["train", mix, "--base", "base", "--data", rows, "-o", out]
    Path(rows).write_text("\n".join(json.dumps(row) for row in texts))
    assert run([*train, "--strict"]) == 1
    assert "no expert is called 'cod'; they are math, code" in capsys.readouterr().err
    texts[1]["expert"] = "code"
    Path(rows).write_text("\n".join(json.dumps(row) for row in texts))
    assert run(train) == 0
    assert capsys.readouterr().out.strip() == f"wrote {out}: gate trained; 2 rows"
    usage = ["usage", out, "--base", "base", "--data", rows, "--json"]
    assert run(usage) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["by_label"] == {"math": [1.0, 0.0], "code": [0.0, 1.0]}
