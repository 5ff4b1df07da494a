"""What codes are worth, in the number formats that tensor cores and fp32 units take.

Codes of four bits ("int4", "mxfp4"; `moeq.four_bits`) come as words of eight. What is done to them
is counted in instructions of integers, of which a GPU has half as many a second as of fp32: a code
is brought to where a number between 1/2 and 2 has its fraction, and what that number is more than
the code is taken off afterwards, with the multiplication by a scale or, in fp32, once for a whole
group. The eight magnitudes of e2m1 are looked up by PRMT, four codes at a time, and so are their
negatives, by the other halves of nibbles: PRMT gives 0 where a nibble's highest bit is set.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeq.kernels.triton.rows import GROUP

WORD = tl.constexpr(8)
"""Codes in a word."""

WORDS = tl.constexpr(4)
"""Of a group."""

MXFP4_LIFT = tl.constexpr(512.0)
"""What products of `decode_words` lack there, so that their scales fit into bf16 and fp16."""


def _ptx(*lines: str) -> tl.constexpr:
    return tl.constexpr("{\n" + "\n".join(lines) + "\n}")


def _int4_pairs(magic: str, start: str, *finish: str) -> tl.constexpr:
    """A word in $4 to four pairs in $0..$3. PRMT brings the halves of a byte to the low ends of 16
    bits each; `magic` makes numbers of them, 128 + 8 + code in bf16, 1024 + 8 + code in fp16."""
    lines = [".reg .b32 high, minus, zero;", "shr.u32 high, $4, 4;", start]
    for byte in range(4):
        lines += [
            f"prmt.b32 ${byte}, $4, high, 0x0{byte + 4}0{byte};",
            f"lop3.b32 ${byte}, ${byte}, 0x000F000F, {magic}, 0xEA;",
            *(line.replace("$pair", f"${byte}") for line in finish),
        ]
    return _ptx(*lines)


# 136 times a group scale has few enough bits for bf16, so one operation subtracts and multiplies
_INT4_BF16 = _int4_pairs(
    "0x43004300",
    "mov.b32 minus, 0xC308C308; mov.b32 zero, 0x80008000; fma.rn.bf16x2 minus, $5, minus, zero;",
    "fma.rn.bf16x2 $pair, $pair, $5, minus;",
)
# 1032 times one may be too large for fp16
_INT4_FP16 = _int4_pairs(
    "0x64006400",
    "mov.b32 minus, 0xE408E408;",
    "add.rn.f16x2 $pair, $pair, minus;",
    "mul.rn.f16x2 $pair, $pair, $5;",
)

_E2M1_BYTES = (
    ".reg .b32 a, b, c, d, first, second, even, odd;",
    "mov.b32 even, 0x03020100; mov.b32 odd, 0x0C080604;",
    "shr.u32 b, $word, 16; xor.b32 c, $word, 0x88888888; shr.u32 d, c, 16;",
    "prmt.b32 a, even, odd, $word; prmt.b32 b, even, odd, b;",
    "prmt.b32 c, even, odd, c; prmt.b32 d, even, odd, d;",
    "add.u32 a, a, 0x40404040; sub.u32 first, a, c;",
    "add.u32 b, b, 0x40404040; sub.u32 second, b, d;",
)
"""64 + 2 * code of the low four codes into bytes of `first`, of the high four of `second`."""


def _e2m1_bytes(word: str) -> list[str]:
    return [line.replace("$word", word) for line in _E2M1_BYTES]


# Below the bits of 1/2, a byte of 64 + 2 * code makes 3/4 + code / 128 of it
_E2M1_BF16 = _ptx(
    ".reg .b32 minus, zero, half;",
    "mov.b32 half, 0x3F3F3F3F; mov.b32 minus, 0xBF40BF40; mov.b32 zero, 0x80008000;",
    "fma.rn.bf16x2 minus, $5, minus, zero;",
    *_e2m1_bytes("$4"),
    "prmt.b32 $0, first, half, 0x4140; prmt.b32 $1, first, half, 0x4342;",
    "prmt.b32 $2, second, half, 0x4140; prmt.b32 $3, second, half, 0x4342;",
    *(f"fma.rn.bf16x2 ${pair}, ${pair}, $5, minus;" for pair in range(4)),
)


def _e2m1_pairs_fp16() -> tl.constexpr:
    """Moved to where fp16 has them, codes are 2^-14 times their values, subnormals included."""
    lines = [".reg .b32 even;", "shl.b32 even, $4, 4;"]
    for byte in range(4):
        lines += [
            f".reg .b32 sign{byte};",
            f"prmt.b32 sign{byte}, even, $4, 0x{byte + 4}{byte + 4}{byte}{byte};",
            f"shr.u32 ${byte}, sign{byte}, 3;",
            f"and.b32 ${byte}, ${byte}, 0x0E000E00;",
            f"lop3.b32 ${byte}, sign{byte}, 0x80008000, ${byte}, 0xEA;",
            f"mul.rn.f16x2 ${byte}, ${byte}, $5;",
        ]
    return _ptx(*lines)


_E2M1_FP16 = _e2m1_pairs_fp16()

_INT4_FP32 = _ptx(
    ".reg .b32 a, b, c, d;",
    "shl.b32 a, $8, 15; shl.b32 b, $8, 7; shr.u32 c, $8, 1; shr.u32 d, $8, 9;",
    *(
        f"lop3.b32 ${2 * pair + odd}, {shifted}, {mask}, 0x3F800000, 0xEA;"
        for pair, shifted in enumerate("abcd")
        for odd, mask in enumerate(("0x00078000", "0x00780000"))
    ),
)
_E2M1_FP32 = _ptx(
    ".reg .b32 half;",
    "mov.b32 half, 0x3F000000;",
    *_e2m1_bytes("$8"),
    *(
        f"prmt.b32 ${code}, {'first' if code < 4 else 'second'}, half, 0x7{code % 4}44;"
        for code in range(8)
    ),
)


@triton.jit
def decode_codes(codes, dtype: tl.constexpr, FP8_BITS: tl.constexpr):
    """int8 or fp8 codes as fp16, bf16 or fp32, exactly. FP8_BITS: e4m3 as int8 bits, for GPUs that
    have no such type: the bits move to where bf16 (fp16) has them, and a power of two corrects the
    exponent's bias, subnormals included."""
    if FP8_BITS:
        wide = codes.to(tl.int16)
        if dtype == tl.float16:
            return ((wide << 7) & -16385).to(tl.float16, bitcast=True) * 256.0
        else:
            value = ((wide << 4) & -30736).to(tl.bfloat16, bitcast=True).to(tl.float32)
            return (value * 1.329227995784916e36).to(dtype)
    else:
        return codes.to(dtype)


