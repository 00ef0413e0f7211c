"""Model folders, read without loading them: files, tensor headers, configuration, tokens."""
