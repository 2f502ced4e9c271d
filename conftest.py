"""What holds for every test of the repository."""

import os

# JAX reads this when it is imported. Without it there is no double precision to test; one test of the suite runs
# JAX in its default mode.
os.environ.setdefault("JAX_ENABLE_X64", "1")

# Keras reads this when it is imported, and would ask for TensorFlow. Other backends are tested in other processes.
os.environ.setdefault("KERAS_BACKEND", "torch")