@triton.jit
def decode_words(words, group, dtype: tl.constexpr, GROUPS: tl.constexpr, PTX: tl.constexpr):
    """Words int32 [N, K / 8] of codes and bits [N, K / 32] of group scales -> their products [N, K]
    in fp16 or bf16, exactly, those of mxfp4 divided by `MXFP4_LIFT`. PTX: with few
    instructions, which Triton's interpreter does not know."""
    N: tl.constexpr = words.shape[0]
    COUNT: tl.constexpr = group.shape[1]
    words = tl.reshape(words, (N, COUNT, WORDS))
    wide = group.to(tl.int8, bitcast=True).to(tl.int16)
    if GROUPS == "int4" and dtype == tl.float16:
        bits = (((wide << 7) & -16512) + 8192).to(tl.uint16, bitcast=True)
    elif GROUPS == "int4":
        bits = (((wide << 4) & -30736) + 15360).to(tl.uint16, bitcast=True)
    elif dtype == tl.float16:
        bits = (tl.maximum(group.to(tl.int32) - 107, 0) << 10).to(tl.uint16)
    else:  # 128 times the group scale, because codes are divided by that
        bits = ((group.to(tl.int16) - 2) << 7).to(tl.uint16, bitcast=True)
    if PTX:
        scale = bits.to(tl.uint32)
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            (_E2M1_FP16 if dtype == tl.float16 else _E2M1_BF16)
            if GROUPS == "mxfp4"
            else (_INT4_FP16 if dtype == tl.float16 else _INT4_BF16),
            "=&r,=&r,=&r,=&r,r,r",
            [words, (scale | (scale << 16))[:, :, None]],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
        pairs = tl.join(tl.join(p0, p2), tl.join(p1, p3))
        value = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16)).to(dtype, bitcast=True)
    else:
        code = (words[:, :, :, None] >> (4 * tl.arange(0, WORD))[None, None, None, :]) & 15
        scale = bits.to(dtype, bitcast=True).to(tl.float32)
        if GROUPS == "mxfp4":
            code = _e2m1(code)
            lift = tl.where(group < 10, 0, group.to(tl.int32) - 9) << 23
            scale = lift.to(tl.float32, bitcast=True)
        else:
            code = code.to(tl.float32) - 8.0
        value = (code * scale[:, :, None, None]).to(dtype)
    return tl.reshape(value, (N, COUNT * GROUP))


