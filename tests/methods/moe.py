"""Small MoE layers in the checkpoint's dtype, and ways of loading them through a method."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeq.config import OnlineQuantizationConfig
from moeq.methods.base import OnlineMoEMethodBase
from moeq.schemes import OnlineQuantScheme


@dataclass(frozen=True)
class Checkpoint:
    """Weights [N, K] and biases [N] by (expert, projection)."""

    num_experts: int
    hidden: int
    intermediate: int
    is_gated: bool
    weights: dict[tuple[int, str], Tensor]
    biases: dict[tuple[int, str], Tensor]

    def arrivals(self) -> list[tuple[int, str, bool]]:
        """(expert, projection, is_bias) of every tensor."""
        return [(*key, False) for key in self.weights] + [(*key, True) for key in self.biases]


def checkpoint(
    num_experts: int = 3,
    hidden: int = 140,
    intermediate: int = 150,
    *,
    is_gated: bool = True,
    has_bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Checkpoint:
    """Random experts. Gate, up and down differ in size, so that no two can be taken for another."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden)}
    shapes["down"] = (hidden, intermediate)
    if not is_gated:
        del shapes["gate"]
    size = {"gate": 0.1, "up": 0.05, "down": 0.2}
    keys = list(itertools.product(range(num_experts), shapes))
    weights = {
        (e, p): (size[p] * torch.randn(shapes[p], generator=generator)).to(dtype) for e, p in keys
    }
    biases = {
        (e, p): torch.randn(shapes[p][0], generator=generator).to(dtype)
        for e, p in keys
        if has_bias
    }
    return Checkpoint(num_experts, hidden, intermediate, is_gated, weights, biases)


def created(
    model: Checkpoint,
    scheme: OnlineQuantScheme | str,
    *,
    local_experts: Sequence[int] | None = None,
    local_channels: range | None = None,
    backend: str = "reference",
) -> tuple[OnlineMoEMethodBase, nn.Module]:
    """A method and its layer, with memory taken and nothing loaded."""
    config = OnlineQuantizationConfig(moe=scheme, backend=backend)
    method = config.get_quant_method("experts", "moe")
    assert isinstance(method, OnlineMoEMethodBase)
    layer = nn.Module()
    method.create_weights(
        layer,
        num_experts=model.num_experts,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        is_gated=model.is_gated,
        has_bias=bool(model.biases),
        dtype=next(iter(model.weights.values())).dtype,
        local_experts=local_experts,
        local_channels=local_channels,
    )
    method.materialize(layer, torch.device("cpu"))
    return method, layer


def arrive(
    method: OnlineMoEMethodBase,
    layer: nn.Module,
    model: Checkpoint,
    arrivals: Iterable[tuple[int, str, bool]] | None = None,
) -> None:
    """Hand over tensors in the given order, in a buffer that is used again, as the reader does."""
    buffer = torch.empty(0)
    for expert, projection, is_bias in model.arrivals() if arrivals is None else arrivals:
        source = (model.biases if is_bias else model.weights)[expert, projection]
        buffer.fill_(float("nan"))
        buffer = source.clone()
        name = f"experts.{expert}.{projection}_proj.{'bias' if is_bias else 'weight'}"
        load = method.load_bias if is_bias else method.load_expert
        load(layer, expert, projection, buffer, name)  # type: ignore[operator]


def loaded(
    model: Checkpoint,
    scheme: OnlineQuantScheme | str,
    *,
    local_experts: Sequence[int] | None = None,
    backend: str = "reference",
    activation: str = "silu",
) -> tuple[OnlineMoEMethodBase, nn.Module]:
    """A layer that is ready to apply."""
    method, layer = created(model, scheme, local_experts=local_experts, backend=backend)
    arrive(method, layer, model)
    method.process_weights_after_loading(layer, activation=activation)
    return method, layer


def stored(layer: nn.Module) -> dict[str, bytes]:
    """The bytes of everything that a layer holds."""
    return {
        name: value.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, value in layer._parameters.items()
        if value is not None
    }


def routing(
    tokens: int, num_experts: int, k: int = 2, *, dtype: torch.dtype = torch.int64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """topk_ids [T, k], distinct per token, and topk_weights [T, k]."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, num_experts, generator=generator)
    weights, ids = scores.topk(k)
    return ids.to(dtype), weights
