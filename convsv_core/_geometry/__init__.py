"""Integers only: frequencies, taps, and the padding rule; private to the core."""

__all__: list[str] = []
