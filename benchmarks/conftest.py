"""What a micro-benchmark's JSON keeps: the summary of each case, the device, the versions; not every single round."""

from __future__ import annotations

from typing import Any

import torch

from dq_runtime.environment import device_name, versions

KEPT = ("min", "median", "max", "iqr", "rounds")


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """A hook of pytest-benchmark, called before it writes ``--benchmark-json``. Times are in seconds."""
    rows = [
        {**case["extra_info"], **{name: case["stats"][name] for name in KEPT}} for case in output_json["benchmarks"]
    ]
    date = output_json["datetime"]
    output_json.clear()
    output_json |= {
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "date": date,
        "command": "make bench",
        "unit": "seconds",
        "rows": rows,
    }
