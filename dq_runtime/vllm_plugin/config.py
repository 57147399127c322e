"""``quantization_config`` of a table checkpoint as vLLM asks for it: which layer is packed, and how.

vLLM multiplies q, k and v as one matrix, and gate and up; ``packed_modules_mapping`` of its model says which names of
the checkpoint are one layer there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from dq_runtime.errors import CheckpointError
from dq_runtime.levels import INT
from dq_runtime.packing.quant_config import OWN_METHOD, Scheme, Targets, from_config
from dq_runtime.vllm_plugin.linear import TableLinearMethod

WHERE = "quantization_config"


@register_quantization_config(OWN_METHOD)
class TableConfig(QuantizationConfig):  # type: ignore[misc] # vllm is not installed where types are checked
    """``schemes``: target -> scheme, all of one table; ``dense``: names of the linears that are not packed. Raises
    :class:`CheckpointError` for a layer that vLLM would compute from something else than what is stored."""

    def __init__(self, schemes: Mapping[str, Scheme], dense: list[str]) -> None:
        super().__init__()
        self._targets = Targets(schemes, WHERE)
        self._dense = frozenset(dense)

    def __repr__(self) -> str:
        return f"TableConfig({OWN_METHOD!r})"

    def get_name(self) -> str:
        """``quant_method``."""
        return OWN_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What our backends take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """sm_80, where our Triton kernels begin."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all of it stands in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TableConfig:
        """Of what config.json states."""
        schemes = from_config(config, WHERE)
        if config.get("transposed") or any(scheme.form == INT for scheme in schemes.values()):
            raise CheckpointError(
                f"{WHERE}: linears stored transposed (GPT-2's Conv1D) are not loaded into vLLM; export to dense"
            )
        return cls(schemes, list(config.get("ignore") or []))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """The names of dense linears as the model in vLLM has them. Targets that name single layers stay: where vLLM
        renames those, no target matches and the checkpoint is refused."""
        self._dense = frozenset(hf_to_vllm_mapper.apply_list(sorted(self._dense)))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """How ``layer``, called ``prefix``, is computed; None for what is not a linear."""
        if isinstance(layer, LinearBase):
            scheme = self.scheme_of(prefix)
            return UnquantizedLinearMethod() if scheme is None else TableLinearMethod(scheme, prefix)
        if isinstance(layer, ParallelLMHead) and prefix not in self._dense:
            raise CheckpointError(
                f"{prefix} is packed, which vLLM's head cannot be here; leave it dense (--override '{prefix}=dense')"
            )
        return None

    def scheme_of(self, prefix: str) -> Scheme | None:
        """The scheme that all members of the linear ``prefix`` share; None if they are dense."""
        parent, _, last = prefix.rpartition(".")
        members = [f"{parent}.{name}" if parent else name for name in self.packed_modules_mapping.get(last, [last])]
        schemes = {name: None if name in self._dense else self._targets.match(name) for name in members}
        if len(set(schemes.values())) > 1:
            stated = ", ".join(f"{name.rpartition('.')[2]}: {_words(scheme)}" for name, scheme in schemes.items())
            raise CheckpointError(
                f"{prefix} is one matrix in vLLM, but its members differ ({stated}); quantize them alike"
            )
        return schemes[members[0]]


def _words(scheme: Scheme | None) -> str:
    if scheme is None:
        return "dense"
    return f"{scheme.form} " + ("whole rows" if scheme.group_size == -1 else f"groups of {scheme.group_size}")
