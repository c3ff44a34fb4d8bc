"""Draws the pictures of the README and the docs from the committed records.

python benchmarks/pictures.py
"""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from broadsheet.core.records import read_json
from broadsheet.lab import plots
from broadsheet.lab.table import quality_of, rows, view
from broadsheet.lab.terminal import terminal_table

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"
#: results -> the budget whose table is drawn
RESULTS = {
    "caches_sessions": 0.25,
    "caches_text": 0.25,
    "weights_sessions": 3.0,
    "weights_outliers": 3.0,
    "weights_text": 3.0,
}


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, budget in RESULTS.items():
        path = HERE / "results" / f"{name}.records.json"
        if not path.is_file():
            continue
        records = list(read_json(path))
        table = rows(records)
        how = view(records)
        console = Console(record=True, width=150, file=io.StringIO(), force_terminal=True)
        console.print(terminal_table([r for r in records if r.setting.get("budget", budget) == budget]))
        title = f"broadsheet compare {name.partition('_')[0]} --budgets {budget:g}"
        (IMAGES / f"{name}_table.svg").write_text(console.export_svg(title=title, unique_id=name), encoding="utf-8")
        figure = plots.quality_against_price(table, quality_of(records), how)
        (IMAGES / f"{name}_bytes.svg").write_text(plots.svg(figure), encoding="utf-8")
        for mode in ("multi-turn", "multi-request"):
            turns = plots.quality_by_turn(table, mode, how.reference)
            if turns is not None:
                (IMAGES / f"{name}_{mode}.svg").write_text(plots.svg(turns), encoding="utf-8")
    print(f"drawn into {IMAGES}")


if __name__ == "__main__":
    main()
