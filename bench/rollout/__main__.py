"""Measures a quick update, a run with nothing to do, `--tags verify` and a rollback, beside the old update procedure.

make bench-rollout                      # three rounds; the first run of the site is broken down by role
make bench-rollout ARGS="--rounds 1"
make bench-rollout ARGS=--hosts         # what a further webhook host costs when nothing changed, over real SSH

Ends with 1 when a bound is not met.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from nacl.signing import SigningKey

from bench.rollout.old import OldStack
from bench.rollout.sender import Stream
from tests.support.cluster import Cluster
from tests.support.sites import REPO, PlaybookResult, Site

NAME, NUMBER = "wht-bench", 8
RATE = 10.0
"""Deliveries a second. At 50 what follows them (worker, PostgreSQL, object store) takes 1.4 of two processors by itself."""
RESULTS = REPO / "bench" / "results"
BOUNDS = {"nothing to do": 10.0, "verify": 5.0, "rollback": 12.0}
"""Seconds that may be taken, as medians."""
FURTHER_HOST = 1.0
"""Seconds that a further host may cost when nothing changed."""
OURS = ("update", "rollback", "forward again")
"""What no delivery may fail in."""


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.rollout",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--hosts", action="store_true", help="measure the cost of a further webhook host instead"
    )
    parser.add_argument("--no-keep", action="store_true", help="print only")
    options = parser.parse_args()
    name, measure, tell = (
        ("rollout-hosts", further_host, show_hosts) if options.hosts else ("rollout", run, show)
    )
    keep = (lambda _result: None) if options.no_keep else partial(write, RESULTS / f"{name}.json")
    with tempfile.TemporaryDirectory() as directory:
        result = measure(Path(directory), options.rounds, keep)
    tell(result)
    if missed := result["missed"]:
        sys.exit("Bounds that were not met:\n" + "\n".join(f"- {line}" for line in missed))


def write(file: Path, result: dict[str, Any]) -> None:
    """Keep a result, also one of a run that is not at its end."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


