"""``offload generate``: bad input is refused before the work, and a killed run is finished."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload import cli
from tests.tiny import write_tiny_model

TEXTS = ["the quick brown fox", "the lazy", "a cat and a dog", "runs", "old grey cat", "over"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(
        tmp_path / "prompts.jsonl", [{"id": f"p{i}", "prompt": t} for i, t in enumerate(TEXTS)]
    )


def options(model: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    return [
        "generate", "--model", str(model), "--prompts", str(prompts), "--output", str(out),
        "--host-memory", "64MiB", "--max-new-tokens", "6", *more,
    ]  # fmt: skip


def rows(path: Path) -> dict[Any, Any]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    by_id = {row["id"]: row for row in found}
    assert len(by_id) == len(found), "a row is there twice"
    return by_id


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """The command in this process; its exit status."""

    def call(arguments: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["offload", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    return call


Run = Callable[[list[str]], int]


def test_rows_are_written_with_progress_and_a_second_run_does_the_rest(
    run: Run, model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "rows.jsonl"
    told = options(model, prompts, out, "--temperature", "1.0", "--seed", "3", "--batch-size", "2")
    assert run([*told, "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    steps = [e for e in events if e["event"] == "step"]
    assert steps[-1]["rows"] == steps[-1]["total"] == len(TEXTS)
    assert steps[-1]["tokens_per_s"] > 0
    assert events[-1] == {"event": "done", "rows": 6, "total": 6, "output": str(out)}
    whole = rows(out)
    assert set(whole) == {f"p{i}" for i in range(len(TEXTS))}
    assert all(set(r) == {"id", "text", "tokens", "finish_reason"} for r in whole.values())
    assert all(r["tokens"] <= 6 and r["finish_reason"] in ("eos", "length") for r in whole.values())

    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:3]) + lines[3][:20])  # the fourth is torn
    assert run([*told[:-2], "--batch-size", "1"]) == 0
    assert "3 of them done before" in capsys.readouterr().out
    assert rows(out) == whole
    assert run(told) == 0
    assert rows(out) == whole


def test_a_stop_string_ends_a_row_before_it(
    run: Run, model: Path, prompts: Path, tmp_path: Path
) -> None:
    out, cut = tmp_path / "rows.jsonl", tmp_path / "cut.jsonl"
    assert run(options(model, prompts, out, "--with-prompt")) == 0
    whole = rows(out)
    text = whole["p0"]["text"]
    assert whole["p0"]["prompt"] == TEXTS[0]
    stop = next(c for c in text[1:] if c.isascii())
    assert run(options(model, prompts, cut, "--stop", stop)) == 0
    assert rows(cut)["p0"]["text"] == text[: text.index(stop)]
    assert rows(cut)["p0"]["finish_reason"] == "stop"


def test_conversations_go_through_the_chat_template(
    run: Run, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    from offload.prompts import encode, read_prompts

    asked = write(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "cat"}]}])
    assert run(options(model, asked, tmp_path / "rows.jsonl")) == 2
    assert "chat template" in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{{ '<answer>' if add_generation_prompt else '' }}"
    )
    ids = encode(read_prompts(asked), tokenizer, 64)
    assert ids == [tokenizer("<user>cat<answer>", add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "a"}', "{"], "prompts.jsonl:2: not JSON"),
        (['{"text": "a"}'], "prompts.jsonl:1: needs either 'prompt' or 'messages'; has: text"),
        (['{"prompt": 3}'], "'prompt' must be text, not 3"),
        (['{"messages": []}'], "'messages' must be a list"),
        (['{"id": [1], "prompt": "a"}'], "'id' must be text or a whole number"),
        (['{"id": 1, "prompt": "a"}', '{"prompt": "b"}'], "ids given twice: 1 in"),
        ([""], "has no prompts"),
        (['{"prompt": ""}'], "the prompt is empty"),
        ([json.dumps({"prompt": "cat " * 80})], "the model takes 63"),
    ],
)
def test_bad_prompts_are_named_before_the_model_is_loaded(
    run: Run, model: Path, tmp_path: Path, lines: list[str], message: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    monkeypatch.setattr("offload.batchjob.from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    assert run(options(model, path, tmp_path / "rows.jsonl")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--temperature", "-1"], "temperature must be"),
        (["--top-p", "0"], "top_p must be"),
        (["--stop", ""], "stop string is empty"),
        (["--micro-batches", "2"], "give --batch-size"),
        (["--dtype", "int3"], "dtype must be one of"),
        (["--model", "nowhere/at/all"], "no model directory"),
        (["--model", "tiny-llama-30m"], "random weights"),
    ],
)
def test_bad_settings_are_refused(
    run: Run, model: Path, prompts: Path, tmp_path: Path, more: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(options(model, prompts, tmp_path / "rows.jsonl", *more)) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_other_rows_is_left_alone(
    run: Run, model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    assert run(options(model, prompts, out)) == 0
    before = out.read_bytes()

    def refused(message: str, *more: str) -> None:
        assert run(options(model, prompts, out, *more)) == 2
        assert message in capsys.readouterr().err

    refused("temperature 0.0 (now 1.0)", "--temperature", "1.0")
    with out.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused("another process is writing")
    write(prompts, [{"id": f"p{i}", "prompt": f"{t}!"} for i, t in enumerate(TEXTS)])
    refused("were made with prompts")
    write(prompts, [{"id": f"q{i}", "prompt": t} for i, t in enumerate(TEXTS)])
    refused("no prompt's")
    assert out.read_bytes() == before
    out.write_bytes(before[:30] + b"\n" + before[30:])
    refused("rows.jsonl:1 is no row")


def test_the_rows_after_kill_9_are_those_of_a_run_that_was_not_killed(
    run: Run, model: Path, tmp_path: Path
) -> None:
    asked = write(
        tmp_path / "prompts.jsonl", [{"prompt": f"{TEXTS[i % 6]} {i}"} for i in range(40)]
    )
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    told = ["--temperature", "0.9", "--batch-size", "1", "--micro-batches", "2"]
    assert run(options(model, asked, whole, *told)) == 0
    process = subprocess.Popen(
        [sys.executable, "-c", "from offload.cli import main; main()",
         *options(model, asked, cut, *told)],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and (not cut.exists() or cut.read_bytes().count(b"\n") < 3):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 3 <= len(cut.read_bytes().splitlines()) < 40
    assert run(options(model, asked, cut, *told)) == 0
    assert rows(cut) == rows(whole)


def test_a_signal_ends_the_run_after_its_step(
    run: Run, model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from offload.rows import RowFile

    out = tmp_path / "rows.jsonl"
    append = RowFile.append

    def interrupted(file: RowFile, found: Any) -> None:
        made = list(found)
        append(file, made)
        if made:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "append", interrupted)
        assert run(options(model, prompts, out, "--batch-size", "2")) == 128 + signal.SIGINT
    assert "run the same command again" in capsys.readouterr().out
    assert 0 < len(rows(out)) < len(TEXTS)
    assert run(options(model, prompts, out)) == 0
    assert len(rows(out)) == len(TEXTS)
