"""What `test_ranks` has each of two ranks do: `torchrun ... -m tests.engines.ranks FOLDER`.

Every check is a function of this module. Ranks write after each that it passed, so that a test can
say which did not; the first that fails ends the run, because ranks that go different ways wait for
each other forever.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.distributed.configuration_utils import DistributedConfig

import moeq
from moeq import OnlineQuantizationConfig, report_of
from moeq.checkpoint.files import Files
from moeq.checkpoint.headers import read_headers
from moeq.engines import hf_stream
from moeq.errors import CheckpointError, ModelError, RefreshError
from moeq.methods.base import OnlineMoEMethodBase
from moeq.methods.linear import OnlineLinearMethod
from tests.engines.models import BY_NAME, Architecture
from tests.engines.tools import assert_same_state, bits

RANKS = 2
SCHEMES = ("int8_per_channel_weight_only", "fp8_per_tensor")
QWEN, GPT_OSS = BY_NAME["qwen3_moe"], BY_NAME["gpt_oss"]
"""A tensor per expert, and a plan that splits attention too; all experts in one tensor, with biases
and a gate of their own."""

BY_EXPERT = {"tp_size": RANKS, "ep_size": RANKS}

TOLERANCE = 1e-5
"""Relative, in fp32: a token's experts are added on two ranks, then the two sums; the output of
attention is summed over the heads of two ranks. About 1e-6; one wrong expert shows as 1e-2."""

CHECKS: dict[str, Callable[[Path], None]] = {}


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS[function.__name__] = function
    return function


def make_folders(folder: Path) -> None:
    """The checkpoints of all checks, made once, before there are ranks."""
    for architecture in (QWEN, GPT_OSS):
        model = architecture.make().to(torch.bfloat16)
        model.save_pretrained(folder / architecture.name)
    torch.manual_seed(1)
    model = QWEN.make().to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder / "new")
    model.model.layers[1].mlp.experts.gate_up_proj.data[6, 3, 5] = torch.nan  # of the second rank
    model.save_pretrained(folder / "damaged")
    odd = transformers.Qwen3MoeConfig.from_pretrained(folder / "qwen3_moe", num_experts=7)
    QWEN.model_class(odd).to(torch.bfloat16).save_pretrained(folder / "odd")


def load(
    path: Path, architecture: Architecture = QWEN, moe: str = SCHEMES[0], **kwargs: Any
) -> Any:
    """On this rank; `tp_size`, `ep_size` and plans among the arguments, by expert where absent."""
    known = ("tp_size", "ep_size", "fsdp_size", "tp_plan", "ep_plan", "ep_implementation")
    split = {name: kwargs.pop(name) for name in known if name in kwargs}
    linear, ignore = kwargs.pop("linear", None), kwargs.pop("ignore", ())
    return architecture.model_class.from_pretrained(
        path,
        quantization_config=OnlineQuantizationConfig(moe=moe, linear=linear, ignore=ignore),
        distributed_config=DistributedConfig(**split or BY_EXPERT),
        **{"dtype": torch.float32} | kwargs,
    )


def load_alone(path: Path, architecture: Architecture = QWEN, moe: str = SCHEMES[0]) -> Any:
    config = OnlineQuantizationConfig(moe=moe)
    return architecture.model_class.from_pretrained(
        path, quantization_config=config, dtype=torch.float32
    )


def rank() -> int:
    return torch.distributed.get_rank()


def logits(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return model(input_ids=torch.randint(3, 96, (2, 12), generator=generator)).logits.detach()


def assert_same_logits(found: nn.Module, expected: nn.Module) -> None:
    theirs = logits(expected)
    assert (logits(found) - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def assert_slice(model: nn.Module, whole: nn.Module, architecture: Architecture = QWEN) -> None:
    """Every tensor of a rank's experts is its part of the single process's, to the bit."""
    for name in architecture.experts:
        ours, theirs = model.get_submodule(name), whole.get_submodule(name)
        expected = dict(theirs.named_parameters())
        assert expected.keys() == dict(ours.named_parameters()).keys()
        for parameter, tensor in ours.named_parameters():
            part = expected[parameter].chunk(RANKS)[rank()]
            assert type(tensor.data) is Tensor
            assert torch.equal(bits(tensor.data), bits(part.data)), (name, parameter)


@contextlib.contextmanager
def nothing_allocated() -> Iterator[None]:
    refuse = mock.Mock(side_effect=AssertionError("weights were allocated"))
    with (
        mock.patch.object(OnlineMoEMethodBase, "materialize", refuse),
        mock.patch.object(OnlineLinearMethod, "load", refuse),
    ):
        yield


@check
def the_logits_are_those_of_one_process(folder: Path) -> None:
    """Attention is split too, by transformers. Without gradients the outputs of all experts are
    summed; with them tokens travel to their experts and back."""
    for scheme in SCHEMES:
        split, whole = (
            load(folder / "qwen3_moe", moe=scheme),
            load_alone(folder / "qwen3_moe", moe=scheme),
        )
        attention = split.model.layers[0].self_attn.q_proj.weight
        assert attention.to_local().shape[0] * RANKS == attention.shape[0]
        with torch.no_grad():
            assert_same_logits(split, whole)
        assert_same_logits(split, whole)


@check
def the_logits_of_experts_with_biases_and_a_gate_of_their_own(folder: Path) -> None:
    for scheme in SCHEMES:
        split = load(
            folder / "gpt_oss", GPT_OSS, scheme, **BY_EXPERT, tp_plan={"lm_head": "replicate"}
        )
        whole = load_alone(folder / "gpt_oss", GPT_OSS, scheme)
        assert_slice(split, whole, GPT_OSS)
        with torch.no_grad():
            assert_same_logits(split, whole)


@check
def the_codes_are_a_slice_of_one_process(folder: Path) -> None:
    for scheme in SCHEMES:
        split = load(folder / "qwen3_moe", moe=scheme)
        assert_slice(split, load_alone(folder / "qwen3_moe", moe=scheme))


@check
def a_rank_reads_its_own_experts_alone(folder: Path) -> None:
    """Biases are so small that it reads over those of others, as over all small gaps."""
    for architecture in (QWEN, GPT_OSS):
        (file,) = (folder / architecture.name).glob("*.safetensors")
        own, others = expert_bytes(file)
        with recorded_reads() as read:
            load(
                folder / architecture.name,
                architecture,
                **BY_EXPERT,
                tp_plan={"lm_head": "replicate"},
            )
        assert own and others
        for begin, end in own:
            assert any(first <= begin and end <= last for first, last in read)
        for begin, end in others:
            assert not any(first < end and begin < last for first, last in read)


def expert_bytes(file: Path) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(first, end) of the matrices of this rank's experts in a file, and of the others'."""
    found: tuple[list[tuple[int, int]], list[tuple[int, int]]] = [], []
    pieces = []
    for spec in read_headers([file]).values():
        _, _, rest = spec.name.partition(".experts.")
        number = rest.split(".")[0]
        if number.isdigit():
            pieces.append((int(number), spec.offset, spec.nbytes))
        elif rest and not rest.endswith("_bias"):
            each = spec.nbytes // spec.shape[0]
            pieces += [(e, spec.offset + e * each, each) for e in range(spec.shape[0])]
    experts = 1 + max(expert for expert, _, _ in pieces)
    for expert, begin, nbytes in pieces:
        is_other = expert * RANKS // experts != rank()
        found[is_other].append((begin, begin + nbytes))
    return found


