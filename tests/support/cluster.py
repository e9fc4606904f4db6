"""Sites of several hosts: containers that are hosts, each with an engine and an sshd of its own, in a network of their own.

The controller is this machine, over real SSH, as an ordinary user with sudo. The site is `inventory/production` with other
addresses: one infrastructure host (registry behind TLS and a login, PostgreSQL, Redis, object store; made by our own
roles), and webhook hosts. Images are built on this machine's engine.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import yaml

from tests.support.testhost import testhost

REPO = Path(__file__).resolve().parents[2]
SUITE = "trixie"
#: A host as an administrator hands it over: sshd, sudo, an engine that is installed and does not run yet.
PACKAGES = (
    *testhost.PACKAGES,
    "openssh-server",
    "sudo",
    "iproute2",
    "iptables",
    "curl",
    "docker.io",
    "docker-cli",
    "docker-compose",
    "docker-buildx",
    "python3-docker",
    "python3-requests",
    # A probe is signed on the host, here with a key of ours.
    "python3-nacl",
)
USER = "aisha"
REGISTRY_USER = "deploy"
ACCOUNT = "account-of-the-test"
MANIFEST_KINDS = (
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
)
EMBEDDED_IMAGES = ("aisha-base", "aisha-registry", "aisha-postgres", "aisha-redis", "aisha-s3")


@dataclass
class ClusterRun:
    """What a run of ansible-playbook came to: exit code, output, seconds, and the recap of each host."""

    code: int
    output: str
    seconds: float

    @property
    def recap(self) -> dict[str, dict[str, int]]:
        """Counters of the recap by host."""
        lines = re.findall(r"^(\S+)\s+:\s+(ok=.*)$", self.output, re.MULTILINE)
        return {
            host: {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", rest)} for host, rest in lines
        }

    @property
    def changed(self) -> dict[str, int]:
        """How many tasks changed something, by host."""
        return {host: counters["changed"] for host, counters in self.recap.items()}

    def must_pass(self) -> ClusterRun:
        """Raise AssertionError with the output's end when the run failed."""
        assert self.code == 0, f"ansible-playbook failed ({self.code}):\n{self.output[-8000:]}"
        return self

    def must_fail(self, *words: str) -> ClusterRun:
        """Raise AssertionError unless the run failed and its output has all these words."""
        assert self.code != 0, f"ansible-playbook should have failed:\n{self.output[-4000:]}"
        flat = re.sub(r"\s+", " ", self.output)
        for word in words:
            assert word in flat, f"{word!r} is not in the output:\n{self.output[-6000:]}"
        return self


@dataclass(frozen=True)
class Machine:
    """One host of the site: a container with an address in the site's network."""

    name: str
    address: str

    def run(self, command: str, *, check: bool = True, timeout: float = 120) -> str:
        """Run a shell command as root, by the test's own way in (not over SSH); its output."""
        done = testhost.docker("exec", self.name, "bash", "-c", command, check=False, timeout=timeout)
        if check and done.returncode != 0:
            raise AssertionError(f"{self.name}: `{command}` ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def succeeds(self, command: str) -> bool:
        """Whether a shell command as root ends with 0."""
        return testhost.docker("exec", self.name, "bash", "-c", command, check=False).returncode == 0

    def containers(self) -> dict[str, str]:
        """Id and start time of every running container, by name: what a run that touches nothing leaves as it is."""
        listed = self.run("docker ps --quiet --no-trunc").split()
        if not listed:
            return {}
        shown = self.run(
            f"docker inspect --format '{{{{.Name}}}} {{{{.Id}}}} {{{{.State.StartedAt}}}}' {' '.join(listed)}"
        )
        return {line.split()[0].lstrip("/"): line for line in shown.splitlines()}

    def files(self, path: str) -> str:
        """Every file below a path with size, time and target: what a run that touches nothing leaves as it is."""
        return self.run(f"find {path} -printf '%p %y %s %T@ %l\\n' 2>/dev/null | sort", check=False)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """The first true value of a condition; AssertionError when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"{what} did not come true within {seconds:.0f} s")


def digest_of(data: bytes) -> str:
    """The digest as registries write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def openssl(*arguments: str) -> None:
    """Run openssl; its own words when it fails."""
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@dataclass
class Authority:
    """A private certificate authority, as a company has one."""

    directory: Path

    def __post_init__(self) -> None:
        """Make the authority."""
        self.directory.mkdir(parents=True, exist_ok=True)
        openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", str(self.directory / "ca.key"), "-out", str(self.certificate), "-days", "30"),
            *("-subj", "/CN=Authority of the test", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )

    @property
    def certificate(self) -> Path:
        """The authority's own certificate."""
        return self.directory / "ca.pem"

    def issue(self, name: str, *subject_names: str) -> tuple[Path, Path]:
        """A certificate with its key, signed by the authority, e.g. for ``DNS:x`` and ``IP:1.2.3.4``."""
        certificate, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-CA", str(self.certificate), "-CAkey", str(self.directory / "ca.key")),
            *("-keyout", str(key), "-out", str(certificate), "-days", "20", "-subj", f"/CN={name}"),
            *("-addext", f"subjectAltName={','.join(subject_names)}"),
            *("-addext", "basicConstraints=critical,CA:FALSE", "-addext", "extendedKeyUsage=serverAuth"),
        )
        return certificate, key


