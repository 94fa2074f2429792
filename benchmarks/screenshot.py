"""docs/demo.png: the demo as a visitor sees it, with eight prints of seed 42, each the best of eight candidates, one of them selected.
docs/demo-phone.png: the same on a phone.

python -m benchmarks.screenshot --out docs/demo.png --phone docs/demo-phone.png      needs the extras app, svg and dev, and Chromium
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import tokun
from tokun.app import page as app
from tokun.utils import console
from tokun.utils.optional_packages import need


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=None, help="default: the bundled engraving model")
    parser.add_argument("--port", type=int, default=7861)
    parser.add_argument("--print", type=int, default=7, dest="taken", help="which of the eight to select (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/demo.png"))
    parser.add_argument("--phone", type=Path, default=None, help="also as a phone shows it, 390 px wide, into this file")
    args = parser.parse_args()
    page = app.build(tokun.load(args.checkpoint))
    app.serve(page, port=args.port, wait=False)
    try:
        photograph(f"http://127.0.0.1:{args.port}", args.taken, {args.out: (1240, 960), **({args.phone: PHONE} if args.phone else {})})
    finally:
        page.close(verbose=False)
    for out in filter(None, (args.out, args.phone)):
        print(f"{out}: {out.stat().st_size:,} bytes")


PHONE = 390, 844


def photograph(address: str, taken: int, sizes: dict[Path, tuple[int, int]]) -> None:
    """Write a picture of the page for each file, in a window of that width and height."""
    with need("playwright.sync_api", extra="dev").sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for out, (width, height) in sizes.items():
            visitor = browser.new_page(viewport={"width": width, "height": height})
            visitor.set_default_timeout(600_000)
            visitor.goto(f"{address}/?seed=42&n=8&best=8")
            visitor.wait_for_selector(".plate.sheet")
            visitor.locator("#history .thumbnail-item").nth(taken).click()
            visitor.wait_for_selector("a[download]")
            visitor.wait_for_timeout(2000)  # the page scrolls to the print by itself, and smoothly
            visitor.evaluate("scrollTo(0, 0)")
            visitor.mouse.move(5, 5)
            visitor.wait_for_timeout(1000)
            visitor.screenshot(path=out, full_page=(width, height) != PHONE)
            visitor.close()
        browser.close()


if __name__ == "__main__":
    console.run("benchmarks/screenshot.py", main)
