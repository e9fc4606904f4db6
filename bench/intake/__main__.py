"""Measures the intake beside the reference, prints a table, and keeps the figures as JSON in ``bench/results/``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from webhook_api.shapes import SHAPES

from bench.intake import limit, profile, site, targets
from bench.intake.backends import backends
from bench.intake.targets import Target

CONNECTIONS = (1, 8, 32, 64)
RATE = 500
RESULTS = Path(__file__).resolve().parents[1] / "results"


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(prog="python -m bench.intake", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement")
    parser.add_argument("--connections", type=int, nargs="+", default=list(CONNECTIONS))
    parser.add_argument("--only", choices=("service", "reference"))
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the service")
    parser.add_argument(
        "--ordinary", action="store_true", help="send the service what its quick way leaves to Flask"
    )
    parser.add_argument("--profile", action="store_true", help="where the service's time goes, by py-spy")
    parser.add_argument("--site", action="store_true", help="through nginx and two instances, in containers")
    parser.add_argument("--name", default="intake", help="of the file in bench/results/")
    parser.add_argument("--no-keep", action="store_true", help="print only")
    options = parser.parse_args()
    if options.profile:
        profile.show(options.seconds)
        return
    result = through_nginx(options) if options.site else run(options)
    show(result)
    if not options.no_keep:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{options.name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nkept in {path}")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one run."""
    extra = dict(item.split("=", 1) for item in options.env)
    body = SHAPES["portrait-ok"].build("0" * 36, "https://v3.fal.media")
    with backends() as servers, tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        work = Path(directory)
        load_before = os.getloadavg()[0]
        tps = [limit.pgbench(servers, work, body, options.seconds)]
        running: list[Target] = []
        if options.only != "reference":
            # Any coding but none is the ordinary way's, this one means none.
            headers = {"Content-Encoding": "identity"} if options.ordinary else {}
            running.append(stack.enter_context(targets.service(servers, work, extra, headers)))
        if options.only != "service":
            running.append(stack.enter_context(targets.reference(servers, work)))
        samples, memory = measure(running, work, options)
        tps.append(limit.pgbench(servers, work, body, options.seconds))
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "load_before": load_before},
        "workers": targets.WORKERS, "seconds": options.seconds, "rounds": options.rounds, "env": extra,
        "body_bytes": len(body),
        "pgbench_tps": [value for value in tps if value is not None],
        "memory": memory,
        "samples": samples,
    }  # fmt: skip


def measure(
    running: list[Target], work: Path, options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Samples and memory of each target, which take turns: what else happens on the machine meets all."""
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {}
    memory: dict[str, dict[str, float]] = {}
    for number in range(options.rounds):
        for target in running if number % 2 == 0 else running[::-1]:
            measured = samples.setdefault(target.name, {})
            for connections in options.connections:
                measured.setdefault(f"closed_{connections}", []).append(
                    target.send(work, connections, options.seconds)
                )
            measured.setdefault(f"open_{RATE}", []).append(target.send(work, 32, options.seconds, RATE))
            memory[target.name] = target.memory()
        print(f"round {number + 1} of {options.rounds} done", flush=True)
    return samples, memory


def through_nginx(options: argparse.Namespace) -> dict[str, Any]:
    """A whole site of the run's own: nginx, two instances of one process each, PostgreSQL, all in containers."""
    with tempfile.TemporaryDirectory() as directory, site.edge_and_instance(Path(directory)) as running:
        samples, memory = measure(running, Path(directory), options)
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "machine": {"cpus": os.cpu_count()}, "workers": 2,
        "seconds": options.seconds, "rounds": options.rounds, "pgbench_tps": [], "memory": memory, "samples": samples,
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """Print medians and ratios."""
    names = list(result["samples"])
    kinds = list(result["samples"][names[0]])
    both = len(names) == 2
    print(f"\n{'':18}" + "".join(f"{name:>30}" for name in names) + (f"{'ratio':>10}" if both else ""))
    for kind in kinds:
        rates = [median(result, name, kind, "rate") for name in names]
        p99 = [median(result, name, kind, "p99") for name in names]
        line = f"{kind:18}" + "".join(
            f"{r:>14.0f}/s p99 {p:>6.1f} ms" for r, p in zip(rates, p99, strict=True)
        )
        if both:
            line += (
                f"{p99[0] / p99[1]:>9.2f}p" if kind.startswith("open") else f"{rates[0] / rates[1]:>9.2f}x"
            )
        broken = {name: sum(s["taken"] != sum(s["statuses"].values()) or s["broken"] for s in result["samples"][name][kind])
                  for name in names}  # fmt: skip
        print(line + (f"  not all 200: {broken}" if any(broken.values()) else ""))
    if "closed_32" in kinds:
        cpu = [statistics.median(s["cpu_us"] for s in result["samples"][n]["closed_32"]) for n in names]
        print("processor time    " + "".join(f"{value:>19.0f} us a delivery" for value in cpu))
    print(
        "memory            "
        + "".join(
            f"{result['memory'][n]['pss_mb']:>14.0f} MB PSS {result['memory'][n]['rss_mb']:>6.0f} RSS"
            for n in names
        )
    )
    if result["pgbench_tps"]:
        tps = statistics.median(result["pgbench_tps"])
        shares = [median(result, name, "closed_32", "rate") / tps for name in names if "closed_32" in kinds]
        print(
            f"pgbench           {tps:>14.0f} tps; at 32 connections: "
            + ", ".join(f"{n} {s:.2f}" for n, s in zip(names, shares, strict=False))
        )


def median(result: dict[str, Any], name: str, kind: str, figure: str) -> float:
    """Median of a figure over the rounds."""
    values = [
        sample["rate"] if figure == "rate" else sample["ms"][figure]
        for sample in result["samples"][name][kind]
    ]
    return statistics.median(values)


if __name__ == "__main__":
    main()
