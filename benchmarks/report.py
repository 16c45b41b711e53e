"""What every benchmark ends with: a table on the console, and the same figures as JSON in out/bench/.

    python benchmarks/report.py

puts the tables of out/bench/ into docs/benchmarks.md, each between the lines that name it.
"""

import json
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

OUT = Path("out/bench")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


def report(name, title, columns, rows, results):
    """Print ``rows`` under ``columns``, and write them and ``results`` to out/bench/``name``.json."""
    rows = [[str(cell) for cell in row] for row in rows]
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)
    OUT.mkdir(parents=True, exist_ok=True)
    kept = {"title": title, "columns": list(columns), "rows": rows, "results": results}
    (OUT / f"{name}.json").write_text(json.dumps(kept, indent=2))


def markdown(columns, rows):
    """A table as the page has it."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(page=PAGE):
    """Put every table that the page names, and out/bench/ holds, in its place."""
    text = page.read_text()
    for name in re.findall(r"<!-- table (\w+) -->", text):
        file = OUT / f"{name}.json"
        if file.is_file():
            kept = json.loads(file.read_text())
            place = rf"(<!-- table {name} -->\n).*?\n?(<!-- end -->)"
            table = markdown(kept["columns"], kept["rows"])
            text = re.sub(place, lambda found: found[1] + table + "\n" + found[2], text, flags=re.S)  # noqa: B023
    page.write_text(text)


if __name__ == "__main__":
    publish()
