"""Change kernels so that their singular values are within bounds. Private to the core."""

__all__: list[str] = []
