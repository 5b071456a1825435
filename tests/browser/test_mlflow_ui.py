"""MLflow's pages in a real browser, on the store of a run: parent, children, a chart, the report.

    POLYTROPE_SCREENSHOTS=docs/images POLYTROPE_BROWSER_STORE=.polytrope pytest tests/browser

takes the pictures of the documentation from the newest run of a store of one's own (by default: a small run).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from mlflow_support import POLYTROPE, QUICK, polytrope, wait_until
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from polytrope.pipeline.commands.common import find_run
from polytrope.pipeline.store import Store
from polytrope.pipeline.tracking import free_port

REPOSITORY = Path(__file__).parents[2]
WORKFLOW = """\
name: browsed
description: a small training
executor: local
stages:
  train:
    uses: mlflow_stages:train
    matrix: {rate: [1.0, 2.0]}
    with: {steps: 40, rate: "${matrix.rate}"}
  report: {uses: "mlflow_stages:report", inputs: {models: train}}
"""

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    given = os.environ.get("POLYTROPE_BROWSER_STORE")
    if given:
        return Store(given)
    directory = tmp_path_factory.mktemp("browsed")
    shutil.copy(REPOSITORY / "tests" / "integration" / "mlflow_stages.py", directory)
    (directory / "w.yaml").write_text(WORKFLOW)
    for command in (("run", "w.yaml"), ("sync",)):
        code, output = polytrope(directory, *command)
        assert code == 0, output
    return Store(directory / ".polytrope")


@pytest.fixture(scope="module")
def address(store: Store) -> Iterator[str]:
    """Of `polytrope ui` on the store."""
    port = free_port(0)
    server = subprocess.Popen(
        [POLYTROPE, "ui", "--store", str(store.root), "--port", str(port)],
        env={**os.environ, **QUICK},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        (url,) = re.findall(r"http://\S+", line)

        def answers() -> bool:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=2):
                    return True
            except OSError:
                return False

        wait_until(answers, "polytrope ui answers", 120)
        yield url
    finally:
        server.terminate()  # not SIGINT, which a shell's background jobs ignore
        server.communicate(timeout=30)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no browser (Debian packages `chromium` and `chromium-driver`)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.add_argument("--window-size=1280,860")
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def runs(store: Store) -> dict[str, Run]:
    """Stage (`parent` for the workflow's) → MLflow run of the newest run of the store."""
    client = MlflowClient(tracking_uri=f"sqlite:///{store.root}/mlflow.db")
    run_id = find_run(store, None).name
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`polytrope.run_id` = '{run_id}'")
    return {run.data.tags.get("polytrope.stage", "parent"): run for run in found}


def page(browser: webdriver.Chrome, url: str, *texts: str) -> None:
    """Open a page and wait until it shows these texts."""
    browser.get("about:blank")  # MLflow's addresses differ after the #: the browser would not load again
    browser.get(url)
    wait_until(lambda: shows(browser, *texts), f"{url} shows {texts}")
    for button in browser.find_elements(By.CSS_SELECTOR, "button[aria-label*='Close']"):
        try:
            button.click()  # MLflow's assistant covers a third of the page
        except WebDriverException:
            continue


def shows(browser: webdriver.Chrome, *texts: str) -> bool:
    try:
        shown = browser.find_element(By.TAG_NAME, "body").text
    except StaleElementReferenceException:
        return False
    return all(text in shown for text in texts)


def screenshot(browser: webdriver.Chrome, name: str) -> None:
    directory = os.environ.get("POLYTROPE_SCREENSHOTS")
    if directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(directory) / f"{name}.png"))


def run_url(address: str, run: Run) -> str:
    return f"{address}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def test_the_experiment_lists_the_run_and_its_stages(
    browser: webdriver.Chrome, address: str, runs: dict[str, Run]
) -> None:
    parent = runs["parent"]
    page(browser, f"{address}/#/experiments/{parent.info.experiment_id}/runs", "matching runs", parent.info.run_name)
    expander = "[data-testid='expander'], [aria-label*='xpand'] , .ag-cell button"
    for element in browser.find_elements(By.CSS_SELECTOR, expander):
        if shows(browser, *(name for name in runs if name != "parent")):
            break
        try:
            element.click()
        except WebDriverException:
            continue
    wait_until(lambda: shows(browser, *(name for name in runs if name != "parent")), "the children are listed")
    screenshot(browser, "mlflow-runs")


def test_the_parent_shows_what_was_run_and_leads_to_children_and_report(
    browser: webdriver.Chrome, address: str, runs: dict[str, Run]
) -> None:
    parent = runs["parent"]
    children = [name for name in runs if name != "parent"]
    page(browser, run_url(address, parent), "Finished", "Show more", *children[:3])
    browser.find_element(By.XPATH, "//*[text()='Show more']").click()
    wait_until(lambda: shows(browser, "Results of", "Stages"), "the description is unfolded")
    link = browser.find_element(By.LINK_TEXT, "report.html")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", link)
    screenshot(browser, "mlflow-description")
    assert f"runs/{parent.info.run_id}/artifacts/report.html" in link.get_attribute("href")
    page(browser, link.get_attribute("href"), "report.html", "graph.svg", "requirements.txt")
    frames = browser.find_elements(By.TAG_NAME, "iframe")
    wait_until(lambda: browser.find_elements(By.TAG_NAME, "iframe"), "the report is shown")
    frames = browser.find_elements(By.TAG_NAME, "iframe")
    browser.switch_to.frame(frames[0])
    wait_until(lambda: len(browser.find_element(By.TAG_NAME, "body").text) > 5, "the report has text")
    assert browser.find_element(By.TAG_NAME, "h1").text
    browser.switch_to.default_content()
    screenshot(browser, "mlflow-report")


def test_a_training_shows_its_loss_curve(browser: webdriver.Chrome, address: str, runs: dict[str, Run]) -> None:
    training = next(run for run in runs.values() if "train/loss" in run.data.metrics)
    page(browser, f"{run_url(address, training)}/model-metrics", "loss", "Step")
    curve = ".plot-container .scatterlayer path.js-line"
    wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, curve), "a curve")
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center'})", browser.find_element(By.CSS_SELECTOR, curve)
    )
    screenshot(browser, "mlflow-curves")
