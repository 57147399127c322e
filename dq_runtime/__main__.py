"""``python -m dq_runtime``: the ``dq`` command without installing a script."""

from dq_runtime.cli import console_script

console_script()
