"""What `test_ranks` has each of two ranks do: `torchrun ... -m tests.engines.ranks FOLDER`.

Every check is a function of this module. Ranks write after each that it passed, so that a test can
say which did not; the first that fails ends the run, because ranks that go different ways wait for
each other forever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
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
from tests.engines.published import FP8_BLOCKS, MXFP4, fp8_blocks
from tests.engines.tools import assert_same_state, bits

RANKS = 2
SCHEMES = ("int8_per_channel_weight_only", "fp8_per_tensor", "int4_per_group_weight_only")
QWEN, GPT_OSS = BY_NAME["qwen3_moe"], BY_NAME["gpt_oss"]
"""A tensor per expert, and a plan that splits attention too; all experts in one tensor, with biases
and a gate of their own."""

WEIGHT_ONLY, FP8, INT4 = SCHEMES

BY_EXPERT: dict[str, Any] = {"tp_size": RANKS, "ep_size": RANKS}
BY_CHANNEL: dict[str, Any] = {"tp_size": RANKS}
WAYS = (
    (WEIGHT_ONLY, BY_EXPERT),
    (FP8, BY_EXPERT),
    (INT4, BY_EXPERT),
    (WEIGHT_ONLY, BY_CHANNEL),
)
"""Which scheme, and how ranks share its experts."""

WHOLE_HEAD = {"lm_head": "replicate"}
"""gpt_oss has no plan for tensor parallelism, and transformers wants one."""

TOLERANCE = 1e-5
"""Relative, in fp32: the sums over a token's experts, over channels and over the heads of attention
are made of two, in another order. About 2e-6; one wrong expert shows as 1e-2."""

CHECKS: dict[str, Callable[[Path], None]] = {}


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS[function.__name__] = function
    return function


def make_folders(folder: Path) -> None:
    """The checkpoints of all checks, made once, before there are ranks."""
    for architecture in (QWEN, GPT_OSS):
        model = architecture.make().to(torch.bfloat16)
        model.save_pretrained(folder / architecture.name)
        if architecture is QWEN:
            model.save_pretrained(folder / "fused", save_original_format=False)
    torch.manual_seed(1)
    model = QWEN.make().to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder / "new")
    model.model.layers[1].mlp.experts.gate_up_proj.data[6, 3, 5] = torch.nan  # of the second rank
    model.save_pretrained(folder / "damaged")
    for name, odd in ("odd_experts", "num_experts"), ("odd_channels", "moe_intermediate_size"):
        config = transformers.Qwen3MoeConfig.from_pretrained(folder / "qwen3_moe", **{odd: 7})
        QWEN.model_class(config).to(torch.bfloat16).save_pretrained(folder / name)
    for name, seed in ("groups", 2), ("new_groups", 3):
        torch.manual_seed(seed)
        config = transformers.Qwen3MoeConfig.from_pretrained(
            folder / "qwen3_moe", moe_intermediate_size=128
        )
        model = QWEN.model_class(config)
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.1
        model.to(torch.bfloat16).save_pretrained(folder / name)
    MXFP4.write(folder / "mxfp4")
    FP8_BLOCKS.write(folder / "fp8")
    dataclasses.replace(FP8_BLOCKS, architecture=QWEN, encode=_of_experts).write(folder / "experts")


def _of_experts(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Experts in fp8, everything else as it is."""
    experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    stored, decoded = fp8_blocks(experts)
    return tensors | stored, tensors | decoded


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


def assert_share(
    model: nn.Module, whole: nn.Module, way: dict[str, Any], architecture: Architecture = QWEN
) -> None:
    """Every tensor of a rank's experts is its part of the single process's, to the bit."""
    for name in architecture.experts:
        ours, theirs = model.get_submodule(name), whole.get_submodule(name)
        expected = dict(theirs.named_parameters())
        assert expected.keys() == dict(ours.named_parameters()).keys()
        for parameter, tensor in ours.named_parameters():
            part = share_of(parameter, expected[parameter].data, way)
            assert type(tensor.data) is Tensor
            assert torch.equal(bits(tensor.data), bits(part)), (name, parameter)


def share_of(parameter: str, tensor: Tensor, way: dict[str, Any]) -> Tensor:
    if way is BY_EXPERT:
        return tensor.chunk(RANKS)[rank()]
    if parameter.startswith("w13"):
        return torch.cat([part.chunk(RANKS, 1)[rank()] for part in tensor.chunk(2, 1)], 1)
    in_columns = parameter in ("w2_codes", "w2_group_scale")
    return tensor.chunk(RANKS, 2)[rank()] if in_columns else tensor


