"""Runs in the tool's environment, without dq_runtime: FOLDER/job.json, windows.json and original/ to a dense directory.

Started by public_tools.py, which has the options' meaning.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def autoround(job: dict[str, Any], model: Any, tokenizer: Any, windows: list[list[int]]) -> dict[str, Any]:
    """AutoRound as its users run it: 8 windows a step, its own start and learning rate, symmetric.

    Only its rule to leave out layers whose sides 32 does not divide is switched off: it is about how its exports pack,
    nothing is packed here, and stories260K would keep 15 of its 35 layers in float32.
    """
    from auto_round import AutoRound
    from auto_round.compressors import layer_config_resolver

    rules = layer_config_resolver.apply_layer_config_special_cases

    def all_shapes(layer_config: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        asked = {name: dict(config) for name, config in layer_config.items()}
        found, *rest = rules(layer_config, *args, **kwargs)
        for config in found.values():
            if config.get("in_blocks") and config["bits"] == 16:
                config |= {"bits": job["bits"], "data_type": "int"}
        for name, config in asked.items():
            found[name]["group_size"] = config["group_size"]
        return found, *rest

    layer_config_resolver.apply_layer_config_special_cases = all_shapes
    rows = {name: {"group_size": -1} for name, m in model.named_modules() if name.endswith(tuple(job["row_layers"]))}
    tuner = AutoRound(
        model,
        tokenizer,
        bits=job["bits"],
        group_size=job["group_size"],
        sym=True,
        iters=job["iters"],
        dataset=[torch.tensor([window]) for window in windows],
        nsamples=len(windows),
        seqlen=len(windows[0]),
        layer_config=rows if job["row_layers"] else None,
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounded, _ = tuner.quantize()
    rounded.float().save_pretrained(job["output"] + ".partial")
    return {"iters": job["iters"]}


def gptq(job: dict[str, Any], model: Any, tokenizer: Any, windows: list[list[int]]) -> dict[str, Any]:
    """llm-compressor's GPTQModifier: its defaults (damping 0.01, static act-order), symmetric groups."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    def scheme(targets: list[str], size: int | None) -> QuantizationScheme:
        strategy = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
        return QuantizationScheme(
            targets=targets, weights=QuantizationArgs(num_bits=job["bits"], symmetric=True, **strategy)
        )

    rows = [f"re:.*{end}$" for end in job["row_layers"]]
    others = ["re:.*(q|k|v|o|gate|up|down)_proj$"]
    if rows:
        others = [f"re:^(?!.*({'|'.join(job['row_layers'])})$).*(q|k|v|o|gate|up|down)_proj$"]
    groups = {"group_0": scheme(others, job["group_size"])}
    if rows:
        groups["group_1"] = scheme(rows, None)
    data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(w) for w in windows]})
    oneshot(
        model=model,
        dataset=data,
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        num_calibration_samples=len(windows),
        max_seq_length=len(windows[0]),
        shuffle_calibration_samples=False,
    )
    # Rounded and expanded: the weights that the compressed form would decompress to, without its scales beside them.
    original = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    names = dict(original.named_parameters())
    state = model.state_dict()
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(expanded(model, state, name))
    original.save_pretrained(job["output"] + ".partial")
    return {}


def expanded(model: Any, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The parameter as its own library quantizes and dequantizes it."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    if not name.endswith(".weight") or name[:-6] + "weight_scale" not in state:
        return state[name]
    module = model.get_submodule(name[: -len(".weight")])
    zero = getattr(module, "weight_zero_point", None)
    g_idx = getattr(module, "weight_g_idx", None)
    args = module.quantization_scheme.weights
    return fake_quantize(module.weight, module.weight_scale, zero, args, g_idx)


def main() -> None:
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    windows = json.loads((folder / "windows.json").read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    partial = Path(job["output"] + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    started = time.monotonic()
    made = {"autoround": autoround, "gptq": gptq}[job["tool"]](job, model, tokenizer, windows)
    made |= {key: job[key] for key in ("tool", "bits", "group_size", "row_layers", "threads", "calibration_sha256")}
    package = {"autoround": "auto-round", "gptq": "llmcompressor"}[job["tool"]]
    made["package"] = f"{package} {version(package)}"
    made |= {name: version(name) for name in ("torch", "transformers")}
    made["seconds"] = round(time.monotonic() - started, 1)
    (partial / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    for file in Path(job["model"]).glob("tokenizer*"):
        shutil.copy(file, partial / file.name)
    partial.rename(job["output"])


if __name__ == "__main__":
    main()
