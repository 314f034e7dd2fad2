"""The page as one file: the template with style, code and data inserted."""

import json
from pathlib import Path

PAGE = Path("page/fashion-cnn.html")
HERE = Path(__file__).parent
# In order: each uses those before it.
SCRIPTS = (
    "network",
    "move",
    "draw",
    "attribution",
    "step",
    "toy",
    "conv",
    "end",
    "cnn",
    "results",
    "moved",
    "start",
)


def html(contents: dict) -> str:
    """The page that shows `contents`; it needs no other file and no network."""
    parts = {
        "<!-- style -->": f"<style>\n{_read('style.css')}</style>",
        # In JSON, "<" occurs only in strings, where it could end the element.
        "<!-- contents -->": '<script type="application/json" id="contents">'
        + json.dumps(contents, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        + "</script>",
        "<!-- scripts -->": "".join(f"<script>\n{_read(f'{name}.js')}</script>\n" for name in SCRIPTS),
    }
    page = _read("page.html")
    for place, text in parts.items():
        before, after = page.split(place)
        page = before + text + after
    return page


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
