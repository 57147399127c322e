"""The errors a user can cause. Each carries one sentence: what is wrong, where, and what to do."""


class DQError(Exception):
    """Bad input or an unusable environment; the command line prints it alone and exits with code 2."""


class SpecError(DQError):
    """A quantization request that contradicts itself or the model."""


class CheckpointError(DQError):
    """A checkpoint that is missing, truncated, altered, mis-shaped or foreign."""


class DataError(DQError):
    """Calibration or held-out text that is missing, empty or too short."""


class BackendError(DQError):
    """No backend (or not the one asked for) can run this call; the message prints the whole call."""


class Interrupted(DQError):  # noqa: N818 (not an error of anybody's)
    """The run was stopped by the user after saving its state; ``--resume`` continues it."""
