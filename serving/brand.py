"""What gives the page, the reports and the pictures one look: name, logo and style sheet.

The style sheet needs nothing else. A report embeds it whole::

    <style>{STYLE}</style> … <header class="ade-head">{MARK}<h1>{NAME}</h1></header>
"""

from __future__ import annotations

from pathlib import Path

NAME = "AV-ADE"
MARK_FILE = Path(__file__).with_name("mark.svg")
MARK = MARK_FILE.read_text().strip()
STYLE = Path(__file__).with_name("style.css").read_text()
