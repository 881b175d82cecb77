"""``fleet``: many models."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bnfold.commands.arguments import FLEET, FLEET_REPORT, command
from bnfold.commands.job import refuse_contradictions
from bnfold.commands.running import quiet
from bnfold.commands.terminal import fail, show, write

if TYPE_CHECKING:
    from bnfold.report import ModelRow


@command(click.argument("models", metavar="MODELS.TOML", type=click.Path(path_type=Path)), FLEET, FLEET_REPORT)
def fleet(models: Path, output: str, **given: Any) -> int:
    """Export every model of a list, on all cores or on a cluster, and write a page about all of them.

    What an earlier run has done and what nothing has changed of is not done again. pip install 'bnfold[fleet]'

    \b
    bnfold fleet models.toml -o out/
    bnfold fleet models.toml -o s3://bucket/out --scheduler tcp://host:8786
    """
    refuse_contradictions(given)
    from bnfold.fleet.rows import ListError, read_rows, size_of

    memory = size_of(given["memory"]) if given["memory"] else None
    try:
        rows = read_rows(models)
    except ListError as error:
        for fault in error.faults:
            fail(f"{models}: {fault}", 2)
        return 2
    with quiet(), contextlib.redirect_stdout(sys.stderr):
        from bnfold.fleet.cluster import Where
        from bnfold.fleet.places import Folder
        from bnfold.fleet.run import run
        from bnfold.render import document, fleet_line, require_matplotlib

        require_matplotlib()  # for the models' pages

        def tell(row: ModelRow, done: int, total: int) -> None:
            if not given["quiet"]:
                write(fleet_line(row, done, total) + "\n", sys.stderr)

        report = run(
            rows, models.name, models.absolute().parent, output,
            Where(given["scheduler"], given["workers"], memory), timeout=given["timeout"], anew=given["retry"],
            tell=tell,
        )  # fmt: skip
        results = Folder(output)
        for suffix in (".json", ".html", ".xml"):
            results.write(f"index{suffix}", document(report, suffix).encode("utf-8", "backslashreplace"))
    if given["as_json"]:
        write(report.to_json() + "\n", sys.stdout)
    elif not given["quiet"]:
        from bnfold.render import fleet_report

        show(lambda page: fleet_report(report, page, where=f"{output.rstrip('/')}/index.html, index.json, index.xml"))
    return report.exit_code
