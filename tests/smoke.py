"""Check an installed distribution, with its core dependencies alone: ``python -I tests/smoke.py``.

Run it in a virtual environment that holds a wheel of convsv and no extra. It needs nothing else of this repository.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

FILES = (
    "convsv_core/py.typed",
    "convsv_core/reports/assets/page.html",
    "convsv_backends/py.typed",
    "convsv_adapters/py.typed",
    "convsv_adapters/data/digits.onnx",
    "convsv_conformance/py.typed",
)


def main() -> None:
    """Check the files, one call, and what the command line says without its libraries."""
    import numpy as np

    import convsv_core as convsv

    installed = importlib.metadata.distribution("convsv")
    assert installed.version == convsv.__version__, (installed.version, convsv.__version__)
    assert Path(str(convsv.__file__)).is_relative_to(sys.prefix), f"{convsv.__file__} is not the installed package"
    recorded = {str(file): Path(str(file.locate())) for file in installed.files or ()}
    for name in FILES:
        assert recorded[name].is_file(), f"{name} is not in the distribution"
    licence = next(path for name, path in recorded.items() if name.endswith("/licenses/LICENSE"))
    assert licence.read_text().startswith("MIT License")

    kernel = np.ones((1, 1, 3))
    values = convsv.singular_values(kernel, (4,), convsv.Conv("OIW"))
    assert np.allclose(values, [3, 1, 1, 1]), values
    assert next(row for row in convsv.backends() if row.name == "numpy").available

    assert importlib.util.find_spec("click") is None, "click is installed: this check wants no extra"
    command = Path(sys.executable).parent / "convsv"
    done = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr == "convsv: the command line needs click: pip install 'convsv[cli]'\n", done.stderr
    print(f"convsv {convsv.__version__} is installed whole")


if __name__ == "__main__":
    main()
