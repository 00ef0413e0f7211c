"""``python -m posttrain``: the command line."""

from posttrain.cli.main import main

if __name__ == "__main__":
    main()
