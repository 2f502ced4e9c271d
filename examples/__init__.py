"""Examples of `convsv`. They run from a checkout and are not installed."""

__all__: list[str] = []
