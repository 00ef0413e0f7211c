"""What everything is made of: records, configuration, errors, files. No PyTorch."""
