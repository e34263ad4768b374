"""The router by itself: a decision, and the index under it, against the clock and beside Dynamo's."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from bench.report import Report, arguments

# Each part adds its rows to the report.
PARTS = (("router_decision", "add_decision_rows"), ("router_index", "add_index_rows"))


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    report = Report("router")
    for part, add in PARTS:
        if importlib.util.find_spec(f"bench.{part}") is None:
            print(f"bench.{part}: left out, it is not there", file=sys.stderr)
            continue
        getattr(importlib.import_module(f"bench.{part}"), add)(report, quick=options.quick)
    report.print(as_json=options.json)


if __name__ == "__main__":
    main()
