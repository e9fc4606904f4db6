#!/usr/bin/env python3
"""Bare Debian hosts in containers, each able to run a Docker engine of its own: for role engine and fresh-machine tests.

    testhost.py build SUITE [--packages a,b]     image aisha-testhost:SUITE, from this machine's own mirrors
    testhost.py up NAME SUITE [-v HOST:INSIDE]   a running host
    testhost.py down NAME                        gone, with its volumes and control groups

Such a host has no systemd and no CAP_SYS_RESOURCE, and trusts the authorities that this machine trusts. Its engine must put
containers under a control group that is the host's own, so /etc/docker/daemon.json holds `cgroup-parent`: a file that is
there before the engine is, as on a machine that somebody has prepared.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[3]
IMAGE = "aisha-testhost"
#: What the README presupposes; everything else is essential in Debian.
PACKAGES = ("make", "python3", "python3-venv", "git", "ca-certificates")
MAX_AGE_DAYS = 7
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
#: Where `--privileged` is refused this is what an engine inside needs; measured, see docs/decisions.
RUN_OPTIONS = (
    "--cap-add=ALL",
    "--security-opt=seccomp=unconfined",
    "--security-opt=apparmor=unconfined",
    "--security-opt=systempaths=unconfined",
    "--device-cgroup-rule=a *:* rwm",
    "--cgroupns=host",
    "--volume=/sys/fs/cgroup:/sys/fs/cgroup",
    "--volume=/var/lib/docker",
)
#: Process 1: reaps children, ends at once when it is told to.
INIT = "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done"


def docker(*arguments: str, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run `docker ARGUMENTS`; ends the program with the engine's own words when it fails and `check` is set."""
    done = subprocess.run(
        ["docker", *arguments], check=False, text=True, capture_output=True, timeout=timeout
    )
    if check and done.returncode != 0:
        raise SystemExit(f"docker {arguments[0]} failed: {done.stderr.strip()}")
    return done


