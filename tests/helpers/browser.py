"""A fresh Chromium, and the clicks of a person in MLflow's UI."""

import importlib.util
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from fixtures import needs

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = needs(
    (CHROMIUM, "Chromium: apt-get install chromium"),
    (importlib.util.find_spec("playwright"), "Playwright: make .venv/browser"),
)


@contextmanager
def open_page(width: int, height: int, **settings) -> Iterator:
    """A page of a browser with its own profile; `settings` are those of Playwright's new_page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser.new_page(viewport={"width": width, "height": height}, **settings)
        finally:
            browser.close()


def see_table(page, address: str) -> None:
    """Open the address that `fashion-cnn ui` prints, and close the panel that MLflow opens next to it."""
    page.goto(address)
    page.get_by_text("val_accuracy").first.wait_for()
    close = page.locator("[data-component-id='mlflow.assistant.chat_panel.close']")
    if close.is_visible():
        close.click()
    page.get_by_role("row").nth(2).wait_for()


def see_comparison(page) -> None:
    """From the table: select the first two runs and click Compare."""
    rows = page.get_by_role("checkbox", name=re.compile("toggle row selection", re.IGNORECASE))
    for place in (0, 1):
        rows.nth(place).click()
    page.get_by_role("button", name=re.compile("^Compare")).first.click()
    page.get_by_text("Run details").wait_for()


def see_models(page) -> None:
    """From the table: click Models on the left."""
    page.get_by_role("link", name="Models", exact=True).click()
    page.get_by_text("Ready", exact=True).first.wait_for()


def see_run(page, name: str) -> None:
    """From the table: click the name of a run."""
    page.get_by_role("link", name=name, exact=True).first.click()
    page.get_by_text("About this run").wait_for()
