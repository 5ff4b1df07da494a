"""Four bits to a weight: moeq's rounding against bitsandbytes' nf4 and hqq, on the same experts.

    pip install bitsandbytes hqq        # both optional: what is missing is left out
    python benchmarks/four_bits.py

Only the experts of the embedded model are replaced, by what each method makes of them; arithmetic
is fp32, so that nothing but the rounding shows. KL is the mean over the held-out text and over
orders of the columns: which columns share a group is an accident of training, and worth 3 % of KL.
Every method meets the same orders. Bits are those of all that a method stores, by weight, and what
that would be with rows of 2048.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeq import four_bits
from moeq.embedded import held_out_text, model_folder
from moeq.fidelity.divergence import divergence
from moeq.fidelity.statistics import interval
from moeq.quantize import amax, dequantize, quantize, scale_from_amax
from moeq.schemes import Granularity

WINDOW, TOKENS = 512, 8192

CHANNEL = Granularity.CHANNEL

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Method(NamedTuple):
    """A way of storing a matrix [N, K]: what it gives back in fp32, and its bits for N and K."""

    name: str
    rounded: Callable[[Tensor], Tensor]
    bits: Callable[[int, int], int]


def ours(group_dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def rounded(weight: Tensor) -> Tensor:
        scale = scale_from_amax(amax(weight, CHANNEL), torch.uint8)
        n, k = weight.shape
        codes = torch.empty(n, four_bits.packed(k), dtype=torch.uint8)
        group = torch.empty(n, four_bits.groups(k), dtype=group_dtype)
        four_bits.quantize(weight, scale, codes, group)
        return dequantize(codes, scale, CHANNEL, group_scale=group, columns=k)

    return rounded


def of_groups(n: int, k: int) -> int:
    """Bits of what `ours` stores."""
    return 8 * n * (four_bits.packed(k) + four_bits.groups(k)) + 32 * n


def ocp(weight: Tensor) -> Tensor:
    """MXFP4 as its specification converts: 2^(floor(log2 amax) - 2), above 6 becomes 6."""
    n, k = weight.shape
    groups = weight.view(n, k // 32, 32)
    scale = 2.0 ** (groups.abs().amax(-1, keepdim=True).log2().floor() - 2).clamp_(min=-127)
    distance = ((groups / scale).abs()[..., None] - torch.tensor(E2M1)).abs()
    even_first = distance + torch.arange(8) % 2 * 1e-6
    values = torch.tensor(E2M1)[even_first.argmin(-1)]
    return (values * groups.sign() * scale).view(n, k)


def nearest(weight: Tensor) -> Tensor:
    """The baseline: -7..7, a scale of amax / 7 in fp16 for 32 columns."""
    n, k = weight.shape
    groups = weight.view(n, k // 32, 32)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).half().float().clamp_(min=2.0**-24)
    return ((groups / scale).round_().clamp_(-7, 7) * scale).view(n, k)


def int8(weight: Tensor) -> Tensor:
    scale = scale_from_amax(amax(weight, CHANNEL), torch.int8)
    return dequantize(quantize(weight, scale, torch.int8, CHANNEL), scale, CHANNEL)


def bitsandbytes(double: bool) -> Callable[[Tensor], Tensor]:
    functional: Any = __import__("bitsandbytes.functional").functional

    def rounded(weight: Tensor) -> Tensor:
        # Flat: of rows that 64 does not divide it gives back other numbers than it stored
        codes, state = functional.quantize_4bit(
            weight.contiguous().flatten(),
            blocksize=64,
            quant_type="nf4",
            compress_statistics=double,
        )
        back: Tensor = functional.dequantize_4bit(codes, state).reshape(weight.shape)
        return back

    return rounded


def hqq(small: bool) -> Callable[[Tensor], Tensor]:
    quantizer: Any = __import__("hqq.core.quantize").core.quantize.Quantizer
    eight: dict[str, Any] = {
        "nbits": 8,
        "optimize": False,
        "device": "cpu",
        "view_as_float": False,
    }

    def rounded(weight: Tensor) -> Tensor:
        codes, meta = quantizer.quantize(
            weight,
            nbits=4,
            group_size=64,
            axis=1,
            channel_wise=True,
            optimize=True,
            round_zero=False,
            device="cpu",
        )
        for name, group in (("scale", 128), ("zero", None)):
            if small:
                stored, its = quantizer.quantize(
                    meta[name], group_size=group, channel_wise=group is not None, **eight
                )
                its["compute_dtype"] = torch.float32
                meta[name] = quantizer.dequantize(stored, its)
            else:
                meta[name] = meta[name].half().float()
        meta["compute_dtype"] = torch.float32
        back: Tensor = quantizer.dequantize(codes, meta).reshape(weight.shape)
        return back

    return rounded


def methods() -> list[Method]:
    """Those whose libraries are installed."""
    found = [
        Method("int8 per channel", int8, lambda n, k: 8 * n * k + 32 * n),
        Method("moeq int4_per_group", ours(torch.float8_e4m3fn), of_groups),
        Method("nearest, fp16 scale of 32", nearest, lambda n, k: 4 * n * k + n * k // 32 * 16),
        Method("moeq mxfp4", ours(torch.float8_e8m0fnu), of_groups),
        Method("mxfp4, the OCP's scales", ocp, lambda n, k: 4 * n * k + n * k // 32 * 8),
    ]
    if importlib.util.find_spec("bitsandbytes"):
        found += [
            Method(
                "bitsandbytes nf4",
                bitsandbytes(False),
                lambda n, k: 4 * n * k + 32 * math.ceil(n * k / 64),
            ),
            Method(
                "bitsandbytes nf4, double",
                bitsandbytes(True),
                lambda n, k: (
                    4 * n * k + 8 * (b := math.ceil(n * k / 64)) + 32 * math.ceil(b / 256) + 32
                ),
            ),
        ]
    if importlib.util.find_spec("hqq"):
        found += [
            Method("hqq, groups of 64", hqq(False), lambda n, k: 4 * n * k + n * k // 64 * 32),
            Method(
                "hqq, 8-bit scale, zero",
                hqq(True),
                lambda n, k: 4 * n * k + n * k // 64 * 16 + math.ceil(n * k / 64 / 128) * 64 + 64,
            ),
        ]
    return found


def order_of(number: int, name: str, k: int) -> Tensor:
    """The columns' own order, then random ones."""
    if number == 0:
        return torch.arange(k)
    seed = number * 1_000_003 + zlib.crc32(name.encode())
    return torch.randperm(k, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--orders", type=int, default=5, help="of columns, for each method")
    orders = parser.parse_args().orders
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    ids = torch.tensor(tokenizer(held_out_text())["input_ids"][:TOKENS]).view(-1, WINDOW)
    experts = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith(("gate_up_proj", "down_proj")) and parameter.ndim == 3
    }
    original = {name: parameter.clone() for name, parameter in experts.items()}

    def logits(window: Tensor) -> Tensor:
        found: Tensor = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        return found

    reference = [logits(window) for window in ids]
    print(f"{'':26}{'bits':>7}{'K=2048':>8}{'error':>8}{'KL':>10}   95 % interval, x 1e-3")
    for name, rounded, bits in methods():
        kl, wrong, whole = [], 0.0, 0.0
        for number in range(orders):
            for own, parameter in experts.items():
                order = order_of(number, own, parameter.shape[-1])
                back = order.argsort()
                for matrix, before in zip(parameter, original[own], strict=True):
                    matrix.copy_(rounded(before[:, order].contiguous())[:, back])
                wrong += float((parameter - original[own]).double().square().sum())
                whole += float(original[own].double().square().sum())
            kl.append(
                torch.cat(
                    [divergence(r, logits(w)).kl for r, w in zip(reference, ids, strict=True)]
                ).numpy()
            )
        stored = sum(p.shape[0] * bits(*p.shape[1:]) for p in experts.values())
        weights = sum(p.numel() for p in experts.values())
        mean = interval(np.stack(kl), np.mean)
        print(
            f"{name:26}{stored / weights:7.3f}{bits(2048, 2048) / 2048**2:8.3f}"
            f"{(wrong / whole) ** 0.5:8.4f}{mean.value * 1e3:10.3f}"
            f"   {mean.low * 1e3:.3f} to {mean.high * 1e3:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
