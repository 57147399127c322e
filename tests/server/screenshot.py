"""Makes docs/images/chat_page.png: ``PYTHONPATH=tests python -m server.screenshot CHECKPOINT``; needs a Chromium."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from dq_runtime.runtime.engine import EngineSettings
from dq_runtime.server.run import open_served
from server.live_server import serving

QUESTIONS = ("What is the capital of France?", "Why is the sky blue? Answer in two sentences.")
OUTPUT = Path(__file__).parents[2] / "docs" / "images" / "chat_page.png"


def main(checkpoint: str) -> None:
    engine, served = open_served(checkpoint, "SmolLM2-135M-Instruct-4bit", "cpu", False, EngineSettings(max_running=4))
    with serving(engine, served) as live, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 960, "height": 720})
        page.goto(live.url)
        page.locator("summary").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Most tokens").fill("96")
        page.locator("summary").click()
        for question in QUESTIONS:
            page.get_by_label("Your message").fill(question)
            page.keyboard.press("Enter")
            page.locator("#log[aria-busy=true]").wait_for()
            page.locator("#log[aria-busy=false]").wait_for()
        page.screenshot(path=OUTPUT)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
