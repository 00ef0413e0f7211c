"""A run as one self-contained HTML page: what every stage did to behaviour, and how sure it is.

    run folder ──load.py──▶ RunView ──render.py──▶ report.html

``load`` reads run folders and needs pyarrow, ``render`` needs jinja2; ``view`` needs nothing.
"""
