"""Self-contained HTML pages: SVG primitives, templates and what all pages share. Knows no run.

values ──svg.py──▶ drawings ─┐
                             ├─template.py: the caller's template + page.css, page.js──▶ one page
Section of another unit ─────┘
"""
