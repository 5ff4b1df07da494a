"""moeq's schemes in vLLM: the bytes of moeq's own loads, and the predictions."""

from __future__ import annotations

import hashlib
import json
import shutil
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import moeq
from moeq import OnlineQuantizationConfig
from moeq.embedded import PROMPT, held_out_text, model_folder
from moeq.engines.hf_modules import order_of_files
from moeq.engines.offline import quantize_checkpoint
from moeq.schemes import OnlineQuantScheme
from tests.vllm_engine.conftest import DEVICE, Job

SCHEMES = [scheme.value for scheme in OnlineQuantScheme]
INT8 = "int8_per_channel_weight_only"
EAGER = {"enforce_eager": True}
BROKEN = "gate and up exchanged"

pytestmark = pytest.mark.engine


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    ids: list[int] = tokenizer(held_out_text())["input_ids"]
    return [ids[start : start + 100] for start in range(0, 400, 100)] + [
        tokenizer(PROMPT).input_ids
    ]


def changed(folder: Path, target: Path, change: Any) -> Path:
    """A checkpoint in one file whose tensors `change` has seen."""
    target.mkdir()
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, target)
    return target


def exchange(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if n.endswith(".gate_proj.weight") and ".experts." in n]:
        other = name.replace("gate_proj", "up_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def empty(tensors: dict[str, Tensor]) -> None:
    """Rows of zeros, and an expert of nothing else."""
    for name, tensor in tensors.items():
        if ".experts.1." in name:
            tensor[3] = 0
        if ".experts.2." in name:
            tensor.zero_()


def damage(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.4.down_proj.weight"][5, 6] = torch.nan


def damage_linear(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.self_attn.o_proj.weight"][5, 6] = torch.inf


def lose_expert(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.4.down_proj.weight"]


def lose_linear(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.self_attn.k_proj.weight"]


def lose_router(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.gate.weight"]


def lose_norm(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.input_layernorm.weight"]


CHANGES = {
    "zeros": empty,
    "nan": damage,
    "inf": damage_linear,
    "no expert": lose_expert,
    "no linear": lose_linear,
    "no router": lose_router,
    "no norm": lose_norm,
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("checkpoints")
    changes = {BROKEN: exchange, **CHANGES}
    return {n: changed(model_folder(), base / n.replace(" ", "_"), c) for n, c in changes.items()}


def config(**entries: Any) -> dict[str, Any]:
    return {"hf_overrides": {"quantization_config_dict_json": json.dumps(entries)}}


@pytest.fixture(scope="session")
def one(vllm_job: Job, prompts: list[list[int]], checkpoints: dict[str, Path]) -> dict[str, Any]:
    """Every run of one process."""
    runs: dict[str, dict[str, Any]] = {"bf16": {"quantization": None}}
    runs |= {scheme: {"quantization": f"moeq_{scheme}"} for scheme in SCHEMES}
    quantized = {"quantization": f"moeq_{INT8}"}
    runs[BROKEN] = quantized | {"model": str(checkpoints[BROKEN])}
    fp8 = {"quantization": "moeq_fp8_per_channel"}
    runs |= {name: fp8 | {"model": str(checkpoints[name])} for name in CHANGES}
    runs["inf"]["quantization"] = "moeq_fp8_per_tensor"  # whose scale is not asked on arrival
    runs["ignore"] = fp8 | config(ignore=["model.layers.0.mlp.experts", "re:.*[qkv]_proj"])
    runs["targets"] = {"quantization": "moeq"} | config(targets={"*.experts": INT8})
    runs["experts alone"] = fp8 | config(linear="none")
    runs["no layer"] = fp8 | config(ignore=["model.layers.9.*"])
    runs["no such target"] = {"quantization": "moeq"} | config(targets={"lm_head": SCHEMES[0]})
    runs["head ignored"] = quantized | config(ignore=["lm_head"])
    runs["parts differ"] = fp8 | config(ignore=["*.q_proj"])
    runs["unknown key"] = fp8 | config(ignored=["*.q_proj"])
    runs["no scheme"] = {"quantization": "moeq"}
    runs["vLLM's config"] = fp8 | {"quantization_config": {"linear": "fp8_per_tensor"}}
    runs["dummy"] = quantized | {"load_format": "dummy"}
    return vllm_job(model_folder(), prompts, {name: EAGER | run for name, run in runs.items()})


def ours(folder: Path, scheme: str) -> dict[str, Tensor]:
    """What a load of moeq's own holds, as bytes."""
    model = moeq.load(folder, scheme, device=DEVICE)
    with order_of_files(model):
        return {
            name: parameter.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, parameter in model.named_parameters()
            if name.endswith(("_codes", "_scale"))
        }


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def merged(states: dict[str, Tensor]) -> dict[str, Tensor]:
    """By vLLM's names: its linears hold q, k and v, with a scale per row where there is one."""
    found = {}
    for name, tensor in states.items():
        if name.endswith(".weight_scale") and not tensor.ndim:
            rows = len(states[name.replace("_scale", "_codes")])
            found[name] = tensor.expand(rows)
        else:
            found[name] = tensor
    for name in [name for name in found if ".q_proj." in name]:
        parts = [found.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        found[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
    return {n.replace(".experts.", ".experts.routed_experts."): t for n, t in found.items()}


def distance(first: list[list[float]], second: list[list[float]]) -> float:
    """Mean difference of log-probabilities."""
    pairs = [pair for one, other in zip(first, second, strict=True) for pair in zip(one, other)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def judged(model: Any, prompts: list[list[int]]) -> list[list[float]]:
    found = []
    for ids in prompts:
        with torch.no_grad():
            logits = model(torch.tensor([ids], device=DEVICE)).logits[0].float()
        rows = logits.log_softmax(-1)[:-1].cpu()
        found.append(rows[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist())
    return found


@pytest.fixture(scope="session")
def floor(one: dict[str, Any], prompts: list[list[int]]) -> float:
    """What rounding in bf16 does: vLLM's unquantized model against transformers'."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.bfloat16).to(DEVICE)
    found = distance(judged(plain, prompts), one["bf16"]["logprobs"])
    assert 0 < found < 0.05
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_and_scales_are_those_of_our_own_load(one: dict[str, Any], scheme: str) -> None:
    assert "error" not in one[scheme], one[scheme]
    (found,) = one[scheme]["digests"]
    expected = merged(ours(model_folder(), scheme))
    assert found == {name: digest(tensor) for name, tensor in expected.items()}
    assert len(found) >= 20


@pytest.mark.parametrize("scheme", SCHEMES)
def test_predictions_agree_within_the_noise_of_bf16(
    one: dict[str, Any], prompts: list[list[int]], floor: float, scheme: str
) -> None:
    """Log-probabilities of the same prompts in both engines. Quantized activations round again
    what bf16 rounded differently, so the bound is four times the noise; an exchange of
    gate and up is at least ten bounds away."""
    mine = judged(moeq.load(model_folder(), scheme, device=DEVICE), prompts)
    found = distance(mine, one[scheme]["logprobs"])
    assert found <= 4 * floor, (found, floor)
    if scheme == INT8:
        assert distance(mine, one[BROKEN]["logprobs"]) > 40 * floor


def test_completions_are_those_of_transformers(
    one: dict[str, Any], prompts: list[list[int]]
) -> None:
    """Of weights alone, whose rounding is the same; the last prompt's logits have no near ties."""
    model = moeq.load(model_folder(), INT8, device=DEVICE)
    (*_, found) = one[INT8]["completions"]
    ids = torch.tensor([prompts[-1]], device=DEVICE)
    with torch.no_grad():
        written = model.generate(ids, do_sample=False, max_new_tokens=len(found))
    assert found == written[0, ids.shape[1] :].tolist()


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs")
def test_compiled_and_in_cuda_graphs(vllm_job: Job, prompts: list[list[int]]) -> None:
    schemes = (INT8, "fp8_per_channel")
    runs: dict[str, dict[str, Any]] = {}
    few = {"compilation_config": {"cudagraph_capture_sizes": [1, 8]}}  # each takes seconds
    for scheme in schemes:
        runs[scheme] = {"quantization": f"moeq_{scheme}"} | few
        runs[f"{scheme}, eager"] = {"quantization": f"moeq_{scheme}"} | EAGER
    found = vllm_job(model_folder(), prompts, runs)
    for scheme in schemes:
        run, eager = found[scheme], found[f"{scheme}, eager"]
        assert "error" not in run, run
        assert run["digests"] == eager["digests"]
        # Rounding may choose another token, and what follows it is another text
        agreed = [
            abs(p - q)
            for ours, theirs, ps, qs in zip(
                run["completions"], eager["completions"], run["written"], eager["written"]
            )
            for _, p, q in takewhile(lambda same: same[0], zip(map(eq, ours, theirs), ps, qs))
        ]
        assert len(agreed) > sum(map(len, eager["completions"])) / 2
        # Both were 0.006 to 0.033 from transformers' on an H100, where noise was 0.008 to 0.039
        assert sum(agreed) / len(agreed) < 0.1


def test_zeros_stay_zeros(one: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    (found,) = one["zeros"]["digests"]
    with pytest.warns(UserWarning, match="every weight is zero in expert 2"):
        states = ours(checkpoints["zeros"], "fp8_per_channel")
    assert found == {name: digest(tensor) for name, tensor in merged(states).items()}
    assert (states["model.layers.0.mlp.experts.w13_scale"][2] == 1).all()
    assert all(p > -1e3 for prompt in one["zeros"]["logprobs"] for p in prompt)


@pytest.fixture(scope="session")
def ranks(vllm_job: Job, prompts: list[list[int]]) -> dict[str, Any]:
    """Every run of two processes. Starting them takes half a minute each."""
    if DEVICE == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    split = {"tensor_parallel_size": 2}
    by_expert = split | {"enable_expert_parallel": True}
    runs = {
        f"{way} {scheme}": {"quantization": f"moeq_{scheme}"} | options
        for way, options, scheme in (
            ("channels", split, INT8),
            ("channels", split, "fp8_per_tensor"),
            ("experts", by_expert, INT8),
        )
    }
    runs["divided"] = {"quantization": "moeq_fp8_per_block"} | split
    runs = {name: EAGER | run for name, run in runs.items()}
    # Compiled: vLLM 0.32 has no eager pipelines on CPUs
    runs["stages"] = {"quantization": f"moeq_{INT8}", "pipeline_parallel_size": 2}
    return vllm_job(model_folder(), prompts, runs, ranks=2)


def of_rank(name: str, tensor: Tensor, rank: int, by_expert: bool) -> Tensor:
    """What one of two ranks holds of a tensor of `ours`."""
    if tensor.dtype == torch.float8_e4m3fn:
        tensor = tensor.view(torch.uint8)
    if ".experts." in name:
        if by_expert:
            return tensor.chunk(2)[rank]
        if "w13" in name:
            halves = tensor.chunk(2, dim=1) if tensor.ndim > 1 else ()  # gate, up
            return torch.cat([h.chunk(2, dim=1)[rank] for h in halves], 1) if halves else tensor
        return tensor.chunk(2, dim=2)[rank] if "codes" in name else tensor
    if "o_proj" in name:  # its columns; scales are of whole rows, or of the whole
        return tensor.chunk(2, dim=1)[rank] if "codes" in name else tensor
    return tensor.chunk(2)[rank] if tensor.ndim else tensor


@pytest.mark.parametrize(
    ("way", "scheme"), [("channels", INT8), ("channels", "fp8_per_tensor"), ("experts", INT8)]
)
def test_ranks_hold_parts_of_the_same_bytes(ranks: dict[str, Any], way: str, scheme: str) -> None:
    """Whose scales are those of one process: nothing depends on the number of ranks."""
    run = ranks[f"{way} {scheme}"]
    assert "error" not in run, run
    states = ours(model_folder(), scheme)
    for rank, found in enumerate(run["digests"]):
        parts = {n: of_rank(n, t, rank, way == "experts") for n, t in states.items()}
        assert found == {name: digest(tensor) for name, tensor in merged(parts).items()}


@pytest.mark.parametrize(
    ("way", "scheme"), [("channels", INT8), ("channels", "fp8_per_tensor"), ("experts", INT8)]
)
def test_ranks_predict_the_same(
    one: dict[str, Any], ranks: dict[str, Any], floor: float, way: str, scheme: str
) -> None:
    found = distance(one[scheme]["logprobs"], ranks[f"{way} {scheme}"]["logprobs"])
    assert found <= 4 * floor, (found, floor)


def test_stages_of_a_pipeline(one: dict[str, Any], ranks: dict[str, Any], floor: float) -> None:
    assert "error" not in ranks["stages"], ranks["stages"]
    first, second = ranks["stages"]["digests"]
    assert first
    assert second
    assert first.keys().isdisjoint(second)
    assert first | second == one[INT8]["digests"][0]
    assert distance(one[INT8]["logprobs"], ranks["stages"]["logprobs"]) <= 4 * floor


def test_a_divided_block_is_refused(ranks: dict[str, Any]) -> None:
    assert "error" in ranks["divided"]
    assert "cuts it into parts of [128, 64, 64], which divide blocks of 128 x 128" in ranks["log"]
    assert "use fewer ranks, or a scheme with a scale per channel" in ranks["log"]


def test_a_config_chooses_layers(one: dict[str, Any]) -> None:
    everything = set(one["fp8_per_channel"]["digests"][0])
    found = set(one["ignore"]["digests"][0])
    gone = everything - found
    assert {".".join(name.split(".")[2:5]) for name in gone} == {
        "0.mlp.experts",
        *(f"{layer}.self_attn.qkv_proj" for layer in range(5)),
    }
    experts = {name for name in everything if ".experts." in name}
    assert set(one["targets"]["digests"][0]) == experts == set(one["experts alone"]["digests"][0])
    assert one["targets"]["digests"] == one[INT8]["digests"]
    assert everything > experts


def test_a_head_that_is_never_quantized_may_be_ignored(one: dict[str, Any]) -> None:
    assert "error" not in one["head ignored"], one["head ignored"]


def test_the_router_is_never_quantized(one: dict[str, Any]) -> None:
    for scheme in SCHEMES:
        assert not [name for name in one[scheme]["digests"][0] if ".gate." in name]


@pytest.fixture(scope="session")
def gpt_oss(vllm_job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Experts with biases in one tensor, whose gate is clamped and alternates with up: stored and
    loaded in a way of the model's own."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    small = GptOssConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, num_local_experts=8, num_experts_per_tok=2,
        intermediate_size=192, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    model = GptOssForCausalLM(small)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.08)
    folder = tmp_path_factory.mktemp("gpt_oss")
    model.to(torch.bfloat16).save_pretrained(folder)
    prompts = [[i * 37 % 500 for i in range(start, start + 60)] for start in (1, 100)]
    runs: dict[str, dict[str, Any]] = {"bf16": {"quantization": None}}
    runs |= {s: {"quantization": f"moeq_{s}"} | config(linear="none") for s in GPT_OSS_SCHEMES}
    runs[INT8] = {"quantization": f"moeq_{INT8}"}
    found = vllm_job(folder, prompts, {name: EAGER | run for name, run in runs.items()})
    return folder, found | {"prompts": prompts}


GPT_OSS_SCHEMES = (INT8, "fp8_per_block")


@pytest.mark.parametrize("scheme", GPT_OSS_SCHEMES)
def test_experts_with_biases_and_a_clamped_gate(
    gpt_oss: tuple[Path, dict[str, Any]], scheme: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder, found = gpt_oss
    assert "error" not in found[scheme], found[scheme]
    mine = moeq.load(folder, OnlineQuantizationConfig(moe=scheme), device=DEVICE)
    expected = {
        name.replace(".experts.", ".experts.routed_experts."): digest(parameter.detach().cpu())
        for name, parameter in mine.named_parameters()
        if name.endswith(("_codes", "_scale"))
    }
    assert found[scheme]["digests"] == [expected]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)
    prompts = found["prompts"]
    noise = distance(judged(plain, prompts), found["bf16"]["logprobs"])
    assert distance(judged(mine, prompts), found[scheme]["logprobs"]) <= 4 * noise


@pytest.mark.skipif(DEVICE == "cuda", reason="a test of vLLM's CPU build")
def test_vllm_without_the_plugin_reads_linears_of_four_bits(
    vllm_job: Job, prompts: list[list[int]], floor: float, tmp_path: Path
) -> None:
    """Its CPU build has a kernel for them on every machine; for experts it wants AMX."""
    chosen = OnlineQuantizationConfig(moe="none", linear="int4_per_group_weight_only")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    quantize_checkpoint(model_folder(), chosen, whole, file_format="compressed-tensors")

    def turn(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            tensors[name] = tensors[name].roll(1, 0)

    changed(whole, broken, turn)
    runs = {name: EAGER | {"model": str(path)} for name, path in (("ct", whole), ("no", broken))}
    found = vllm_job(whole, prompts, runs, plugins="")
    assert "error" not in found["ct"], found["ct"]
    mine = judged(moeq.load(model_folder(), chosen), prompts)
    assert distance(mine, found["ct"]["logprobs"]) <= 4 * floor
    assert distance(mine, found["no"]["logprobs"]) > 40 * floor


def test_random_codes_where_vllm_is_asked_for_dummies(one: dict[str, Any]) -> None:
    assert "error" not in one["dummy"], one["dummy"]
    assert one["dummy"]["digests"][0].keys() == one[INT8]["digests"][0].keys()


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (
            "no expert",
            "layers.1.mlp.experts: 1 expert tensors never arrived, the first: down",
        ),
        ("no linear", "layers.1.self_attn.qkv_proj.weight: NaN, or some of it never arrived"),
        ("no router", "layers.1.mlp.gate.weight: NaN, or some of it never arrived"),
        ("no norm", "model.layers.1.input_layernorm.weight"),
        ("no such target", "target 'lm_head' matches no layer that can be quantized"),
        (
            "nan",
            "model.layers.1.mlp.experts.w2_weight, w2 of expert 4: nan at [5, 6]"
            if DEVICE == "cpu"  # GPUs do not wait for the answer
            else "model.layers.1.mlp.experts: NaN or Inf among the weights of its experts",
        ),
        ("inf", "model.layers.1.self_attn.o_proj.weight: Inf among its values"),
        ("no layer", "pattern 'model.layers.9.*' matches no layer"),
        ("parts differ", "qkv_proj is one layer in vLLM, and its parts differ"),
        (
            "unknown key",
            "unknown key 'ignored' in the quantization config (did you mean",
        ),
        ("no scheme", "--quantization moeq needs a config that says which scheme"),
        ("vLLM's config", "for vLLM's own schemes|quantization_config is only supported when"),
    ],
)
def test_what_is_wrong_is_said_at_the_start(one: dict[str, Any], run: str, says: str) -> None:
    error = one[run].get("error", "")
    assert any(way in error for way in says.split("|")), one[run]
