"""``python -m mipipe``: the command line."""

from mipipe.cli.main import main

if __name__ == "__main__":
    main()
