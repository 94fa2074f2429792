"""docs/demo.png: the demo as a visitor sees it, with eight prints of seed 42, one of them selected.

python -m benchmarks.screenshot --out docs/demo.png      needs the extras app, svg and dev, and Chromium
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
    parser.add_argument("--print", type=int, default=1, dest="taken", help="which of the eight to select (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/demo.png"))
    args = parser.parse_args()
    page = app.build(tokun.load(args.checkpoint))
    app.serve(page, port=args.port, wait=False)
    try:
        photograph(f"http://127.0.0.1:{args.port}", args.taken, args.out)
    finally:
        page.close(verbose=False)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


def photograph(address: str, taken: int, out: Path) -> None:
    with need("playwright.sync_api", extra="dev").sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        visitor = browser.new_page(viewport={"width": 1240, "height": 960})
        visitor.set_default_timeout(120_000)
        visitor.goto(address)
        visitor.get_by_label("Prints of this seed").first.fill("8")
        visitor.click("#generate")
        visitor.wait_for_selector(".plate.sheet")
        visitor.locator("#history .thumbnail-item").nth(taken).click()
        visitor.wait_for_selector("a[download]")
        visitor.mouse.move(5, 5)
        visitor.wait_for_timeout(1000)
        visitor.screenshot(path=out, full_page=True)
        browser.close()


if __name__ == "__main__":
    console.run("benchmarks/screenshot.py", main)
