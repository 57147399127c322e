"""PEFT's LoRA (arXiv 2106.09685) on packed linears: y = qmm(x, W) + scaling * B(A(dropout(x))), with W fixed."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn

from dq_runtime.errors import DQError
from dq_runtime.hf.linear import PackedLinear


class PackedLora(Linear):
    """PEFT's own LoRA layer over a :class:`PackedLinear`. What needs the dense weight (merging, DoRA) is refused."""

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the sum of W and B A lies on no grid."""
        raise DQError(
            "LoRA weights cannot be merged into packed ones, whose grid does not hold the sum; keep the adapter"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""
        raise DQError("LoRA weights were never merged into these packed ones")


def lora_config(model: Any = None, **settings: Any) -> Any:
    """A :class:`peft.LoraConfig` of ``settings`` that knows packed linears; for ``peft.get_peft_model``.

    ``target_modules="all-linear"`` means every linear of ``model``, packed or not, but its head, as it does in PEFT,
    which by itself finds unpacked ones only; :class:`DQError` without the model.
    """
    if settings.get("target_modules") == "all-linear":
        if model is None:
            raise DQError(
                "target_modules='all-linear' needs the model: lora_config(model, target_modules='all-linear')"
            )
        head = model.get_output_embeddings()
        linear = (PackedLinear, nn.Linear)
        names = [name for name, m in model.named_modules() if isinstance(m, linear) and m is not head]
        settings = settings | {"target_modules": names}
    config = LoraConfig(**settings)
    config._register_custom_module({PackedLinear: PackedLora})
    return config
