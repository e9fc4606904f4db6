"""Fills a database, starts the console on it as its container does, and times every page. Fails when one is too slow.

python -m bench.console                      # 10 million deliveries in a PostgreSQL of its own (a quarter of an hour)
python -m bench.console --rows 200000        # a quick look
python -m bench.console --keep; python -m bench.console --reuse --times 10; python -m bench.console --drop
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg
from webhook_api.migrate import migrate

from bench.console.pages import everything
from bench.console.place import Known, furnish, settle
from bench.console.visit import Refused, Visitor
from bench.table.fill import fill
from bench.table.server import Server
from tests.support.website import website

REPO = Path(__file__).resolve().parents[2]
RESULTS = REPO / "bench" / "results"
LIMIT_MS = 100.0
PER_SECOND = 5.0
"""Deliveries a second: a day holds 432,000, an hour 18,000."""
TROUBLE = 5
"""One in 1,000 is dead, one in 4,000 parked."""
EFFECTS = ("avatar", "raw_archive")
LEAST = 20


def main() -> None:
    """Run."""
    options = _options()
    server = Server(options.container, options.image, options.port, options.directory)
    if options.drop:
        server.remove()
        return
    try:
        result = run(server, options)
    except Refused as error:
        sys.exit(str(error))
    finally:
        if not options.keep and not options.reuse:
            server.remove()
    show(result)
    if not options.no_results:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / "console.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        say(f"kept in {path.relative_to(REPO)}")
    slow = [name for name, page in result["pages"].items() if page["p95_ms"] > LIMIT_MS]
    if slow:
        sys.exit(f"{len(slow)} of {len(result['pages'])} are over {LIMIT_MS:.0f} ms: {', '.join(slow)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.console",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=4, help="how often it goes through all pages")
    parser.add_argument("--times", type=int, default=10, help="how often each is asked for in a round")
    parser.add_argument(
        "--image", default="aisha-postgres:latest", help="PostgreSQL's, as role backends builds it"
    )
    parser.add_argument("--container", default="bench-console")
    parser.add_argument("--port", type=int, default=20862)
    parser.add_argument("--directory", type=Path, default=REPO / ".cache", help="for its passwords")
    parser.add_argument("--keep", action="store_true", help="leave server and rows for --reuse")
    parser.add_argument("--reuse", action="store_true", help="measure what --keep has left, and leave it")
    parser.add_argument("--drop", action="store_true", help="only take away what --keep has left")
    parser.add_argument("--no-results", action="store_true", help="print only")
    options = parser.parse_args()
    if options.rounds * options.times < LEAST:
        parser.error(f"{LEAST} requests of each page at least: rounds times times")
    return options


def say(text: str) -> None:
    """Progress, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Fill unless it was filled, and measure."""
    if not options.reuse:
        server.remove()
        server.start(filling=True)
        with psycopg.connect(server.url, autocommit=True) as connection:
            migrate(connection)
            days = options.rows / PER_SECOND / 86_400
            fill(connection, options.rows, say, EFFECTS, days, TROUBLE)
            furnish(connection, options.rows, say)
    server.start(filling=False)
    with psycopg.connect(server.url, autocommit=True) as connection:
        migrate(connection)
        known = settle(connection)
        connection.execute("analyze webhook.deliveries")
        row = connection.execute(
            "select reltuples::bigint, pg_database_size(current_database()) from pg_class "
            "where oid = 'webhook.deliveries'::regclass"
        ).fetchone()
    before = os.getloadavg()
    with (
        tempfile.TemporaryDirectory() as directory,
        website(server.url, Path(directory) / "log", CONSOLE_SECURE_COOKIES="false") as site,
    ):
        samples = measure(site.port, known, options.rounds, options.times)
    pages = {name: _figure(seconds) for name, seconds in samples.items()}
    worst = max(pages, key=lambda name: pages[name]["p95_ms"])
    return {
        "rows": int(row[0]) if row else 0, "bytes": int(row[1]) if row else 0, "per_second": PER_SECOND,
        "requests": options.rounds * options.times, "at": time.strftime("%FT%TZ", time.gmtime()),
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "load_before": before,
                    "load_after": os.getloadavg()},
        "limit_ms": LIMIT_MS, "worst": worst, "pages": pages,
    }  # fmt: skip


def measure(port: int, known: Known, rounds: int, times: int) -> dict[str, list[float]]:
    """Seconds of each request, by page. All pages take turns in every round, so none has the cache for itself."""
    visitors = {name: Visitor(port) for name in ("maria", "viktor")}
    for name, visitor in visitors.items():
        visitor.log_in(name)
    visitors |= {role: Visitor(port, token) for role, token in known.tokens.items()}
    found: dict[str, list[float]] = {}
    for number in range(rounds):
        for asked in everything(known):
            answers = [visitors[asked.who].ask(asked).seconds for _ in range(times)]
            found.setdefault(asked.name, []).extend(answers)
        say(f"round {number + 1} of {rounds}")
    return found


def _figure(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median_ms": round(1000 * statistics.median(ordered), 1),
        "p95_ms": round(1000 * ordered[math.ceil(0.95 * len(ordered)) - 1], 1),
        "max_ms": round(1000 * ordered[-1], 1),
        "first_ms": round(1000 * seconds[0], 1),
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    machine, pages, worst = result["machine"], result["pages"], result["worst"]
    print(
        f"\n{result['rows']:,} deliveries, {result['per_second']:g} a second, {result['bytes'] / 2**30:.1f} GiB; "
        f"{result['requests']} requests of each page; load {machine['load_before'][0]:.1f} before, "
        f"{machine['load_after'][0]:.1f} after"
    )
    print(f"\n{'ms':52}{'first':>9}{'median':>9}{'p95':>9}{'max':>9}")
    for name, page in pages.items():
        mark = " !" if page["p95_ms"] > result["limit_ms"] else ""
        figures = "".join(f"{page[key]:>9.1f}" for key in ("first_ms", "median_ms", "p95_ms", "max_ms"))
        print(f"{name:52}{figures}{mark}")
    print(f"\nworst: {worst}, p95 {pages[worst]['p95_ms']} ms (limit {result['limit_ms']:.0f} ms)")


if __name__ == "__main__":
    main()
