"""Training text: files -> records -> tokens with a loss mask -> packed blocks, in exact order.

A record is plain text or a conversation. It becomes segments of text, each learned from or
not; segments are tokenized apart, so that the boundary between prompt and answer falls where
it falls at inference. All records are joined, each closed by the end-of-text token, and cut
into blocks of ``seq_len`` tokens (greedy packing, nothing padded). A block may begin inside a
record and attention may look across records, as in ordinary pretraining.
"""

from __future__ import annotations

import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from offload.runconfig import DataConfig, InputError

IGNORED_LABEL = -100  # what torch's cross entropy skips
STDLIB_BYTES = 4 << 20
TEXT_SUFFIXES = (".txt", ".md", ".py")
JSON_SUFFIXES = (".jsonl", ".ndjson")
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "encodings"}
_PIECE_CHARACTERS = 1 << 20
_ENCODE_AT_ONCE = 256

# Given to tokenizers without a chat template, and exported with them, so that whoever loads
# the trained model prompts it as it was trained.
FALLBACK_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + ':\\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}"
    "{{ '' if loop.last and not add_generation_prompt else '\\n\\n' }}"
    "{% endfor %}"
    "{{ '### Assistant:\\n' if add_generation_prompt else '' }}"
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """Plain ``text``, or a conversation of ``turns``; ``where`` names its place for errors."""

    where: str
    text: str = ""
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text, and whether the model learns to write it."""

    text: str
    learned: bool


@dataclass(frozen=True, slots=True)
class Blocks:
    """Packed tokens.

    ``tokens`` int32 [blocks, seq_len]; ``learned`` bool [blocks, seq_len]: whether the token
    counts in the loss. Every block has a learned token after its first one, so that no mean
    over a block's loss is empty.
    """

    tokens: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)

    def labels(self, indices: Sequence[int]) -> npt.NDArray[np.int64]:
        """int64 [rows, seq_len]; not shifted: the model shifts."""
        chosen = list(indices)
        return np.where(self.learned[chosen], self.tokens[chosen], IGNORED_LABEL).astype(np.int64)

    def input_ids(self, indices: Sequence[int]) -> npt.NDArray[np.int64]:
        """int64 [rows, seq_len]."""
        return self.tokens[list(indices)].astype(np.int64)

    def fingerprint(self) -> str:
        """Equal for equal tokens and masks: a resumed run must see the same data."""
        digest = hashlib.sha256(repr(self.tokens.shape).encode())
        digest.update(np.ascontiguousarray(self.tokens).data)
        digest.update(np.ascontiguousarray(self.learned).data)
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Position:
    """Where the next row is taken: ``index`` into the order of ``epoch``. JSON by ``asdict``."""

    epoch: int = 0
    index: int = 0


class Sampler:
    """Endless rows in an order fixed by (seed, epoch), from any position."""

    def __init__(self, blocks: int, seed: int, position: Position | None = None) -> None:
        self.position = position or Position()
        self._blocks = blocks
        self._seed = seed
        self._order_epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def take(self, rows: int) -> list[int]:
        """The next ``rows`` block indices; moves the position on."""
        taken: list[int] = []
        while len(taken) < rows:
            epoch, index = self.position.epoch, self.position.index
            chunk = self._of_epoch(epoch)[index : index + rows - len(taken)]
            taken += chunk.tolist()
            index += len(chunk)
            done = index >= self._blocks
            self.position = Position(epoch + 1, 0) if done else Position(epoch, index)
        return taken

    def _of_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._order_epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._blocks)
            self._order_epoch = epoch
        return self._order


def find_files(path: str | None) -> list[Path]:
    """The data files of a path, directory or glob, sorted; None: Python's standard library.

    Raises InputError when there is none.
    """
    if path is None:
        return _stdlib_files()
    place = Path(path).expanduser()
    wanted = TEXT_SUFFIXES + JSON_SUFFIXES
    if place.is_file():
        return [place]
    if place.is_dir():
        found = sorted(p for p in place.rglob("*") if p.suffix in wanted and p.is_file())
        if not found:
            raise InputError(f"no {', '.join(wanted)} file in {place}; name a file or a glob")
        return found
    matches = sorted(Path(m) for m in glob.glob(str(place), recursive=True) if Path(m).is_file())
    if not matches:
        raise InputError(f"no data at {path}; --data takes a file, a directory or a glob")
    return matches


def _stdlib_files() -> list[Path]:
    """The first few MiB of the standard library's sources, in an order that never changes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    chosen: list[Path] = []
    total_bytes = 0
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        total_bytes += path.stat().st_size
        if total_bytes > STDLIB_BYTES:
            break
        chosen.append(path)
    if not chosen:
        raise InputError(f"no Python sources under {root}; name your own text with --data")
    return chosen


