"""The demo: `python -m tokun.app`, or `build` and `serve` for a page of one's own.

page   the page and its look (page.css)      demo   what it does, without a page      gate   the limits of a request
"""

from tokun.app.page import build, serve

__all__ = ["build", "serve"]