@contextlib.contextmanager
def recorded_reads() -> Iterator[list[tuple[int, int]]]:
    """(first, end) of all that moeq reads of files inside the block."""
    read: list[tuple[int, int]] = []
    original = Files.read

    def recorded(self: Files, path: Path, stamp: Any, at: int, window: Any, name: Any) -> None:
        read.append((at, at + len(window)))
        original(self, path, stamp, at, window, name)

    with mock.patch.object(Files, "read", recorded):
        yield read


@check
def the_report_is_of_the_rank(folder: Path) -> None:
    split = report_of(load(folder / "qwen3_moe"))
    whole = report_of(load_alone(folder / "qwen3_moe"))
    assert split.coverage == 1.0
    assert split.expert_bytes_before * RANKS == whole.expert_bytes_before
    assert split.expert_bytes_after * RANKS == whole.expert_bytes_after
    skipped = whole.total_bytes_before - split.total_bytes_before
    assert skipped == split.expert_bytes_before
    assert split.total_bytes_after < whole.total_bytes_after - split.expert_bytes_after
    partly = load(folder / "qwen3_moe", ignore=[QWEN.experts[0]])
    assert report_of(partly).coverage == 0.5


@check
def what_is_not_quantized_is_left_to_transformers(folder: Path) -> None:
    """Also where, for a GPU, it would be streamed; and so are experts that are ignored."""
    with mock.patch.object(hf_stream, "streams_kept", lambda device: True):
        split = load(folder / "qwen3_moe", ignore=[QWEN.experts[0]])
    config = OnlineQuantizationConfig(moe=SCHEMES[0], ignore=[QWEN.experts[0]])
    whole = QWEN.model_class.from_pretrained(
        folder / "qwen3_moe", quantization_config=config, dtype=torch.float32
    )
    with torch.no_grad():
        assert_same_logits(split, whole)


