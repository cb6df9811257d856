"""The prompts of ``offload generate``: JSON lines, every one of which is checked before the work.

A line is ``{"prompt": TEXT}`` or ``{"messages": [{"role", "content"}, ...]}``, with an ``"id"``
(text or a whole number) or without; then its number among the prompts, from 0, is its id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.runconfig import InputError

_NAMED = 5  # bad lines or ids that an error names


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One prompt; ``where`` names its place for errors. ``messages`` None: it is plain text."""

    where: str
    id: str | int
    prompt: str
    messages: tuple[dict[str, str], ...] | None = None


def read_prompts(path: Path) -> list[PromptLine]:
    """All prompts of a file. Raises InputError that names file and line, or the ids given twice."""
    try:
        # Not splitlines: JSON text may hold other ends of line than \n.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; convert it") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check --prompts") from error
    found: list[PromptLine] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_parse(line, f"{path}:{number}", len(found)))
    if not found:
        raise InputError(f"{path} has no prompts; one JSON object a line, with 'prompt'")
    _refuse_twice(found)
    return found


def fingerprint(prompts: Sequence[PromptLine]) -> str:
    """Equal for equal prompts in the same order."""
    digest = hashlib.sha256()
    for line in prompts:
        digest.update(json.dumps([line.id, line.prompt, line.messages]).encode())
    return digest.hexdigest()[:16]


def encode(prompts: Sequence[PromptLine], tokenizer: Any, most: int | None) -> list[list[int]]:
    """Token ids of each prompt, with the tokenizer's own begin; conversations by its template.

    Raises InputError for prompts that are empty, too long, or that the template refuses.
    """
    rows = [_ids(line, tokenizer) for line in prompts]
    empty = [line.where for line, ids in zip(prompts, rows, strict=True) if not ids]
    if empty:
        raise InputError(f"{_several(empty)}: the prompt is empty, and the tokenizer adds no token")
    long = [
        f"{line.where} ({len(ids)} tokens)" for line, ids in zip(prompts, rows, strict=True)
        if most is not None and len(ids) > most
    ]  # fmt: skip
    if long:
        raise InputError(f"{_several(long)}: the model takes {most}; shorten them")
    return rows


def _parse(line: str, where: str, number: int) -> PromptLine:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); one object per line") from error
    if not isinstance(fields, dict):
        raise InputError(f"{where}: a prompt must be an object, not {type(fields).__name__}")
    if ("prompt" in fields) == ("messages" in fields):
        has = ", ".join(sorted(map(str, fields))) or "none"
        raise InputError(f"{where}: needs either 'prompt' or 'messages'; has: {has}")
    name = fields.get("id", number)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise InputError(f"{where}: 'id' must be text or a whole number, not {name!r:.40}")
    if "messages" in fields:
        return PromptLine(where, name, "", _messages(fields["messages"], where))
    if not isinstance(fields["prompt"], str):
        raise InputError(f"{where}: 'prompt' must be text, not {fields['prompt']!r:.40}")
    return PromptLine(where, name, fields["prompt"])


def _messages(messages: Any, where: str) -> tuple[dict[str, str], ...]:
    good = isinstance(messages, list) and messages and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )  # fmt: skip
    if not good:
        raise InputError(f"{where}: 'messages' must be a list of objects with role and content")
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _refuse_twice(prompts: Sequence[PromptLine]) -> None:
    first: dict[str | int, PromptLine] = {}
    twice: list[str] = []
    for line in prompts:
        if line.id in first:
            twice.append(f"{line.id!r} in {first[line.id].where} and {line.where}")
        first.setdefault(line.id, line)
    if twice:
        raise InputError(f"ids given twice: {_several(twice)}; each row needs its own")


def _ids(line: PromptLine, tokenizer: Any) -> list[int]:
    if line.messages is None:
        return [int(token) for token in tokenizer(line.prompt)["input_ids"]]
    if not tokenizer.chat_template:
        raise InputError(
            f"{line.where}: 'messages' need a chat template, and the model's tokenizer has none; "
            "give 'prompt'"
        )
    try:
        text = tokenizer.apply_chat_template(
            list(line.messages), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program from the model's author: any error
        raise InputError(f"{line.where}: the chat template refuses it: {error}") from error
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _several(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
