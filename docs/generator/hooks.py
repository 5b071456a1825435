"""What mkdocs calls while it builds the site: pages and plots made from the code, formulas as MathML, links into the
repository. `mkdocs.yml` names this file.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plots
import reference_pages
import tables
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

log = logging.getLogger("mkdocs.polytrope")

PAGES: dict[str, Callable[[], str]] = {
    "reference/stages.md": reference_pages.stages_page,
    "reference/command-options.md": reference_pages.commands_page,
    "reference/python.md": reference_pages.python_page,
}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
PLACEHOLDER = re.compile(r"^<!-- generated: (\w+)((?: [\w-]+)*) -->$", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)\)")
PICTURES = "benchmarks/results"  # of the repository, outside docs/: pages may show them


def on_config(config: Any) -> Any:
    """Leave pages out of the navigation that are neither written nor generated."""
    docs = Path(config.docs_dir)

    def existing(entry: Any) -> Any:
        if isinstance(entry, dict):
            kept = {title: found for title, value in entry.items() if (found := existing(value)) is not None}
            return kept or None  # a title without a page
        if isinstance(entry, list):
            return [kept for kept in map(existing, entry) if kept is not None]
        return entry if entry in PAGES or (docs / entry).exists() else None

    config.nav = existing(config.nav)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and plots."""
    for path, make in PAGES.items():
        files.append(File.generated(config, path, content=make()))
    for name, svg in plots.all_plots().items():
        files.append(File.generated(config, f"activations/plots/{name}.svg", content=svg))
    for name, svg in plots.analysis_plots().items():
        files.append(File.generated(config, f"plots/{name}.svg", content=svg))
    for name, svg in plots.part_plots().items():
        files.append(File.generated(config, f"parts/plots/{name}.svg", content=svg))
    for picture in sorted((Path(config.config_file_path).parent / PICTURES).glob("*.png")):
        files.append(File.generated(config, f"{PICTURES}/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Fill in the generated tables; name the repository's files that pages link to outside the site."""
    markdown = PLACEHOLDER.sub(lambda match: tables.TABLES[match[1]](*match[2].split()), markdown)
    here = Path(config.docs_dir) / page.file.src_uri
    root = Path(config.config_file_path).parent

    def link(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        path = Path(os.path.normpath(here.parent / target))
        if not target.startswith("../") or path.is_relative_to(config.docs_dir):
            return match[0]
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else target
        if not path.exists():
            log.warning("%s links to %s, which is not in the repository", page.file.src_uri, name)
        if picture:
            return f"![{text}]({os.path.relpath(name, Path(page.file.src_uri).parent)})"
        return text if text.strip("`") == name else f"{text} (`{name}`)"

    return LINK.sub(link, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """LaTeX to MathML, which browsers show without a script."""

    def formula(match: re.Match[str]) -> str:
        from html import unescape

        return convert(unescape(match[3]).strip(), display="block" if match[2] == "[" else "inline")

    return FORMULA.sub(formula, html)