@check
def refresh_takes_the_rank_s_share(folder: Path) -> None:
    """Of experts and of what transformers split, at the same addresses."""
    (file,) = (folder / "new").glob("*.safetensors")
    split, fresh = load(folder / "qwen3_moe"), load(folder / "new")
    before = [tensor.data_ptr() for tensor in split.model.layers[0].mlp.experts.parameters()]
    report = moeq.refresh(split, load_file(file).items())
    assert report.nbytes == sum(tensor.nbytes for tensor in load_file(file).values())
    after = [tensor.data_ptr() for tensor in split.model.layers[0].mlp.experts.parameters()]
    assert after == before
    assert_same_state(local_state(split), local_state(fresh))
    with torch.no_grad():
        assert_same_logits(split, fresh)
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.experts.1.up_proj.weight"]
    with pytest.raises(RefreshError, match=r"up of expert 1") if rank() == 0 else no_error():
        moeq.refresh(split, tensors.items())


def local_state(model: nn.Module) -> nn.Module:
    """The tensors of this rank, for `assert_same_state`."""
    holder = nn.Module()
    for name, tensor in model.state_dict().items():
        part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        holder.register_buffer(name.replace(".", "/"), part)
    return holder


@check
def a_saved_checkpoint_is_split_too(folder: Path) -> None:
    for scheme in SCHEMES:
        whole, saved = load_alone(folder / "qwen3_moe", moe=scheme), folder / f"saved-{scheme}"
        if rank() == 0:
            moeq.save(whole, saved)
        torch.distributed.barrier()
        again = moeq.load(
            saved, dtype=torch.float32, distributed_config=DistributedConfig(**BY_EXPERT)
        )
        assert_slice(again, whole)
        with torch.no_grad():
            assert_same_logits(again, whole)
        assert report_of(again).coverage == 1.0
        online = report_of(load(folder / "qwen3_moe", moe=scheme))
        assert report_of(again).total_bytes_after == online.total_bytes_after


@check
def a_rank_cannot_save(folder: Path) -> None:
    model = load(folder / "qwen3_moe")
    with pytest.raises(ModelError, match=r"split over 2 ranks.*moeq quantize"):
        moeq.save(model, folder / f"rank-{rank()}")
    with pytest.raises(ModelError, match="save_pretrained"):
        model.save_pretrained(folder / f"rank-{rank()}")
    assert not (folder / f"rank-{rank()}").exists()


