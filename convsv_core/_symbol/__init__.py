"""Compute the matrices of a convolution at frequencies, and test many of them at once. Private to the core."""

__all__: list[str] = []
