"""Fills a table, measures it beside a small one, prints a table, and keeps the figures in ``bench/results/``.

python -m bench.table                      # 10 million rows in a PostgreSQL of its own (a quarter of an hour)
python -m bench.table --rows 200000        # a quick look
python -m bench.table --keep; python -m bench.table --reuse --rounds 5; python -m bench.table --drop
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psycopg

from bench.table.fill import fill
from bench.table.measure import READ_BOUND, side_by_side
from bench.table.queries import know
from bench.table.server import Server

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "webhook"))
RESULTS = REPO / "bench" / "results"
NAME = "bench-table"
BASE_ROWS = 20_000


def main() -> None:
    """Run."""
    options = _options()
    server = Server(options.container, options.image, options.port, options.directory)
    if options.drop:
        server.remove()
        return
    try:
        result = run(server, options)
        show(result)
        if not options.no_results:
            RESULTS.mkdir(exist_ok=True)
            path = RESULTS / "table.json"
            path.write_text(json.dumps(result, indent=1) + "\n")
            say(f"kept in {path}")
    finally:
        if not options.keep and not options.reuse:
            server.remove()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--base", type=int, default=BASE_ROWS, help="rows of the small table beside it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=5, help="how often each question is asked in a round")
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement of the intake")
    parser.add_argument(
        "--image", default="aisha-postgres:latest", help="PostgreSQL's, as role backends builds it"
    )
    parser.add_argument("--container", default=NAME)
    parser.add_argument("--port", type=int, default=20861)
    parser.add_argument("--directory", type=Path, default=REPO / ".cache", help="for its passwords")
    parser.add_argument("--keep", action="store_true", help="leave server and rows for --reuse")
    parser.add_argument("--reuse", action="store_true", help="measure what --keep has left, and leave it")
    parser.add_argument("--drop", action="store_true", help="only take away what --keep has left")
    parser.add_argument("--no-results", action="store_true", help="print only")
    return parser.parse_args()


def say(text: str) -> None:
    """Progress, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Fill unless it was filled, and measure."""
    from webhook_api.migrate import migrate

    sizes = {"small": options.base, "big": options.rows}
    urls = {}
    if not options.reuse:
        server.remove()
        server.start(filling=True)
        for place, rows in sizes.items():
            urls[place] = _database(server, place, create=True)
            with psycopg.connect(urls[place], autocommit=True) as connection:
                migrate(connection)
                fill(connection, rows, lambda text, place=place: say(f"{place}: {text}"))  # type: ignore[misc]
    server.start(filling=False)
    known, counts, bytes_ = {}, {}, {}
    for place in sizes:
        urls[place] = _database(server, place, create=False)
        with psycopg.connect(urls[place], autocommit=True) as connection:
            migrate(connection)
            known[place] = know(connection)
            connection.execute("analyze webhook.deliveries")
            row = connection.execute(
                "select reltuples::bigint, pg_total_relation_size('webhook.deliveries') from pg_class "
                "where oid = 'webhook.deliveries'::regclass"
            ).fetchone()
            counts[place], bytes_[place] = row or (0, 0)
    before = os.getloadavg()
    samples = side_by_side(urls, known, options.rounds, options.times, options.seconds, say)
    return {
        "rows": counts, "bytes": bytes_, "rounds": options.rounds, "at": time.strftime("%FT%TZ", time.gmtime()),
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "load_before": before,
                    "load_after": os.getloadavg()},
        "measured": {name: _summary(places) for name, places in samples.items()},
        "samples": samples,
    }  # fmt: skip


def _database(server: Server, place: str, *, create: bool) -> str:
    name = f"bench_{place}"
    if create:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute(f"create database {name}".encode())
    return server.url.rsplit("/", 1)[0] + f"/{name}"


def _summary(places: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    small, big = (_figure(places[place]) for place in ("small", "big"))
    summary: dict[str, Any] = {"small": small, "big": big}
    if "per_second" in small:
        summary["ratio"] = big["per_second"] / small["per_second"]
    elif small["ms"] and big["ms"]:
        summary["ratio"] = big["ms"] / small["ms"]
    return summary


def _figure(samples: list[dict[str, Any]]) -> dict[str, Any]:
    if "per_second" in samples[0]:
        return {
            name: statistics.median(sample[name] for sample in samples)
            for name in ("per_second", "p50_ms", "p99_ms")
        }
    times = [each for sample in samples for each in sample["seconds"]]
    known = [each for each in times if each is not None]
    late = len(known) < len(times)
    return {
        "ms": None if late else 1000 * statistics.median(known),
        "rows_read": max(s["rows_read"] for s in samples),
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    rows, machine = result["rows"], result["machine"]
    print(
        f"\n{rows['small']:,} rows beside {rows['big']:,} ({result['bytes']['big'] / 2**30:.1f} GiB); medians of "
        f"{result['rounds']} rounds; load {machine['load_before'][0]:.1f} before, {machine['load_after'][0]:.1f} after"
    )
    print(f"\n{'':38}{'small':>14}{'big':>14}{'ratio':>8}{'rows read':>12}")
    for name, measured in result["measured"].items():
        small, big = measured["small"], measured["big"]
        ratio = f"{measured['ratio']:.2f}" if "ratio" in measured else "-"
        if "per_second" in small:
            print(f"{name:38}{small['per_second']:>12,.0f}/s{big['per_second']:>12,.0f}/s{ratio:>8}")
            print(f"{'  p50 / p99':38}{_times(small):>14}{_times(big):>14}")
            continue
        mark = " !" if big["rows_read"] > READ_BOUND or big["ms"] is None else ""
        print(f"{name:38}{_ms(small):>14}{_ms(big):>14}{ratio:>8}{big['rows_read']:>12,}{mark}")


def _ms(figure: dict[str, Any]) -> str:
    return "not in time" if figure["ms"] is None else f"{figure['ms']:.2f} ms"


def _times(figure: dict[str, Any]) -> str:
    return f"{figure['p50_ms']:.1f}/{figure['p99_ms']:.1f} ms"


if __name__ == "__main__":
    main()
