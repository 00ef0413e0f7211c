"""A run as one self-contained HTML page: the effect of every stage, with intervals.

    run folder ──load.py──▶ RunReport ──render.py──▶ report.html ◀── Section of another unit

Charts are functions of domain types. Neither reading a run nor rendering it needs torch.
"""
