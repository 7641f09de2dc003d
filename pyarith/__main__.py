"""``python -m pyarith``: the command line."""

from pyarith.cli import main

if __name__ == "__main__":
    main()
