"""The version, apart so that building needs no import of torch."""

__version__ = "0.1.0"
