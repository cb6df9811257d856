"""What generating with a model larger than memory costs: shape, rates, workload, policy; data only.

All bytes are of a whole model unless a name says otherwise; the time model that joins them is in
search.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from offload.tiers.spec import Compute, Machine


@dataclass(frozen=True, slots=True)
class Experts:
    """Of the layers' weights, those that not every token is multiplied with; none by default.

    ``layer_bytes`` and ``layer_elements``: of a layer's experts together; ``count`` of them, of
    which each token is routed to ``chosen``. Routing is taken to be balanced and each token's
    choice to be independent of the others'.
    """

    count: int = 1
    chosen: int = 1
    layer_bytes: int = 0
    layer_elements: int = 0

    def touched(self, tokens: float) -> float:
        """The share of the experts that so many tokens are expected to need."""
        return float(1.0 - (1.0 - self.chosen / self.count) ** tokens)

    def tokens_each(self, tokens: float) -> float:
        """Tokens that each of those sees."""
        return tokens * self.chosen / (self.count * self.touched(tokens))


@dataclass(frozen=True, slots=True)
class Weights:
    """Stored bytes and, of those that are multiplied with, their number (elements).

    ``head``: what follows the layers. ``lookup_bytes``: tables of which a few rows are read where
    they lie. ``unit_bytes``: the largest module's weights, all of which its product needs at once;
    ``largest_bytes``: the largest tensor. ``fixed_bytes``: held beside weights whatever is away:
    buffers, and what codes are widened in.
    A layer's ``experts`` are part of it, stacked in one module: all are read, whichever are chosen.
    """

    layers: int
    layer_bytes: int
    layer_elements: int
    head_bytes: int
    head_elements: int
    lookup_bytes: int
    unit_bytes: int
    experts: Experts = Experts()
    largest_bytes: int = 0
    fixed_bytes: int = 0

    def touched_elements(self, tokens: float) -> float:
        """Of a layer, that so many tokens are expected to be multiplied with."""
        always = self.layer_elements - self.experts.layer_elements
        return always + self.experts.layer_elements * self.experts.touched(tokens)

    def layer_s(self, tokens: float, compute: Compute) -> float:
        """Seconds of a layer's products. What experts are spared is in the rates: see `routed`."""
        return self.touched_elements(tokens) * compute.weight_s(tokens)

    def routed(self, compute: Compute) -> Compute:
        """Rates of plain products as those of these layers, whose experts see fewer tokens each.

        Rates measured with such layers are so already.
        """
        if not self.experts.layer_elements:
            return compute
        always = self.layer_elements - self.experts.layer_elements
        points = []
        for tokens, each_s in compute.product_s:
            touched = self.touched_elements(tokens)
            expert_s = compute.weight_s(self.experts.tokens_each(tokens))
            layer_s = always * each_s + (touched - always) * expert_s
            points.append((tokens, layer_s / touched))
        return replace(compute, product_s=tuple(points))

    @property
    def pass_bytes(self) -> int:
        """What one pass needs, each weight once."""
        return self.layers * self.layer_bytes + self.head_bytes

    @property
    def total_bytes(self) -> int:
        """All that is stored."""
        return self.pass_bytes + self.lookup_bytes


@dataclass(frozen=True, slots=True)
class RowCost:
    """Bytes that a row takes beside the weights, by token; named as in the block engine.

    ``position_bytes``: keys and values of one token in all layers; ``token_bytes``: activations of
    one token in the pass that runs; ``waiting_bytes``: in a pass that waits for its turn;
    ``row_bytes``: whatever the length (logits). ``attention_width``: of the queries of all layers
    together: scores against one earlier token take twice so many multiplications.
    ``result_bytes``: the largest result of one token, for which a recorded pass has room once more.
    """

    position_bytes: int
    token_bytes: int
    waiting_bytes: int
    row_bytes: int
    attention_width: int
    result_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """A model as the search sees it."""

    weights: Weights
    rows: RowCost


@dataclass(frozen=True, slots=True)
class Workload:
    """So many prompts of so many tokens, each continued by ``new_tokens``.

    Raises ValueError where one of them is not positive.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True, slots=True)
class Rates:
    """The disk and copies (``machine``), the host's processor and the device's, if there is one."""

    machine: Machine
    host: Compute
    device: Compute | None = None


@dataclass(frozen=True, slots=True)
class Shares:
    """Where something lies: parts of it, which sum to 1."""

    device: float
    host: float
    disk: float


@dataclass(frozen=True, slots=True)
class Times:
    """Predicted seconds. ``prefill_s`` and ``pass_s`` (one token of every row) are of one block;
    ``first_s``: of the first prompts, whose pass is recorded and reads on demand.

    ``bound_s``: of the whole workload were each lane to run at its lone rate, all in parallel;
    ``binding``: the lane that then takes longest.
    """

    prefill_s: float
    pass_s: float
    total_s: float
    bound_s: float
    binding: str
    first_s: float


@dataclass(frozen=True, slots=True)
class Policy:
    """How to generate: rows at once, where everything lies, and what that is predicted to take.

    ``held_bytes``: at most, by tier. ``cpu_attention``: attention to keys and values that are not
    on the device is computed on the host.
    """

    batch: int
    micro_batches: int
    weights: Shares
    kv: Shares
    hidden: Shares
    cpu_attention: bool
    times: Times
    held_bytes: dict[str, float]
    tokens_per_s: float

    @property
    def rows(self) -> int:
        """Rows at once."""
        return self.batch * self.micro_batches
