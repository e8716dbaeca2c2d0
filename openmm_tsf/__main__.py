"""`python -m openmm_tsf` is `openmm-tsf`."""

from .cli import main

if __name__ == "__main__":
    main()
