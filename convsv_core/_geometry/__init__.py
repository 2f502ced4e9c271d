"""Geometry as integers: frequencies, taps and padding. Shapes alone decide everything here."""

__all__: list[str] = []
