"""The one loop: draw, score, admit, pack, step."""
