"""The demo: `tokun app`, or `build` and `serve` from Python.

page    the layout, its look and its script      events   what its buttons do        views   pairs and words as HTML
demo    what it does, without a page             links    a print as an address      visit   what a visitor keeps
gate    the limits of a request
"""

from tokun.app.page import build, serve

__all__ = ["build", "serve"]
