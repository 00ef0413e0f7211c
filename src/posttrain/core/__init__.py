"""The base of all other folders: records, configuration, errors, files. No PyTorch."""
