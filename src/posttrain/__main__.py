"""The command line, as ``python -m posttrain``."""

from posttrain.cli.main import main

if __name__ == "__main__":
    main()
