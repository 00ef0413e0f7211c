"""A run as one self-contained HTML page: what every stage did to behaviour, and how sure it is.

run folder ──load──▶ RunView ──render──▶ report.html
"""

from posttrain.report.load import load_view, write_report
from posttrain.report.render import render
from posttrain.report.view import RunView

__all__ = ["RunView", "load_view", "render", "write_report"]
