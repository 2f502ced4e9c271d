"""Benchmarks of `convsv`: ``python -m benchmarks --help``, from a checkout with the ``cli`` extra."""

__all__: list[str] = []
