"""Run the command line: ``python -m convsv_adapters.cli``."""

from convsv_adapters.cli import main

main()
