"""Examples of `convsv`, run from a checkout and not installed."""
