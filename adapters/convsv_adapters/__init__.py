"""Adapters of convsv to frameworks, model formats and the command line."""
