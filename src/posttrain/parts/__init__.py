"""Parts of methods: sources, signals, terms, and the methods that are made of them.

A part is one class in one file: its options, what it needs, its formula and source, and its code.
A folder is a family: the losses, the signals that feed them and the named methods are neighbours.

    registry    who registers, who finds
    base        Part, Term, Signal, Source, Method, Composition
    tools       what a part may use of the stage that it works in
    legality    whether a composition can work
"""
