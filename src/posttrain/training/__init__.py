"""The training loop: draw, score, admit, pack, step."""
