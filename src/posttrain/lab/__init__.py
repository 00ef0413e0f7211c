"""The embedded lab: a tiny base model whose support is known by construction, and its tour."""
