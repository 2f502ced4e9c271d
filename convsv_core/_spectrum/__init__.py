"""Compute all singular values, singular vectors, and the numbers that follow from them. Private to the core."""

__all__: list[str] = []
