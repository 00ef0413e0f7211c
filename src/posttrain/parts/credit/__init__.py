"""Credit assignment: advantages of answers and tokens, and selection of what is trained."""
