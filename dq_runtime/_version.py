"""The one place that states the version; packaging reads it without importing."""

__version__ = "0.1.0"
