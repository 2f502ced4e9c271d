"""Adapters of convsv to frameworks, model formats and the command line."""

__all__: list[str] = []
