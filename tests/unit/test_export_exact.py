"""Another form of the same weight: every value equal in float64, or a refusal that says what would fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dq_runtime.errors import SpecError
from dq_runtime.export.exact import cast, held_by, refit, regroup, smallest, widen, with_zeros
from dq_runtime.packing import PackedWeight, pack_codes


def weight(bits: int, group: int, symmetric: bool, n: int = 5, k: int = 192) -> PackedWeight:
    g = torch.Generator().manual_seed(bits * 100 + group)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
    scale = (torch.rand(n, k // group, generator=g) * 0.1 + 1e-3).to(torch.bfloat16)
    zero = None if symmetric else torch.randint(0, 2**bits, (n, k // group), generator=g, dtype=torch.uint8)
    return PackedWeight(pack_codes(codes, bits), scale, zero, bits, k)


def values(w: PackedWeight) -> Tensor:
    """By definition, in float64: scale * (code - zero)."""
    zero = torch.full(w.scale.shape, 2.0 ** (w.bits - 1)).double() if w.zero is None else w.zero.double()
    grouped = w.codes().double().view(w.n, w.scale.shape[1], -1)
    return ((grouped - zero.unsqueeze(-1)) * w.scale.double().unsqueeze(-1)).view(w.n, w.k)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_wider_codes_and_finer_groups_are_the_same_values(bits: int, symmetric: bool) -> None:
    w = weight(bits, 64, symmetric)
    for wider in range(bits, 9):
        assert torch.equal(values(widen(w, wider)), values(w))
    for group in (64, 32, 16):
        finer = regroup(w, group)
        assert finer.group_size == group
        assert torch.equal(values(finer), values(w))
    assert torch.equal(values(with_zeros(w)), values(w))


def test_refit_takes_the_fewest_bits_and_the_largest_group_that_hold_the_weight() -> None:
    w = weight(5, 192, True)
    fitted = refit("layer", w, (2, 4, 8), (32, 64, 128), "form")
    assert (fitted.bits, fitted.group_size) == (8, 64)
    assert torch.equal(values(fitted), values(w))
    assert refit("layer", w, (5,), (-1,), "form") is w


@pytest.mark.parametrize(("bits", "groups"), [((2, 4), (64,)), ((8,), (128,))])
def test_refit_never_rounds(bits: tuple[int, ...], groups: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match=r"form cannot hold some\.layer \(5 bits, groups of 64\).*--group-size"):
        refit("some.layer", weight(5, 64, True), bits, groups, "form")


def test_a_dtype_that_would_round_is_refused_with_the_value() -> None:
    exact = torch.tensor([1.0, 0.5, 2.0**-20]).to(torch.bfloat16)
    assert torch.equal(cast(exact, torch.float16, "scale", "do this"), exact.to(torch.float16))
    tiny = torch.tensor([1.0, 2.0**-30]).to(torch.bfloat16)
    with pytest.raises(SpecError, match=r"scale holds 9\.31323e-10, which float16 cannot.*do this"):
        cast(tiny, torch.float16, "scale", "do this")
    assert not held_by(torch.tensor([1e9]), torch.float16)
    assert smallest(tiny, (torch.float16, torch.bfloat16)).dtype is torch.bfloat16