@check
def moeq_load_takes_ranks(folder: Path) -> None:
    config = DistributedConfig(**BY_EXPERT)
    seen: list[tuple[int, int]] = []
    scheme = OnlineQuantizationConfig(moe=SCHEMES[0])
    model = moeq.load(
        folder / "qwen3_moe",
        scheme,
        dtype=torch.float32,
        distributed_config=config,
        progress=lambda *found: seen.append(found),
    )
    assert_slice(model, load_alone(folder / "qwen3_moe"))
    assert seen[-1] == (report_of(model).total_bytes_before,) * 2


@check
def experts_that_cannot_be_shared_evenly(folder: Path) -> None:
    with nothing_allocated(), pytest.raises(ModelError, match="7 experts, which 2 ranks"):
        load(folder / "odd")


@check
def experts_cut_across_their_matrices(folder: Path) -> None:
    with (
        nothing_allocated(),
        pytest.raises(ModelError, match=r"DistributedConfig\(tp_size=2, ep_size=2\)"),
    ):
        load(folder / "qwen3_moe", tp_size=RANKS)


@check
def ranks_with_different_data(folder: Path) -> None:
    with nothing_allocated(), pytest.raises(ModelError, match=r"fsdp_size=2.*FSDP"):
        load(folder / "qwen3_moe", fsdp_size=RANKS, tp_size=1)


@check
def linears(folder: Path) -> None:
    """Where transformers splits them they cannot be quantized; whole ones can."""
    with nothing_allocated(), pytest.raises(ModelError, match=r"q_proj.*colwise.*tp_plan"):
        load(folder / "qwen3_moe", linear="fp8_per_channel")
    names = [f"model.layers.*.self_attn.{name}_proj" for name in "qkvo"]
    split = load(
        folder / "qwen3_moe",
        linear="fp8_per_channel",
        **BY_EXPERT,
        tp_plan=dict.fromkeys(names, "replicate"),
    )
    whole = QWEN.model_class.from_pretrained(
        folder / "qwen3_moe",
        quantization_config=OnlineQuantizationConfig(moe=SCHEMES[0], linear="fp8_per_channel"),
        dtype=torch.float32,
    )
    with torch.no_grad():
        assert_same_logits(split, whole)


@check
def a_plan_that_leaves_experts_whole(folder: Path) -> None:
    names = [f"model.layers.*.mlp.experts{end}" for end in ("", ".gate_up_proj", ".down_proj")]
    plan = dict.fromkeys(names[1:], "replicate")
    with nothing_allocated(), pytest.raises(ModelError, match="does not hand 4 of its 8 experts"):
        load(folder / "qwen3_moe", **BY_EXPERT, ep_plan=plan)


@check
def kernels_that_are_not_ours(folder: Path) -> None:
    with nothing_allocated(), pytest.raises(ModelError, match="deepgemm_megamoe"):
        load(folder / "qwen3_moe", **BY_EXPERT, ep_implementation="deepgemm_megamoe")


@check
def damage_in_an_expert(folder: Path) -> None:
    """The rank that holds it says so; the other has nothing to say."""
    name = "model.layers.1.mlp.experts.6.gate_proj.weight"
    expected = pytest.raises(moeq.MoeqError, match=name) if rank() == 1 else no_error()
    with expected:
        load(folder / "damaged")


@check
def an_incomplete_checkpoint_is_refused_on_every_rank(folder: Path) -> None:
    (file,) = (folder / "qwen3_moe").glob("*.safetensors")
    specs = read_headers([file])
    del specs["model.layers.0.mlp.experts.1.up_proj.weight"]
    with (
        nothing_allocated(),
        mock.patch("moeq.engines.transformers.read_headers", lambda files: specs),
        pytest.raises(CheckpointError, match=r"experts\.1\.up_proj"),
    ):
        load(folder / "qwen3_moe")


@contextlib.contextmanager
def no_error() -> Iterator[None]:
    yield


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    torch.distributed.init_process_group("gloo")
    for name, function in CHECKS.items():
        function(folder)
        (folder / f"{name}.{rank()}").touch()
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
