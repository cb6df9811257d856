"""Find out, on tiny tensors, what an optimizer does: before it is given anything real.

The user's class runs with the user's flags and group values (through `groups.shadow`) on
tensors of about a thousand elements that mirror the real parameters: same group, same dtype,
same order of dimensions. Three questions are answered by experiment, not by class name:

* does it treat every tensor for itself (else CoupledOptimizerError)?
* does it treat every element for itself, bit for bit (then tensors may be cut)?
* which state does it keep, of which shapes?
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offload.errors import OffloadError
from offload.optim.groups import GroupLedger, coupled, own_copy, raw_step, same, shadow
from offload.optim.pieces import align_elements

_STEPS = 3
_COPIES = 2  # tiny tensors per kind of parameter, so that two of one kind meet in a step
# Distinct primes per number of dimensions: a dimension, or product of adjacent ones, of a state
# tensor tells which dimensions of the parameter it stands for.
_TINY = {0: (), 1: (1021,), 2: (31, 37), 3: (7, 11, 13), 4: (3, 5, 7, 11)}
_TINY_MANY = (2, 3, 5, 7, 11, 13, 17, 19)


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of optimizer state as it will be after the first step.

    ``non_negative``: none of its elements was below zero when the optimizer was tried.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    non_negative: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements, without alignment."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ParamProfile:
    """What the optimizer does with one parameter.

    ``state``: tensors to keep somewhere. ``unmanaged``: names of scalars (python numbers,
    0-dim tensors) that stay with the optimizer. ``element_names``: the state that has one
    element per element of the parameter.
    """

    elementwise: bool
    state: tuple[StateTensor, ...]
    unmanaged: tuple[str, ...]
    element_names: frozenset[str]


@dataclass(frozen=True, slots=True, eq=False)
class OptimizerProfile:
    """What an optimizer does. ``calls_closure``: its step runs a closure once, if given one."""

    params: Mapping[nn.Parameter, ParamProfile]
    calls_closure: bool

    @property
    def elementwise(self) -> bool:
        """Whether every parameter may be cut into pieces."""
        return all(p.elementwise for p in self.params.values())

    @property
    def state_bytes(self) -> int:
        """Bytes of all state tensors that will be kept elsewhere."""
        return sum(t.size_bytes for p in self.params.values() for t in p.state)


@dataclass(frozen=True, slots=True)
class _Kind:
    """Parameters that the optimizer treats alike, as far as can be told."""

    group: int
    shape: tuple[int, ...]  # of the tiny stand-in
    dtype: torch.dtype


@dataclass(slots=True, eq=False)
class _Sample:
    """A tiny stand-in, or a piece of one, with its gradient for each step."""

    group: int
    weight: Tensor
    grads: list[Tensor]
    state: dict[str, Any] = field(default_factory=dict)

    def clone(self) -> _Sample:
        """A copy with memory of its own."""
        state = {k: own_copy(v) for k, v in self.state.items()}
        return _Sample(self.group, self.weight.clone(), self.grads, state)


def profile(optimizer: Optimizer) -> OptimizerProfile:
    """Learn what ``optimizer`` does, without changing it, its state or the random state.

    Raises CoupledOptimizerError when it cannot be run chunk by chunk, OffloadError when it
    cannot be tried.
    """
    calls_closure = _check_signature(optimizer)
    _check_attributes(optimizer)
    kinds: dict[_Kind, list[nn.Parameter]] = {}
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p.numel():  # some optimizers divide by the number of elements
                kinds.setdefault(_Kind(i, tiny_shape(p.shape), p.dtype), []).append(p)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = _samples(optimizer, kinds)
        calls_closure = _check_empty_step(optimizer, calls_closure)
        outcomes = _check_uncoupled(optimizer, samples)
        nothing = ParamProfile(True, (), (), frozenset())
        known = {p: nothing for group in optimizer.param_groups for p in group["params"]}
        for n, (kind, params) in enumerate(kinds.items()):
            index = n * _COPIES
            cuts = _is_elementwise(optimizer, samples[index], outcomes[index])
            for p in params:
                known[p] = _forecast(p, kind, outcomes[index].state, optimizer.state.get(p), cuts)
    return OptimizerProfile(known, calls_closure)


def tiny_shape(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape of about a thousand elements, dimensions distinct and in the same order of size.

    Dimensions of 1 stay: broadcasting and factoring depend on them.
    """
    dims = tuple(shape)
    large = sorted((i for i, d in enumerate(dims) if d > 1), key=lambda i: (dims[i], i))
    tiny = list(dims)
    for i, size in zip(large, _TINY.get(len(large), _TINY_MANY[: len(large)]), strict=True):
        tiny[i] = size
    return tuple(tiny)


def _check_signature(optimizer: Optimizer) -> bool:
    """Whether step takes a closure; refuse one that cannot do without."""
    parameters = list(inspect.signature(raw_step(type(optimizer))).parameters.values())[1:]
    if not parameters or parameters[0].kind is parameters[0].KEYWORD_ONLY:
        return False
    first = parameters[0]
    if first.kind is first.POSITIONAL_OR_KEYWORD and first.default is first.empty:
        raise coupled(optimizer, f"its step() needs a {first.name} that runs the model again")
    return first.kind is not first.VAR_KEYWORD


