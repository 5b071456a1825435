"""The pages that polytrope writes, as a person with a phone sees them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from quickstart_support import Run
from selenium import webdriver

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
