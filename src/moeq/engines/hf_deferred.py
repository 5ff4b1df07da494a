"""A transformers model with everything but its experts, which are read a layer at a time.

transformers loads the model in its own dtype, as ever; a quantizer that quantizes nothing claims
the experts' tensors (`hf_claim`) and leaves them in their files. `read_experts` reads one layer,
`own_parameters` puts it into the layout of the model's module. What else is stored as codes is
claimed too, and decoded (`hf_stream`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import auto as hf_auto
from transformers.quantizers.base import HfQuantizer

from moeq.checkpoint.encodings import EncodedSpec
from moeq.checkpoint.headers import TensorSpec
from moeq.checkpoint.published import read_specs
from moeq.checkpoint.stream import CHUNK_BYTES, Chunk, chunks_of, stream
from moeq.config import OnlineQuantizationConfig
from moeq.engines.hf_claim import ClaimingConverter
from moeq.engines.hf_routes import Decision, KeptExperts, decide, original_names
from moeq.engines.hf_stream import LayerStream, arrivals_of, pieces_of
from moeq.engines.hf_structure import Target, experts_shape, find_targets, is_experts
from moeq.engines.load import check_folder, for_source, is_saved, model_class
from moeq.errors import ConfigError, ModelError
from moeq.plan import LayerPlan
from moeq.schemes import OnlineQuantScheme

_METHOD = "moeq_deferred"


@dataclass(frozen=True)
class Experts:
    """The experts of one layer, as the checkpoint has them and in one layout.

    Attributes:
        w13: [E, P * I, H], gate, then up (P = 2), or up alone; in the checkpoint's dtype.
        w2: [E, H, I].
        b13: [E, P * I], or None.
        b2: [E, H], or None.
    """

    w13: Tensor
    w2: Tensor
    b13: Tensor | None
    b2: Tensor | None


@dataclass(frozen=True)
class Deferred:
    """A model whose experts are still in their files.

    Attributes:
        model: without the parameters of `experts`.
        experts: name of an experts module -> the layer, and where its weights come from.
        decisions: what a load would decide, for each config that was asked for.
    """

    model: Any
    experts: dict[str, tuple[Target, LayerPlan]]
    decisions: list[Decision]


def load_deferred(
    folder: Path, configs: Sequence[OnlineQuantizationConfig], device: torch.device
) -> Deferred:
    """Load all of a model but its experts, whether a config quantizes them or not.

    Args:
        folder: of a checkpoint that moeq did not write.
        configs: which schemes for which layers; one at least.
        device: where the model goes.

    Raises:
        MoeqError: as a load under one of the configs would, before it reads.
    """
    entries = check_folder(folder)
    if is_saved(entries):
        raise ConfigError(
            f"{folder} is already quantized by moeq, and nothing is left to compare it with",
            hint="take the original checkpoint: its quantized bytes are the same",
        )
    hf_auto.AUTO_QUANTIZER_MAPPING[_METHOD] = _DeferringQuantizer
    deferring = _DeferringConfig(configs, device)
    model = model_class(entries).from_pretrained(
        folder,
        quantization_config=deferring,
        **for_source(folder, entries, {"device_map": str(device)}),
    )
    return Deferred(model.eval(), deferring.experts, deferring.decisions)


class _DeferringConfig:
    """transformers makes the quantizer of it; what that learns is left here."""

    quant_method = _METHOD

    def __init__(self, configs: Sequence[OnlineQuantizationConfig], device: torch.device) -> None:
        self.configs = configs
        self.device = device
        self.decisions: list[Decision] = []
        self.experts: dict[str, tuple[Target, LayerPlan]] = {}

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": _METHOD}


class _DeferringQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizes nothing, and keeps transformers from loading experts."""

    requires_calibration = False
    quantization_config: _DeferringConfig

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        return 0 if param_name in self._claimed else param.element_size()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._model = model
        self._claimed: set[str] = set()
        self._specs = read_specs([Path(file) for file in kwargs["checkpoint_files"]])
        self._streamed = False

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> Any:
        # `model` is passed from transformers 5.20 on
        asked = self.quantization_config
        claims: dict[str, str] = {}
        for config in asked.configs:
            found = find_targets(self._model, config)
            decision = decide(self._model, config, found, self._specs, weight_conversions)
            asked.decisions.append(decision)
        deferring = [*asked.decisions]
        with contextlib.suppress(ModelError):  # some that nobody quantizes cannot be read by us
            every: tuple[list[Target], dict[str, str]] = (_all_experts(self._model), {})
            config = asked.configs[0]
            deferring.append(decide(self._model, config, every, self._specs, weight_conversions))
        for decision in deferring:
            plans = {plan.shape.name: plan for plan in decision.routes.plans}
            experts = {t.shape.name: t for t in decision.targets if t.shape.kind == "moe"}
            asked.experts |= {name: (target, plans[name]) for name, target in experts.items()}
            mine = {f"{name}.{own}" for name, t in experts.items() for own in original_names(t)}
            claims |= {key: p for key, p in decision.routes.claims.items() if p in mine}
        self._claimed.update(claims.values())
        claims |= self._decode_rest(asked.decisions)
        return [ClaimingConverter(claims), *weight_conversions]

    def _decode_rest(self, decisions: list[Decision]) -> dict[str, str]:
        """Claims on what is stored as codes and part of the model from the beginning: what a config
        keeps, unless another one defers it, and linears, which are quantized once they are here."""
        claims: dict[str, str] = {}
        kept: dict[str, TensorSpec] = {}
        merged: dict[str, KeptExperts] = {}
        for decision in decisions:
            routes = decision.routes
            mine = dict(routes.encoded)
            for target in decision.targets:
                weight = f"{target.shape.name}.weight"
                spec = routes.sources[weight][0].spec if target.shape.kind == "linear" else None
                if isinstance(spec, EncodedSpec):
                    mine[weight] = spec
            deferred = self.quantization_config.experts
            experts = [e for e in routes.kept_experts if e.shape.name not in deferred]
            merged |= {e.shape.name: e for e in experts}
            kept |= {p: spec for p, spec in mine.items() if p not in self._claimed}
            wanted = mine.keys() | {p for e in experts for p in e.sources}
            every = routes.claims | routes.plain_claims
            claims |= {k: p for k, p in every.items() if p in wanted - self._claimed}
        routes = dataclasses.replace(
            decisions[0].routes, plans=(), kept_experts=tuple(merged.values())
        )
        decision = dataclasses.replace(decisions[0], targets=[], routes=routes)
        self._stream = LayerStream(self._model, decision, {}, self.quantization_config.device, kept)
        return claims

    def load_parameter(self, parameter: str) -> tuple[dict[str, Tensor], set[str]]:
        """As `ClaimingConverter` asks: of deferred experts nothing is to be set, and nothing is
        missing."""
        if parameter in self._claimed:
            return {}, {parameter}
        if not self._streamed:
            self._streamed = True
            self._stream.prepare()
            self._stream.run(lambda _: None)
        return {parameter: self._stream.tensors.pop(parameter)}, set()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name, (target, _) in self.quantization_config.experts.items():
            for own in original_names(target):
                model.get_submodule(name)._parameters.pop(own)
        del self._model, self._specs, self._stream


