"""The parts that the adapters of JAX's frameworks share."""

__all__: list[str] = []
