"""What every benchmark ends with: a table on the console and the same figures as JSON in out/bench/."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table


def report(name, title, columns, rows, results):
    """Print ``rows`` under ``columns`` and write ``results`` to out/bench/``name``.json."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=150).print(table)
    out = Path("out/bench") / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2))