def run(work: Path, rounds: int, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All measurements: the old way and ours take turns in every round."""
    source = work / "webhook"
    shutil.copytree(REPO / "webhook", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    site = Site(NAME, work / "site", NUMBER, {"images_source": str(source)})
    result = opening(rounds) | {"rate": RATE}
    measured: dict[str, list[dict[str, Any]]] = result.setdefault("measured", {})
    with ExitStack() as stack:
        stack.callback(site.teardown)
        result["first_run"] = first_run(site)
        key = SigningKey(bytes.fromhex(site.secret("fal_dev_key")))
        old = OldStack(site, work / "old", base_image())
        stack.callback(old.remove)
        old.start(source, "v-first")
        for number in range(1, rounds + 1):
            for name, sample in one_round(site, old, key, source, number):
                measured.setdefault(name, []).append(sample)
                print(f"round {number}: {name}: {sample}", flush=True)
                keep(result)
    result["machine"]["load_after"] = os.getloadavg()[0]
    result["missed"] = judge(measured)
    keep(result)
    return result


def opening(rounds: int) -> dict[str, Any]:
    """What every result begins with."""
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": {"cpus": os.cpu_count(), "load_before": os.getloadavg()[0]},
        "rounds": rounds,
    }


def judge(measured: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The bounds that were not met, in words."""
    missed = [
        f"{name}: {middle(measured[name], 'seconds'):.1f} s, at most {bound:g}"
        for name, bound in BOUNDS.items()
        if middle(measured[name], "seconds") > bound
    ]
    ours, old = middle(measured["update"], "serving_s"), middle(measured["old update"], "seconds")
    if ours > old:
        missed.append(
            f"update: both instances served it after {ours:.1f} s, the old procedure took {old:.1f}"
        )
    missed += [
        f"{name}: {total(measured[name], 'failed')} failed"
        for name in OURS
        if total(measured[name], "failed")
    ]
    return missed


def forget_deliveries(site: Site) -> None:
    """What was sent waits for avatars that never come: the next measurement is not to carry what is tried again."""
    command = ["docker", "exec", f"{site.name}-postgres", "psql", "-qU", "postgres", "aisha", "-c"]
    statement = "DELETE FROM webhook.deliveries WHERE request_id LIKE 'bench-rollout-%'"
    subprocess.run([*command, statement], capture_output=True, check=True)


def one_round(
    site: Site, old: OldStack, key: SigningKey, source: Path, number: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each measurement once."""
    marker = source / "webhook_api" / "__init__.py"
    text = marker.read_text()

    def change(way: str) -> None:
        marker.write_text(f"{text}\n# {way} {number}\n")

    change("old")
    version = f"v-{number}"
    yield (
        "old update",
        under_load(
            old.port, old.api_ports, key, lambda: old.update(source, version), lambda seen: seen == version
        ),
    )
    change("ours")
    forget_deliveries(site)
    before = version_of(site.settings["site_api_ports"][0])
    edge, ports = int(site.settings["site_http_port"]), tuple(site.settings["site_api_ports"])
    yield (
        "update",
        under_load(
            edge, ports, key, lambda: site.site("--tags", "update").must_pass(), lambda seen: seen != before
        ),
    )
    forget_deliveries(site)
    changed = version_of(ports[0])
    yield (
        "rollback",
        under_load(
            edge,
            ports,
            key,
            lambda: site.playbook("playbooks/rollback.yml").must_pass(),
            lambda seen: seen != changed,
        ),
    )
    forget_deliveries(site)
    yield (
        "forward again",
        under_load(
            edge, ports, key, lambda: site.site("--tags", "update").must_pass(), lambda seen: seen == changed
        ),
    )
    forget_deliveries(site)
    yield "nothing to do", timed(lambda: nothing_changed(site.site()))
    yield "verify", timed(lambda: site.site("--tags", "verify").must_pass())


def nothing_changed(done: PlaybookResult) -> None:
    """A run that had nothing to do says so."""
    assert done.must_pass().recap["changed"] == 0, done.output[-3000:]


def further_host(work: Path, rounds: int, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A site of two webhook hosts over real SSH: a run with nothing to do on one of them, and on both."""
    cluster = Cluster("wht-bench-hosts", work, 14)
    result = opening(rounds)
    seconds: dict[str, list[float]] = result.setdefault("seconds", {"one host": [], "two hosts": []})
    controller: dict[str, list[float]] = result.setdefault(
        "controller_cpu", {"one host": [], "two hosts": []}
    )
    try:
        cluster.make()
        cluster.make_infrastructure()
        cluster.site().must_pass()
        for number in range(1, rounds + 1):
            for name, limit in (("one host", ["--limit", "localhost,webhook-1"]), ("two hosts", [])):
                before = processor_seconds()
                done = cluster.site(*limit).must_pass()
                assert set(done.changed.values()) == {0}, done.recap
                seconds[name].append(round(done.seconds, 1))
                controller[name].append(round(processor_seconds() - before, 1))
                print(
                    f"round {number}: {name}: {done.seconds:.1f} s, processors {controller[name][-1]:.1f} s",
                    flush=True,
                )
                keep(result)
    finally:
        cluster.down()
    result["machine"]["load_after"] = os.getloadavg()[0]
    cost = further(seconds)
    result["further_host_s"] = round(cost, 2)
    result["further_host_controller_cpu_s"] = round(further(controller), 2)
    result["missed"] = [f"a further host costs {cost:.1f} s"] if cost >= FURTHER_HOST else []
    keep(result)
    return result


def further(samples: dict[str, list[float]]) -> float:
    """What two hosts take more than one."""
    return statistics.median(samples["two hosts"]) - statistics.median(samples["one host"])


def processor_seconds() -> float:
    """Processor time of the commands so far: the controller's part of a run, without the hosts, which are containers."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def show_hosts(result: dict[str, Any]) -> None:
    """Print medians."""
    for name, samples in result["seconds"].items():
        print(f"{name:10}{statistics.median(samples):>8.1f} s")
    print(f"a further host: {result['further_host_s']:.1f} s (less than {FURTHER_HOST:g})")
    print(f"of the controller's processors: {result['further_host_controller_cpu_s']:.1f} s")


def first_run(site: Site) -> dict[str, Any]:
    """The site from nothing (images and packages may be cached), by role."""
    with environment(ANSIBLE_CALLBACKS_ENABLED="ansible.posix.profile_roles"):
        started = time.monotonic()
        output = site.site().must_pass().output
        seconds = time.monotonic() - started
    table = output.rpartition("===")[2]
    roles = dict(re.findall(r"^(\w+)\s-+\s([\d.]+)s$", table, re.MULTILINE))
    return {"seconds": round(seconds, 1), "roles": {name: float(value) for name, value in roles.items()}}


def under_load(
    edge: int, ports: tuple[int, ...], key: SigningKey, act: Callable[[], object], new: Callable[[str], bool]
) -> dict[str, Any]:
    """Do something while deliveries come in: seconds to the end, and until all instances served what is new."""
    with Stream(edge, key, RATE) as stream:
        time.sleep(1)
        with watch(ports, new) as served:
            sample = timed(act)
        time.sleep(1)
    return {**sample, "serving_s": served.get("seconds"), **stream.answers.as_result()}


@contextmanager
def watch(ports: tuple[int, ...], new: Callable[[str], bool]) -> Iterator[dict[str, float]]:
    """Notes when all instances name what is new."""
    seen: dict[str, float] = {}
    ended = threading.Event()
    started = time.monotonic()

    def look() -> None:
        while not ended.wait(0.1):
            if all(version and new(version) for version in map(version_of, ports)):
                seen["seconds"] = round(time.monotonic() - started, 1)
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join(10)


def version_of(port: int) -> str:
    """What an instance's /health calls its version; empty when it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return str(json.load(answer)["version"])
    except (OSError, ValueError, KeyError):
        return ""


def timed(act: Callable[[], object]) -> dict[str, Any]:
    """Seconds of something."""
    started = time.monotonic()
    act()
    return {"seconds": round(time.monotonic() - started, 1)}


def base_image() -> str:
    """The base image that the site's run used: the newest that has a tag."""
    command = ["docker", "image", "ls", "aisha-base", "--filter", "dangling=false"]
    command += ["--format", "{{.Repository}}:{{.Tag}}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return found[0]


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Variables of the environment for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def show(result: dict[str, Any]) -> None:
    """Print medians."""
    print(
        f"\nload {result['machine']['load_before']:.1f} before, {result['machine']['load_after']:.1f} after"
    )
    first = result["first_run"]
    print(f"first run {first['seconds']} s: " + ", ".join(f"{n} {s:.1f}" for n, s in first["roles"].items()))
    print(f"\n{'':16}{'seconds':>10}{'serving':>10}{'sent':>8}{'failed':>8}{'slowest':>9}")
    for name, samples in result["measured"].items():
        line = f"{name:16}{middle(samples, 'seconds'):>10.1f}"
        if "sent" in samples[0]:
            line += f"{middle(samples, 'serving_s'):>10.1f}{total(samples, 'sent'):>8}{total(samples, 'failed'):>8}"
            line += f"{max(s['slowest_s'] for s in samples):>8.2f}s"
        bound = BOUNDS.get(name)
        print(line + (f"   (at most {bound:.0f})" if bound else ""))
    measured = result["measured"]
    old = middle(measured["old update"], "seconds")
    print(
        f"\nupdate: {middle(measured['update'], 'seconds') / old:.2f} of the old procedure's time to its end, "
        f"{middle(measured['update'], 'serving_s') / old:.2f} until both instances serve what is new"
    )


def middle(samples: list[dict[str, Any]], figure: str) -> float:
    """Median over the rounds; what was never seen counts as for ever."""
    return statistics.median(float("inf") if s[figure] is None else s[figure] for s in samples)


def total(samples: list[dict[str, Any]], figure: str) -> int:
    """Sum over the rounds."""
    return sum(int(s[figure]) for s in samples)


if __name__ == "__main__":
    main()