@contextlib.contextmanager
def nothing_allocated() -> Iterator[None]:
    refuse = mock.Mock(side_effect=AssertionError("weights were allocated"))
    with (
        mock.patch.object(OnlineMoEMethodBase, "materialize", refuse),
        mock.patch.object(OnlineLinearMethod, "load", refuse),
    ):
        yield


@check
def a_rank_has_its_share_and_the_logits_of_one_process(folder: Path) -> None:
    """Attention is split too, by transformers. By expert and without gradients the outputs of all
    experts are summed; with gradients tokens travel to their experts and back."""
    for scheme, way in WAYS:
        whole = load_alone(folder / "qwen3_moe", moe=scheme)
        for name in ("qwen3_moe", "fused"):
            split = load(folder / name, moe=scheme, **way)
            attention = split.model.layers[0].self_attn.q_proj.weight
            assert attention.to_local().shape[0] * RANKS == attention.shape[0]
            assert_share(split, whole, way)
            with torch.no_grad():
                assert_same_logits(split, whole)
            assert_same_logits(split, whole)


@check
def experts_with_biases_and_a_gate_of_their_own(folder: Path) -> None:
    for scheme in SCHEMES:
        split = load(folder / "gpt_oss", GPT_OSS, scheme, **BY_EXPERT, tp_plan=WHOLE_HEAD)
        whole = load_alone(folder / "gpt_oss", GPT_OSS, scheme)
        assert_share(split, whole, BY_EXPERT, GPT_OSS)
        with torch.no_grad():
            assert_same_logits(split, whole)


@check
def ranks_generate_what_one_process_does(folder: Path) -> None:
    prompt = torch.tensor([[5, 9, 17, 33]])
    choices: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    whole = load_alone(folder / "qwen3_moe").generate(prompt, **choices)
    for way in (BY_EXPERT, BY_CHANNEL):
        found = load(folder / "qwen3_moe", **way).generate(prompt, **choices)
        assert torch.equal(found, whole)


@check
def a_rank_reads_its_share_alone(folder: Path) -> None:
    """Without the gaps that it otherwise reads over to save requests: of these sizes all are."""
    for name, architecture, way in (
        ("qwen3_moe", QWEN, BY_EXPERT),
        ("fused", QWEN, BY_EXPERT),
        ("gpt_oss", GPT_OSS, BY_EXPERT),
        ("qwen3_moe", QWEN, BY_CHANNEL),
        ("fused", QWEN, BY_CHANNEL),
    ):
        (file,) = (folder / name).glob("*.safetensors")
        with recorded_reads() as read, mock.patch("moeq.checkpoint.stream._GAP", 0):
            load(folder / name, architecture, **way, tp_plan=WHOLE_HEAD)
        found = {byte for begin, end in read for byte in range(begin, end, 2)}
        assert found == set(bytes_of_share(file, way))
        assert sum(end - begin for begin, end in read) == 2 * len(found)  # none of them twice


def bytes_of_share(file: Path, way: dict[str, Any]) -> Iterator[int]:
    """Where in a file every bf16 of this rank's share of the experts begins. With channels apart,
    of gate and up its own rows, of down all."""
    for spec in read_headers([file]).values():
        _, _, rest = spec.name.partition(".experts.")
        if not rest:
            continue
        places = torch.arange(spec.offset, spec.offset + spec.nbytes, 2).view(spec.shape)
        if way is BY_EXPERT:
            number = rest.split(".")[0]
            if not number.isdigit():
                places = places.chunk(RANKS)[rank()]
            elif int(number) * RANKS // 8 != rank():
                continue
        elif "gate_up" in rest:
            places = torch.cat([part.chunk(RANKS, 1)[rank()] for part in places.chunk(2, 1)])
        elif "down" not in rest:
            places = places.chunk(RANKS)[rank()]
        yield from places.flatten().tolist()


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
    whole = report_of(load_alone(folder / "qwen3_moe"))
    experts = report_of(load(folder / "qwen3_moe"))
    assert experts.expert_bytes_before * RANKS == whole.expert_bytes_before
    assert experts.expert_bytes_after * RANKS == whole.expert_bytes_after
    channels = report_of(load(folder / "qwen3_moe", **BY_CHANNEL))
    assert channels.expert_bytes_before * 3 == whole.expert_bytes_before * 2  # all of down
    extra = 2 * 8 * 160 * 4 // 2  # the scales of down are on both ranks
    assert channels.expert_bytes_after == experts.expert_bytes_after + extra
    for split in (experts, channels):
        assert split.coverage == 1.0
        skipped = whole.total_bytes_before - split.total_bytes_before
        assert skipped == whole.expert_bytes_before - split.expert_bytes_before
        saved = whole.total_bytes_after - split.total_bytes_after
        assert saved > whole.expert_bytes_after - split.expert_bytes_after  # attention too
    partly = load(folder / "qwen3_moe", ignore=[QWEN.experts[0]])
    assert report_of(partly).coverage == 0.5