def _check_attributes(optimizer: Optimizer) -> None:
    """Refuse an optimizer that reaches parameters by other ways than its groups."""
    params = {id(p) for g in optimizer.param_groups for p in g["params"]}
    for name, value in optimizer.__dict__.items():
        if name in ("param_groups", "state"):
            continue
        values = value if isinstance(value, list | tuple | set) else (value,)
        if any(id(v) in params for v in values):
            raise coupled(optimizer, f"it keeps parameters of its own in the attribute {name!r}")
    strays = [k for k in optimizer.state if id(k) not in params]
    if strays:
        raise coupled(optimizer, f"it keeps state that belongs to no parameter: {strays[0]!r}")


def _samples(optimizer: Optimizer, kinds: Mapping[_Kind, list[nn.Parameter]]) -> list[_Sample]:
    """``_COPIES`` stand-ins of each kind, in order, with weights and gradients of all sizes."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for kind, params in kinds.items():
        tensors = [
            torch.randn(kind.shape, generator=generator)
            * 10.0 ** torch.empty(kind.shape).uniform_(-4, 1, generator=generator)
            for _ in range((1 + _STEPS) * _COPIES)
        ]
        tensors = [t.to(kind.dtype) for t in tensors]
        for n in range(_COPIES):
            weight, *grads = tensors[n::_COPIES]
            state = _tiny_state(params[0], kind, optimizer.state.get(params[0], {}))
            samples.append(_Sample(kind.group, weight, grads, state))
    return samples


def _tiny_state(param: nn.Parameter, kind: _Kind, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Existing state (Adagrad's constructor makes it) in tiny: filled with its first element."""
    sizes = _products(tuple(param.shape), kind.shape)
    tiny: dict[str, Any] = {}
    for name, value in entries.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            shape = _mapped(tuple(value.shape), tuple(param.shape), kind.shape, sizes)
            first = value[(0,) * value.dim()].item()
            tiny[name] = torch.full(shape, first, dtype=value.dtype)
        else:
            tiny[name] = own_copy(value)
    return tiny


def _products(source: tuple[int, ...], target: tuple[int, ...]) -> dict[int, int]:
    """From each product of adjacent dimensions of one shape to that of the other."""
    ends = range(len(source) + 1)
    spans = sorted(((i, j) for i in ends for j in ends if i < j), key=lambda s: s[0] - s[1])
    sizes = {math.prod(source[i:j]): math.prod(target[i:j]) for i, j in spans}
    return sizes | {1: 1}


def _mapped(
    shape: tuple[int, ...],
    source: tuple[int, ...],
    target: tuple[int, ...],
    sizes: Mapping[int, int],
) -> tuple[int, ...]:
    """``shape``, seen beside a ``source`` parameter, as it would be beside a ``target`` one."""
    if shape == source:
        return target
    if len(shape) == len(source) and all(a in (1, b) for a, b in zip(shape, source, strict=True)):
        return tuple(1 if a == 1 else t for a, t in zip(shape, target, strict=True))
    return tuple(sizes.get(d, d) for d in shape)


def _trial(
    optimizer: Optimizer, samples: list[_Sample], subsets: list[list[int]]
) -> tuple[list[_Sample], list[dict[str, Any]]]:
    """Samples and group values after some steps, each taken subset by subset from a like start."""
    samples = [s.clone() for s in samples]
    groups = [
        {**{k: own_copy(v) for k, v in g.items() if k != "params"}, "params": []}
        for g in optimizer.param_groups
    ]
    base = shadow(optimizer, groups, {})
    for name, value in base.__dict__.items():
        if isinstance(value, Tensor):
            base.__dict__[name] = value.detach().clone()
        elif name not in ("param_groups", "state") and isinstance(value, list | dict | set):
            base.__dict__[name] = copy.copy(value)
    for n in range(_STEPS):
        ledger = GroupLedger(base)
        for subset in subsets:
            _trial_subset(ledger, [samples[i] for i in subset], n)
        ledger.commit()
    values = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in groups]
    return samples, values


def _trial_subset(ledger: GroupLedger, samples: list[_Sample], n: int) -> None:
    params: dict[int, list[Tensor]] = {}
    for s in samples:
        # A Parameter, as for real; it shares the memory of the sample's weight.
        stand_in = nn.Parameter(s.weight, requires_grad=s.weight.is_floating_point())
        stand_in.grad = s.grads[n].clone()
        params.setdefault(s.group, []).append(stand_in)
    tensors = {id(s): t for s, t in zip(samples, _in_order(params, samples), strict=True)}
    twin = ledger.open(params, {tensors[id(s)]: s.state for s in samples if s.state})
    raw_step(type(twin))(twin)
    state = twin.state
    ledger.close(twin, params)
    for s in samples:
        s.weight = tensors[id(s)].detach()
        s.state = dict(state.pop(tensors[id(s)], {}))
    if state:
        raise coupled(twin, "it keeps state that belongs to no parameter")