@dataclass
class Cluster:
    """A site of several hosts. `number` picks its network (172.31.<101 + 2*number>.0/24)."""

    name: str
    directory: Path
    number: int
    webhook_count: int = 2
    machines: dict[str, Machine] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)

    # What it is made of

    @property
    def prefix(self) -> str:
        """The first three numbers of the network's addresses."""
        return f"172.31.{101 + 2 * self.number}"

    @property
    def network(self) -> str:
        """The Docker network of this machine that the hosts share."""
        return f"{self.name}-lan"

    @property
    def infra(self) -> Machine:
        """The infrastructure host."""
        return self.machines["infra"]

    @property
    def webhooks(self) -> list[Machine]:
        """The webhook hosts, in their order."""
        return [machine for name, machine in self.machines.items() if name.startswith("webhook-")]

    @property
    def registry(self) -> str:
        """The registry as images are named."""
        return f"{self.infra.address}:5000"

    @property
    def inventory(self) -> Path:
        """The inventory of the production site."""
        return self.directory / "production"

    @property
    def vault_password(self) -> Path:
        """File with the vault's password."""
        return self.directory / "vault-password"

    @property
    def vault(self) -> dict[str, Any]:
        """What the vault holds."""
        command = ["ansible-vault", "view", "--vault-password-file", str(self.vault_password)]
        command.append(str(self.inventory / "group_vars" / "all" / "vault.yml"))
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found: dict[str, Any] = yaml.safe_load(shown)
        return found

    def secret(self, name: str) -> str:
        """A secret of the vault."""
        vault = self.vault
        return str(vault.get(name) or vault["vault_secrets"][name])

    # Making it

    def make(self) -> None:
        """Hosts, keys, authority, inventories and vault; nothing of the project runs yet."""
        image = testhost.build(SUITE, PACKAGES, tag=f"{SUITE}-site")
        self.make_keys()
        testhost.docker("network", "create", "--subnet", f"{self.prefix}.0/24", self.network)
        addresses = {"infra": 4} | {f"webhook-{n}": 9 + n for n in range(1, self.webhook_count + 1)}
        for name, last in addresses.items():
            self.machines[name] = Machine(f"{self.name}-{name}", f"{self.prefix}.{last}")
            self.start(self.machines[name], image)
        self.know_hosts()
        self.make_certificates()
        self.write_inventories()

    def make_keys(self) -> None:
        """The key of the person who deploys, and the password of the vault."""
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.directory / "id")]
        subprocess.run(command, check=True)
        self.vault_password.touch(mode=0o600)
        self.vault_password.write_text(os.urandom(16).hex())
        self.sudo_password = os.urandom(12).hex()

    def start(self, machine: Machine, image: str) -> None:
        """A host that is up: the ordinary user, whose sudo asks for a password, and sshd."""
        testhost.up(
            machine.name,
            SUITE,
            image=image,
            options=(f"--network={self.network}", f"--ip={machine.address}"),
        )
        public = (self.directory / "id.pub").read_text().strip()
        machine.run(
            f"useradd --create-home --shell /bin/bash {USER} && install -d -o {USER} -g {USER} -m 0700 /home/{USER}/.ssh"
            f" && echo '{public}' > /home/{USER}/.ssh/authorized_keys && chown {USER}: /home/{USER}/.ssh/authorized_keys"
            f" && echo '{USER} ALL=(ALL) ALL' > /etc/sudoers.d/{USER}"
            " && rm -f /etc/ssh/ssh_host_* && ssh-keygen -q -A && mkdir -p /run/sshd && /usr/sbin/sshd"
        )
        command = ["docker", "exec", "--interactive", machine.name, "chpasswd"]
        subprocess.run(command, input=f"{USER}:{self.sudo_password}\n", text=True, check=True)

    def know_hosts(self) -> None:
        """The hosts' keys, as an administrator who compares fingerprints has them in known_hosts."""
        lines = []
        for machine in self.machines.values():
            key = machine.run("cat /etc/ssh/ssh_host_ed25519_key.pub").split()
            lines.append(f"{machine.address} {key[0]} {key[1]}")
        (self.directory / "known_hosts").write_text("\n".join(lines) + "\n")

    def make_certificates(self) -> None:
        """A private authority, and certificates for the registry and the public name; hosts get the authority's."""
        self.authority = Authority(self.directory / "ca")
        self.registry_tls = self.authority.issue("registry", f"IP:{self.infra.address}")
        self.public_tls = self.authority.issue("webhook.test", "DNS:webhook.test")
        for machine in self.webhooks:
            command = [
                "docker",
                "cp",
                str(self.authority.certificate),
                f"{machine.name}:/etc/ssl/site-ca.pem",
            ]
            subprocess.run(command, check=True, capture_output=True)

    @property
    def connection(self) -> dict[str, Any]:
        """How the controller reaches a host."""
        options = f"-o UserKnownHostsFile={self.directory}/known_hosts -o GlobalKnownHostsFile=/dev/null"
        return {
            "ansible_user": USER,
            "ansible_ssh_private_key_file": str(self.directory / "id"),
            "ansible_ssh_common_args": options,
            "ansible_python_interpreter": "/usr/bin/python3",
        }

    def write_inventories(self) -> None:
        """inventory/production with other addresses, its vault, and the inventory that makes the infrastructure."""
        shutil.copytree(REPO / "inventory" / "production", self.inventory)
        (self.inventory / "group_vars" / "all" / "vault.yml").unlink(missing_ok=True)
        command = [sys.executable, str(REPO / "scripts" / "vault.py"), "--inventory", str(self.inventory)]
        command += ["--password-file", str(self.vault_password), "--values", "-"]
        given = yaml.safe_dump({"vault_become_password": self.sudo_password})
        subprocess.run(command, input=given, text=True, check=True, capture_output=True)
        self.write_hosts()
        self.write_variables()
        self.write_infrastructure()

    def write_hosts(self) -> None:
        """The hosts of the production inventory: its groups, our addresses."""
        hosts = yaml.safe_load((REPO / "inventory" / "production" / "hosts.yml").read_text())
        ours = {
            name: {
                "ansible_host": machine.address,
                "ansible_become_password": "{{ vault_become_password }}",
                **self.connection,
            }
            for name, machine in self.machines.items()
            if name.startswith("webhook-")
        }
        hosts["all"]["children"]["webhook"]["hosts"] = ours
        (self.inventory / "hosts.yml").write_text(yaml.safe_dump(hosts))

    def write_variables(self) -> None:
        """The variables of the production inventory with what is different here."""
        path = REPO / "inventory" / "production" / "group_vars" / "all" / "main.yml"
        different = {
            "site_name": self.name,
            "site_registry": self.registry,
            "site_registry_scheme": "https",
            "site_registry_username": REGISTRY_USER,
            "stack_database_url": f"postgresql://aisha_webhook@{self.infra.address}:5432/aisha",
            "stack_redis_url": f"redis://{self.infra.address}:6379/0",
            "stack_minio_endpoint": f"{self.infra.address}:9000",
            # fal's own keys are not to be had from here: a key pair of ours stands in for them.
            "secrets_development_key": True,
            "stack_fal_account_ids": [ACCOUNT],
            "verify_account_id": ACCOUNT,
            "edge_certificate_src": str(self.public_tls[0]),
            "edge_certificate_key_src": str(self.public_tls[1]),
            # The public name leads nowhere from here.
            "verify_validate_certs": False,
        }
        # The authority's certificate stands where the hosts have it; on this machine, in the test's own directory.
        here = f"{{{{ '{self.authority.certificate}' if ansible_connection | default('ssh') == 'local'"
        ca = f"{here} else '/etc/ssl/site-ca.pem' }}}}"
        variables = yaml.safe_load(path.read_text()) | different | {"site_registry_ca": ca} | self.variables
        (self.inventory / "group_vars" / "all" / "main.yml").write_text(yaml.safe_dump(variables))

    def write_infrastructure(self) -> None:
        """The inventory of the other hosts of the site: registry and backends by our own roles, for hosts beside them."""
        directory = self.directory / "infrastructure"
        (directory / "group_vars" / "all").mkdir(parents=True)
        host = {
            "ansible_host": self.infra.address,
            "ansible_become_password": "{{ vault_become_password }}",
            **self.connection,
        }
        groups = ("registry", "backends")
        hosts = {
            "all": {"hosts": {"infra": host}, "children": {g: {"hosts": {"infra": None}} for g in groups}}
        }
        variables = {
            "site_name": f"{self.name}-infra",
            "site_registry": self.registry,
            "site_registry_scheme": "https",
            "site_registry_username": REGISTRY_USER,
            "site_registry_password": "{{ vault_registry_password }}",
            "registry_address": "0.0.0.0",
            "registry_certificate_src": str(self.registry_tls[0]),
            "registry_certificate_key_src": str(self.registry_tls[1]),
            "backends_address": "0.0.0.0",
            "backends_postgres_port": 5432,
            "backends_redis_port": 6379,
            "backends_s3_port": 9000,
            "secrets_given": "{{ vault_secrets }}",
        }
        (directory / "hosts.yml").write_text(yaml.safe_dump(hosts))
        (directory / "group_vars" / "all" / "main.yml").write_text(yaml.safe_dump(variables))
        shutil.copy(self.inventory / "group_vars" / "all" / "vault.yml", directory / "group_vars" / "all")

    def lend_images(self) -> None:
        """What this machine's engine has built already need not be built again on the infrastructure host."""
        self.infra.run(
            "pgrep dockerd || start-stop-daemon --start --background --pidfile /run/docker.pid --exec /usr/sbin/dockerd"
        )
        wait_for(lambda: self.infra.succeeds("docker info"), "the infrastructure host's engine")
        listed = testhost.docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}").stdout.split()
        names = [name for name in listed if name.partition(":")[0] in EMBEDDED_IMAGES]
        if names:
            with subprocess.Popen(["docker", "save", *names], stdout=subprocess.PIPE) as saving:
                command = ["docker", "exec", "--interactive", self.infra.name, "docker", "load", "--quiet"]
                subprocess.run(command, stdin=saving.stdout, check=True, capture_output=True, timeout=300)

    # Using it

    def playbook(
        self, playbook: str, *arguments: str, inventory: Path | None = None, timeout: float = 1200
    ) -> ClusterRun:
        """Run a playbook from this machine against the site; shown as well when VERBOSE is set."""
        command = ["ansible-playbook", "-i", str(inventory or self.inventory), playbook]
        command += ["--vault-password-file", str(self.vault_password), *arguments]
        environment = {**os.environ, "ANSIBLE_NOCOLOR": "1"}
        environment["ANSIBLE_SSH_CONTROL_PATH_DIR"] = str(self.control)
        # All hosts share this machine's processors.
        environment["ANSIBLE_TIMEOUT"] = "90"
        begin = time.monotonic()
        run = subprocess.run(
            command,
            cwd=REPO,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        if os.environ.get("VERBOSE"):
            print(run.stdout)
        return ClusterRun(run.returncode, run.stdout, time.monotonic() - begin)

    @property
    def control(self) -> Path:
        """Where the connections that runs share, and keep for a minute, have their sockets."""
        return self.directory / "cp"

    def end_connections(self) -> None:
        """End them: the next run connects anew, whatever stands in its way then."""
        for socket in self.control.glob("*"):
            command = ["ssh", "-O", "exit", "-o", f"ControlPath={socket}", "any"]
            subprocess.run(command, capture_output=True, check=False, timeout=30)
            socket.unlink(missing_ok=True)

    def site(self, *arguments: str, timeout: float = 1200) -> ClusterRun:
        """Run `site.yml` against the production inventory."""
        return self.playbook("site.yml", *arguments, timeout=timeout)

    def with_variables(self, **variables: Any) -> list[str]:
        """Arguments that set variables for one run."""
        return ["-e", json.dumps(variables)]

    def make_infrastructure(self) -> ClusterRun:
        """Registry and backends on the infrastructure host."""
        self.lend_images()
        return self.playbook("site.yml", inventory=self.directory / "infrastructure").must_pass()

    def state(self, machines: Sequence[Machine] | None = None) -> dict[str, tuple[dict[str, str], str]]:
        """Containers and files of the webhook hosts: equal before and after a run that touched nothing."""
        return {
            machine.name: (machine.containers(), machine.files(f"/opt/{self.name}"))
            for machine in machines or self.webhooks
        }

    # The registry, as somebody else uses it

    def registry_call(self, method: str, path: str, **options: Any) -> requests.Response:
        """One call of the registry's API with the site's login; the answer, whatever its status."""
        url = path if path.startswith("https://") else f"https://{self.registry}/v2/{path}"
        login = (REGISTRY_USER, self.secret("vault_registry_password"))
        ca = str(self.authority.certificate)
        return requests.request(method, url, auth=login, verify=ca, timeout=30, **options)

    def push(self, repository: str, tag: str, labels: dict[str, str] | None = None) -> str:
        """Push a small image (one empty layer), as another deployment has; the digest of its manifest."""
        layer = gzip.compress(bytes(1024), mtime=0)
        rootfs = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(bytes(1024)).hexdigest()}"]}
        config = {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": rootfs,
            "config": {"Labels": labels or {}},
        }
        blobs = [json.dumps(config | {"comment": f"{repository}:{tag}"}).encode(), layer]
        for blob in blobs:
            self.upload(repository, blob)
        media = "application/vnd.docker.{}"
        described = [
            {"mediaType": media.format(kind), "size": len(blob), "digest": digest_of(blob)}
            for blob, kind in zip(
                blobs, ("container.image.v1+json", "image.rootfs.diff.tar.gzip"), strict=True
            )
        ]
        kind = media.format("distribution.manifest.v2+json")
        manifest = {"schemaVersion": 2, "mediaType": kind, "config": described[0], "layers": described[1:]}
        data = json.dumps(manifest).encode()
        answer = self.registry_call(
            "PUT", f"{repository}/manifests/{tag}", data=data, headers={"Content-Type": kind}
        )
        assert answer.status_code == 201, answer.text
        return digest_of(data)

    def upload(self, repository: str, blob: bytes) -> None:
        """Put one blob into a repository."""
        begun = self.registry_call("POST", f"{repository}/blobs/uploads/")
        place = begun.headers["Location"]
        separator = "&" if "?" in place else "?"
        done = self.registry_call("PUT", f"{place}{separator}digest={digest_of(blob)}", data=blob)
        assert done.status_code == 201, done.text

    def manifests(self, repository: str) -> dict[str, str]:
        """Tags of a repository and the digests of what they name, read byte by byte."""
        tags = self.registry_call("GET", f"{repository}/tags/list").json().get("tags") or []
        kinds = {"Accept": ", ".join(MANIFEST_KINDS)}
        found = {}
        for tag in tags:
            answer = self.registry_call("GET", f"{repository}/manifests/{tag}", headers=kinds)
            assert answer.status_code == 200, answer.text
            found[tag] = digest_of(answer.content)
        return found

    # Taking it away

    def down(self) -> None:
        """Remove the hosts, their network, the site's images on this machine's engine, and its trust for the registry."""
        for machine in self.machines.values():
            testhost.down(machine.name)
        testhost.docker("network", "rm", self.network, check=False)
        if self.machines:
            names = testhost.docker(
                "image",
                "ls",
                "--format",
                "{{.Repository}}:{{.Tag}}",
                "--filter",
                f"reference={self.registry}/*",
            ).stdout.split()
            for name in names:
                testhost.docker("image", "rm", "--force", name, check=False)
            shutil.rmtree(Path("/etc/docker/certs.d") / self.registry, ignore_errors=True)
            # Where this machine, which builds, notes that.
            shutil.rmtree(Path("/opt") / self.name, ignore_errors=True)
