"""The largest singular value: exact on a grid, certified for every input size, exact with padding."""

__all__: list[str] = []
