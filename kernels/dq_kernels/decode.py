"""Words in streaming order -> a tile of weights in registers, ready to be the left operand of a matrix instruction.

A field of q bits inside 16 is made a float without any conversion: its bits are OR-ed into the mantissa of 128.0 (bf16)
or 1024.0 (fp16), and the constant is subtracted again, exactly. A field need not be shifted down to bit 0 as long as it
lies inside the 7 mantissa bits of bf16: at bit 3 it counts eightfold, and its scale is divided by 8, a power of two, so
still exactly. That saves 5 of 7 shifts at 2 bits and 2 of 4 at 3 bits; decoding, not memory, is what limits small M.

The instructions are written in PTX for two 16-bit values at a time (plain Triton spends 2.6 integer instructions a
weight, this 1.2); the interpreter, which has no PTX, takes the same fields with shifts and masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from dq_kernels.levels import E2M1, NF4, level

BF16_ONE, FP16_ONE = 0x4300, 0x6400  # 128.0 and 1024.0: one unit in the last place is 1


def _both(value: int) -> str:
    return f"0x{value << 16 | value:08X}"


def _fields(takes: Sequence[tuple[int, int]], magic: int, lut: str = "0xEA") -> tl.constexpr:
    """PTX: one register of two words in, for each (shift, mask) one register of two floats out.

    ``lut``: of lop3; 0xEA is (a & b) | c.
    """
    source = f"${len(takes)}"
    shifts = sorted({shift for shift, _ in takes if shift})
    lines = [f".reg .b32 {', '.join(f's{shift}' for shift in shifts)};"] if shifts else []
    lines += [f"shr.u32 s{shift}, {source}, {shift};" for shift in shifts]
    for out, (shift, mask) in enumerate(takes):
        word = f"s{shift}" if shift else source
        lines.append(f"lop3.b32 ${out}, {word}, {_both(mask)}, {_both(magic)}, {lut};")
    return tl.constexpr("{ " + "\n".join(lines) + " }")


def _spare(magic: int) -> tl.constexpr:
    """PTX: bit 15 of three words -> one 3-bit code, as floats."""
    return tl.constexpr(
        "{ .reg .b32 a, b, c; shr.u32 a, $1, 15; shr.u32 b, $2, 14; shr.u32 c, $3, 13;\n"
        f"lop3.b32 a, a, 0x00010001, {_both(magic)}, 0xEA;\n"
        "lop3.b32 a, b, 0x00020002, a, 0xEA;\n"
        "lop3.b32 $0, c, 0x00040004, a, 0xEA; }"
    )


def _lookup(levels: Sequence[float], dtype: torch.dtype) -> tl.constexpr:
    """PTX: one register of two words of 4 fields in, for each field one register of its two levels out.

    A byte permutation picks 4 of 8 bytes by the low 3 bits of a word's nibbles: two look up a byte of 16 levels, one
    makes the mask that chooses between them, and a last round puts low and high bytes side by side. 3.4 instructions a
    weight, for any table.
    """
    bits = torch.tensor(levels).to(dtype).view(torch.int16).tolist()

    def four(first: int, byte: int) -> str:
        return f"0x{sum((bits[first + i] >> 8 * byte & 255) << 8 * i for i in range(4)):08X}"

    lines = [
        ".reg .b32 t, c0, c1, b0, b1, m, p, q, l0, l1, h0, h1, u0, u1, v0, v1;",
        "and.b32 c0, $4, 0x77777777;", "shr.u32 c1, c0, 16;", "shr.u32 t, $4, 3;", "and.b32 b0, t, 0x11111111;",
        "shr.u32 b1, b0, 16;",
    ]  # fmt: skip
    for e in range(2):
        lines.append(f"prmt.b32 m, 0x0000FF00, 0, b{e};")
        for byte, name in enumerate("lh"):
            lines += [
                f"prmt.b32 p, {four(0, byte)}, {four(4, byte)}, c{e};",
                f"prmt.b32 q, {four(8, byte)}, {four(12, byte)}, c{e};",
                f"lop3.b32 {name}{e}, m, q, p, 0xCA;",
            ]
        lines += [f"prmt.b32 u{e}, l{e}, h{e}, 0x5140;", f"prmt.b32 v{e}, l{e}, h{e}, 0x7362;"]
    for out, (name, order) in enumerate((("u", "0x5410"), ("u", "0x7632"), ("v", "0x5410"), ("v", "0x7632"))):
        lines.append(f"prmt.b32 ${out}, {name}0, {name}1, {order};")
    return tl.constexpr("{ " + "\n".join(lines) + " }")


TAKES_2 = [(0, 0x03), (0, 0x0C), (0, 0x30), (6, 0x03), (6, 0x0C), (6, 0x30), (12, 0x03), (12, 0x0C)]
TAKES_3 = [(0, 0x07), (0, 0x38), (6, 0x07), (6, 0x38), (12, 0x07)]
TAKES_4 = [(0, 0x0F), (4, 0x0F), (8, 0x0F), (12, 0x0F)]
# 8 bits do not fit a bf16 mantissa. The top bit is stored flipped: v = 128 + low 7 bits, and c = 128 or 256 from the
# top bit (which lands in the exponent), give v - c = code - 128.
TAKES_8 = [(0, 0x7F), (0, 0x80), (8, 0x7F), (8, 0x80)]
TAKES_8_FP16 = [(0, 0xFF), (8, 0xFF)]

ASM2_BF16, ASM2_FP16 = _fields(TAKES_2, BF16_ONE), _fields(TAKES_2, FP16_ONE)
ASM3_BF16, ASM3_FP16 = _fields(TAKES_3, BF16_ONE), _fields(TAKES_3, FP16_ONE)
ASM4_BF16, ASM4_FP16 = _fields(TAKES_4, BF16_ONE), _fields(TAKES_4, FP16_ONE)
# fp16 has room for 8 bits: (a & b) ^ c flips the top bit back.
ASM8_BF16, ASM8_FP16 = _fields(TAKES_8, BF16_ONE), _fields(TAKES_8_FP16, FP16_ONE | 0x80, lut="0x6A")
ASM_NF4_BF16, ASM_NF4_FP16 = _lookup(NF4.value, torch.bfloat16), _lookup(NF4.value, torch.float16)
ASM_E2M1_BF16, ASM_E2M1_FP16 = _lookup(E2M1.value, torch.bfloat16), _lookup(E2M1.value, torch.float16)
ASM3_SPARE_BF16, ASM3_SPARE_FP16 = _spare(BF16_ONE), _spare(FP16_ONE)


@triton.jit
def cat2(a, b):
    """[BN, P], [BN, P] -> [BN, 2P], columns of a first: only a renaming of registers when P is at least 8."""
    BN: tl.constexpr = a.shape[0]
    P: tl.constexpr = a.shape[1]
    return tl.permute(tl.join(a, b), (0, 2, 1)).reshape(BN, 2 * P)


@triton.jit
def take(w, shift, MASK: tl.constexpr, COMPUTE: tl.constexpr):
    """The plain form of one field of TAKES_*, without the 128 or 1024: what the interpreter can run."""
    return ((w.to(tl.int32) >> shift) & MASK).to(COMPUTE)


@triton.jit
def fields2(w, COMPUTE: tl.constexpr, PLAIN: tl.constexpr):
    """The 8 fields of 2-bit words, each [BN, P] in COMPUTE, counting 1, 4, 16, 1, 4, 16, 1 and 4 times."""
    if PLAIN:
        return (
            take(w, 0, 3, COMPUTE), take(w, 0, 12, COMPUTE), take(w, 0, 48, COMPUTE), take(w, 6, 3, COMPUTE),
            take(w, 6, 12, COMPUTE), take(w, 6, 48, COMPUTE), take(w, 12, 3, COMPUTE), take(w, 12, 12, COMPUTE),
        )  # fmt: skip
    q0, q1, q2, q3, q4, q5, q6, q7 = tl.inline_asm_elementwise(
        ASM2_FP16 if tl.float16 == COMPUTE else ASM2_BF16, "=r,=r,=r,=r,=r,=r,=r,=r,r", [w],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
    )  # fmt: skip
    return (
        q0.to(COMPUTE, bitcast=True), q1.to(COMPUTE, bitcast=True), q2.to(COMPUTE, bitcast=True),
        q3.to(COMPUTE, bitcast=True), q4.to(COMPUTE, bitcast=True), q5.to(COMPUTE, bitcast=True),
        q6.to(COMPUTE, bitcast=True), q7.to(COMPUTE, bitcast=True),
    )  # fmt: skip


@triton.jit
def fields3(w, COMPUTE: tl.constexpr, PLAIN: tl.constexpr):
    """The 5 whole fields of 3-bit words, counting 1, 8, 1, 8 and 1 times."""
    if PLAIN:
        return (
            take(w, 0, 7, COMPUTE), take(w, 0, 56, COMPUTE), take(w, 6, 7, COMPUTE), take(w, 6, 56, COMPUTE),
            take(w, 12, 7, COMPUTE),
        )  # fmt: skip
    q0, q1, q2, q3, q4 = tl.inline_asm_elementwise(
        ASM3_FP16 if tl.float16 == COMPUTE else ASM3_BF16, "=r,=r,=r,=r,=r,r", [w],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
    )  # fmt: skip
    return (
        q0.to(COMPUTE, bitcast=True), q1.to(COMPUTE, bitcast=True), q2.to(COMPUTE, bitcast=True),
        q3.to(COMPUTE, bitcast=True), q4.to(COMPUTE, bitcast=True),
    )  # fmt: skip


@triton.jit
def spare3(a, b, c, COMPUTE: tl.constexpr, PLAIN: tl.constexpr):
    """The 16th code of three words: their bits 15."""
    if PLAIN:
        return take(a, 15, 1, COMPUTE) + take(b, 14, 2, COMPUTE) + take(c, 13, 4, COMPUTE)
    q = tl.inline_asm_elementwise(
        ASM3_SPARE_FP16 if tl.float16 == COMPUTE else ASM3_SPARE_BF16, "=r,r,r,r", [a, b, c],
        dtype=tl.int16, is_pure=True, pack=2,
    )  # fmt: skip
    return q.to(COMPUTE, bitcast=True)


@triton.jit
def fields4(w, COMPUTE: tl.constexpr, PLAIN: tl.constexpr):
    """The 4 fields of 4-bit words."""
    if PLAIN:
        return take(w, 0, 15, COMPUTE), take(w, 4, 15, COMPUTE), take(w, 8, 15, COMPUTE), take(w, 12, 15, COMPUTE)
    q0, q1, q2, q3 = tl.inline_asm_elementwise(
        ASM4_FP16 if tl.float16 == COMPUTE else ASM4_BF16, "=r,=r,=r,=r,r", [w],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
    )  # fmt: skip
    return (
        q0.to(COMPUTE, bitcast=True), q1.to(COMPUTE, bitcast=True), q2.to(COMPUTE, bitcast=True),
        q3.to(COMPUTE, bitcast=True),
    )  # fmt: skip


@triton.jit
def levels4(w, COMPUTE: tl.constexpr, PLAIN: tl.constexpr, TABLE: tl.constexpr):
    """The levels of the 4 fields of 4-bit words, rounded to COMPUTE (exactly, where the table is e2m1)."""
    if PLAIN:
        return (
            level(take(w, 0, 15, tl.int32), TABLE).to(COMPUTE), level(take(w, 4, 15, tl.int32), TABLE).to(COMPUTE),
            level(take(w, 8, 15, tl.int32), TABLE).to(COMPUTE), level(take(w, 12, 15, tl.int32), TABLE).to(COMPUTE),
        )  # fmt: skip
    BF16: tl.constexpr = ASM_NF4_BF16 if TABLE == "nf4" else ASM_E2M1_BF16
    FP16: tl.constexpr = ASM_NF4_FP16 if TABLE == "nf4" else ASM_E2M1_FP16
    q0, q1, q2, q3 = tl.inline_asm_elementwise(
        FP16 if tl.float16 == COMPUTE else BF16, "=r,=r,=r,=r,r", [w],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
    )  # fmt: skip
    return (
        q0.to(COMPUTE, bitcast=True), q1.to(COMPUTE, bitcast=True), q2.to(COMPUTE, bitcast=True),
        q3.to(COMPUTE, bitcast=True),
    )  # fmt: skip


@triton.jit
def fields8(w, COMPUTE: tl.constexpr, PLAIN: tl.constexpr):
    """code - 128 of the 2 fields of 8-bit words."""
    if PLAIN:
        codes = w.to(tl.int32) ^ 0x8080
        return take(codes, 0, 255, COMPUTE) - 128.0, take(codes, 8, 255, COMPUTE) - 128.0
    elif tl.float16 == COMPUTE:
        q0, q1 = tl.inline_asm_elementwise(
            ASM8_FP16, "=r,=r,r", [w], dtype=(tl.int16, tl.int16), is_pure=True, pack=2
        )  # fmt: skip
        return q0.to(COMPUTE, bitcast=True) - 1152.0, q1.to(COMPUTE, bitcast=True) - 1152.0
    else:
        q0, c0, q1, c1 = tl.inline_asm_elementwise(
            ASM8_BF16, "=r,=r,=r,=r,r", [w], dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2
        )  # fmt: skip
        a = q0.to(COMPUTE, bitcast=True) - c0.to(COMPUTE, bitcast=True)
        return a, q1.to(COMPUTE, bitcast=True) - c1.to(COMPUTE, bitcast=True)


@triton.jit
def group_columns(
    source, H: tl.constexpr, ALIGN: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr, HAS_ZERO: tl.constexpr,
    COMPUTE: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Scale and zero point, each [BN, 1], of the 32 columns number ``base + H``; ``source``: s_ptr, z_ptr, rn, N, base.

    ``base`` is a multiple of ALIGN, so that which part of its word a value lies in is mostly known at compile time.
    Asking twice for one group costs one load: the compiler merges equal loads.
    """
    s_ptr, z_ptr, rn, N, base = source
    if GROUP == 0:
        scale = tl.full((1, 1), 1.0, COMPUTE)
    else:
        SPAN: tl.constexpr = GROUP // 32
        if ALIGN % (2 * SPAN) == 0:
            word = tl.load(s_ptr + (base // (2 * SPAN) + H // (2 * SPAN)) * N + rn) >> (16 * (H // SPAN % 2))
        else:
            group = (base + H) // SPAN
            word = tl.load(s_ptr + (group // 2) * N + rn) >> (16 * (group % 2))
        scale = word.to(tl.int16).to(SCALE, bitcast=True).to(COMPUTE)[:, None]
    zero = tl.full((1, 1), MIDDLE, COMPUTE)
    if HAS_ZERO:
        if GROUP == 0:
            word = tl.load(z_ptr + rn)
        else:
            group = (base + H) // SPAN
            word = tl.load(z_ptr + (group // 4) * N + rn) >> (8 * (group % 4))
        zero = (word & 255).to(COMPUTE)[:, None]
    return scale, zero


@triton.jit
def value(q, TIMES: tl.constexpr, column, ONE: tl.constexpr):
    """scale * (code - zero) of a field that counts TIMES; each step but the last multiplication is exact."""
    scale, zero = column
    return (q - (zero * TIMES + ONE)) * (scale * (1.0 / TIMES))


@triton.jit
def step_tile(
    w_ptr, s_ptr, z_ptr, rn, N, step, BITS: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr,
    HAS_ZERO: tl.constexpr, COMPUTE: tl.constexpr, SCALE: tl.constexpr, PLAIN: tl.constexpr,
    TABLE: tl.constexpr = "int",
):  # fmt: skip
    """Weights [BN, STEP] in COMPUTE of rows ``rn`` and the STEP columns from ``step * STEP`` on.

    STEP is the K-block of the order (stream_layout.py). One scale a row (GROUP 0) is left to the caller, who applies it
    to the sums. PLAIN: no PTX, and nothing added by the fields. TABLE: "int", or the table (levels.py) that codes of 4
    bits are places in.
    """
    ONE: tl.constexpr = 0.0 if PLAIN else (1024.0 if tl.float16 == COMPUTE else 128.0)
    row = rn.to(tl.int64)[:, None]
    if BITS == 2:
        w = tl.load(w_ptr + (step.to(tl.int64) * N + row) * 16 + tl.arange(0, 16)[None, :])
        q0, q1, q2, q3, q4, q5, q6, q7 = fields2(w, COMPUTE, PLAIN)
        source = (s_ptr, z_ptr, rn, N, step * 4)
        g0 = group_columns(source, 0, 4, GROUP, MIDDLE, HAS_ZERO, COMPUTE, SCALE)
        g1 = group_columns(source, 1, 4, GROUP, MIDDLE, HAS_ZERO, COMPUTE, SCALE)
        g2 = group_columns(source, 2, 4, GROUP, MIDDLE, HAS_ZERO, COMPUTE, SCALE)
        g3 = group_columns(source, 3, 4, GROUP, MIDDLE, HAS_ZERO, COMPUTE, SCALE)
        return cat2(
            cat2(
                cat2(value(q0, 1, g0, ONE), value(q1, 4, g0, ONE)), cat2(value(q2, 16, g1, ONE), value(q3, 1, g1, ONE))
            ),
            cat2(
                cat2(value(q4, 4, g2, ONE), value(q5, 16, g2, ONE)), cat2(value(q6, 1, g3, ONE), value(q7, 4, g3, ONE))
            ),
        )
    elif BITS == 4:
        w = tl.load(w_ptr + (step.to(tl.int64) * N + row) * 32 + tl.arange(0, 32)[None, :])
        if TABLE == "int":
            q0, q1, q2, q3 = fields4(w, COMPUTE, PLAIN)
        else:
            q0, q1, q2, q3 = levels4(w, COMPUTE, PLAIN, TABLE)
        source = (s_ptr, z_ptr, rn, N, step * 4)
        g0 = group_columns(source, 0, 4, GROUP, MIDDLE, HAS_ZERO, COMPUTE, SCALE)
        g1 = group_columns(source, 1, 4, GROUP, MIDDLE, HAS_ZERO, COMPUTE, SCALE)
        g2 = group_columns(source, 2, 4, GROUP, MIDDLE, HAS_ZERO, COMPUTE, SCALE)
        g3 = group_columns(source, 3, 4, GROUP, MIDDLE, HAS_ZERO, COMPUTE, SCALE)
        if TABLE != "int":
            return cat2(cat2(q0 * g0[0], q1 * g1[0]), cat2(q2 * g2[0], q3 * g3[0]))
        return cat2(
            cat2(value(q0, 1, g0, ONE), value(q1, 1, g1, ONE)), cat2(value(q2, 1, g2, ONE), value(q3, 1, g3, ONE))
        )
    elif BITS == 8:
        w = tl.load(w_ptr + (step.to(tl.int64) * N + row) * 32 + tl.arange(0, 32)[None, :])
        a, b = fields8(w, COMPUTE, PLAIN)
        source = (s_ptr, z_ptr, rn, N, step * 2)
        s0, z0 = group_columns(source, 0, 2, GROUP, MIDDLE, HAS_ZERO, COMPUTE, SCALE)
        s1, z1 = group_columns(source, 1, 2, GROUP, MIDDLE, HAS_ZERO, COMPUTE, SCALE)
        return cat2((a - (z0 - 128.0)) * s0, (b - (z1 - 128.0)) * s1)
    else:
        at = w_ptr + (step.to(tl.int64) * 3 * N + row) * 8 + tl.arange(0, 8)[None, :]
        a = tl.load(at)
        b = tl.load(at + N.to(tl.int64) * 8)
        c = tl.load(at + N.to(tl.int64) * 16)
        a0, a1, a2, a3, a4 = fields3(a, COMPUTE, PLAIN)
        b0, b1, b2, b3, b4 = fields3(b, COMPUTE, PLAIN)
        c0, c1, c2, c3, c4 = fields3(c, COMPUTE, PLAIN)
        d = spare3(a, b, c, COMPUTE, PLAIN)
        source = (s_ptr, z_ptr, rn, N, step * 4)
        g0 = group_columns(source, 0, 4, GROUP, MIDDLE, HAS_ZERO, COMPUTE, SCALE)
        g1 = group_columns(source, 1, 4, GROUP, MIDDLE, HAS_ZERO, COMPUTE, SCALE)
        g2 = group_columns(source, 2, 4, GROUP, MIDDLE, HAS_ZERO, COMPUTE, SCALE)
        g3 = group_columns(source, 3, 4, GROUP, MIDDLE, HAS_ZERO, COMPUTE, SCALE)
        return cat2(
            cat2(quarter3(a0, b0, c0, a4, 1, g0, ONE), quarter3(a1, b1, c1, b4, 8, g1, ONE)),
            cat2(quarter3(a2, b2, c2, c4, 1, g2, ONE), quarter3(a3, b3, c3, d, 8, g3, ONE)),
        )


@triton.jit
def quarter3(q0, q1, q2, q3, TIMES: tl.constexpr, column, ONE: tl.constexpr):
    """32 columns of 3-bit codes: three fields that count TIMES, and one that counts once."""
    return cat2(
        cat2(value(q0, TIMES, column, ONE), value(q1, TIMES, column, ONE)),
        cat2(value(q2, TIMES, column, ONE), value(q3, 1, column, ONE)),
    )
