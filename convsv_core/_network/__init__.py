"""A whole network as a graph of maps, and the certified Lipschitz constant that follows from it."""

__all__: list[str] = []
