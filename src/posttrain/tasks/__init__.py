"""Task sets: prompts with a scorer, split into training and held-out prompts."""