def read_records(files: Iterable[Path]) -> Iterator[Record]:
    """Each record of each file, in order. InputError names the file and line of a bad one."""
    for path in files:
        try:
            if path.suffix in JSON_SUFFIXES:
                yield from _json_records(path)
                continue
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text; convert it or leave it out") from error
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        if text.strip():
            yield Record(str(path), text=text)


def _json_records(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where}: not JSON ({error}); one object per line") from error
            if not isinstance(fields, dict):
                raise InputError(
                    f"{where}: a record must be an object, not {type(fields).__name__}"
                )
            yield from _records_of(fields, where)


def _records_of(fields: dict[str, Any], where: str) -> Iterator[Record]:
    if "messages" in fields:
        yield Record(where, turns=_turns(fields["messages"], where))
    elif "instruction" in fields:
        instances = fields.get("instances", [fields])
        if not isinstance(instances, list) or not all(isinstance(i, dict) for i in instances):
            raise InputError(f"{where}: 'instances' must be a list of objects with 'output'")
        for instance in instances:
            prompt = _text(fields, "instruction", where)
            context = _text(instance, "input", where) if instance.get("input") else ""
            asked = f"{prompt}\n\n{context}" if context else prompt
            answer = _text(instance, "output", where)
            yield Record(where, turns=(Turn("user", asked), Turn("assistant", answer)))
    elif "prompt" in fields and "completion" in fields:
        asked, answer = (_text(fields, key, where) for key in ("prompt", "completion"))
        yield Record(where, turns=(Turn("user", asked), Turn("assistant", answer)))
    elif "text" in fields:
        yield Record(where, text=_text(fields, "text", where))
    else:
        has = ", ".join(sorted(map(str, fields))) or "none"
        raise InputError(
            f"{where}: needs 'text', 'messages', 'prompt' with 'completion', or 'instruction' with "
            f"'output'; has: {has}"
        )


def _text(fields: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(fields.get(key), str):
        raise InputError(f"{where}: '{key}' must be text, not {fields.get(key)!r:.40}")
    return str(fields[key])


def _turns(messages: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"{where}: 'messages' must be a list of objects with role and content")
    turns = tuple(Turn(_text(m, "role", where), _text(m, "content", where)) for m in messages)
    if not any(turn.role == "assistant" for turn in turns):
        raise InputError(f"{where}: 'messages' has no assistant turn, so nothing to learn")
    return turns


def segments(record: Record, tokenizer: Any) -> list[Segment]:
    """What the model sees of a record. Of a conversation only the assistant's words are learned.

    Where a chat template rewrites earlier turns (some drop past reasoning), those turns cannot
    be found in the final text and only the turns that can be are learned.
    """
    if not record.turns:
        return [Segment(piece, True) for piece in _pieces(record.text)]
    messages = [{"role": turn.role, "content": turn.content} for turn in record.turns]
    whole = _render(tokenizer, messages, record.where)
    parts: list[Segment] = []
    start = 0
    for number, turn in enumerate(record.turns):
        if turn.role != "assistant":
            continue
        head = _render(tokenizer, messages[:number], record.where, prompt=True)
        upto = _render(tokenizer, messages[: number + 1], record.where)
        if len(head) >= start and upto.startswith(head) and whole.startswith(upto):
            parts += [Segment(whole[start : len(head)], False), Segment(upto[len(head) :], True)]
            start = len(upto)
    parts.append(Segment(whole[start:], False))
    return [part for part in parts if part.text]


def _render(tokenizer: Any, messages: Any, where: str, prompt: bool = False) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        )
    except Exception as error:  # a template is a program from the model's author: any error
        raise InputError(f"{where}: the model's chat template refuses it: {error}") from error