@triton.jit
def own_groups(value):
    """[N, K] with the columns of every 128 in another order, so that of four threads that share
    them as operands of a product each has whole groups."""
    N: tl.constexpr = value.shape[0]
    K: tl.constexpr = value.shape[1]
    value = tl.reshape(value, (N, K // (4 * GROUP), 4, WORDS, WORD))
    return tl.reshape(tl.permute(value, (0, 1, 3, 2, 4)), (N, K))


@triton.jit
def fractions(words, GROUPS: tl.constexpr, PTX: tl.constexpr):
    """fp32 numbers [M, N, K / 32, 32] of words [M, N, K / 8]: `code / step + offset`, see
    `columns`."""
    M: tl.constexpr = words.shape[0]
    N: tl.constexpr = words.shape[1]
    if PTX:
        f0, f1, f2, f3, f4, f5, f6, f7 = tl.inline_asm_elementwise(
            _E2M1_FP32 if GROUPS == "mxfp4" else _INT4_FP32,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(
                tl.float32, tl.float32, tl.float32, tl.float32,
                tl.float32, tl.float32, tl.float32, tl.float32,
            ),
            is_pure=True,
            pack=1,
        )  # fmt: skip
        low = tl.join(tl.join(f0, f4), tl.join(f2, f6))
        high = tl.join(tl.join(f1, f5), tl.join(f3, f7))
        value = tl.join(low, high)
    else:
        at = tl.arange(0, WORD)
        code = (words[:, :, :, None] >> (4 * at)[None, None, None, :]) & 15
        if GROUPS == "mxfp4":
            value = _e2m1(code) * 0.0078125 + 0.75
        else:
            step = tl.where(at % 2 == 0, 0.00390625, 0.0625)[None, None, None, :]
            value = code.to(tl.float32) * step + 1.0
    return tl.reshape(value, (M, N, words.shape[2] // WORDS, GROUP))


@triton.jit
def _e2m1(code):
    """Stored codes 0..15 as fp32, by arithmetic."""
    place = (code & 7).to(tl.float32)
    place = tl.maximum(tl.maximum(place * 0.5, place - 2.0), place * 2.0 - 8.0)
    return tl.where(code >= 8, -place, place)


@triton.jit
def columns(x, GROUPS: tl.constexpr):
    """Columns fp32 [S, K / 32, 32] as what `fractions` are multiplied by, and what is to be added
    for a group, [S, K / 32], so that the sum is that of `code * x / step`. The steps are 128 for
    mxfp4 and 16 for int4, whose even codes lie 4 bits lower and have columns 16 times as large."""
    if GROUPS == "int4":
        even = (tl.arange(0, GROUP) % 2 == 0)[None, None, :]
        x = tl.where(even, x * 16.0, x)
        return x, tl.sum(x * tl.where(even, -1.03125, -1.5), 2)
    else:
        return x, tl.sum(x, 2) * -0.75


@triton.jit
def step_scale(group, GROUPS: tl.constexpr):
    """fp32 group scales from their bits, times the step of `columns`."""
    if GROUPS == "mxfp4":
        bits = (group.to(tl.int32) + 7) << 23
    else:
        bits = ((group.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -2014314496) + 1040187392
    return bits.to(tl.float32, bitcast=True)
