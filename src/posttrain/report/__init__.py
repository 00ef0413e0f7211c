"""A run as one self-contained HTML page: what every stage did to behaviour, and how sure it is.

    run folder ──load.py──▶ RunReport ──render.py──▶ report.html ◀── Section of another unit

Charts are functions of domain types. Neither reading a run nor rendering it needs torch.
"""
