"""Reader and writer of ONNX models. Importing this package does not import onnx."""

__all__: list[str] = []
