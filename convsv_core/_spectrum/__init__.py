"""All singular values, their vectors, and the numbers that follow from them; private to the core."""

__all__: list[str] = []
