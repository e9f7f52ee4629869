"""A page of Markdown as the Hub shows it: its width, fonts and tables, to measure in a browser."""

from pathlib import Path

from markdown_it import MarkdownIt

WIDTH = 690
"""Pixels of a model card's column on a screen of 1,280."""
_STYLE = """
body { margin: 0; width: 690px; font: 16px/1.6 "Source Sans Pro", "DejaVu Sans", sans-serif; }
table { border-collapse: collapse; font-size: 14px; line-height: 1.7; }
td, th { padding: 4px 10px; border: 1px solid #ddd; }
code { font: 0.875em "IBM Plex Mono", "DejaVu Sans Mono", monospace; }
pre { overflow-x: auto; background: #f5f5f5; padding: 8px; }
"""


def write(source: Path, out: Path) -> None:
    """The text of a card, without its front matter, as HTML."""
    text = source.read_text(encoding="utf-8")
    if text.startswith("---\n"):
        text = text.split("\n---\n", 1)[1]
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    page = f'<meta charset="utf-8"><style>{_STYLE}</style><body>{body}</body>'
    out.write_text(page, encoding="utf-8")
