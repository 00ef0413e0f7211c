"""A small situation in the lab for every method: data, and a recipe that must move one task."""
