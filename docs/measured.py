"""The directive `measured`: what bench/results holds, read when the site is built.

::

    :::{measured} NAME
    :section: a title in NAME.md, whose table is shown; without it and `plot`, the machine
    :rows: a regular expression, to show only rows in which it is found
    :plot: a kind of plot (bench/plots.py), drawn from NAME.json
    :::
"""

import json
import re
import sys
from functools import cache
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

BENCH = Path(__file__).parents[1] / "bench"
RESULTS, PLOTS = BENCH / "results", Path(__file__).parent / "plots"
sys.path.insert(0, str(BENCH))
import plots  # noqa: E402  (of bench)


def report(name: str) -> dict[str, str]:
    """Return the sections of a report by title; what comes before them has the title ""."""
    text = re.sub(r"^# .*\n+", "", (RESULTS / f"{name}.md").read_text())
    lead, *sections = re.split(r"^## ", text, flags=re.M)
    return {"": lead} | dict(section.split("\n\n", 1) for section in sections)


def machine(name: str) -> str:
    """Return on what was measured, in how many threads and with which versions."""
    return re.split(r"\n+Build:", report(name)[""])[0]


def table(name: str, section: str, rows: str) -> str:
    """Return the first table of a section that begins with these words."""
    sections = report(name)
    titles = [title for title in sections if title == section or title.startswith(f"{section} (")]
    if len(titles) != 1:
        raise ValueError(
            f"section must be one of {list(sections)} in {name}.md; received {section!r}"
        )
    lines = re.search(r"(?:^\|.*\n?)+", sections[titles[0]], re.M)[0].splitlines()
    kept = [line for line in lines[2:] if re.search(rows, line)]
    if not kept:
        raise ValueError(f"rows must be found in {section!r} of {name}.md; received {rows!r}")
    return "\n".join([*lines[:2], *kept])


@cache
def drawn(name: str) -> dict[str, Path]:
    """Draw all plots of a run; return them by kind."""
    PLOTS.mkdir(exist_ok=True)
    results = json.loads((RESULTS / f"{name}.json").read_text())
    return {path.stem.rpartition("-")[2]: path for path in plots.draw(results, PLOTS / name)}


class Measured(SphinxDirective):
    required_arguments = 1
    option_spec = dict.fromkeys(("section", "rows", "plot"), directives.unchanged)

    def run(self) -> list[nodes.Node]:
        (name,), options = self.arguments, self.options
        self.env.note_dependency(str(RESULTS / f"{name}.md"))
        if kind := options.get("plot"):
            self.env.note_dependency(str(RESULTS / f"{name}.json"))
            text = f"![{kind}](/plots/{drawn(name)[kind].name})"
        elif "section" in options or "rows" in options:
            text = table(name, options.get("section", ""), options.get("rows", ""))
        else:
            text = machine(name)
        return [nodes.container("", *self.parse_text_to_nodes(text), classes=["measured"])]


def setup(app):
    app.add_directive("measured", Measured)
    return {"parallel_read_safe": True}
