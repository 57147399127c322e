"""The PTX that makes floats of packed codes, executed here instruction by instruction on every 16-bit word.

The interpreter cannot run inline assembly, so the kernels' other tests take a plain branch; this tests the text that
runs on the chip. Floats are checked with torch's bf16 and fp16, which round as the chip does.
"""

from __future__ import annotations

import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

Words = NDArray[np.uint32]
DTYPES = {"BF16": torch.bfloat16, "FP16": torch.float16}
ONE = {"BF16": 128, "FP16": 1024}
FACTORS = {2: (1, 4, 16, 1, 4, 16, 1, 4), 3: (1, 8, 1, 8, 1), 4: (1, 1, 1, 1)}


def run(ptx: str, outputs: int, inputs: list[Words]) -> list[Words]:
    """Execute shr, and, lop3 and prmt on arrays of registers; anything else is an error."""
    registers: dict[str, Words] = {f"${outputs + i}": words for i, words in enumerate(inputs)}

    def read(name: str) -> Words:
        return (
            np.full_like(inputs[0], int(name, 16 if name.startswith("0x") else 10))
            if name[0].isdigit()
            else registers[name]
        )

    for statement in re.sub(r"[{}\n]", " ", ptx).split(";"):
        operation, _, rest = statement.strip().partition(" ")
        operands = [part.strip() for part in rest.split(",")]
        if operation == "shr.u32":
            registers[operands[0]] = read(operands[1]) >> read(operands[2])
        elif operation == "and.b32":
            registers[operands[0]] = read(operands[1]) & read(operands[2])
        elif operation == "prmt.b32":  # of 8 bytes, those that 4 nibbles name; bit 3, their sign instead, is not used
            a, b, selector = (read(name).astype(np.uint64) for name in operands[1:4])
            chosen = np.zeros_like(a)
            for i in range(4):
                nibble = selector >> np.uint64(4 * i) & np.uint64(15)
                assert int(nibble.max()) < 8
                chosen |= ((a | b << np.uint64(32)) >> (nibble * np.uint64(8)) & np.uint64(255)) << np.uint64(8 * i)
            registers[operands[0]] = chosen.astype(np.uint32)
        elif operation == "lop3.b32":
            a, b, c, table = *(read(name) for name in operands[1:4]), int(operands[4], 16)
            result = np.zeros_like(a)
            for index in range(8):  # bit `index` of the table is the result where a, b, c have these bits
                picks = [value if index >> (2 - i) & 1 else ~value for i, value in enumerate((a, b, c))]
                if table >> index & 1:
                    result |= picks[0] & picks[1] & picks[2]
            registers[operands[0]] = result
        else:
            assert operation in ("", ".reg"), f"unknown instruction {operation}"
    return [registers[f"${i}"] for i in range(outputs)]


def every_pair() -> Words:
    """All 16-bit words in the lower half, and in the upper half the same in another order."""
    low = np.arange(2**16, dtype=np.uint32)
    return low | (low * 40503 + 12345 & 0xFFFF) << 16


def halves(register: Words, dtype: torch.dtype) -> torch.Tensor:
    """The two floats of each register, [2, count]."""
    both = np.stack([register & 0xFFFF, register >> 16]).astype(np.uint16)
    return torch.from_numpy(both.view(np.int16)).view(dtype)


def source(name: str) -> str:
    from dq_kernels import decode

    return str(getattr(decode, name).value)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_field_of_every_word(bits: int, kind: str) -> None:
    words, factors = every_pair(), FACTORS[bits]
    outputs = run(source(f"ASM{bits}_{kind}"), len(factors), [words])
    for field, (register, factor) in enumerate(zip(outputs, factors, strict=True)):
        got = halves(register, DTYPES[kind])
        for half in range(2):
            code = torch.from_numpy((words >> (16 * half) >> (bits * field) & (2**bits - 1)).astype(np.int64))
            for zero in range(2**bits):  # `value` in decode.py subtracts ONE + factor * zero in the same dtype
                centred = got[half] - torch.tensor(ONE[kind] + factor * zero).to(DTYPES[kind])
                assert torch.equal(centred.float(), ((code - zero) * factor).float())


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("table", ["NF4", "E2M1"])
def test_every_code_of_every_word_looks_its_level_up(table: str, kind: str) -> None:
    from dq_kernels import levels

    expected = torch.tensor(getattr(levels, table).value).to(DTYPES[kind])
    if table == "E2M1":
        assert torch.equal(expected.float(), torch.tensor(levels.E2M1.value)), "exact in 16 bits"
    words = every_pair()
    for field, register in enumerate(run(source(f"ASM_{table}_{kind}"), 4, [words])):
        got = halves(register, DTYPES[kind])
        for half in range(2):
            code = torch.from_numpy((words >> (16 * half + 4 * field) & 15).astype(np.int64))
            assert torch.equal(got[half].view(torch.int16), expected[code].view(torch.int16))


def test_the_tables_are_those_of_the_package() -> None:
    from dq_kernels import levels
    from dq_runtime.levels import LEVELS

    for form, table in LEVELS.items():
        assert getattr(levels, levels.TABLE_OF[form].upper()).value == table


@pytest.mark.parametrize("kind", DTYPES)
def test_the_sixteenth_three_bit_code(kind: str) -> None:
    words = [every_pair(), np.roll(every_pair(), 4321), np.roll(every_pair(), 99)]
    (register,) = run(source(f"ASM3_SPARE_{kind}"), 1, words)
    got = halves(register, DTYPES[kind])
    for half in range(2):
        code = sum((word >> (16 * half + 15) & 1).astype(np.int64) << plane for plane, word in enumerate(words))
        assert torch.equal(got[half].float() - ONE[kind], torch.from_numpy(np.asarray(code)).float())


@pytest.mark.parametrize("kind", DTYPES)
def test_eight_bits(kind: str) -> None:
    """Stored with the top bit flipped: bf16 subtracts 128 or 256 by it, fp16 flips it back."""
    words = every_pair()
    outputs = [halves(r, DTYPES[kind]) for r in run(source(f"ASM8_{kind}"), 4 if kind == "BF16" else 2, [words])]
    for field in range(2):
        for half in range(2):
            stored = words >> (16 * half + 8 * field) & 0xFF
            code = torch.from_numpy((stored ^ 0x80).astype(np.int64))
            if kind == "BF16":
                centred = outputs[2 * field][half] - outputs[2 * field + 1][half]
            else:
                centred = outputs[field][half] - 1152.0
            assert torch.equal(centred.float(), (code - 128).float())
            for zero in (0, 1, 77, 128, 255):
                shifted = centred - (torch.tensor(zero).to(DTYPES[kind]) - 128.0)
                assert torch.equal(shifted.float(), (code - zero).float())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_scale_divided_by_the_field_s_factor_rounds_once(dtype: torch.dtype) -> None:
    """(factor * c) * (scale / factor) is c * scale to the last bit: both factors are powers of two."""
    scale = (torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 0.1 + 1e-3).to(dtype)
    for factor in (1, 4, 8, 16):
        for code in range(-15, 16):
            direct = scale * torch.tensor(float(code)).to(dtype)
            assert torch.equal((scale * (1.0 / factor)) * torch.tensor(float(code * factor)).to(dtype), direct)
