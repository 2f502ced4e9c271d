"""The array libraries that `convsv` comes with, one module each, registered by entry point."""
