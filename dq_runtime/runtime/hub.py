"""Models by their hub name: what reading and running one needs is fetched, never code or pickles."""

from __future__ import annotations

import re
from pathlib import Path

from dq_runtime.errors import CheckpointError

_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_UNWANTED = ["original/*", "consolidated*"]  # a second copy of the weights, in a format of the model's makers


def local_path(source: str | Path) -> Path:
    """``source`` itself if it exists or is no hub name (``organisation/model``), else the directory it was fetched
    to."""
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as e:  # the library, and what it fetches with, raise many types
        lines = str(e).strip().splitlines()
        why = lines[0] if lines else type(e).__name__
        raise CheckpointError(f"{source} is not here and could not be fetched from the hub: {why}") from None
