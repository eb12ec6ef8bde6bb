"""The command line: exit codes, streams, what is written and what is not."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from builders import adapter_parts, save_adapter, save_parts
from lora_merge.cli.app import _COMMANDS, run
from lora_merge.files.stamp import finish_stamp


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("LORA_MERGE_DEBUG", raising=False)


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    return [str(save_adapter(tmp_path / n, seed=i)) for i, n in enumerate("abc")]


@pytest.mark.parametrize("name", _COMMANDS)
def test_help_fits_80_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "\\b" not in shown and max(map(len, shown.splitlines())) <= 80


def test_help_answers_without_torch() -> None:
    probe = (
        "import sys; from lora_merge.cli.app import run\n"
        "codes = [run([*c, '--help']) for c in ([], ['cluster'], ['info'], ['run'])]\n"
        "heavy = {'torch', 'numpy', 'sklearn', 'huggingface_hub', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'{codes} {heavy}' if any(codes) or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_cluster_writes_and_tells(
    three: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["cluster", *three, "--rank", "4", "-o", str(out)]) == 0
    said = capsys.readouterr()
    assert "self_attn.q_proj" in said.out
    assert f"wrote {out}" in said.out.replace("\n", "")
    assert all(len(line) <= 80 for line in said.out.splitlines() if str(out) not in line)
    assert "\x1b" not in said.out + said.err
    assert (out / "adapter_model.safetensors").is_file()


def test_json_is_one_document(
    three: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    for extra in (["--dry-run"], []):
        assert run(["cluster", *three, "--rank", "4", "-o", out, "--json", *extra]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["schema"] == 1
        assert said.err == ""
        assert Path(out).exists() == (not extra)
    assert run(["info", out, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert {m["rank"] for m in info["modules"]} == {4}


@pytest.mark.parametrize(
    "command",
    [
        ["info", "{a}"],
        ["cluster", "{a}", "{b}", "--rank", "4", "--dry-run"],
        ["cluster", "{a}", "{b}", "--rank", "4", "-o", "{out}"],
        ["methods"],
        ["methods", "ties"],
        ["spectra", "{a}", "{b}"],
        ["spectra", "{a}", "--module", "*0.mlp.up_proj"],
        ["compare", "{a}", "{b}", "--module", "*"],
        ["resize", "{a}", "--dry-run", "--list"],
        ["gate", "{a}", "{b}", "--dry-run"],
    ],
)
def test_piped_lines_end_without_spaces(
    command: list[str], three: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"a": three[0], "b": three[1], "out": str(tmp_path / "out")}
    assert run([part.format(**places) for part in command]) == 0
    shown = capsys.readouterr()
    assert shown.out and shown.out[0] != "\n" and not shown.out.endswith("\n\n")
    assert not re.search(r"[ \t]$", shown.out + shown.err, re.MULTILINE)


def test_dry_run_plans_what_is_then_written(
    three: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(["cluster", *three, "--rank", "4", "-o", str(out), "--dry-run", "--json"])
    plan = json.loads(capsys.readouterr().out)
    run(["cluster", *three, "--rank", "4", "-o", str(out)])
    assert (out / "adapter_model.safetensors").stat().st_size == plan["output_bytes"]
    capsys.readouterr()
    assert run(["cluster", *three, "--rank", "4", "--dry-run"]) == 0
    assert "working memory" in capsys.readouterr().out


def test_run_makes_the_same_bytes(three: list[str], tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    flags = ["-w", "1", "-w", "-0.5", "-w", "2", "--balance", "--centroid", "rank-one"]
    assert run(["cluster", *three, "--rank", "4", "-o", str(first), *flags]) == 0
    assert run(["run", str(first / "lora_merge.yaml"), "-o", str(again)]) == 0
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["cluster"], 2, ["missing argument"]),
        (["cluster", "{a}", "--rank", "0"], 2, ["--rank"]),
        (["cluster", "{a}", "--rank", "4", "--units", "x"], 2, ["--units"]),
        (["cluster", "{a}", "{b}", "-w", "1", "--rank", "4"], 2, ["1 weights", "2 adapters"]),
        (["clustre", "{a}"], 2, ["did you mean 'cluster'"]),
        (["cluster", "{a}", "--rank", "99"], 1, ["rank 99", "4"]),
        (["cluster", "{none}", "--rank", "4"], 1, ["no such file"]),
        (["cluster", "{a}", "{nan}", "--rank", "4"], 1, ["NaN", "{nan}", "q_proj"]),
        (["cluster", "{a}", "{other}", "--rank", "4"], 1, ["other", "--accept-base-models"]),
        (["cluster", "{a}", "--rank", "4", "--device", "cuda:77"], 1, ["cuda|CUDA"]),
        (["cluster", "{a}", "--rank", "4", "--device", "toaster"], 1, ["toaster"]),
        (["cluster", "{a}", "--rank", "4", "-o", "{a}"], 1, ["input"]),
        (["info", "{none}"], 1, ["no such file"]),
        (["merge", "{a}", "--print-recipe", "--json"], 2, ["prints YAML"]),
        (["info", ""], 1, ["an empty name"]),
        (["resize", "{in}/[ab]", "--full", "-o", "x"], 1, ["one adapter is wanted, not 2"]),
        (["fuse", "{in}/[ab]", "--base", "{in}", "-o", "x"], 1, ["no safetensors weights"]),
        (["fuse", "{a}", "--base", "{in}", "-o", "x", "-w", "nan"], 1, ["weight is nan"]),
        (["merge", "{a}", "{b}", "--scale", "inf"], 1, ["scale is inf", "a finite number"]),
        (["resize", "{a}", "-o", "x", "--min-rank", "3", "--max-rank", "2"], 2, ["is above"]),
        (["run", "{none}"], 1, ["cannot read"]),
    ],
)
def test_bad_input_is_told_in_a_line_and_writes_nothing(
    arguments: list[str],
    code: int,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, tensors = adapter_parts(seed=1)
    next(iter(tensors.values()))[0, 0] = float("nan")
    places = {
        "a": save_adapter(tmp_path / "in" / "a"),
        "b": save_adapter(tmp_path / "in" / "b", seed=1),
        "other": save_adapter(tmp_path / "in" / "other", base_model_name_or_path="other"),
        "nan": save_parts(tmp_path / "in" / "nan", config, tensors),
        "none": tmp_path / "in" / "none",
        "in": tmp_path / "in",
    }
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run([a.format(**places) for a in arguments]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    for word in words:
        assert re.search(word.format(**places), said.err.replace("\n", " ")), said.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "command",
    [
        ["cluster", "none", "--rank", "4"],
        ["merge", "user/none", "user/nothing"],
        ["run", "recipe.yaml"],
        ["fuse", "none", "--base", "none"],
        ["resize", "none", "--energy", "0.9"],
        ["extract", "--base", ".", "--tuned", "."],
        ["gate", "none"],
        ["train", "none", "--base", "none", "--data", "rows"],
        ["consolidate", "none", "--base", "none", "--data", "rows"],
        ["describe", "none", "--base", "none", "--data", "rows"],
        ["export", "none", "--to", "experts"],
    ],
)
def test_an_output_that_is_there_is_refused_first(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is opened: the inputs named here do not even exist."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("recipe.yaml").write_text("merge_method: lego\nadapters: [{adapter: none}]\n")
    Path("rows").write_text("")
    save_adapter(tmp_path / "out")
    assert run([*command, "-o", "../out"]) == 1
    assert "../out exists and is not empty" in capsys.readouterr().err


def test_replacing_and_accepting_base_models_are_two_things(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = str(save_adapter(tmp_path / "a"))
    b = str(save_adapter(tmp_path / "b", base_model_name_or_path="other-base"))
    out = tmp_path / "out"
    merge = ["cluster", a, b, "--rank", "4", "-o", str(out)]
    assert run([*merge, "--force"]) == 1
    assert not out.exists()
    assert run([*merge, "--accept-base-models"]) == 0
    assert "base models differ: other-base, tiny-base" in capsys.readouterr().err
    assert run(["run", str(out / "lora_merge.yaml"), "-o", str(tmp_path / "again")]) == 0
    capsys.readouterr()
    assert run([*merge, "--accept-base-models"]) == 1
    assert "--force to replace it" in capsys.readouterr().err
    assert run([*merge, "--accept-base-models", "--force"]) == 0
    assert run(["compare", a, b]) == 1
    assert run(["compare", a, b, "--accept-base-models"]) == 0
    gate = ["gate", a, b, "-o", str(tmp_path / "mix")]
    assert run([*gate, "--force"]) == 1
    assert run([*gate, "--accept-base-models"]) == 0
    more = ["gate", a, "--into", str(tmp_path / "mix"), "-o", str(tmp_path / "more")]
    assert run(more) == 1
    assert run([*more, "--accept-base-models"]) == 0


def test_a_bare_file_needs_its_alpha(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_adapter(tmp_path / "a", alpha=8)
    bare = tmp_path / "bare.safetensors"
    (folder / "adapter_model.safetensors").rename(bare)
    out = tmp_path / "out"
    assert run(["cluster", str(bare), "--rank", "4", "-o", str(out)]) == 1
    assert "--alpha" in capsys.readouterr().err
    assert run(["cluster", str(bare), "--rank", "4", "-o", str(out), "--alpha", "8"]) == 0
    assert run(["run", str(out / "lora_merge.yaml"), "-o", str(tmp_path / "again")]) == 0
    assert run(["info", str(bare), "--alpha", "8", "--rslora", "--json"]) == 0


def test_an_untrained_adapter_is_legal_and_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tensors = adapter_parts()
    zeroed = {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()}
    folder = str(save_parts(tmp_path / "zero", config, zeroed))
    assert run(["info", folder]) == 0
    assert "every module adds nothing" in capsys.readouterr().out.replace("\n", " ")
    out = tmp_path / "out"
    assert run(["cluster", folder, "--rank", "4", "-o", str(out)]) == 0
    assert "its B is zero, as before training" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("weight", "options", "reason"),
    [
        ("1e-300", {}, "its numbers vanish at a weight of 1e-300"),
        ("1", {"alpha": 0}, "its alpha is 0"),
    ],
)
def test_an_adapter_that_adds_nothing_is_told_why(
    weight: str, options: dict[str, float], reason: str, tmp_path: Path, capsys
) -> None:
    first = str(save_adapter(tmp_path / "a", seed=1, **options))
    second = str(save_adapter(tmp_path / "b", seed=2))
    arguments = ["merge", first, second, "-M", "svd", "-w", weight, "-w", "1"]
    assert run([*arguments, "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"a adds nothing: {reason}" in said and "b adds nothing" not in said


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    """A process whose merge is slow enough to be interrupted in its middle."""
    program = (
        "import sys, time\n"
        "from lora_merge.adapters.writer import AdapterWriter\n"
        "add = AdapterWriter.add\n"
        "def slow(*a, **k): print('busy', flush=True); time.sleep(0.5); return add(*a, **k)\n"
        "AdapterWriter.add = slow\n"
        "sys.argv = ['lora-merge', *sys.argv[1:]]\n"
        "from lora_merge.__main__ import main; main()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_interruption_loses_nothing(
    number: int, code: int, three: list[str], tmp_path: Path
) -> None:
    out = save_adapter(tmp_path / "out", seed=9)
    finish_stamp(out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    process = start(["cluster", *three, "--rank", "4", "-o", str(out), "--force", "--jobs", "1"])
    assert process.stdout is not None
    assert process.stdout.readline() == b"busy\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert b"Traceback" not in errors
    if number != signal.SIGKILL:
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "out"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_while_a_module_loads_ends_at_once(
    number: int, code: int, tmp_path: Path
) -> None:
    """Python swallows an exception in some places there, and C++ aborts at it."""
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "try:\n"
        "    print('busy', flush=True); time.sleep(60)\n"
        "except BaseException:\n"
        "    pass\n"
    )
    program = (
        "import sys; from lora_merge.cli import app\n"
        f"sys.path.insert(0, {str(tmp_path)!r}); app.run = lambda _: __import__('slow') and 0\n"
        "from lora_merge.__main__ import main; main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"busy\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in errors


@pytest.mark.parametrize(
    "command",
    [["info", "{}"], ["spectra", "--json", "{}"], ["methods"], ["merge", "--print-recipe", "{}"]],
)
def test_a_closed_pipe_is_no_error(command: list[str], three: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "lora_merge", *(part.format(three[0]) for part in command)],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("options", [[], ["--json"], ["--help"]])
def test_a_full_disk_behind_stdout_is_told(options: list[str], three: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lora_merge", "info", three[0], *options],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 1
    assert b"No space left" in done.stderr and b"Traceback" not in done.stderr


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lora_merge.errors import SourceError

    monkeypatch.setenv("LORA_MERGE_DEBUG", "1")
    with pytest.raises(SourceError):
        run(["info", str(tmp_path / "none")])


@pytest.mark.parametrize(
    "command", [["merge", "{a}", "{b}", "--dry-run"], ["merge", "{a}", "{b}", "--rank", "zzz:1"]]
)
def test_a_terminal_gets_whole_words(command: list[str], three: list[str], tmp_path: Path) -> None:
    """Notes and errors are longer than a line; the same words arrive piped and on a terminal."""
    import pty

    command = [part.format(a=three[0], b=three[1]) for part in command]
    arguments = [sys.executable, "-m", "lora_merge", *command, "-o", str(tmp_path / "out")]
    piped = subprocess.run(arguments, capture_output=True, check=False, text=True)
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "60", "TERM": "xterm"}
    done = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            shown += os.read(leader, 4096)
        except OSError:
            break
    done.wait()
    os.close(leader)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).splitlines()
    assert max(map(len, lines)) <= 60 < max(map(len, piped.stderr.splitlines()))
    assert " ".join(lines).split() == piped.stderr.split()


def test_progress_is_for_terminals_only(three: list[str], tmp_path: Path) -> None:
    """With a pseudo-terminal on stderr a bar is drawn; stdout stays clean."""
    import pty

    leader, follower = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "lora_merge", "cluster", *three, "--rank=4", f"-o{tmp_path}/out"],
        stdout=subprocess.PIPE,
        stderr=follower,
    )
    os.close(follower)
    shown = b""
    while done.poll() is None or shown == b"":
        try:
            shown += os.read(leader, 4096)
        except OSError:
            break
        time.sleep(0.01)
    output = done.communicate()[0]
    os.close(leader)
    assert b"merging" in shown
    assert b"merging" not in output


def test_the_real_checkpoints_cluster_and_load_in_peft(shared: Path, tmp_path: Path) -> None:
    """Three public RoBERTa checkpoints to rank 4, onto a randomly initialised RoBERTa."""
    import warnings

    import peft
    from transformers import RobertaConfig, RobertaForSequenceClassification

    folders = sorted(map(str, (shared / "adapters" / "roberta-base").iterdir()))
    assert run(["cluster", *folders, "--rank", "4", "-o", str(tmp_path / "out")]) == 0
    config = RobertaConfig(
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        num_labels=4,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = RobertaForSequenceClassification(config)
        before = model(torch.arange(10)[None]).logits
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    after = loaded.eval()(torch.arange(10)[None]).logits
    assert torch.isfinite(after).all()
    assert not torch.allclose(before, after)
    key = "roberta.encoder.layer.3.attention.self.query"
    delta = loaded.get_submodule(f"base_model.model.{key}").get_delta_weight("default")
    assert float(delta.norm()) > 0
