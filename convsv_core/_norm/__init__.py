"""The largest singular value: exact, certified, and of padded layers; private to the core."""

__all__: list[str] = []
