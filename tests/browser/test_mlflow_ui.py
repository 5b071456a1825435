"""MLflow's pages in a real browser, on the store of the quickstart: parent, children, charts, the report.

    POLYTROPE_SCREENSHOTS=docs/images POLYTROPE_BROWSER_STORE=.polytrope pytest tests/browser

takes the pictures of the documentation from the newest run of a store of one's own (by default: a smaller quickstart,
run twice, so that the newest run found everything in the store).
"""

from __future__ import annotations

import os
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from mlflow_support import POLYTROPE, QUICK, wait_until
from quickstart_support import run_quickstart
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.common.by import By

from polytrope.pipeline.commands.common import find_run
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.tracking.process import free_port

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def store(request: pytest.FixtureRequest) -> Store:
    given = os.environ.get("POLYTROPE_BROWSER_STORE")
    if given:
        return Store(given)
    store: Store = request.getfixturevalue("local_quickstart").store
    run_quickstart(Path(store.address), "local")  # it computes nothing, and ends before MLflow has all of it
    return store


@pytest.fixture(scope="module")
def served(store: Store) -> Iterator[tuple[str, str]]:
    """Address of `polytrope ui` on the store, and the page that it names."""
    port = free_port()
    server = subprocess.Popen(
        [POLYTROPE, "ui", "--store", store.address, "--port", str(port)],
        env={**os.environ, **QUICK},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        ((url, place),) = re.findall(r"^MLflow: (http://[^/]+)(/\S+) \(Ctrl-C ends it\)$", server.stdout.readline())

        def answers() -> bool:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=2):
                    return True
            except OSError:
                return False

        wait_until(answers, "polytrope ui answers", 120)
        yield url, place
    finally:
        server.terminate()  # not SIGINT, which a shell's background jobs ignore
        said = server.stdout.read() if server.stdout is not None else ""
        server.wait(30)
    assert re.fullmatch(r"  its log: \S+\n", said), "MLflow's own words go into the log"


@pytest.fixture(scope="module")
def address(served: tuple[str, str]) -> str:
    return served[0]


def runs_of(store: Store, run_id: str) -> dict[str, Run]:
    """Stage (`parent` for the workflow's) → MLflow run of a run."""
    client = MlflowClient(tracking_uri=f"sqlite:///{store.address}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`polytrope.run_id` = '{run_id}'")
    return {run.data.tags.get("polytrope.stage", "parent"): run for run in found}


@pytest.fixture(scope="module")
def runs(store: Store) -> dict[str, Run]:
    """Of the newest run of the store."""
    return runs_of(store, find_run(store, None).name)


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


def run_url(address: str, run: Run, tab: str = "") -> str:
    return f"{address}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}{tab}?workflowType=machine_learning"


def test_the_experiment_lists_the_run_and_its_stages(
    browser: webdriver.Chrome, address: str, runs: dict[str, Run]
) -> None:
    parent = runs["parent"]
    page(
        browser,
        f"{address}/#/experiments/{parent.info.experiment_id}/runs?workflowType=machine_learning",
        "matching runs",
        parent.info.run_name,
    )
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


def test_ui_names_the_page_of_the_run_among_those_for_training(
    browser: webdriver.Chrome, served: tuple[str, str], store: Store, runs: dict[str, Run]
) -> None:
    parent = runs["parent"]
    assert re.fullmatch(r"quickstart #\d+", parent.info.run_name)
    opened = subprocess.run(
        [POLYTROPE, "open", "mlflow", "--print", "--store", store.address], capture_output=True, text=True, check=True
    )
    assert opened.stdout.strip() == "".join(served)
    page(browser, opened.stdout.strip(), parent.info.run_name, "Finished")
    assert not shows(browser, "Evaluation runs"), "the pages for language-model applications have this"


def test_the_first_charts_of_the_run_are_the_losses_of_its_trainings(
    browser: webdriver.Chrome, address: str, store: Store, runs: dict[str, Run]
) -> None:
    parent = runs["parent"]
    trainings = {name: run for name, run in runs.items() if "train/loss" in run.data.metrics}
    page(browser, run_url(address, parent, "/model-metrics"), "Model metrics", "-losses")
    first = browser.find_element(By.XPATH, "//*[@aria-expanded='true'][contains(., '(')]")
    assert first.text.split()[0] == "-losses"
    client = MlflowClient(tracking_uri=f"sqlite:///{store.address}/mlflow.db")
    for name, training in trainings.items():
        for curve in ("train", "val"):
            points = client.get_metric_history(training.info.run_id, f"{curve}/loss")
            shown = client.get_metric_history(parent.info.run_id, f"-losses/{name}: {curve}")
            assert [(p.step, p.value) for p in shown] == [(p.step, p.value) for p in points]
    wait_until(lambda: drawn(browser, "-losses/baseline: train"), "the first training's curve is drawn")
    screenshot(browser, "mlflow-losses")
    counts = {"parameters", "steps", "samples", "tokens", "format"}
    for run in trainings.values():
        assert not counts & run.data.metrics.keys()
        assert {"parameters", "steps", "samples", "tokens"} <= run.data.params.keys()


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


def test_a_training_shows_its_loss_curves(
    browser: webdriver.Chrome, address: str, store: Store, runs: dict[str, Run]
) -> None:
    name, training = next((name, run) for name, run in sorted(runs.items()) if "train/loss" in run.data.metrics)
    page(browser, run_url(address, training, "/model-metrics"), "Model metrics", "train")
    client = MlflowClient(tracking_uri=f"sqlite:///{store.address}/mlflow.db")
    for metric in ("val/loss", "train/loss"):
        section = browser.find_element(
            By.XPATH, f"//*[@aria-expanded='true'][starts-with(normalize-space(), '{metric.partition('/')[0]}')]"
        )
        browser.execute_script("arguments[0].scrollIntoView()", section)  # only what is in sight is drawn
        history = client.get_metric_history(training.info.run_id, metric)
        points = [[point.step, point.value] for point in sorted(history, key=lambda point: point.step)]
        assert len(points) > 2
        wait_until(lambda: points in drawn(browser, metric), f"the curve of {metric}")  # noqa: B023 (called at once)
        assert shows(browser, f"{name} ({metric})")
    screenshot(browser, "mlflow-curves")


def drawn(browser: webdriver.Chrome, metric: str) -> list[list[list[float]]]:
    """The points of every line that the page draws for a metric."""
    lines = browser.execute_script(
        """return [...document.querySelectorAll('.js-plotly-plot')].filter(plot => plot.querySelector('path.js-line'))
        .flatMap(plot => plot.data.filter(line => line.metricKey === arguments[0]))
        .map(line => Array.from(line.x).map((x, i) => [x, line.y[i]]))""",
        metric,
    )
    return list(lines)


def test_a_stage_from_the_store_leads_to_the_run_that_computed_it(
    browser: webdriver.Chrome, address: str, store: Store, runs: dict[str, Run]
) -> None:
    stage, cached = next(
        ((name, run) for name, run in runs.items() if "polytrope.source_run" in run.data.tags), (None, None)
    )
    if stage is None or cached is None:
        pytest.skip("the newest run of this store computed everything")
    origin = runs_of(store, cached.data.tags["polytrope.source_run"])[stage]
    page(browser, run_url(address, cached), "Finished", "Taken from the store")
    assert origin.info.run_id in browser.find_element(By.LINK_TEXT, stage).get_attribute("href")