def _in_order(params: Mapping[int, list[Tensor]], samples: list[_Sample]) -> Iterator[Tensor]:
    """The stand-ins in the order of their samples."""
    queues = {group: iter(tensors) for group, tensors in params.items()}
    return (next(queues[s.group]) for s in samples)


def _check_empty_step(optimizer: Optimizer, takes_closure: bool) -> bool:
    """Step without parameters, as torch will do last; tell whether it runs a closure."""
    calls = 0

    def closure() -> None:
        nonlocal calls
        calls += 1

    base = GroupLedger(optimizer).open({}, {})
    try:
        raw_step(type(base))(base, *([closure] if takes_closure else []))
    except Exception as error:
        raise coupled(optimizer, f"a step without parameters fails: {error!r}") from error
    if calls > 1:
        raise coupled(optimizer, "its step() runs the closure more than once")
    return calls == 1


def _check_uncoupled(optimizer: Optimizer, samples: list[_Sample]) -> list[_Sample]:
    """The samples stepped together; raise when stepping them one by one gives anything else."""
    everything = list(range(len(samples)))
    try:
        together, values = _trial(optimizer, samples, [everything])
    except OffloadError:
        raise
    except Exception as error:
        raise OffloadError(
            f"{type(optimizer).__name__} could not be tried on small CPU tensors of its "
            f"parameters' kinds: {error!r}. Check its flags (capturable needs an accelerator)."
        ) from error
    apart, values_apart = _trial(optimizer, samples, [[i] for i in everything])
    if not same(values, values_apart):
        raise coupled(optimizer, "its group values depend on which parameters it steps together")
    for a, b in zip(together, apart, strict=True):
        if not (same(a.weight, b.weight) and same(a.state, b.state)):
            raise coupled(
                optimizer,
                f"a tensor of shape {tuple(a.weight.shape)} comes out differently when it is "
                "stepped together with others",
            )
    return together


def _is_elementwise(optimizer: Optimizer, sample: _Sample, whole: _Sample) -> bool:
    """Whether stepping flat pieces gives the bits of stepping the whole tensor."""
    numel = sample.weight.numel()
    if sample.weight.dim() == 0:
        return True
    step = align_elements(sample.weight.dtype)
    sizes = (1, 2, 1, 3, 5)
    ends = [0]
    while ends[-1] < numel:
        ends.append(min(numel, ends[-1] + step * sizes[len(ends) % len(sizes)]))
    cuts = list(pairwise(ends))
    pieces = [_piece_of(sample, a, b) for a, b in cuts]
    try:
        after, _ = _trial(optimizer, pieces, [list(range(len(pieces)))])
    except Exception:
        return False  # it wants the tensor's real shape
    if not same(torch.cat([p.weight for p in after]), whole.weight.reshape(-1)):
        return False
    return all(p.state.keys() == whole.state.keys() for p in after) and all(
        _joins(whole, name, after) for name in whole.state
    )


def _piece_of(sample: _Sample, start: int, stop: int) -> _Sample:
    def part(value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape == sample.weight.shape:
            return value.reshape(-1)[start:stop].clone()
        return value

    state = {name: part(value) for name, value in sample.state.items()}
    grads = [part(g) for g in sample.grads]
    return _Sample(sample.group, part(sample.weight), grads, state)


def _joins(whole: _Sample, name: str, pieces: list[_Sample]) -> bool:
    """Whether the pieces' state is the whole's: cut like the tensor, or a scalar like it."""
    value = whole.state[name]
    parts = [p.state[name] for p in pieces]
    if isinstance(value, Tensor) and value.shape == whole.weight.shape:
        tensors = [p for p in parts if isinstance(p, Tensor) and p.dim() == 1]
        return len(tensors) == len(parts) and same(torch.cat(tensors), value.reshape(-1))
    return all(same(p, value) for p in parts)


def _forecast(
    param: nn.Parameter,
    kind: _Kind,
    tiny: Mapping[str, Any],
    existing: Mapping[str, Any] | None,
    elementwise: bool,
) -> ParamProfile:
    """The state of a real parameter, from that of its stand-in and what exists already."""
    sizes = _products(kind.shape, tuple(param.shape))
    state: list[StateTensor] = []
    unmanaged: list[str] = []
    element_names: set[str] = set()
    for name, value in tiny.items():
        real = (existing or {}).get(name, value)
        if not isinstance(value, Tensor) or value.dim() == 0 or param.dim() == 0:
            unmanaged.append(name)
            continue
        shape = (
            _mapped(tuple(value.shape), kind.shape, tuple(param.shape), sizes)
            if real is value
            else tuple(real.shape)
        )
        non_negative = not value.is_complex() and bool((value >= 0).all())
        state.append(StateTensor(name, shape, value.dtype, non_negative))
        if shape == tuple(param.shape):
            element_names.add(name)
    return ParamProfile(elementwise, tuple(state), tuple(unmanaged), frozenset(element_names))
