"""The model types of checkpoints that only we can read (``dq_llama``), for transformers' ``AutoConfig``.

Nobody else knows them, on purpose (:data:`dq_runtime.packing.quant_config.FOREIGN_PREFIX`). Here such a type means the
config class that it has without the prefix, and what is saved again bears the prefix again.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from dq_runtime.packing.quant_config import FOREIGN_PREFIX


class PrefixedConfig:
    """What ``AutoConfig`` finds under every prefixed type; which one it is stands in config.json."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config as transformers knows it (and ``kwargs`` that it does not use, where they are asked for)."""
        model_type = config_dict["model_type"].removeprefix(FOREIGN_PREFIX)
        named = _written_with_prefix(CONFIG_MAPPING[model_type])
        return named.from_dict(config_dict | {"model_type": model_type}, **kwargs)


@cache
def _written_with_prefix(known: type) -> Any:
    """A subclass of the config class ``known`` that is it in everything but what it writes.

    It has the same name too: by that transformers' tables find the model and the tokenizer of a config.
    """

    def to_json_string(self: Any, use_diff: bool = True) -> str:
        written = json.loads(known.to_json_string(self, use_diff))  # type: ignore[attr-defined]
        written["model_type"] = FOREIGN_PREFIX + written["model_type"]
        return json.dumps(written, indent=2, sort_keys=True) + "\n"

    def reduce(self: Any, protocol: Any) -> Any:
        return _blank, (known,), self.__dict__

    return type(known.__name__, (known,), {"to_json_string": to_json_string, "__reduce_ex__": reduce})


def _blank(known: type) -> Any:
    """An object of the subclass that pickle and copy fill: the class itself has no name to be found by."""
    made = _written_with_prefix(known)
    return made.__new__(made)


def register_model_types() -> None:
    """Tell ``AutoConfig``; calling it again changes nothing."""
    for model_type in CONFIG_MAPPING_NAMES:
        AutoConfig.register(FOREIGN_PREFIX + model_type, PrefixedConfig, exist_ok=True)
