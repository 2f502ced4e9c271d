"""The conformance suite of `convsv` checks every backend against the dense matrix of the operator.

Run ``python -m convsv_conformance --backend NAME`` from anywhere, or under pytest
``pytest -p convsv_conformance.plugin --pyargs convsv_conformance --convsv-backend NAME``. A backend that is
installed as a plugin of `convsv_core` gets every case; its author subclasses and copies nothing.
"""

__all__: list[str] = []
