"""The matrices of a convolution at frequencies, and tests of many of them at once; private to the core."""

__all__: list[str] = []
