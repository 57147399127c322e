"""What the server may be told, in one frozen object."""

from __future__ import annotations

from dataclasses import dataclass, field

from dq_runtime.errors import SpecError


@dataclass(frozen=True)
class ServerSettings:
    """``api_key``: the bearer token that clients must send, or None. ``max_body``: bytes of a request body, 413 beyond.
    ``timeout``: seconds from a request's arrival to its last token, 504 beyond. ``drain``: seconds that running answers
    are given when the server is told to stop. ``in_flight``: generating requests held at once, those that are still
    being read included, 429 beyond. ``cors_origins``: origins whose pages may call the API ("*": all). ``log_prompts``
    puts prompts into the log. Raises :class:`SpecError` for numbers out of range."""

    api_key: str | None = None
    max_body: int = 4_000_000
    timeout: float = 600.0
    drain: float = 30.0
    in_flight: int = 272
    cors_origins: tuple[str, ...] = field(default_factory=tuple)
    log_prompts: bool = False

    def __post_init__(self) -> None:
        rules = (
            (self.api_key is None or self.api_key != "", "the API key is empty; give one, or leave it out"),
            (self.api_key is None or self.api_key.isascii(), "the API key must be ASCII: HTTP headers are"),
            (self.max_body >= 1, f"--max-body must be at least 1 byte, got {self.max_body}"),
            (self.timeout > 0, f"--timeout must be positive, got {self.timeout}"),
            (self.drain >= 0, f"--drain must be 0 seconds or more, got {self.drain}"),
            (self.in_flight >= 1, f"in_flight must be at least 1, got {self.in_flight}"),
        )
        for holds, message in rules:
            if not holds:
                raise SpecError(message)
