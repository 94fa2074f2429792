"""The demo: `tokun app`, or `build` and `serve` for a page of one's own.

page   the layout, and its look (page.css)      events   what its buttons do      views   pairs and words as HTML
demo   what it does, without a page             gate     the limits of a request
"""

from tokun.app.page import build, serve

__all__ = ["build", "serve"]
