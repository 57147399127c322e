"""Checkpoints that other tools make of a model, end to end, for the reading rows of interop.py.

    python benchmarks/others.py MODEL DIR --tool llm-compressor --text FILE
    python benchmarks/others.py MODEL DIR --tool auto-round --text FILE

Run each with an interpreter that has the tool (llmcompressor 0.14 wants another compressed-tensors than transformers of
today may have, so they seldom share one). DIR/TOOL-SCHEME/ appears with ``made_by.txt``, the tool's name and version.
The settings are small (8 windows; 4 iterations of AutoRound): what is asked is whether the files are read, not how good
they are.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOWS = 8


def windows_of(tokenizer: Any, text: Path, length: int) -> list[torch.Tensor]:
    """int64 [1, length] each."""
    ids = tokenizer(text.read_text(encoding="utf-8")[:20000], return_tensors="pt").input_ids[0]
    return [ids[i * length : (i + 1) * length].unsqueeze(0) for i in range(WINDOWS)]


def llm_compressor(model: Path, folder: Path, text: Path) -> None:
    """GPTQ to 4 bits with zero points, and the 4-bit floats without data."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [{"input_ids": w[0].tolist(), "attention_mask": [1] * 128} for w in windows_of(tokenizer, text, 128)]
    grid = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}
    groups = {"group_0": {"targets": ["Linear"], "weights": grid}}
    recipes = {
        "gptq-w4a16": GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        "mxfp4a16": QuantizationModifier(targets="Linear", scheme="MXFP4A16", ignore=["lm_head"]),
        "nvfp4a16": QuantizationModifier(targets="Linear", scheme="NVFP4A16", ignore=["lm_head"]),
    }
    for scheme, recipe in recipes.items():
        out = folder / f"llm-compressor-{scheme}"
        if (out / "made_by.txt").exists():
            continue
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        data = {"dataset": Dataset.from_list(rows), "max_seq_length": 128, "num_calibration_samples": WINDOWS}
        oneshot(model=loaded, recipe=recipe, **(data if scheme.startswith("gptq") else {}))
        loaded.save_pretrained(out, save_compressed=True)
        tokenizer.save_pretrained(out)
        (out / "made_by.txt").write_text(f"llmcompressor {version('llmcompressor')}\n")


def auto_round(model: Path, folder: Path, text: Path) -> None:
    """4 bits with zero points, in AutoRound's own format."""
    from auto_round import AutoRound

    out = folder / "auto-round-w4a16"
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = {"bits": 4, "group_size": 64, "sym": False, "iters": 4, "nsamples": WINDOWS, "seqlen": 64}
    data = windows_of(tokenizer, text, 64)
    rounder = AutoRound(loaded, tokenizer, dataset=data, batch_size=4, device_map="cpu", **settings)
    rounder.quantize_and_save(str(out), format="auto_round")
    for found in list(out.glob("*/config.json")):  # 0.16 makes a folder of its own, named after the model
        for file in found.parent.iterdir():
            file.rename(out / file.name)
        found.parent.rmdir()
    (out / "made_by.txt").write_text(f"auto-round {version('auto-round')}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tool", choices=("llm-compressor", "auto-round"), required=True)
    parser.add_argument("--text", type=Path, required=True)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    made = llm_compressor if options.tool == "llm-compressor" else auto_round
    made(options.model, options.folder, options.text)


if __name__ == "__main__":
    main()
