"""The pages that polytrope writes, as a person with a phone sees them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_support import wait_until
from quickstart_support import REPOSITORY, Run
from selenium import webdriver
from selenium.webdriver.common.by import By

from polytrope.pipeline.commands.cli import main

WIDTH = 390  # CSS pixels of a common phone


@pytest.fixture
def phone(browser: webdriver.Chrome) -> Iterator[webdriver.Chrome]:
    metrics = {"width": WIDTH, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_report_is_read_on_a_phone_without_moving_the_page(phone: webdriver.Chrome, local_quickstart: Run) -> None:
    phone.get((local_quickstart.artifact("report") / "report.html").as_uri())
    assert phone.execute_script("return document.documentElement.scrollWidth") == WIDTH
    tables = phone.execute_script(
        """return [...document.querySelectorAll('table')].map(table => {
            const box = table.parentElement.getBoundingClientRect();
            const name = table.querySelector('td').getBoundingClientRect();
            const heads = [...table.querySelectorAll('th')].map(head => [head.innerText, head.getBoundingClientRect()]);
            table.parentElement.scrollLeft = 200;
            return {right: box.right, name: name.left,
                    moved: table.querySelector('td').getBoundingClientRect().left,
                    heads: heads.map(([text, place]) => [text, place.right])};
        })"""
    )
    assert len(tables) > 4
    for table in tables:
        assert table["moved"] == table["name"], "the first column stays where it is"
    seen = [text for text, right in tables[0]["heads"] if right <= tables[0]["right"]]
    assert {"model", "validation loss"} <= {text.replace("\n", " ") for text in seen}
    widths = phone.execute_script("return [...document.querySelectorAll('figure img')].map(image => image.width)")
    assert widths
    assert min(widths) >= 700, "the text of a plot can be read"


def test_the_card_fits_a_phone(phone: webdriver.Chrome, local_quickstart: Run, tmp_path: Path) -> None:
    output = tmp_path / "card.html"
    assert main(["card", "--store", local_quickstart.store.address, "--output", str(output)]) == 0
    phone.get(output.as_uri())
    assert phone.execute_script("return document.documentElement.scrollWidth") == WIDTH


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pages, built as `mkdocs.yml` says."""
    directory = tmp_path_factory.mktemp("site")
    (directory / "docs").mkdir()
    for name in ("style.css", "iframe-worker.js"):
        shutil.copy(REPOSITORY / "docs" / name, directory / "docs" / name)
    (directory / "docs" / "index.md").write_text("# Start\n\nNothing here.\n")
    (directory / "docs" / "other.md").write_text("# Other\n\n## Quokka\n\nA small marsupial.\n")
    text = (REPOSITORY / "mkdocs.yml").read_text()
    text = re.sub(r"^(nav|hooks):.*\n(?: +.*\n)*", "", text, flags=re.MULTILINE)
    (directory / "mkdocs.yml").write_text(text)
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "POLYTROPE_REPOSITORY": "https://example.org/code"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict"]
    subprocess.run(command, cwd=directory, env=environment, check=True, timeout=120)
    return directory / "build" / "docs"


def test_the_documentation_is_searched_dark_and_linked_when_opened_as_files(
    browser: webdriver.Chrome, site: Path
) -> None:
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["http://*", "https://*"]})
    try:
        browser.get((site / "index.html").as_uri())
        scheme = "return document.body.getAttribute('data-md-color-scheme')"
        wait_until(lambda: browser.execute_script(scheme) == "slate", "the page is dark")
        assert browser.find_element(By.CSS_SELECTOR, "a.md-source").get_attribute("href") == "https://example.org/code"
        search = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
        search.click()
        search.send_keys("quokka")
        found = "return [...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
        wait_until(lambda: browser.execute_script(found), "the search finds the page")
        assert "other.html" in browser.execute_script(found)[0]
    finally:
        browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
