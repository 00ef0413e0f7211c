"""Objectives: what each term computes, and how its values become one number."""
