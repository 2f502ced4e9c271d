"""Kernels changed so that their singular values keep to bounds; private to the core."""

__all__: list[str] = []
