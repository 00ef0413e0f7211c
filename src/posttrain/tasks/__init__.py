"""Task sets: prompts with a scorer, split into what may be trained on and what only measures."""
