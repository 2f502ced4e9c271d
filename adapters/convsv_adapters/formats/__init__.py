"""Readers and writers of model files, one module or folder a format."""

__all__: list[str] = []
