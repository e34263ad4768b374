"""The router by itself: a decision, the index and the tokenizer under it, against the clock and beside Dynamo's."""

from __future__ import annotations

from bench.report import Report, arguments
from bench.router_decision import add_decision_rows
from bench.router_index import add_index_rows
from bench.router_tokens import add_token_rows


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    report = Report("router")
    for add in (add_decision_rows, add_token_rows, add_index_rows):
        add(report, quick=options.quick)
    report.print(as_json=options.json)


if __name__ == "__main__":
    main()
