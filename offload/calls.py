"""What a forward pass is called with, as far as plans differ by it; and whether its code is known.

[Note: known code]
Checking that nobody wrote to a chunk before it is dropped costs a pass over its bytes. That is
needed wherever code of the user's may have run while the chunk was in memory. It has not, for a
chunk that came and goes within one forward pass, where all modules are torch's, transformers' and
ours, not patched, without hooks or modes of the user's: none of those write to their weights but an
Embedding with ``max_norm``. Nor need a chunk that is ordered and put in place within such a pass be
compared with what its home showed meanwhile. What was in memory when the pass began or ends is
checked as ever, and so is all that is dropped outside of it. Not seen, and taken for harmless: a
function that the user registered with transformers as an attention and that writes to weights;
another thread that does so while the pass runs, which no check could order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from offload.hook import has_user_hooks
from offload.internals import calls_are_watched, tree_leaves

_KNOWN = ("torch.", "transformers.", "offload.")
_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a model or of a part of it.

    ``part``: the submodule's name, "" for the model itself. ``goes_on``: it is given a cache that
    is not empty. ``tokens``: elements of its main input. ``extent``: elements of all of them,
    a cache's length included.
    """

    part: str = ""
    goes_on: bool = False
    tokens: int = 0
    extent: int = 0

    @property
    def form(self) -> str:
        """Calls of one form share a plan: sizes are rounded up to a power of two."""
        phase = "decode" if self.goes_on else "prefill"
        size = 1 << max(self.tokens - 1, 0).bit_length()
        return f"{self.part + ' ' if self.part else ''}{phase} {size}"


def call_of(part: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """What a module is being called with."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    extent = sum(x.numel() for x in tensors)
    named = (kwargs[name] for name in _INPUTS if isinstance(kwargs.get(name), Tensor))
    main = next(named, tensors[0] if tensors else None)
    cached = max((_length(x) for x in (*args, *kwargs.values())), default=0)
    if main is not None and main.dim():
        extent += cached * main.shape[0]
    return Call(part, cached > 0, 0 if main is None else main.numel(), extent)


def _length(value: object) -> int:
    """Tokens in a transformers cache; 0 for anything else."""
    ask = getattr(value, "get_seq_length", None)
    return int(ask()) if callable(ask) else 0


def entries(model: nn.Module) -> dict[str, nn.Module]:
    """Submodules that users call by themselves (an encoder), by name.

    Those that have a list of repeated blocks somewhere below them, and are not in such a list.
    """
    found: dict[str, nn.Module] = {}
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    for name in lists:
        parents = name.split(".")
        for depth in range(1, len(parents)):
            above = ".".join(parents[:depth])
            module = model.get_submodule(above)
            if isinstance(module, nn.ModuleList):
                break
            found[above] = module
    return found


def is_known(model: nn.Module) -> bool:
    """Whether a forward pass of this model runs no code of the user's: see the note above."""
    return not has_user_hooks(model) and is_known_but_for_hooks(model)


def is_known_but_for_hooks(model: nn.Module) -> bool:
    """The same of a model that is known to have no hooks of the user's: asked in every pass."""
    if calls_are_watched():
        return False
    kinds = set()
    for module in model.modules():
        own = module.__dict__
        if "forward" in own or own.get("max_norm") is not None:
            return False
        kinds.add(type(module))
    return all(map(_is_known_class, kinds))


def _is_known_class(kind: type[nn.Module]) -> bool:
    sources = kind.__module__, kind.forward.__module__, kind.__call__.__module__
    quiet = getattr(kind, "max_norm", None) is None
    return quiet and all(f"{source}.".startswith(_KNOWN) for source in sources)
