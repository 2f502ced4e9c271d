"""Run the command line: ``python -m convsv_adapters.cli``."""

from convsv_adapters.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
