"""Broken inputs by the thousand: none may end in a traceback, hang, or count as done for nothing.

    PYTHONPATH=benchmarks python -m fuzz                     # every kind
    PYTHONPATH=benchmarks python -m fuzz recipes --num 200 --commands 10 --seed 3

Every input is made from a valid one and a seed, so that a number names it: ``--only 1234`` makes
one again and shows its traceback. Kinds: ``recipes`` (planned, and some of them run), ``files``
(data and task files), ``models`` (folders), ``rewards``, ``options`` (each option set alone to
another legal value, and the common ones in pairs: what plans must run).
"""
