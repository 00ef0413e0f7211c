"""A run as one self-contained HTML page: what every stage did to behaviour, and how sure it is.

    run folder ──load.py──▶ RunView ──render──▶ report.html

``posttrain.report.load`` reads run folders and needs pyarrow; rendering needs nothing heavy.
"""

from posttrain.report.render import render
from posttrain.report.view import RunView

__all__ = ["RunView", "render"]
