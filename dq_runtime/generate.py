"""``python -m dq_runtime.generate CHECKPOINT PROMPT``: the same command as ``dq generate``.

The function ``dq_runtime.generate`` lives in :mod:`dq_runtime.runtime.generate`. Importing this module by its full name
would put a module where the function is expected, so the module can be called like it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from dq_runtime.runtime.generate import generate

        return generate(*args, **kwargs)


if __name__ == "__main__":
    from dq_runtime.cli import main

    sys.exit(main(["generate", *sys.argv[1:]]))

sys.modules[__name__].__class__ = _Callable
