"""Parts of methods: sources, signals, terms, and the methods that are made of them.

A part is one class in one file: its options, what it needs, its formula and source, and its code.
A folder is a family: the losses, the signals that feed them and the named methods are neighbours.

    registry    registration and lookup by role and name
    base        Part, Term, Signal, Source, Method, Composition
    tools       the stage's policies, task sets and files, for parts
    legality    checks of compositions
"""
