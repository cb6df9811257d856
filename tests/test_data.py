"""Records, masks, packing and order."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offload.data import (
    IGNORED_LABEL,
    STDLIB_BYTES,
    Blocks,
    Position,
    Record,
    Sampler,
    Segment,
    Turn,
    find_files,
    pack,
    read_records,
    segments,
    split,
    use_fallback_template,
)
from offload.runconfig import DataConfig, InputError
from offload.tinymodel import train_tokenizer

SHARED_DATA = Path(
    os.environ.get("OFFLOAD_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    text = "the quick brown fox jumps over the lazy dog.\n" * 20
    made = train_tokenizer([Record("t", text=text)])
    use_fallback_template(made, [Record("c", turns=(Turn("user", "a"), Turn("assistant", "b")))])
    return made


def _jsonl(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_every_json_shape_is_read(tmp_path: Path) -> None:
    path = _jsonl(
        tmp_path / "d.jsonl",
        {"text": "plain"},
        {"instruction": "add", "input": "1 1", "output": "2"},
        {"instruction": "say", "output": "hi"},
        {"prompt": "ask", "completion": "told"},
        {"instruction": "do", "instances": [{"input": "", "output": "x"}, {"output": "y"}]},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]},
    )
    records = list(read_records([path]))
    assert [r.text for r in records] == ["plain", "", "", "", "", "", ""]
    assert [tuple(t.content for t in r.turns) for r in records[1:]] == [
        ("add\n\n1 1", "2"),
        ("say", "hi"),
        ("ask", "told"),
        ("do", "x"),
        ("do", "y"),
        ("u", "v"),
    ]
    assert records[1].where == f"{path}:2"


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "not JSON"),
        ("[1]", "must be an object"),
        ('{"prompt": "a"}', "needs 'text', 'messages', 'prompt' with 'completion'"),
        ('{"text": 3}', "'text' must be text"),
        ('{"instruction": "a"}', "'output' must be text"),
        ('{"messages": "a"}', "must be a list"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
        ('{"instruction": "a", "instances": {}}', "must be a list"),
    ],
)
def test_bad_record_names_file_and_line(tmp_path: Path, line: str, part: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(InputError) as caught:
        list(read_records([path]))
    assert f"{path}:3" in str(caught.value)
    assert part in str(caught.value)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8"):
        list(read_records([tmp_path / "a.txt"]))


def test_files_of_directory_glob_and_standard_library(tmp_path: Path) -> None:
    for name in ("b.py", "a.txt", "sub/c.md", "skip.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [p.name for p in find_files(str(tmp_path))] == ["a.txt", "b.py", "c.md"]
    assert [p.name for p in find_files(str(tmp_path / "*.py"))] == ["b.py"]
    for missing in (tmp_path / "none.txt", tmp_path / "*.csv"):
        with pytest.raises(InputError, match="no data at"):
            find_files(str(missing))
    stdlib = find_files(None)
    assert stdlib == find_files(None)
    assert 0 < sum(p.stat().st_size for p in stdlib) <= STDLIB_BYTES


def test_only_the_assistant_is_learned(tokenizer: Any) -> None:
    turns = (
        Turn("system", "S"),
        Turn("user", "A"),
        Turn("assistant", "B"),
        Turn("user", "C"),
        Turn("assistant", "D"),
    )
    assert segments(Record("r", turns=turns), tokenizer) == [
        Segment("### System:\nS\n\n### User:\nA\n\n### Assistant:\n", False),
        Segment("B<|endoftext|>", True),
        Segment("\n\n### User:\nC\n\n### Assistant:\n", False),
        Segment("D<|endoftext|>", True),
    ]


def test_turns_that_the_template_rewrites_are_not_learned() -> None:
    class Forgetful:
        """Like templates that drop the reasoning of earlier answers."""

        def apply_chat_template(
            self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
        ) -> str:
            last = len(messages) - 1
            shown = [
                m["content"] if i == last or m["role"] == "user" else "..."
                for i, m in enumerate(messages)
            ]
            return "|".join(shown) + ("|" if add_generation_prompt else "")

    turns = (Turn("user", "A"), Turn("assistant", "B"), Turn("user", "C"), Turn("assistant", "D"))
    assert segments(Record("r", turns=turns), Forgetful()) == [
        Segment("A|...|C|", False),
        Segment("D", True),
    ]


def test_labels_stay_with_their_tokens(tokenizer: Any) -> None:
    record = Record("r", turns=(Turn("user", "the quick fox"), Turn("assistant", "jumps over")))
    answer = tokenizer("jumps over<|endoftext|>")["input_ids"]
    whole = len(tokenizer("### User:\nthe quick fox\n\n### Assistant:\n")["input_ids"]) + len(
        answer
    )
    blocks = pack([record] * 3, tokenizer, whole, 0)
    labels = blocks.labels([0, 1, 2])
    assert labels.shape == (3, whole)
    expected = [IGNORED_LABEL] * (whole - len(answer)) + answer
    assert labels.tolist() == [expected] * 3
    assert blocks.input_ids([1])[0, -len(answer) :].tolist() == answer


def test_packing_joins_records_with_end_tokens_and_drops_the_tail(tokenizer: Any) -> None:
    records = [Record(str(i), text=f"fox {i}" * (i + 1)) for i in range(7)]
    blocks = pack(records, tokenizer, 5, 3)
    stream = blocks.tokens.reshape(-1)
    texts = {r.text for r in records}
    pieces = tokenizer.decode(stream).split("<|endoftext|>")
    assert set(pieces[:-1]) <= texts
    assert any(text.startswith(pieces[-1]) for text in texts)
    assert blocks.learned.all()
    total = sum(len(tokenizer(r.text)["input_ids"]) + 1 for r in records)
    assert len(stream) == total // 5 * 5


def test_packing_depends_on_the_seed_only(tokenizer: Any) -> None:
    records = [Record(str(i), text=f"the lazy dog {i}") for i in range(20)]
    one, two = pack(records, tokenizer, 8, 1), pack(records, tokenizer, 8, 2)
    assert one.fingerprint() == pack(records, tokenizer, 8, 1).fingerprint()
    assert one.fingerprint() != two.fingerprint()


def test_blocks_without_a_target_are_dropped(tokenizer: Any) -> None:
    prompt = "the quick brown fox " * 30
    record = Record("r", turns=(Turn("user", prompt), Turn("assistant", "jumps")))
    blocks = pack([record] * 4, tokenizer, 8, 0)
    assert blocks.learned[:, 1:].any(axis=1).all()
    long = pack([record] * 4, tokenizer, 2 + len(tokenizer(prompt)["input_ids"]), 0)
    assert len(long) >= 1


def test_too_little_data_says_which_length_works(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"--seq-len \d+ or less"):
        pack([Record("r", text="fox")], tokenizer, 512, 0)


def test_long_texts_are_encoded_whole(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the quick brown fox\n" * 50
    whole = pack([Record("r", text=text)], tokenizer, 4, 0)
    monkeypatch.setattr("offload.data._PIECE_CHARACTERS", 64)
    assert len(segments(Record("r", text=text), tokenizer)) > 5
    assert tokenizer.decode(pack([Record("r", text=text)], tokenizer, 4, 0).tokens.reshape(-1)) == (
        tokenizer.decode(whole.tokens.reshape(-1))
    )


def test_sampler_visits_all_once_per_epoch_in_a_new_order() -> None:
    sampler = Sampler(10, seed=5)
    first, second = sampler.take(10), sampler.take(10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert sampler.position == Position(2, 0)


@pytest.mark.parametrize("taken", [0, 1, 3, 7, 8, 20])
def test_sampler_goes_on_from_a_position(taken: int) -> None:
    whole = Sampler(7, seed=1)
    everything = whole.take(40)
    first = Sampler(7, seed=1)
    assert first.take(taken) == everything[:taken]
    rest = Sampler(7, seed=1, position=first.position)
    assert rest.take(40 - taken) == everything[taken:]
    assert rest.position == whole.position


def test_split_holds_out_the_end() -> None:
    blocks = Blocks(np.arange(40, dtype=np.int32).reshape(10, 4), np.ones((10, 4), bool))
    train, held = split(blocks, DataConfig(eval_fraction=0.2))
    assert (len(train), len(held)) == (8, 2)
    assert held.tokens.tolist() == blocks.tokens[8:].tolist()
    assert [len(part) for part in split(blocks, DataConfig(eval_fraction=0.0))] == [10, 0]
    assert [len(part) for part in split(blocks, DataConfig(eval_fraction=0.01))] == [9, 1]
    single = Blocks(blocks.tokens[:1], blocks.learned[:1])
    assert [len(part) for part in split(single, DataConfig(eval_fraction=0.5))] == [1, 0]


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data folder is not here")
def test_the_shared_instruction_file_is_read(tokenizer: Any) -> None:
    records = list(read_records(find_files(str(SHARED_DATA / "seed_tasks.jsonl"))))
    assert len(records) == 175
    blocks = pack(records, tokenizer, 128, 0)
    assert 0.2 < blocks.learned.mean() < 0.8
