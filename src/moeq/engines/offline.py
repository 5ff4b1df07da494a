"""A checkpoint quantized into another, without ever holding the model.

The same decisions and the same stream as a load; only that the storage into which experts are
quantized is a file, mapped. What is not quantized is copied as it is stored. So the folder is the
one that `moeq.save` writes after `moeq.load`, or the same weights in compressed-tensors' format,
and the memory that it takes is the window of a load.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moeq.checkpoint.cache import identity
from moeq.checkpoint.folder import checkpoint_files
from moeq.checkpoint.headers import TensorSpec
from moeq.checkpoint.hub import resolve_model
from moeq.checkpoint.published import read_specs
from moeq.checkpoint.writer import Finished, map_shard, new_folder
from moeq.config import OnlineQuantizationConfig
from moeq.engines.formats import FORMATS, Entry, Format, joined
from moeq.engines.hf_plans import load_plan
from moeq.engines.hf_routes import Decision, quantized_names
from moeq.engines.hf_stream import LayerStream, create_method
from moeq.engines.hf_structure import Target
from moeq.engines.load import check_folder, empty_model, is_saved
from moeq.engines.planning import decision_for
from moeq.engines.save import copy_beside
from moeq.errors import ConfigError
from moeq.methods.parameters import parameter
from moeq.plan import LayerPlan, LoadPlan

SHARD_BYTES = 5 * 10**9

_CPU = torch.device("cpu")

FileFormat = Literal["moeq", "compressed-tensors"]


def quantize_checkpoint(
    model: str | Path,
    config: OnlineQuantizationConfig,
    out: str | Path,
    *,
    file_format: FileFormat = "moeq",
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> LoadPlan:
    """Write what `moeq.save` would write of a model loaded under `config`.

    Args:
        model: a folder, or an id on the Hugging Face hub.
        config: which scheme for which layer.
        out: a new folder; it appears once it is whole.
        resume: leave files that are whole beside `out` if this is interrupted, and go on from those
            that an interrupted run with the same source and config left.
        file_format: moeq's, or that of other programs, see `moeq.engines.formats`.
        progress: called with bytes read so far and bytes to read.
        shard_bytes: of a weight file, about; a layer is never cut.

    Raises:
        MoeqError: as a load does; or the folder exists, or its disk is too small; or the format
            cannot hold the model.
    """
    folder = resolve_model(model)
    entries = check_folder(folder)
    if is_saved(entries):
        raise ConfigError(
            f"{folder} is already quantized by moeq", hint="start from the unquantized checkpoint"
        )
    specs = read_specs(checkpoint_files(folder))
    empty = empty_model(folder)
    decision = decision_for(empty, specs, config)
    plan = load_plan(empty, decision, specs, LayerStream(empty, decision, {}, _CPU))
    plans = {layer.shape.name: layer for layer in decision.routes.plans}
    form = FORMATS[file_format]
    form.check(plans)
    quantization = form.config(decision.config, decision.targets, plans)
    read = 0

    def advance(nbytes: int) -> None:
        nonlocal read
        read += nbytes
        if progress is not None:
            progress(read, plan.checkpoint_bytes)

    methods = {
        target.shape.name: create_method(decision.config, target, empty.dtype)
        for target in decision.targets
    }
    shards = _shards(decision, specs, shard_bytes)
    recipe = {"quantization": quantization, "format": file_format, "shard_bytes": shard_bytes}
    keep = identity(folder, recipe) if resume else None
    with new_folder(Path(out), plan.final_bytes, keep=keep) as staging:
        weight_map: dict[str, str] = {}
        finished = Finished(staging)
        for index, (targets, kept) in enumerate(shards):
            name = f"{form.stem}-{index + 1:05}-of-{len(shards):05}.safetensors"
            if len(shards) == 1:
                name = form.single
            shard = _Shard(targets, kept, form, plans)
            weight_map.update(dict.fromkeys(shard.layout, name))
            if name in finished:
                advance(shard.source_bytes)
                continue
            tensors = shard.map(staging / name)
            stream = LayerStream(empty, _part(decision, targets), methods, _CPU, kept)
            stream.tensors.update({spec: tensors[spec] for spec in kept})
            stream.run(advance)
            shard.finish()
            if resume:
                finished.add(name)
        finished.forget()
        if len(shards) > 1:
            total = sum((staging / name).stat().st_size for name in set(weight_map.values()))
            index_entries = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write(staging / form.index, index_entries)
        _write(staging / "config.json", entries | {"quantization_config": quantization})
        if (folder / "generation_config.json").is_file():
            shutil.copyfile(folder / "generation_config.json", staging / "generation_config.json")
        copy_beside(folder, staging)
    return plan


class _Shard:
    """One file: its tensors become the parameters of layers, while those are quantized.

    Attributes:
        layout: dtype and shape of every tensor in it.
        source_bytes: that are read for it.
    """

    def __init__(
        self,
        targets: list[Target],
        kept: dict[str, TensorSpec],
        form: Format,
        plans: Mapping[str, LayerPlan],
    ) -> None:
        self._form = form
        self._plans = plans
        self._metas = {
            (target, own): parameter(target.module, own)
            for target in targets
            for own in quantized_names(target.module)
        }
        self._parts: dict[tuple[Target, str], list[str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.layout: dict[str, Entry] = {}
        for (target, own), meta in self._metas.items():
            plan = plans[target.shape.name]
            entries = form.tensors(plan, own, meta)
            self._parts[target, own] = list(entries)
            self.layout |= entries
        for target in targets:
            self._shapes |= form.shapes(plans[target.shape.name])
        self.layout |= dict.fromkeys(self._shapes, (torch.int64, (2,)))
        self.layout |= {spec.name: (spec.dtype, spec.shape) for spec in kept.values()}
        layers = {target.shape.name for target in targets}
        self.source_bytes = sum(plans[name].source_bytes for name in layers)
        self.source_bytes += sum(spec.nbytes for spec in kept.values())

    def map(self, path: Path) -> dict[str, Tensor]:
        """Make the file; its tensors by name."""
        tensors = map_shard(path, self.layout)
        for name, shape in self._shapes.items():
            tensors[name].copy_(torch.tensor(shape))
        for (target, own), meta in self._metas.items():
            mine = [tensors[name] for name in self._parts[target, own]]
            whole = joined(mine, meta.dtype, tuple(meta.shape))
            setattr(target.module, own, nn.Parameter(whole, requires_grad=False))
        return tensors

    def finish(self) -> None:
        """Give the layers their parameters without memory back."""
        for (target, own), meta in self._metas.items():
            plan = self._plans[target.shape.name]
            self._form.finish(plan, own, parameter(target.module, own))
            setattr(target.module, own, meta)


def _shards(
    decision: Decision, specs: Mapping[str, TensorSpec], limit: int
) -> list[tuple[list[Target], dict[str, TensorSpec]]]:
    """Layers and kept tensors, file by file."""
    plans = {plan.shape.name: plan for plan in decision.routes.plans}
    read = {source.spec.name for plan in plans.values() for source in plan.sources}
    shards: list[tuple[list[Target], dict[str, TensorSpec]]] = [([], {})]
    size = 0
    items: list[tuple[int, Target | TensorSpec]] = [
        (plans[target.shape.name].final_bytes, target) for target in decision.targets
    ]
    left = read | set(decision.routes.dropped)
    items += [(spec.held_bytes, spec) for spec in specs.values() if spec.name not in left]
    for nbytes, item in items:
        if size and size + nbytes > limit:
            shards.append(([], {}))
            size = 0
        size += nbytes
        targets, kept = shards[-1]
        if isinstance(item, TensorSpec):
            kept[item.name] = item
        else:
            targets.append(item)
    return shards


def _part(decision: Decision, targets: list[Target]) -> Decision:
    names = {target.shape.name for target in targets}
    plans = tuple(plan for plan in decision.routes.plans if plan.shape.name in names)
    routes = dataclasses.replace(decision.routes, plans=plans, kept_experts=())  # copied one by one
    return dataclasses.replace(decision, targets=targets, routes=routes)


def _write(path: Path, entries: Any) -> None:
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
