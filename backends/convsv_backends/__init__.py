"""Hold the backends of the array libraries that `convsv` supports, one module each, registered by entry point."""

__all__: list[str] = []
