"""Attention of transformers' models on the host, for keys and values that a cache left there.

A model looks its attention function up by name. While histories live, that name is one of ours,
which calls the function that the model would have called, and nothing else, unless the cache has
returned keys on the host: then the queries and the mask go there, and the result comes back. What a
cache returns carries a `Ride`, so that it is known whether keys and values reach the function as
they are. Until that was seen, in a layer's first call, its history goes to the device.

Imported only where a cache is asked for: transformers is heavy. Its names: the registries
(``AttentionInterface.register`` and that of masks) and ``set_attn_implementation`` are documented;
``config._attn_implementation``, where the present name is read, has no public form.
"""

from __future__ import annotations

import inspect
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from offload.errors import OffloadError
from offload.internals import tree_map
from offload.prefetch.attention import FEW_QUERIES

OURS = {"sdpa": "offload-sdpa", "eager": "offload-eager"}  # by the name of what is called
_RIDE = "offload_ride"  # an attribute of keys and values
_COMPARED = re.compile(r"_attn_implementation\s*(?:==|!=|in|not in)\s*([^\n]*)")


class Ride(Protocol):
    """What keys and values carry from the cache to the attention function."""

    on_host: bool

    def arrived(self, most_queries: int) -> None:
        """They did, in a layer of which so many tokens a row may attend on the host."""
        ...

    def attended(self, seconds: float) -> None:
        """The call that computes attention to them took so long."""
        ...


def put_on(ride: Ride, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Have keys and values carry it; the same tensors."""
    for x in states:
        setattr(x, _RIDE, ride)
    return states


class Interface:
    """The attention functions of one model; ours between `enter` and `leave`.

    ``why_not``: why that could not be, "" where it could, None before it was tried.
    """

    def __init__(self, model: nn.Module) -> None:
        self.why_not: str | None = None
        self._model: Any = model
        self._before: str | None = None
        self._said = False

    def enter(self) -> None:
        """Put ours in place, where it was not tried since the last `leave`."""
        if self.why_not is None:
            self.why_not = self._replace()

    def say(self, why: str) -> None:
        """Tell the user, once, that all is copied."""
        if not self._said:
            self._said = True
            print(
                f"offload: keys and values of {type(self._model).__name__} are copied to the "
                f"device for every token, since attention on the host cannot be had: {why}",
                file=sys.stderr,
            )

    def _replace(self) -> str:
        why, name = _why_not(self._model)
        if why:
            return why
        _register(name)
        self._model.set_attn_implementation(OURS[name])
        if _names(self._model) != {OURS[name]}:
            self._model.set_attn_implementation(name)
            return "some of its modules keep an attention of their own"
        self._before = name
        return ""

    def leave(self) -> None:
        """Put the model's own back, unless somebody has set another since."""
        before, self._before, self.why_not = self._before, None, None
        if before is not None and _names(self._model) == {OURS[before]}:
            self._model.set_attn_implementation(before)


def _why_not(model: Any) -> tuple[str, str]:
    """Why a model's attention cannot be ours, else "", and what it is now."""
    if not hasattr(model, "set_attn_implementation"):
        return "it does not look up its attention by name", ""
    names = _names(model)
    name = names.pop() if len(names) == 1 else ""
    if name not in OURS:
        told = ", ".join(map(repr, sorted({name, *names} - {""})))
        return f"its attention is {told}, not one of {', '.join(map(repr, OURS))}", name
    for kind in {type(module) for module in model.modules() if _is_theirs(module)}:
        made_in = sys.modules.get(kind.__module__)
        try:
            source = inspect.getsource(made_in) if made_in is not None else ""
        except (OSError, TypeError):
            source = ""
        if "ALL_ATTENTION_FUNCTIONS" not in source:
            return f"{kind.__name__} does not look up its attention by name", name
        if any(f'"{name}"' in found[1] for found in _COMPARED.finditer(source)):
            return f"{kind.__name__} asks whether its attention is called {name!r}", name
    return "", name


def _is_theirs(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx") and hasattr(module, "is_causal")


def _names(model: Any) -> set[str]:
    """The attention functions that a model's configurations name."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    found = (getattr(c, "_attn_implementation", None) for c in configs.values())
    return {str(name) for name in found if name is not None}


def _register(name: str) -> None:
    """Known to transformers for good: names of ours, which mean what the others mean."""
    AttentionInterface.register(OURS[name], partial(attend, name))
    AttentionMaskInterface.register(OURS[name], AttentionMaskInterface()[name])


def attend(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, **rest: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """As the attention function called ``name``: its arguments are transformers' own.

    ``query`` [batch, heads, new, dim], ``key`` and ``value`` [batch, kv heads, tokens, dim];
    returns [batch, new, heads, dim] and the weights, or None.
    """
    function = _original(name, module)
    ride = _ride_of(key, value)
    if ride is not None:
        ride.arrived(_most_queries(name, module, function))
    if ride is None or not ride.on_host:
        began_s = time.perf_counter()
        result: tuple[Tensor, Any] = function(module, query, key, value, attention_mask, **rest)
        if ride is not None:
            ride.attended(time.perf_counter() - began_s)
        return result

    def there(x: Any) -> Any:
        return x.to("cpu") if isinstance(x, Tensor) else x

    told = tree_map(there, (query, attention_mask, rest))
    began_s = time.perf_counter()
    output, weights = function(module, told[0], key, value, told[1], **told[2])
    ride.attended(time.perf_counter() - began_s)
    place = query.device
    return output.to(place), weights.to(place) if isinstance(weights, Tensor) else weights


def _ride_of(key: Tensor, value: Tensor) -> Ride | None:
    """Of keys and values that are as a cache returned them."""
    found: Ride | None = getattr(key, _RIDE, None)
    return found if getattr(value, _RIDE, None) is found else None


def _original(name: str, module: nn.Module) -> Callable[..., Any]:
    """What a module would have called under this name.

    Raises OffloadError where its modeling file has none.
    """
    for kind in type(module).__mro__:
        made_in = sys.modules.get(kind.__module__)
        eager = getattr(made_in, "eager_attention_forward", None)
        functions = getattr(made_in, "ALL_ATTENTION_FUNCTIONS", None)
        if functions is not None and (name != "eager" or eager is not None):
            found: Callable[..., Any] = functions.get_interface(name, eager)
            return found
    everywhere: Callable[..., Any] | None = AttentionInterface().get(name)
    if everywhere is not None:
        return everywhere
    raise OffloadError(
        f"{type(module).__name__} has no attention called {name!r}: give kv_cache(), or "
        "generate(), attention='device'"
    )


def _most_queries(name: str, module: nn.Module, function: Callable[..., Any]) -> int:
    """Tokens a row that may attend on the host.

    What a modeling file has for itself may read weights of the module (sinks), which are the
    device's. Where heads share keys, transformers multiplies keys and values, but for one query in
    "sdpa": that memory is nobody's. What drops out in training draws the device's random numbers.
    """
    owns = next(module.parameters(recurse=False), None) is not None
    owns = owns or next(module.buffers(recurse=False), None) is not None
    if module.training or (owns and function is not AttentionInterface().get(name)):
        return 0
    if getattr(module, "num_key_value_groups", 1) == 1:
        return FEW_QUERIES
    return int(name == "sdpa")
