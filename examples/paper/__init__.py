"""The experiments of Sedghi, Gupta and Long, ICLR 2019, section 4: ``python -m examples.paper --help``."""

__all__: list[str] = []