def _all_experts(model: nn.Module) -> list[Target]:
    """Every module of transformers' shared kind of experts; which scheme it has does not matter."""
    scheme = OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY
    return [
        Target(module, shape, scheme, up_name)
        for name, module in model.named_modules()
        if is_experts(module)
        for shape, up_name in [experts_shape(name, module)]
    ]


def read_experts(
    target: Target, plan: LayerPlan, device: torch.device, on_bytes: Callable[[int], None]
) -> Experts:
    """One layer from its files; `on_bytes` is called with the bytes of what has been read.

    Raises:
        CheckpointError: a file could not be read, or changed since its header was.
    """
    shape = plan.shape
    e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size
    parts = 2 if shape.is_gated else 1
    weights = {s.spec.dtype for s in plan.sources if not s.is_bias}
    biases = {s.spec.dtype for s in plan.sources if s.is_bias}

    def empty(dtypes: set[torch.dtype], *sizes: int) -> Tensor:
        widest = max(dtypes, key=lambda dtype: dtype.itemsize)
        return torch.empty(sizes, dtype=widest, device=device)

    experts = Experts(
        empty(weights, e, parts * i, h),
        empty(weights, e, h, i),
        empty(biases, e, parts * i) if shape.has_bias else None,
        empty(biases, e, h) if shape.has_bias else None,
    )

    def use(chunk: Chunk, buffer: Tensor) -> None:
        for piece, span in chunk.spans(buffer):
            source = piece.key.source
            w13, w2 = (experts.b13, experts.b2) if source.is_bias else (experts.w13, experts.w2)
            assert w13 is not None and w2 is not None
            for expert, part, arrived, _ in arrivals_of(source, piece.key.expert, span):
                first = i if part == "up" and shape.is_gated else 0
                place = w2[expert] if part == "down" else w13[expert, first : first + i]
                place.copy_(arrived.tensor())

    chunks = chunks_of(pieces_of(target, plan.sources), CHUNK_BYTES)
    stream(chunks, use, workers=torch.get_num_threads() + 1, on_bytes=on_bytes)
    return experts


def own_parameters(module: nn.Module, experts: Experts, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters of a module of transformers' shared kind of experts, in its own layout."""
    any_module: Any = module
    up = "gate_up_proj" if any_module.has_gate else "up_proj"
    interleaved = any_module.has_gate and not any_module.is_concatenated
    own = {up: experts.w13, "down_proj": experts.w2}
    if experts.b13 is not None and experts.b2 is not None:
        own |= {f"{up}_bias": experts.b13, "down_proj_bias": experts.b2}
    for name, tensor in own.items():
        if interleaved and name.startswith(up):  # [gate, up, gate, up, ...] along the rows
            tensor = torch.stack(tensor.chunk(2, 1), 2).flatten(1, 2)
        if any_module.is_transposed and tensor.ndim == 3:
            tensor = tensor.transpose(1, 2).contiguous()
        own[name] = tensor.to(dtype)
    return own