def without_sys_resource(status: str) -> list[str]:
    """The option that takes CAP_SYS_RESOURCE (bit 24) from a host. An engine that has not got it itself refuses the option.

    :param status: text of /proc/self/status.
    """
    bounding = re.search(r"^CapBnd:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return ["--cap-drop=SYS_RESOURCE"] if bounding and int(bounding.group(1), 16) >> 24 & 1 else []


def _module_utils() -> None:
    import ansible.module_utils

    path = str(REPO / "module_utils")
    if path not in ansible.module_utils.__path__:
        ansible.module_utils.__path__.append(path)


def own_sources(suite: str) -> list[str]:
    """Lines for sources.list: the suite, its updates and security updates, from the mirrors that this machine uses."""
    _module_utils()
    from ansible.module_utils.base_image import TARGET_FORMAT, debian_sites, parse_targets, source_lines

    answer = subprocess.run(
        ["apt-get", "indextargets", "--format", TARGET_FORMAT],
        check=True,
        text=True,
        capture_output=True,
        timeout=60,
    )
    main, security = debian_sites(parse_targets(answer.stdout), lambda path: Path(path).read_text())
    if not main:
        raise SystemExit("apt names no Debian mirror on this machine: run apt-get update first")
    return source_lines(suite, main, security)


def pip_configuration() -> str:
    """A pip.conf with this machine's http(s) indexes; TLS is checked against the system's authorities."""
    _module_utils()
    from ansible.module_utils.build_environment import host_pip_configuration

    own = host_pip_configuration() or "[global]\n"
    return f"{own.rstrip()}\ncert = {CA_BUNDLE}\n"


def split_bundle(text: str) -> list[str]:
    """The certificates of a PEM bundle, one by one: update-ca-certificates takes one a file."""
    return re.findall(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", text, re.DOTALL)


def standing_age_days(image: str, packages: tuple[str, ...]) -> float | None:
    """Age of the image when it was made with these packages; None otherwise."""
    answer = docker("image", "inspect", image, "--format", "{{json .Config.Labels}}", check=False)
    labels = json.loads(answer.stdout) if answer.returncode == 0 else {}
    if not labels or labels.get("org.aisha.testhost.packages") != ",".join(packages):
        return None
    return (time.time() - float(labels["org.aisha.testhost.created"])) / 86400


def build(suite: str, packages: tuple[str, ...] = PACKAGES, tag: str = "") -> str:
    """Have the image of a bare host; the name of the image. Takes half a minute when there is none of the last days.

    :param tag: the image's tag, where a suite is wanted with several sets of packages; the suite when empty.
    """
    image = f"{IMAGE}:{tag or suite}"
    age = standing_age_days(image, packages)
    if age is not None and age < MAX_AGE_DAYS:
        return image
    with tempfile.TemporaryDirectory(prefix="testhost-") as directory:
        authorities = Path(directory, "ca")
        authorities.mkdir()
        for number, certificate in enumerate(split_bundle(CA_BUNDLE.read_text())):
            (authorities / f"host-{number:03}.crt").write_text(certificate)
        Path(directory, "pip.conf").write_text(pip_configuration())
        archive = Path(directory, "root.tar")
        command = ["mmdebstrap", "--variant=minbase", f"--include={','.join(packages)}", "--format=tar"]
        command += [f"--customize-hook=copy-in {directory}/pip.conf /etc"]
        if "ca-certificates" in packages:
            command += [f"--customize-hook=sync-in {authorities} /usr/local/share/ca-certificates"]
            command += ['--customize-hook=chroot "$1" update-ca-certificates']
        made = subprocess.run(
            [*command, suite, str(archive), *own_sources(suite)],
            text=True,
            capture_output=True,
            timeout=600,
            check=False,
        )
        if made.returncode != 0:
            raise SystemExit(f"mmdebstrap could not make {suite}:\n{made.stderr[-3000:]}")
        labels = {"created": f"{time.time():.0f}", "packages": ",".join(packages)}
        changes = [f"--change=LABEL org.aisha.testhost.{key}={value}" for key, value in labels.items()]
        docker("import", *changes, str(archive), image, timeout=300)
    return image


def up(
    name: str, suite: str, volumes: tuple[str, ...] = (), image: str = "", options: tuple[str, ...] = ()
) -> None:
    """Start a host.

    :param volumes: further options for `docker run --volume`.
    :param image: what `build` made, if not the default.
    :param options: further options for `docker run`, such as its network and address.
    """
    given = [*RUN_OPTIONS, *without_sys_resource(Path("/proc/self/status").read_text()), *options]
    given += [f"--volume={volume}" for volume in volumes]
    image = image or build(suite)
    docker("run", "--detach", f"--name={name}", f"--hostname={name}", *given, image, "bash", "-c", INIT)
    prepared = json.dumps({"cgroup-parent": f"/{name}"})
    # Some engines mount /proc/sys read-only in spite of systempaths=unconfined.
    writable = "echo 1 2>/dev/null > /proc/sys/net/ipv4/ip_forward || mount -o remount,rw /proc/sys"
    script = f"{writable} && mkdir -p /etc/docker && echo '{prepared}' > /etc/docker/daemon.json"
    docker("exec", name, "bash", "-c", script)


def down(name: str) -> None:
    """Remove a host with its volumes, and the control groups that its engine made; nothing when there is none."""
    docker("rm", "--force", "--volumes", name, check=False)
    groups = sorted(
        Path("/sys/fs/cgroup").glob(f"**/{name}/**/"), key=lambda path: len(path.parts), reverse=True
    )
    for group in groups:
        try:
            group.rmdir()
        except OSError as error:
            print(f"{group} stays: {error.strerror}", file=sys.stderr)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("build")
    making.add_argument("suite")
    making.add_argument("--packages", default=",".join(PACKAGES))
    starting = commands.add_parser("up")
    starting.add_argument("name")
    starting.add_argument("suite")
    starting.add_argument("--volume", "-v", action="append", default=[])
    commands.add_parser("down").add_argument("name")
    given = parser.parse_args()
    if given.command == "build":
        print(build(given.suite, tuple(given.packages.split(","))))
    elif given.command == "up":
        up(given.name, given.suite, tuple(given.volume))
    else:
        down(given.name)


if __name__ == "__main__":
    main()
