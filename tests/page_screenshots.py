"""Pictures of the page for the documentation: `python tests/page_screenshots.py docs/images`.

A call about the bundled picture with the embedded model: desktop, and a phone in the dark.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import moshivis
from moshivis.serve.static import PAGE
from page_support import ANSWER, PATIENT, choose_example, open_browser, until, wait_for_words
from serve_support import serving

SCREENS: dict[str, Any] = {
    "page-desktop": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
    "page-phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "device_scale_factor": 2},
}


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, serving(moshivis.load(), page=PAGE) as server:
        with open_browser(Path(folder)) as browser:
            for name, screen in SCREENS.items():
                page = browser.new_context(**screen).new_page()
                page.goto(server.url)
                until(page, "document.querySelector('#thumbs img')?.complete")
                choose_example(page)
                page.click("#tab-gallery")
                page.click("#call")
                wait_for_words(page, ANSWER, PATIENT)
                page.wait_for_timeout(2500)
                page.fill("#question", "What colour is the star?")
                page.keyboard.press("Enter")
                until(page, "moshivis.transcript.turns.at(-1).form === 'written'")
                until(page, "moshivis.transcript.turns.at(-1).pieces.length > 0")
                page.evaluate("document.activeElement.blur()")
                page.wait_for_timeout(1500)
                page.screenshot(path=out / f"{name}.png")
                page.context.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