def _pieces(text: str) -> Iterator[str]:
    """``text`` cut at line ends into pieces a tokenizer digests without much memory."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1
        end = end if end > start else start + _PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


def use_fallback_template(tokenizer: Any, records: Sequence[Record]) -> None:
    """Give a tokenizer without a chat template ours, when the data holds conversations."""
    if any(record.turns for record in records) and not tokenizer.chat_template:
        tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE


def pack(records: Sequence[Record], tokenizer: Any, seq_len: int, seed: int) -> Blocks:
    """All records, in an order fixed by ``seed``, as blocks of ``seq_len`` tokens.

    The tail shorter than a block is dropped, and so are blocks with nothing to learn. Raises
    InputError when no block remains.
    """
    order = np.random.default_rng([seed]).permutation(len(records))
    tokens: list[npt.NDArray[np.int32]] = []
    learned: list[npt.NDArray[np.bool_]] = []
    for first in range(0, len(order), _ENCODE_AT_ONCE):
        chosen = [records[i] for i in order[first : first + _ENCODE_AT_ONCE]]
        for ids, mask in _encode(chosen, tokenizer):
            tokens.append(ids)
            learned.append(mask)
    stream = np.concatenate([np.empty(0, np.int32), *tokens])
    count = len(stream) // seq_len
    if count == 0:
        raise InputError(
            f"the data has {len(stream)} tokens, fewer than one sequence of {seq_len}; "
            f"add data or use --seq-len {max(2, len(stream))} or less"
        )
    blocks = stream[: count * seq_len].reshape(count, seq_len)
    masks = np.concatenate(learned)[: count * seq_len].reshape(count, seq_len)
    useful = masks[:, 1:].any(axis=1)
    if not useful.any():
        raise InputError("the data has no answer to learn from within any sequence; see --seq-len")
    return Blocks(blocks[useful], masks[useful])


def _encode(
    records: Sequence[Record], tokenizer: Any
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
    """Per record: ids [tokens] and learned [tokens], with the tokenizer's own begin and end."""
    parts = [segments(record, tokenizer) for record in records]
    texts = [segment.text for row in parts for segment in row]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else iter([])
    begin = _begin_tokens(tokenizer)
    for row in parts:
        ids: list[int] = []
        mask: list[bool] = []
        for segment, piece in zip(row, islice(encoded, len(row)), strict=True):
            ids += piece
            mask += [segment.learned] * len(piece)
        if ids[: len(begin)] != begin:  # a chat template may write it itself
            ids, mask = begin + ids, [False] * len(begin) + mask
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
            mask.append(mask[-1] if mask else False)
        yield np.asarray(ids, np.int32), np.asarray(mask, np.bool_)


def _begin_tokens(tokenizer: Any) -> list[int]:
    """The begin-of-text token if this tokenizer puts one before every text."""
    start = tokenizer.bos_token_id
    if start is None or start == tokenizer.eos_token_id:
        return []
    return [start] if tokenizer("a")["input_ids"][:1] == [start] else []


def split(blocks: Blocks, config: DataConfig) -> tuple[Blocks, Blocks]:
    """(train, held out): the last ``eval_fraction`` of the blocks, at least one if it is not 0.

    Records are shuffled before packing, so the end of the stream is a fair sample, and at most
    one record straddles the cut.
    """
    held = min(len(blocks) - 1, max(1, round(len(blocks) * config.eval_fraction)))
    held = held if config.eval_fraction > 0 else 0
    cut = len(blocks) - held
    return (
        Blocks(blocks.tokens[:cut], blocks.learned[:cut]),
        Blocks(blocks.tokens[cut:], blocks.learned[cut:]),
    )
