"""The kinds of PEFT: the random tensors of each, and what they do to a frozen transformer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..base.checks import shown
from ..base.values import Count, Flag, Names, Numbers, Positive, checked_dataclass
from ..errors import ArchitectureError, ConfigError
from .architectures import TARGETS, Layer
from .hooks import Args, Bound, Kwargs, hidden_states
from .signals import Scales
from .sites import Role, Site, projection, zeros

OPENING = 0.5
"""A gate's value at zero weights, and about its mean under unit weights."""
SMALL = 0.1
"""How far from zero a prefix's keys are centred, in units of the frozen ones: larger keys draw
attention off the text, whatever the values are."""

Rows = Mapping[tuple[str, int], Tensor]
"""By site and layer number, (S, *shape without the layer)."""
Products = dict[nn.Module, tuple[Tensor, Tensor, float]]
"""A (S, r, in), B (S, out, r) and f: f * B A is added to a module's weights."""


@dataclass(eq=False, kw_only=True)
class Weights(Bound):
    """PEFT weights of S particles: row r of R belongs to particle r // (R // S)."""

    placed: Sequence[tuple[Kind, Sequence[Layer]]]  # each kind with the layers that carry it
    rows: Rows
    particles: int
    mask: Tensor | None  # (R, T), 1 or True for real tokens
    layer: Layer = field(init=False)  # the one that runs
    length: int = field(init=False)  # T
    seen: dict[str, Tensor] = field(init=False)  # what its modules leave for each other

    def run(self, layer: Layer, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        states = hidden_states(args, kwargs)
        if len(states) % self.particles:
            raise ConfigError(
                f"{len(states)} rows cannot be shared out to {self.particles} particles"
            )
        self.layer, self.length, self.seen = layer, states.shape[1], {}
        if layer.positions:
            self.seen["layer"] = states
        return super().run(layer, forward, args, kwargs)

    def project(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Each kind adds its branch. Relative positions are projected too by some models, once for
        all particles: they are left alone."""
        if self.layer.positions and self.at(module, "query", "key") and x is not self.seen["layer"]:
            return output
        for kind, layers in self.placed:
            if self.layer in layers:
                output = kind.project(self, module, x, output)
        return output

    def attend(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        for kind, layers in self.placed:
            if self.layer in layers:
                key, value = kind.attend(self, key, value)
        return key, value

    def at(self, module: nn.Module, *targets: str) -> bool:
        """Whether the module computes one of these projections of the layer that runs."""
        return any(module is self.layer.projections[target].module for target in targets)

    def row(self, name: str) -> Tensor:
        """A site's tensor for the layer that runs."""
        return self.rows[name, self.layer.number]

    def gate(self, kind: str, x: Tensor) -> Tensor:
        """(S, R/S) sigmoid(w.x + b), averaged over an example's real tokens.

        x is (R, T, in), or (R*T, in) where a model flattens rows and tokens.
        """
        weight, bias = self.row(f"{kind}.gate.weight"), self.row(f"{kind}.gate.bias")
        flat = x.reshape(self.particles, -1, x.shape[-1])
        logits = torch.bmm(flat, weight.to(x)[:, :, None]).float()
        logits = logits.reshape(self.particles, -1, self.length)
        gates = torch.sigmoid(logits + bias.to(logits)[:, None, None])
        if self.mask is None:
            return gates.mean(-1)
        real = self.mask.to(gates.device, gates.dtype).reshape(gates.shape)
        return (gates * real).sum(-1) / real.sum(-1).clamp_min(1)


def rows_of(
    sites: Iterable[Site], weights: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> Rows:
    """The weights `(S, *site.shape)` layer by layer; all but the gates in `dtype`."""
    rows: dict[tuple[str, int], Tensor] = {}
    for site in sites:
        stacked = weights[site.name]
        if dtype is not None and site.role != "gate":
            stacked = stacked.to(dtype)
        # By indexing, every layer would allocate the whole stack's gradient.
        rows |= zip(((site.name, n) for n in site.layers), stacked.unbind(1), strict=True)
    return rows


def add_branch(
    output: Tensor,
    x: Tensor,
    pair: tuple[Tensor, Tensor],
    scale: float,
    gate: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """output + scale * gate * up(activation(down x)), in the dtype of the output.

    Shapes: output (R, T, out), x (R, T, in), the pair down (S, r, in) and up (S, out, r), gate
    (S, R/S). Some architectures flatten rows and tokens, (R*T, d).
    """
    down, up = (side.to(output).mT for side in pair)
    particles = len(down)
    x = x.to(output.dtype).reshape(particles, -1, x.shape[-1])
    hidden = torch.bmm(x, down)
    if activation is not None:
        hidden = activation(hidden)
    if gate is not None:
        examples = hidden.reshape(particles, gate.shape[1], -1, hidden.shape[-1])
        hidden = (examples * gate.to(output)[..., None, None]).reshape(hidden.shape)
    frozen = output.reshape(particles, -1, output.shape[-1])
    return torch.baddbmm(frozen, hidden, up, alpha=scale).reshape(output.shape)


class SitePart(NamedTuple):
    """One layer's part of a site."""

    name: str
    role: Role
    sizes: Mapping[str, int]  # by dim
    unit: Tensor  # 0-d
    anchor: float = 0.0  # sd of the anchor, in units


@checked_dataclass
class Kind(ABC):
    """One kind of PEFT, on all layers or some of them.

    Attributes:
        layers: numbers of the layers that carry it (negative ones count from the last), or None
            for all.
        gated: whether a sigmoid gate for each example, as in UniPELT (Mao et al. 2022), scales it.
    """

    layers: Numbers | None = field(default=None, kw_only=True)
    gated: Flag = field(default=False, kw_only=True)

    name: ClassVar[str]

    @property
    def boost(self) -> float:
        """The factor that makes up for a half-open gate."""
        return 1 / OPENING if self.gated else 1.0

    def chosen(self, layers: Sequence[Layer]) -> tuple[Layer, ...]:
        """Those of the transformer's layers that carry this kind."""
        if self.layers is None:
            return tuple(layers)
        return tuple(layers[n] for n in sorted({range(len(layers))[n] for n in self.layers}))

    def sites(self, layers: Sequence[Layer], scales: Scales) -> list[Site]:
        """The random tensors of this kind on these layers, stacked along the dimension "layer"."""
        first, *others = (self.parts(layer, scales) for layer in layers)
        return [_stacked(layers, parts) for parts in zip(first, *others, strict=True)]

    @abstractmethod
    def parts(self, layer: Layer, scales: Scales) -> list[SitePart]:
        """The random tensors of one layer."""

    def gate_parts(self, rms: Tensor, width: int) -> list[SitePart]:
        """Those of a gate that reads such an input, if there is one."""
        weight = SitePart(f"{self.name}.gate.weight", "gate", {"in": width}, _unit(rms, width))
        bias = SitePart(f"{self.name}.gate.bias", "gate", {}, torch.ones_like(rms))
        return [weight, bias] if self.gated else []

    def products(self, rows: Rows, layer: Layer) -> Products:
        """What it adds to the weights of linear modules; {} if it does anything else."""
        return {}

    def project(self, weights: Weights, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """What a linear module of the layer that runs returns for x."""
        if self.gated and weights.at(module, "query"):
            weights.seen[self.name] = weights.gate(self.name, x)
        return output

    def attend(self, weights: Weights, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (R, heads, T, head dim) of the layer that runs."""
        return key, value


@checked_dataclass
class LoRA(Kind):
    """W x becomes W x + alpha/rank * B A x on the targeted projections (Hu et al. 2022).

    Sites, for each target: "lora.<target>.A" (layer, rank, in) and "lora.<target>.B"
    (layer, out, rank). If gated, "lora.gate.weight" and "lora.gate.bias": one gate for each layer,
    which reads the attention's input.

    Attributes:
        targets: out of query, key, value, output, ffn_in, ffn_gate (gated feed-forward blocks
            only) and ffn_out.
        rank: r, the rows of A and columns of B.
        alpha: the branch is scaled by alpha / rank.

    >>> LoRA(("query",), rank=4).alpha
    16.0
    """

    targets: Names = ("query", "value")
    rank: Count = 8
    alpha: Positive = 16.0

    name: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(
                f"lora: targets={shown(self.targets)} must be one or more, each once, of {TARGETS}"
            )

    @property
    def factor(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def parts(self, layer: Layer, scales: Scales) -> list[SitePart]:
        parts: list[SitePart] = []
        for target in self.targets:
            p, name, rank = layer.projections[target], f"lora.{target}", self.rank
            unit = _unit(scales.rms(p, "inputs"), p.inputs)
            parts.append(SitePart(f"{name}.A", "input", {"rank": rank, "in": p.inputs}, unit, 1.0))
            # A x has RMS 1 in each of r dimensions, so B A x has sd(B) * sqrt(r).
            unit = self.boost * scales.rms(p, "outputs") * rank**0.5 / self.alpha
            parts.append(SitePart(f"{name}.B", "output", {"out": p.outputs, "rank": rank}, unit))
        query = layer.projections["query"]
        return parts + self.gate_parts(scales.rms(query, "inputs"), query.inputs)

    def products(self, rows: Rows, layer: Layer) -> Products:
        modules = {layer.projections[target].module for target in self.targets}
        return {m: (*self._product(rows, layer, m), self.factor) for m in modules}

    def _product(self, rows: Rows, layer: Layer, module: nn.Module) -> tuple[Tensor, Tensor]:
        """A and B of all targets in this module, which may be fused."""
        parts = {t: p for t in self.targets if (p := layer.projections[t]).module is module}
        downs = [rows[f"lora.{target}.A", layer.number] for target in parts]
        ups = [p.whole(rows[f"lora.{target}.B", layer.number]) for target, p in parts.items()]
        return torch.cat(downs, 1), torch.cat(ups, 2)

    def project(self, weights: Weights, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        super().project(weights, module, x, output)
        if not weights.at(module, *self.targets):
            return output
        pair = self._product(weights.rows, weights.layer, module)
        gate = weights.seen["lora"] if self.gated else None
        return add_branch(output, x, pair, self.factor, gate)


@checked_dataclass
class Adapter(Kind):
    """A bottleneck beside or behind the feed-forward block, before the residual sum and the norm.

    With x the input and h = FFN(x) the output of the block, h becomes

        parallel:   h + scale * up(act(down x))     (He et al. 2022; the paper's choice)
        sequential: h + scale * up(act(down h))     (Houlsby et al. 2019 with scale 1)

    Sites: "adapter.down" (layer, bottleneck, in), "adapter.up" (layer, out, bottleneck); no
    biases. If gated, "adapter.gate.weight" and "adapter.gate.bias", reading what `down` reads.

    Attributes:
        size: width of the bottleneck.
        scale: the factor in the formulas.
        placement: "parallel" or "sequential".
        activation: any name that transformers knows ("relu", "gelu", "silu", "tanh", ...).

    >>> Adapter(size=16, placement="sequential", scale=1.0).activation
    'relu'
    """

    size: Count = 8
    scale: Positive = 4.0
    placement: Literal["parallel", "sequential"] = "parallel"
    activation: str = "relu"

    name: ClassVar[str] = "adapter"

    def parts(self, layer: Layer, scales: Scales) -> list[SitePart]:
        first, last = layer.projections["ffn_in"], layer.projections["ffn_out"]
        out = scales.rms(last, "outputs")
        rms, width = out, last.outputs
        if self.placement == "parallel":
            rms, width = scales.rms(first, "inputs"), first.inputs
        inner = {"bottleneck": self.size, "in": width}
        outer = {"out": last.outputs, "bottleneck": self.size}
        reach = self.scale * self.size**0.5 * _rms_after(ACT2FN[self.activation])
        return [
            SitePart("adapter.down", "input", inner, _unit(rms, width), 1.0),
            SitePart("adapter.up", "output", outer, self.boost * out / reach),
            *self.gate_parts(rms, width),
        ]

    def project(self, weights: Weights, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        parallel = self.placement == "parallel"
        if parallel and weights.at(module, "ffn_in"):
            weights.seen["ffn"] = x
        if not weights.at(module, "ffn_out"):
            return output
        x = weights.seen.pop("ffn") if parallel else output
        gate = weights.gate("adapter", x) if self.gated else None
        pair = weights.row("adapter.down"), weights.row("adapter.up")
        return add_branch(output, x, pair, self.scale, gate, ACT2FN[self.activation])


@checked_dataclass
class Prefix(Kind):
    """softmax(q [P_k; K]^T) [P_v; V]: every token also attends to `length` free positions (Li and
    Liang 2021).

    Sites: "prefix.key" (layer, position, in), which says how much a token reads of a position, and
    "prefix.value" (layer, out, position), what it reads there: the two sides of an adapter whose
    activation is the softmax (He et al. 2022). `in` and `out` are key/value heads x head dim. If
    gated, "prefix.gate.weight" and "prefix.gate.bias" read the attention's input and scale P_k and
    P_v.

    The prefix enters after rotation and normalisation of the keys, so tokens keep their positions,
    and is visible to every token, under causal and sliding-window masks too.

    Attributes:
        length: number of positions.

    >>> Prefix(length=10).gated
    False
    """

    length: Count = 30

    name: ClassVar[str] = "prefix"

    def parts(self, layer: Layer, scales: Scales) -> list[SitePart]:
        query, key, value = (layer.projections[name] for name in ("query", "key", "value"))
        keys, values = (self.boost * scales.rms(layer, name) for name in ("keys", "values"))
        inner = {"position": self.length, "in": key.outputs}
        outer = {"out": value.outputs, "position": self.length}
        return [
            SitePart("prefix.key", "input", inner, keys, SMALL),
            SitePart("prefix.value", "output", outer, values),
            *self.gate_parts(scales.rms(query, "inputs"), query.inputs),
        ]

    def attend(self, weights: Weights, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        gate = weights.seen["prefix"] if self.gated else None
        keys, values = weights.row("prefix.key"), weights.row("prefix.value").mT
        return _join(keys, key, gate), _join(values, value, gate)


def _join(prefix: Tensor, frozen: Tensor, gate: Tensor | None) -> Tensor:
    """A prefix (S, P, out), scaled by a gate (S, R/S), in front of keys or values (R, heads, T,
    head dim)."""
    count, heads, _, size = frozen.shape
    particles, length, _ = prefix.shape
    front = prefix.to(frozen).reshape(particles, 1, length, heads, size).transpose(2, 3)
    front = front.expand(-1, count // particles, -1, -1, -1)
    if gate is not None:
        front = front * gate.to(frozen)[..., None, None, None]
    return torch.cat([front.reshape(count, heads, length, size), frozen], 2)


def _stacked(layers: Sequence[Layer], parts: Sequence[SitePart]) -> Site:
    name, role, sizes, _, anchor = parts[0]
    shapes = sorted({(*part.sizes.values(),) for part in parts})
    if len(shapes) > 1:
        raise ArchitectureError(
            f"{name}: its shape differs between layers, {shapes}; choose layers of the same width, "
            "with layers=(...)"
        )
    shape = len(layers), *shapes[0]
    unit = torch.stack([part.unit for part in parts]).reshape(-1, *[1] * len(sizes))
    fixed = anchor * projection(name, shape).to(unit) * unit if anchor else None
    numbers = tuple(layer.number for layer in layers)
    return Site(name, shape, ("layer", *sizes), unit, zeros(shape, unit), numbers, fixed, role)


def _unit(rms: Tensor, width: int) -> Tensor:
    """The sd of weights whose products with inputs of this RMS and width have RMS 1."""
    return 1 / (rms * width**0.5)


def _rms_after(activation: Callable[[Tensor], Tensor]) -> float:
    """RMS of activation(z), z ~ N(0, 1), on 4,095 quantiles."""
    z = torch.special.ndtri(torch.linspace(0, 1, 4097, dtype=torch.float64)[1:-1]).float()
    with torch.no_grad():
        return float(activation(z).square().mean().sqrt().clamp_min(1e-3))
