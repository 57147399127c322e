"""Log probabilities of tokens, as the model gave them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dq_runtime.runtime.engine.events import Alternative, TokenLogprob
from dq_runtime.runtime.token_bytes import TokenBytes
from dq_runtime.runtime.top_values import top_ids


def token_logprob(logits: NDArray[np.float32], token: int, top: int, spelled: TokenBytes) -> TokenLogprob:
    """``token`` and the ``top`` most likely ones (of equal ones the lower id first) by float32 ``logits`` [V];
    log-softmax in float64, nats."""
    values = logits.astype(np.float64)
    best = values.max()
    norm = best + np.log(np.exp(values - best).sum())
    found = top_ids(logits, top) if top > 0 else np.empty(0, np.int64)
    found = found[np.argsort(-values[found], kind="stable")][:top]

    def described(i: int) -> Alternative:
        raw = spelled(i)
        return Alternative(i, raw.decode(errors="replace"), raw, float(values[i] - norm))

    return TokenLogprob(*described(token), top=tuple(described(i) for i in found.tolist()))
