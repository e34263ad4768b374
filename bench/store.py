"""How near the tiers come to what the machine can do: memcpy, raw sockets, other clients and ours, in one run."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from bench.report import Report, arguments

PARTS = ("store_redis", "store_host", "store_disk", "store_crypto", "store_peer")


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    report = Report("store")
    for part in PARTS:
        if importlib.util.find_spec(f"bench.{part}") is None:
            print(f"bench.{part}: left out, it is not there", file=sys.stderr)
            continue
        importlib.import_module(f"bench.{part}").rows(report, options.quick)
    report.print(as_json=options.json)


if __name__ == "__main__":
    main()
