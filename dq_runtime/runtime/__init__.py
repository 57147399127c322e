"""Run a model: load it (dense or packed), feed it tokens, sample, stream text."""
