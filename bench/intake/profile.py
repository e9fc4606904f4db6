"""Where one worker process spends its time at 32 connections, by py-spy."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from bench.intake import targets
from bench.intake.backends import backends

# The first that matches, from the innermost frame outwards.
PARTS = (
    ("waiting (not counted)", ("EventWorker._turn (webhook_api/server/worker.py", "wait (psycopg", "wait (threading")),
    ("Ed25519", ("nacl/",)),
    ("metrics", ("prometheus_client/",)),
    ("log line", ("logging/__init__", "jsonlog.py")),
    ("JSON of the body", ("bodies.py",)),
    ("commit: rows, driver", ("psycopg", "webhook_api/inbox/", "webhook_api/db.py")),
    ("commit: batches, threads", ("Quick._commit", "Quick.flush", "EventWorker.ring")),
    ("rest of the verifier", ("webhook_api/auth/",)),
    ("the row", ("acceptance.py",)),
    ("recv", ("Connection.receive",)),
    ("HTTP", ("webhook_api/server/request.py", "Quick.gate")),
    ("answer: JSON", ("Quick._answer", "Quick.finished", "intake.py", "answers.py")),
    ("send", ("EventWorker._answer", "EventWorker._write")),
    ("loop", ("webhook_api/server/", "quick.py")),
)  # fmt: skip


def show(seconds: float) -> None:
    """Run the service under load and print the shares."""
    with backends() as servers, tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        with targets.service(servers, work) as target:
            worker = targets.children(target.roots[0])[0]
            command = [
                str(Path(sys.executable).with_name("py-spy")), "record", "--rate", "250", "--format", "raw",
                "--duration", str(max(1, round(seconds) - 1)), "--output", str(work / "raw"), "--pid", str(worker),
            ]  # fmt: skip
            recording = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            result = target.send(work, 32, seconds)
            recording.wait(60)
        shares = Counter[str]()
        for line in (work / "raw").read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            shares[_part(stack.split(";"))] += int(count)
    waiting = shares.pop(PARTS[0][0], 0)
    total = sum(shares.values())
    print(f"{result['rate']:.0f} deliveries/s while sampled; {total} samples at work, {waiting} waiting")
    for part, count in shares.most_common():
        print(f"{count / total:7.1%}  {part}")


def _part(frames: list[str]) -> str:
    if any(sign in frames[-1] for sign in PARTS[0][1]):
        return PARTS[0][0]
    for frame in reversed(frames):
        for part, signs in PARTS[1:]:
            if any(sign in frame for sign in signs):
                return part
    return "background: health, keys, spool"
