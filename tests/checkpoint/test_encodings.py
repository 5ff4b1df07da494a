"""Pairs of codes and scales as one tensor, against transformers' own decoding."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moeq.checkpoint import ring, stream
from moeq.checkpoint.encodings import EncodedSpec
from moeq.checkpoint.headers import TensorSpec, read_headers
from moeq.checkpoint.published import logical, read_specs
from moeq.checkpoint.stream import Piece, chunks_of, matrix, read_piece, rows, whole
from moeq.errors import CheckpointError, NonFiniteError

MXFP4 = {"quant_method": "mxfp4"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}

Tensors = dict[str, Tensor]


def mxfp4(experts: int = 3, rows: int = 5, blocks: int = 3) -> Tensors:
    torch.manual_seed(0)
    shape = experts, rows, blocks
    return {
        "w_blocks": torch.randint(0, 256, (*shape, 16), dtype=torch.uint8),
        "w_scales": torch.randint(0, 253, shape, dtype=torch.uint8),
        "norm": torch.ones(7, dtype=torch.bfloat16),
    }


def fp8(n: int = 300, k: int = 200) -> Tensors:
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    codes[codes & 127 == 127] = 0  # NaN
    return {
        "w": codes.view(torch.float8_e4m3fn),
        "w_scale_inv": torch.rand(-(n // -128), -(k // -128)),
        "norm": torch.ones(7, dtype=torch.bfloat16),
    }


def decoded(tensors: Tensors) -> Tensor:
    """`w`, in the orientation in which it is stored."""
    if "w_blocks" in tensors:
        found: Tensor = convert_moe_packed_tensors(tensors["w_blocks"], tensors["w_scales"])
        return found.mT
    n, k = tensors["w"].shape
    grid = tensors["w_scale_inv"].float()
    wide = grid.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return (tensors["w"].float() * wide).to(torch.bfloat16)


def written(folder: Path, quantization: Any, *shards: Tensors) -> dict[str, TensorSpec]:
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    files = [folder / f"{index}.safetensors" for index in range(len(shards))]
    for file, tensors in zip(files, shards, strict=True):
        save_file(tensors, file)
    return read_specs(files)


def bits(tensor: Tensor) -> list[int]:
    found: list[int] = tensor.contiguous().view(torch.int16).tolist()
    return found


def test_every_fp4_code_under_every_scale(tmp_path: Path) -> None:
    """But 255, which is NaN; transformers and we overflow to infinity alike."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 16)
    tensors = {"w_blocks": codes[None], "w_scales": scales[None]}
    spec = written(tmp_path, MXFP4, tensors)["w"]
    assert bits(read_piece(whole(spec, None))) == bits(decoded(tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_fp8_code(dtype: torch.dtype, tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scales = torch.tensor([[1.0, 0.007], [3e-5, 0.3]]).to(dtype)
    tensors = {"w": codes.view(torch.float8_e4m3fn), "w_scale_inv": scales}
    expected = Fp8Dequantize(None)._dequantize_one(*tensors.values(), torch.bfloat16)
    spec = written(tmp_path, FP8, tensors)["w"]
    found = read_piece(whole(spec, None))
    assert torch.equal(found.isnan(), expected.isnan())
    assert bits(found.nan_to_num()) == bits(expected.nan_to_num())


def test_what_the_unquantized_model_has(tmp_path: Path) -> None:
    specs = written(tmp_path, MXFP4, mxfp4())
    assert set(specs) == {"w", "norm"}
    spec = specs["w"]
    assert (spec.shape, spec.dtype) == ((3, 96, 5), torch.bfloat16)
    assert spec.nbytes == 3 * 5 * 3 * 17
    assert spec.held_bytes == 2 * 3 * 5 * 96
    assert spec.keys == ("w_blocks", "w_scales")


@dataclass(frozen=True)
class _Cut:
    """A piece, and the part of the decoded tensor that it is."""

    name: str
    tensors: Callable[[], Tensors]
    piece: Callable[[TensorSpec], Piece]
    part: Any


CUTS = [
    _Cut("all of fp4", mxfp4, lambda spec: whole(spec, 0), ...),
    _Cut("one expert", mxfp4, lambda spec: matrix(spec, 0, 1), 1),
    _Cut("experts", mxfp4, lambda spec: rows(spec, 0, 1, 2), slice(1, 3)),
    _Cut(
        "rows of an expert", mxfp4, lambda spec: Piece(spec, 0, 48 * 7, (2, 96)), (1, slice(2, 4))
    ),
    _Cut("all of fp8", fp8, lambda spec: whole(spec, 0), ...),
    _Cut("within a block", fp8, lambda spec: rows(spec, 0, 130, 7), slice(130, 137)),
    _Cut("over two blocks", fp8, lambda spec: rows(spec, 0, 100, 180), slice(100, 280)),
    _Cut("the cut-off block", fp8, lambda spec: rows(spec, 0, 256, 44), slice(256, 300)),
]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.name)
def test_a_piece(cut: _Cut, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded some rows at a time, with the scales in the same file or in another."""
    monkeypatch.setattr("moeq.checkpoint.encodings._CHUNK", {"cpu": 1000})
    tensors = cut.tensors()
    parts = [tensors]
    if shards == 2:
        scales = next(name for name in tensors if "scale" in name)
        parts = [{n: t for n, t in tensors.items() if n != scales}, {scales: tensors[scales]}]
    specs = written(tmp_path, MXFP4 if cut.tensors is mxfp4 else FP8, *parts)
    piece = cut.piece(specs["w"])
    assert bits(read_piece(piece)) == bits(decoded(tensors)[cut.part])


def _streamed(chunks: list[stream.Chunk], counted: list[int]) -> dict[Any, Tensor]:
    found: dict[Any, Tensor] = {}
    lock = threading.Lock()

    def use(chunk: stream.Chunk, buffer: Tensor) -> None:
        with lock:
            found.update({p.key: span.tensor().clone() for p, span in chunk.spans(buffer)})

    stream.stream(chunks, use, workers=2, on_bytes=counted.append)
    return found


@pytest.mark.parametrize("source", [mxfp4, fp8])
def test_pieces_side_by_side(source: Callable[[], Tensors], tmp_path: Path) -> None:
    """Whatever the chunks, every byte comes once, and every number."""
    tensors = source()
    specs = written(tmp_path, MXFP4 if source is mxfp4 else FP8, tensors)
    spec = specs["w"]
    count = spec.stored_shape[0]
    pieces = [rows(spec, first, first, 1) for first in range(count)]
    pieces.append(whole(specs["norm"], "norm"))
    stored = [(p.offset, p.nbytes, *p.scales) for p in pieces]
    for limit in (1, 2000, 1 << 20):
        chunks = chunks_of(pieces, limit)
        assert len(chunks) == {1: count + 1}.get(limit, len(chunks))
        assert all(c.decoded_bytes <= limit for c in chunks if len(c.pieces) > 1)
        counted: list[int] = []
        found = _streamed(chunks, counted)
        assert torch.equal(found.pop("norm"), tensors["norm"])
        together = torch.cat([found[first] for first in range(count)])
        assert bits(together) == bits(decoded(tensors))
        assert sum(counted) == sum(nbytes + scales for _, nbytes, _, scales in stored)
    if source is mxfp4:
        assert sum(counted) == sum(t.nbytes for t in tensors.values())


class _Passed:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize("part", [16, 48, 1 << 20])
def test_through_the_ring(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a GPU: several threads fill a buffer, scales too."""
    monkeypatch.setattr(ring, "_PART", part)
    tensors = fp8()
    spec = written(tmp_path, FP8, tensors)["w"]
    chunks = chunks_of([rows(spec, first, first, 50) for first in range(0, 300, 50)], 40_000)
    found = {}

    def use(chunk: stream.Chunk, buffer: Tensor) -> _Passed:
        there = buffer[: chunk.buffer_bytes].clone()
        found.update({p.key: span.tensor() for p, span in chunk.spans(there)})
        return _Passed()

    largest = max(chunk.buffer_bytes for chunk in chunks)
    ring.feed(ring.Ring(2, largest, pin=False), chunks, use, readers=3)
    assert bits(torch.cat([found[first] for first in sorted(found)])) == bits(decoded(tensors))


@pytest.mark.parametrize(
    ("quantization", "tensors", "bad", "where"),
    [
        (MXFP4, mxfp4(), 255, (2, 3, 1)),
        (FP8, fp8(), float("nan"), (2, 1)),
        (FP8, fp8(), float("inf"), (1, 0)),
    ],
    ids=["e8m0", "nan", "inf"],
)
def test_a_scale_that_is_no_number(
    quantization: Any, tensors: Tensors, bad: float, where: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    name = next(name for name in tensors if "scale" in name)
    tensors[name][where] = bad
    spec = written(tmp_path, quantization, tensors)["w"]
    good, last = rows(spec, 0, 0, 1), rows(spec, 0, where[0], 1)
    if name == "w_scale_inv":
        last = rows(spec, 0, 128 * where[0] + 3, 2)
    read_piece(good)
    with pytest.raises(NonFiniteError) as caught:
        read_piece(last)
    for word in ("0.safetensors", name, str(list(where))):
        assert word in str(caught.value)


def _without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def _with(**changed: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update(changed)


FAULTS: Sequence[tuple[Any, Callable[[], Tensors], Callable[[Tensors], None], list[str]]] = [
    (MXFP4, mxfp4, _without("w_scales"), ["'w_blocks'", "'w_scales'", "not in the checkpoint"]),
    (MXFP4, mxfp4, _without("w_blocks"), ["no tensor", "mxfp4"]),
    (
        MXFP4,
        mxfp4,
        _with(v_scales=torch.zeros(1, dtype=torch.uint8)),
        ["'v_scales'", "codes that are not there"],
    ),
    (
        MXFP4,
        mxfp4,
        _with(w_scales=torch.zeros(3, 5, 2, dtype=torch.uint8)),
        ["'w_scales'", "[3, 5, 2]", "[3, 5, 3]"],
    ),
    (MXFP4, mxfp4, _with(w_scales=torch.zeros(3, 5, 3)), ["'w_scales'", "float32", "uint8"]),
    (MXFP4, mxfp4, _with(w_blocks=torch.zeros(3, 5, 3, 8, dtype=torch.uint8)), ["[3, 5, 3, 8]"]),
    (MXFP4, mxfp4, _with(w_blocks=torch.zeros(3, 5, 3, 16)), ["'w_blocks'", "float32"]),
    (MXFP4, mxfp4, _with(w=torch.zeros(3, 96, 5)), ["'w_blocks'", "'w'", "there too"]),
    (FP8, fp8, _without("w_scale_inv"), ["'w'", "'w_scale_inv'", "not in the checkpoint"]),
    (FP8, fp8, _without("w"), ["no tensor", "fp8"]),
    (FP8, fp8, _with(v_scale_inv=torch.ones(1)), ["'v_scale_inv'", "codes that are not there"]),
    (FP8, fp8, _with(w_scale_inv=torch.ones(2, 2)), ["'w_scale_inv'", "[2, 2]", "[3, 2]"]),
    (FP8, fp8, _with(w_scale_inv=torch.ones(3, 2).to(torch.int8)), ["'w_scale_inv'", "int8"]),
    (FP8, fp8, _with(w=torch.ones(2, 3, 4).to(torch.float8_e4m3fn)), ["'w'", "[2, 3, 4]"]),
    (FP8, fp8, _with(w=torch.ones(300, 200).to(torch.float8_e5m2)), ["'w'", "float8_e5m2"]),
    (FP8, fp8, _with(w=torch.ones(0, 200).to(torch.float8_e4m3fn)), ["'w'", "[0, 200]"]),
]


@pytest.mark.parametrize(("quantization", "source", "change", "says"), FAULTS)
def test_a_damaged_pair(
    quantization: Any,
    source: Callable[[], Tensors],
    change: Callable[[Tensors], None],
    says: list[str],
    tmp_path: Path,
) -> None:
    tensors = source()
    change(tensors)
    with pytest.raises(CheckpointError) as caught:
        written(tmp_path, quantization, tensors)
    for word in says:
        assert word in str(caught.value)
    assert ("0.safetensors" in str(caught.value)) != ("no tensor" in says)


@pytest.mark.parametrize(
    "quantization",
    [
        None,
        "mxfp4",
        {"quant_method": "gptq"},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": [128, 0]},
        {"quant_method": "fp8", "weight_block_size": [128, True]},
    ],
    ids=str,
)
def test_other_checkpoints_stay_as_they_are(quantization: Any, tmp_path: Path) -> None:
    specs = written(tmp_path, quantization, fp8())
    assert specs == read_headers([tmp_path / "0.safetensors"])
    assert not any(isinstance(spec, EncodedSpec) for spec in logical(specs, quantization).values())


def test_scales_that_cannot_be_read(tmp_path: Path) -> None:
    spec = written(tmp_path, FP8, fp8())["w"]
    (tmp_path / "0.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="changed since its header was read"):
        read_piece(whole(spec, None))
