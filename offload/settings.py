"""Settings as frozen dataclasses with one level of sections: from YAML and flags, and to YAML.

One rule for every command: what a flag says, else what the ``--config`` file says, else the
default. Every value has a key path (``optimizer.lr``) that errors name; its flag is the path's last
part (``--lr``). Sizes stay as the user wrote them (``"8GiB"`` or bytes), so that the YAML written
beside a run reads like the command.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from offload.errors import OffloadError
from offload.tiers.spec import parse_size

T = TypeVar("T")


class InputError(OffloadError):
    """What the user gave cannot work. The message is one line: the place, then the remedy."""


def whole(default: int, least: int) -> int:
    """A field for a whole number of at least ``least``."""
    number: int = field(default=default, metadata={"least": least})
    return number


def real(default: float, least: float, below: float = math.inf) -> float:
    """A field for a number of at least ``least`` and below ``below``."""
    number: float = field(default=default, metadata={"least": least, "below": below})
    return number


def sections(owner: type) -> dict[str, type]:
    """The fields of a settings class that are settings themselves."""
    hints = get_type_hints(owner)
    return {f.name: hints[f.name] for f in _fields(owner) if is_dataclass(hints[f.name])}


def key_paths(owner: type) -> list[str]:
    """Every key a configuration may hold, e.g. ``model`` and ``optimizer.lr``."""
    inner = sections(owner)
    top = [f.name for f in _fields(owner) if f.name not in inner]
    return top + [f"{name}.{f.name}" for name, kind in inner.items() for f in _fields(kind)]


def default_of(owner: type, key: str) -> Any:
    """What a key is when nobody says; ``MISSING`` where somebody must."""
    section, _, leaf = key.rpartition(".")
    found = {f.name: f for f in _fields(sections(owner)[section] if section else owner)}
    return found[leaf].default


def flags_of(owner: type) -> dict[str, str]:
    """The key path of each flag, by the flag's name in Python (``seq_len``).

    A flag is the last part of its key, except where that reads badly: ``data.path`` is ``--data``.
    """
    found = {path.rsplit(".", 1)[-1]: path for path in key_paths(owner)}
    if "data.path" in found.values():
        found["data"] = found.pop("path")
    return found


def build(owner: type[T], values: Mapping[str, Any]) -> T:
    """The settings of flat ``{key path: value}``; keys left out take their defaults.

    Raises InputError for an unknown key (with the nearest known one), a key that has no default
    and is missing, a wrong type or a value out of range.
    """
    known = key_paths(owner)
    for key in values:
        if key not in known:
            raise InputError(_unknown_key(key, known))
    inner = sections(owner)
    made = {name: kind(**_own(kind, f"{name}.", values)) for name, kind in inner.items()}
    return owner(**_own(owner, "", values, leave=inner), **made)


def _own(
    kind: type, prefix: str, values: Mapping[str, Any], leave: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """The fields of one class that are given, each of its type."""
    found = {}
    for f in _fields(kind):
        key = prefix + f.name
        if leave and f.name in leave:
            continue
        if key in values:
            found[f.name] = convert(kind, f.name, values[key], key)
        elif f.default is MISSING and f.default_factory is MISSING:
            flag = f"--{f.name.replace('_', '-')}"
            raise InputError(f"{key} is missing: give {flag}, or '{key}' in the --config file")
    return found


def read_yaml(path: Path, *owners: type) -> dict[str, Any]:
    """The flat ``{key path: value}`` of a YAML file with the sections of these settings classes.

    Raises InputError if it is not one.
    """
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise InputError(f"{path} is not valid YAML: {line}; correct that place") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(
            f"{path} must hold keys such as 'model:' and 'data:', not a {type(tree).__name__}"
        )
    inner = {name: kind for owner in owners for name, kind in sections(owner).items()}
    return _flat(tree, inner, path)


def _flat(tree: Mapping[Any, Any], inner: Mapping[str, type], path: Path) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in inner:
            flat[str(key)] = value
        elif isinstance(value, dict):
            flat |= {f"{key}.{leaf}": found for leaf, found in value.items()}
        elif value is not None:
            first = _fields(inner[key])[0].name
            raise InputError(f"{path}: {key} must hold keys such as {key}.{first}")
    return flat


def to_yaml(config: Any) -> str:
    """The whole configuration as YAML; ``read_yaml`` and ``build`` give it back equal."""
    import yaml

    text: str = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    return text


def absolute(path: str) -> str:
    """The same place, whatever directory a later command starts in."""
    return str(Path(path).expanduser().absolute())


def absolute_model(model: str) -> str:
    """A model directory's absolute path; hub names stay what they are."""
    return absolute(model) if Path(model).expanduser().is_dir() else model


def convert(owner: type, leaf: str, value: Any, key: str) -> Any:
    """``value`` as the type of ``owner.leaf``, inside its range, or InputError."""
    hint = get_type_hints(owner)[leaf]
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    if int in kinds and str in kinds:
        return _size(value, key)
    kind = kinds[0]
    if get_origin(kind) is tuple:
        return _texts(value, key)
    if kind is float and not isinstance(value, bool):
        value = _as_float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{key} must be {_NAMES[kind]}, not {value!r}")
    limits = {f.name: f.metadata for f in _fields(owner)}[leaf]
    least, below = limits.get("least"), limits.get("below", math.inf)
    if least is not None and not least <= value < below:
        upper = "" if below == math.inf else f" and below {below:g}"
        raise InputError(f"{key} must be at least {least:g}{upper}, not {value!r}")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _fields(owner: type) -> tuple[Field[Any], ...]:
    return fields(owner)


def _size(value: Any, key: str) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InputError(f"{key} must be a size such as 8GiB, not {value!r}")
    try:
        parse_size(value)
    except ValueError as error:
        raise InputError(f"{key}: {error}") from error
    return value


def _texts(value: Any, key: str) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
        raise InputError(f"{key} must be text, or a list of texts, not {value!r}")
    return tuple(found)


def _as_float(value: Any) -> Any:
    # YAML 1.1 reads 1e-4 (no dot) as text; people mean the number.
    if isinstance(value, int | str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _unknown_key(key: str, known: list[str]) -> str:
    leaves = {path.rsplit(".", 1)[-1]: path for path in known}
    leaf = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not near:
        near = [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
    hint = f"did you mean '{near[0]}'?" if near else "known keys: " + ", ".join(known)
    return f"unknown configuration key '{key}'; {hint}"


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is not as it was, for an error: ``lr 0.1 (now 0.2), seed 1 (now 2)``, or ""."""
    return ", ".join(
        f"{key} {before.get(key)!r} (now {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    )