@check
def what_is_not_quantized_is_left_to_transformers(folder: Path) -> None:
    """Also where, for a GPU, it would be streamed; and so are experts that are ignored."""
    config = OnlineQuantizationConfig(moe=WEIGHT_ONLY, ignore=[QWEN.experts[0]])
    whole = QWEN.model_class.from_pretrained(
        folder / "qwen3_moe", quantization_config=config, dtype=torch.float32
    )
    for way in (BY_EXPERT, BY_CHANNEL):
        with mock.patch.object(hf_stream, "streams_kept", lambda device: True):
            split = load(folder / "qwen3_moe", ignore=[QWEN.experts[0]], **way)
        with torch.no_grad():
            assert_same_logits(split, whole)


@check
def refresh_takes_the_share_of_the_rank(folder: Path) -> None:
    """Of experts and of what transformers split, at the same addresses."""
    (file,) = (folder / "new").glob("*.safetensors")
    for way in (BY_EXPERT, BY_CHANNEL):
        split, fresh = load(folder / "qwen3_moe", **way), load(folder / "new", **way)
        experts = split.get_submodule(QWEN.experts[0])
        before = [tensor.data_ptr() for tensor in experts.parameters()]
        report = moeq.refresh(split, load_file(file).items())
        assert report.nbytes == sum(tensor.nbytes for tensor in load_file(file).values())
        assert [tensor.data_ptr() for tensor in experts.parameters()] == before
        assert_same_state(local_state(split), local_state(fresh))
        with torch.no_grad():
            assert_same_logits(split, fresh)
    split, tensors = load(folder / "qwen3_moe"), load_file(file)
    del tensors["model.layers.0.mlp.experts.1.up_proj.weight"]
    with pytest.raises(RefreshError, match="up of expert 1") if rank() == 0 else no_error():
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
    for scheme, way in WAYS:
        whole, saved = load_alone(folder / "qwen3_moe", moe=scheme), folder / f"saved-{scheme}"
        if rank() == 0 and not saved.exists():
            moeq.save(whole, saved)
        torch.distributed.barrier()
        config = DistributedConfig(**way)
        again = moeq.load(saved, dtype=torch.float32, distributed_config=config)
        assert_share(again, whole, way)
        with torch.no_grad():
            assert_same_logits(again, whole)
        assert report_of(again).coverage == 1.0
        online = report_of(load(folder / "qwen3_moe", moe=scheme, **way))
        assert report_of(again).total_bytes_after == online.total_bytes_after


@check
def channels_in_whole_groups(folder: Path) -> None:
    """64 of 128 channels are two groups of a row of down; 72 of 144 are two and a quarter."""
    whole = load_alone(folder / "groups", moe=INT4)
    split = load(folder / "groups", moe=INT4, **BY_CHANNEL)
    assert split.get_submodule(QWEN.experts[0]).w2_codes.shape == (8, 160, 32)
    assert_share(split, whole, BY_CHANNEL)
    with torch.no_grad():
        assert_same_logits(split, whole)
    if rank() == 0:
        moeq.save(whole, folder / "saved-groups")
    torch.distributed.barrier()
    again = moeq.load(
        folder / "saved-groups",
        dtype=torch.float32,
        distributed_config=DistributedConfig(**BY_CHANNEL),
    )
    assert_share(again, whole, BY_CHANNEL)
    assert report_of(again).total_bytes_after == report_of(split).total_bytes_after
    (file,) = (folder / "new_groups").glob("*.safetensors")
    moeq.refresh(split, load_file(file).items())
    assert_share(split, load_alone(folder / "new_groups", moe=INT4), BY_CHANNEL)
    with nothing_allocated(), pytest.raises(ModelError, match="of 144 divide 32 weights of a row"):
        load(folder / "qwen3_moe", moe=INT4, **BY_CHANNEL)


@check
def a_rank_cannot_save(folder: Path) -> None:
    model = load(folder / "qwen3_moe")
    with pytest.raises(ModelError, match=r"split over 2 ranks.*moeq quantize"):
        moeq.save(model, folder / f"rank-{rank()}")
    with pytest.raises(ModelError, match="save_pretrained"):
        model.save_pretrained(folder / f"rank-{rank()}")
    assert not (folder / f"rank-{rank()}").exists()


