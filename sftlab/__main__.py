"""The entry of ``python -m sftlab``."""

from sftlab.cli import main

if __name__ == "__main__":
    main()
