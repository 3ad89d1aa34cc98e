"""Adapters for other packages, imported on demand."""