@check
def what_the_readme_says(folder: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# torchrun.*?)```", readme, re.DOTALL)
    code = code.replace("fp8_per_channel", WEIGHT_ONLY)
    for lines, way in ((code, BY_EXPERT), (code.replace(", ep_size=2", ""), BY_CHANNEL)):
        names: dict[str, Any] = {"path": folder / "qwen3_moe"}
        exec(lines, names)
        assert_share(names["model"], load_alone(folder / "qwen3_moe"), way)


@check
def experts_that_are_published_quantized(folder: Path) -> None:
    """A rank decodes its experts, or its rows of them; what is kept in codes it cannot share."""
    for name, architecture, scheme, way in (
        ("mxfp4", GPT_OSS, WEIGHT_ONLY, BY_EXPERT),
        ("experts", QWEN, FP8, BY_EXPERT),
        ("experts", QWEN, WEIGHT_ONLY, BY_CHANNEL),
    ):
        plan = {"tp_plan": WHOLE_HEAD} if architecture is GPT_OSS else {}
        model = moeq.load(
            folder / name / "published",
            OnlineQuantizationConfig(moe=scheme),
            distributed_config=DistributedConfig(**way, **plan),
            dtype=torch.float32,
        )
        whole = load_alone(folder / name / "original", architecture, scheme)
        assert_share(model, whole, way, architecture)
        with torch.no_grad():
            assert_same_logits(model, whole)
    with pytest.raises(ModelError, match="stored as codes and not quantized"), nothing_allocated():
        moeq.load(
            folder / "fp8" / "published",
            OnlineQuantizationConfig(moe=FP8),
            distributed_config=DistributedConfig(**BY_EXPERT),
        )


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
    assert_share(model, load_alone(folder / "qwen3_moe"), BY_EXPERT)
    assert seen[-1] == (report_of(model).total_bytes_before,) * 2


@check
def what_cannot_be_shared_evenly(folder: Path) -> None:
    with nothing_allocated(), pytest.raises(ModelError, match="7 experts, which 2 ranks"):
        load(folder / "odd_experts")
    with nothing_allocated(), pytest.raises(ModelError, match="7 intermediate channels, which 2"):
        load(folder / "odd_channels", **BY_CHANNEL)


@check
def experts_that_cannot_be_cut(folder: Path) -> None:
    advice = r"DistributedConfig\(tp_size=2, ep_size=2\)"
    with nothing_allocated(), pytest.raises(ModelError, match=f"quantizes activations.*{advice}"):
        load(folder / "qwen3_moe", moe=FP8, **BY_CHANNEL)
    with nothing_allocated(), pytest.raises(ModelError, match=f"biases.*{advice}"):
        load(folder / "gpt_oss", GPT_OSS, **BY_CHANNEL, tp_plan=WHOLE_HEAD)


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
    names = [f"model.layers.*.mlp.experts.{name}_proj" for name in ("gate_up", "down")]
    whole = dict.fromkeys(names, "replicate")
    for plan, way in {"ep_plan": BY_EXPERT, "tp_plan": BY_CHANNEL}.items():
        with nothing_allocated(), pytest.raises(ModelError, match=f"does not split.*{plan}"):
            load(folder / "qwen3_moe", **way, **{plan: whole})


@check
def kernels_that_are_not_ours(folder: Path) -> None:
    with nothing_allocated(), pytest.raises(ModelError, match="deepgemm_megamoe"):
        load(folder / "qwen3_moe", **BY_EXPERT, ep_implementation="deepgemm_megamoe")


@check
def damage_in_an_expert(folder: Path) -> None:
    """The rank that reads it says so; the other has nothing to say."""
    name = r"model\.layers\.1\.mlp\.experts\.6\.gate_proj\.weight"
    for way, finder, place in (
        (BY_EXPERT, 1, rf"{name}: nan at \[3, 5\]"),
        (BY_CHANNEL, 0, rf"{name}, from row 0: nan at \[3, 5\]"),
    ):
        with pytest.raises(moeq.MoeqError, match=place) if rank() == finder else no_error():
            load(folder / "damaged", **way)


@check
def an_incomplete_checkpoint_is_refused_on_every_rank(folder: Path) -> None:
    (file,) = (folder / "qwen3_moe").glob("*.safetensors")
    specs = read_headers([file])
    del specs["model.layers.0.mlp.experts.1.up_proj.weight"]
    with (
        nothing_allocated(),
        mock.patch("moeq.engines.transformers.read_specs", lambda files: specs),
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
