"""A checkpoint quantized into another, without ever holding the model.

The same decisions and the same stream as a load; only that the storage into which experts are
quantized is a file, mapped. What is not quantized is copied as it is stored. So the folder is the
one that `moeq.save` writes after `moeq.load`, and the memory that it takes is the window of a load.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeq.checkpoint.headers import (
    QUANTIZED_INDEX,
    QUANTIZED_SINGLE,
    VARIANT,
    TensorSpec,
    checkpoint_files,
    read_headers,
)
from moeq.checkpoint.hub import resolve_model
from moeq.checkpoint.writer import map_shard, new_folder
from moeq.config import OnlineQuantizationConfig
from moeq.engines.hf_routes import Decision, quantized_names
from moeq.engines.hf_stream import LayerStream, create_method, load_plan
from moeq.engines.hf_structure import Target
from moeq.engines.load import check_folder, empty_model
from moeq.engines.planning import decision_for
from moeq.engines.save import copy_beside
from moeq.errors import ConfigError
from moeq.methods.base import parameter
from moeq.plan import LoadPlan

SHARD_BYTES = 5 * 10**9

_CPU = torch.device("cpu")

_Entry = tuple[torch.dtype, tuple[int, ...]]


def quantize_checkpoint(
    model: str | Path,
    config: OnlineQuantizationConfig,
    out: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> LoadPlan:
    """Write what `moeq.save` would write of a model loaded under `config`.

    Args:
        model: a folder, or an id on the Hugging Face hub.
        config: which scheme for which layer.
        out: a new folder; it appears once it is whole.
        progress: called with bytes read so far and bytes to read.
        shard_bytes: of a weight file, about; a layer is never cut.

    Raises:
        MoeqError: as a load does; or the folder exists, or its disk is too small.
    """
    folder = resolve_model(model)
    entries = check_folder(folder)
    if entries.get("quantization_config") is not None:
        raise ConfigError(
            f"{folder} is already quantized by moeq", hint="start from the unquantized checkpoint"
        )
    specs = read_headers(checkpoint_files(folder))
    empty = empty_model(folder)
    decision = decision_for(empty, specs, config)
    plan = load_plan(empty, decision, specs, LayerStream(empty, decision, {}, _CPU))
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
    with new_folder(Path(out), plan.final_bytes) as staging:
        weight_map: dict[str, str] = {}
        for index, (targets, kept) in enumerate(shards):
            name = QUANTIZED_SINGLE
            if len(shards) > 1:
                name = f"model.{VARIANT}-{index + 1:05}-of-{len(shards):05}.safetensors"
            ours = {
                (t, p): parameter(t.module, p) for t in targets for p in quantized_names(t.module)
            }
            layout: dict[str, _Entry] = {
                f"{t.shape.name}.{p}": (meta.dtype, tuple(meta.shape))
                for (t, p), meta in ours.items()
            }
            layout |= {spec.name: (spec.dtype, spec.shape) for spec in kept.values()}
            tensors = map_shard(staging / name, layout)
            for target, own in ours:
                place = nn.Parameter(tensors[f"{target.shape.name}.{own}"], requires_grad=False)
                setattr(target.module, own, place)
            stream = LayerStream(empty, _part(decision, targets), methods, _CPU, kept)
            stream.tensors.update({spec: tensors[spec] for spec in kept})
            stream.run(advance)
            for (target, own), meta in ours.items():
                setattr(target.module, own, meta)
            weight_map.update(dict.fromkeys(layout, name))
        if len(shards) > 1:
            total = sum((staging / name).stat().st_size for name in set(weight_map.values()))
            index_entries = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write(staging / QUANTIZED_INDEX, index_entries)
        _write(
            staging / "config.json", entries | {"quantization_config": decision.config.to_dict()}
        )
        if (folder / "generation_config.json").is_file():
            shutil.copyfile(folder / "generation_config.json", staging / "generation_config.json")
        copy_beside(folder, staging)
    return plan


_Shard = tuple[list[Target], dict[str, TensorSpec]]


def _shards(decision: Decision, specs: Mapping[str, TensorSpec], limit: int) -> list[_Shard]:
    """Layers and kept tensors, file by file."""
    plans = {plan.shape.name: plan for plan in decision.routes.plans}
    read = {source.spec.name for plan in plans.values() for source in plan.sources}
    shards: list[_Shard] = [([], {})]
    size = 0
    items: list[tuple[int, Target | TensorSpec]] = [
        (plans[target.shape.name].final_bytes, target) for target in decision.targets
    ]
    items += [(spec.nbytes, spec) for spec in specs.values() if spec.name not in read]
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
    routes = dataclasses.replace(decision.routes, plans=plans)
    return dataclasses.replace(decision, targets=targets, routes=routes)


def _write(path: Path, entries: Any) -> None:
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
