"""Teachers: divergences from them, their log-probs as credit, and the methods made of these."""
