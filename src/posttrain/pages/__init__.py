"""Self-contained HTML pages: SVG primitives, templates and shared assets. Independent of runs.

values ──svg.py──▶ drawings ─┐
                             ├─template.py: the caller's template + page.css, page.js──▶ one page
Section of another unit ─────┘
"""
