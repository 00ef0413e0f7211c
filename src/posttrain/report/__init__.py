"""A run as one self-contained HTML page: what every stage did to behaviour, and how sure it is."""

from posttrain.report.render import render
from posttrain.report.view import RunView

__all__ = ["RunView", "render"]
