"""The shipped tables of tiles, the choice of one, and the judge of machine code: it must be able to say no."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")  # plays an H100, see capability_of


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
def test_a_shipped_table_covers_every_width_and_few_tokens(capability: int) -> None:
    from dq_kernels.table import table_for

    for bits, rows in table_for(capability).items():
        assert rows[0].max_m == 16, bits
        assert [r.max_m for r in rows] == sorted(r.max_m for r in rows)
        limits = {r.max_m for r in rows}
        assert all(any(r.min_tiles == 0 for r in rows if r.max_m == limit) for limit in limits), "a gap between rows"


def test_k_is_split_only_while_the_chip_has_room() -> None:
    from dq_kernels.table import MAX_SPLIT, choose

    few, many = choose(1, 1024, 4096, 4, CPU), choose(1, 200_000, 4096, 4, CPU)
    assert few is not None
    assert many is not None
    assert few.split == MAX_SPLIT
    assert many.split == 1
    tiny = choose(1, 64, 64, 4, CPU)
    assert tiny is not None
    assert tiny.split == 1, "one step cannot be split"
    assert choose(100_000, 4096, 4096, 4, CPU) is None, "many tokens: decode, and let torch multiply"
    assert choose(5, 4096, 4096, 5, CPU) == choose(5, 4096, 4096, 8, CPU), "5 bits are streamed as 8"


def test_dq_tiles_replaces_the_table_and_a_bad_file_is_named(tmp_path: Path) -> None:
    row = {"max_m": 7, "BM": 16, "BN": 32, "num_warps": 4, "num_stages": 2, "programs": 0}
    good, bad, short = (tmp_path / name for name in ("good.json", "bad.json", "short.json"))
    good.write_text(json.dumps({"rows": {str(b): [row] for b in (2, 3, 4, 8)}}))
    bad.write_text(json.dumps({"rows": {str(b): [row | {"colour": 1}] for b in (2, 3, 4, 8)}}))
    short.write_text(json.dumps({"rows": {"3": [row]}}))
    code = "import torch; from dq_kernels.table import choose; print(choose(7, 64, 64, 3, torch.device('cpu')))"

    def run(file: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "DQ_TILES": str(file), "PYTHONPATH": str(ROOT / "kernels")}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )

    assert "BN=32" in run(good).stdout
    assert "not a table of tiles" in run(bad).stderr
    assert "has rows for [2, 3, 4, 8] bits, got [3]" in run(short).stderr


def test_canonical_weights_that_cannot_be_streamed_are_refused() -> None:
    from dq_kernels.stream_layout import stream_weight

    def weight(k: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(8, (k * 4 + 31) // 32, dtype=torch.int32), torch.ones(8, groups, dtype=torch.bfloat16)

    with pytest.raises(ValueError, match="K to be a multiple of 32, got 50"):
        stream_weight(*weight(50, 1), None, bits=4, k=50)
    with pytest.raises(ValueError, match="at least 32 weights, got 16"):
        stream_weight(*weight(64, 4), None, bits=4, k=64)


LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0020*/                   LOP3.LUT R1, R2, 0xf, R3, 0xea, !PT ;
        /*0030*/              @!P0 SHF.R.U32.HI R4, RZ, 0x4, R5 ;
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R8, R4, gdesc[UR4], R8 ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   STL [R1], R2 ;
        /*0070*/                   EXIT ;
"""


def test_the_listing_is_read_as_nvdisasm_prints_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from dq_kernels import sass

    answers = iter([" Function k:\n  REG:42 STACK:8 SHARED:0\n", LISTING])
    monkeypatch.setattr(sass.subprocess, "check_output", lambda *args, **kwargs: next(answers))
    code = sass.read_code(b"", "cuobjdump", "nvdisasm")
    assert (code.registers, code.stack, code.matrix()) == (42, 8, "HGMMA")
    assert code.wide_async_copies() == 1
    assert code.count("STL", "LDL") == 1
    assert code.inner_loop() == {"LDGSTS": 1, "LOP3": 1, "SHF": 1, "HGMMA": 1, "BRA": 1}


NAIVE = '''
import triton
import triton.language as tl
from dataclasses import replace
from dq_kernels import stream
from dq_kernels.offline import judge


@triton.jit
def naive(
    x_ptr, w_ptr, s_ptr, z_ptr, y_ptr, partial_ptr, arrived_ptr, M, N,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    """The usual way: unpack to integers, convert, scale, weight on the right."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, 128)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, 128):
        x = tl.load(x_ptr + m[:, None] * K + k0 + k[None, :], mask=(m < M)[:, None], other=0.0)
        w = tl.load(w_ptr + n[None, :] * (K // 4) + (k0 + k[:, None]) // 4)
        q = ((w >> (k[:, None] % 4 * 4).to(tl.int16)) & 15).to(tl.bfloat16) - 8.0
        acc = tl.dot(x, q, acc)
    tl.store(y_ptr + m[:, None] * N + n[None, :], acc.to(tl.bfloat16), mask=(m < M)[:, None])


case = next(c for c in stream.offline_cases() if c.archs == (90,) and "4-bit sym g64 bf16 K=4096 16x" in c.label)
assert judge(case, 90).problems == (), judge(case, 90)
constants = {name: case.constants[name] for name in ("K", "BM", "BN")}
print(judge(replace(case, kernel=naive, constants=constants), 90).problems)
'''


def test_the_judge_refuses_a_kernel_that_unpacks_the_usual_way(tmp_path: Path) -> None:
    from dq_kernels.offline import missing

    if missing() is not None:
        pytest.skip(str(missing()))
    script = tmp_path / "naive.py"
    script.write_text(NAIVE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "NO HGMMA" in done.stdout
    assert "I2F" in done.stdout
    assert "INTEGER INSTRUCTIONS A WEIGHT" in done.stdout
