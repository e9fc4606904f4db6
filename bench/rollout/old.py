"""The procedure that this project replaces, rebuilt: `docker build`, push, `up -d --force-recreate`, sleep 15, look.

Its stack: two instances of the same image, the second a `backup` of nginx's upstream as it was, nginx with a published
port; the database and the rest are those of the site beside it.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.support.sites import Site

SLEEP = 15.0
"""Seconds that the old update script waited before it looked."""
NGINX = """
worker_processes auto; pid /tmp/nginx.pid; error_log stderr crit;
events { worker_connections 1024; }
http {
    access_log off; client_max_body_size 50m;
    client_body_temp_path /tmp/body; proxy_temp_path /tmp/proxy; fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u;
    scgi_temp_path /tmp/s;
    upstream webhook_api { server api-1:8000; server api-2:8000 backup; }
    server {
        listen 8080;
        location / { proxy_pass http://webhook_api; proxy_set_header Host $host; }
    }
}
"""


class OldStack:
    """Made beside a standing site, with its secrets and its database."""

    def __init__(self, site: Site, work: Path, base: str) -> None:
        self.name = f"{site.name}-old"
        first = int(site.settings["site_http_port"]) - 20
        self.port, self.api_ports = first, (first + 1, first + 2)
        self._image = f"{site.settings['site_registry']}/webhook-api-old:latest"
        self._base = base
        self._work = work
        self._file = work / "docker-compose.yml"
        (work / "nginx").mkdir(parents=True)
        (work / "nginx" / "nginx.conf").write_text(NGINX)
        self._file.write_text(json.dumps(self._project(site)))

    def start(self, source: Path, version: str) -> None:
        """The first deployment; not measured."""
        self._build(source, version)
        self._compose("up", "-d", "--wait")

    def update(self, source: Path, version: str) -> None:
        """What the update script did."""
        self._build(source, version)
        self._compose("pull", "--quiet", "api-1")
        self._compose("up", "-d", "--force-recreate")
        time.sleep(SLEEP)
        subprocess.run(
            ["curl", "-f", "-s", f"http://127.0.0.1:{self.port}/health"], capture_output=True, check=False
        )

    def remove(self) -> None:
        """Take it away."""
        try:
            self._compose("down", "--volumes", "--timeout", "5")
        finally:
            command = ["docker", "image", "rm", "--force", self._image]
            subprocess.run(command, capture_output=True, check=False)

    def _build(self, source: Path, version: str) -> None:
        authorities = Path("/etc/ssl/certs/ca-certificates.crt")
        secret = ["--secret", f"id=ca,src={authorities}"] if authorities.is_file() else []
        command = [
            "docker",
            "buildx",
            "build",
            "--load",
            "--provenance=false",
            "--quiet",
            *secret,
            "--tag",
            self._image,
        ]
        arguments = ["--build-arg", f"BASE={self._base}", "--build-arg", f"WEBHOOK_VERSION={version}"]
        _run(*command, *arguments, str(source))
        _run("docker", "push", "--quiet", self._image)

    def _compose(self, *arguments: str) -> None:
        _run("docker", "compose", "--project-name", self.name, "--file", str(self._file), *arguments)

    def _project(self, site: Site) -> dict[str, Any]:
        file = site.home / "current" / "docker-compose.webhook.prod.yml"
        ours = json.loads(_run("docker", "compose", "--file", str(file), "config", "--format", "json"))
        services = {}
        for number, port in enumerate(self.api_ports, 1):
            api = ours["services"][f"api-{number}"]
            kept = (
                "command",
                "environment",
                "healthcheck",
                "read_only",
                "tmpfs",
                "user",
                "secrets",
                "mem_limit",
            )
            services[f"api-{number}"] = {
                **{name: api[name] for name in kept if name in api},
                "image": self._image,
                "ports": [f"127.0.0.1:{port}:8000"],
                "networks": {"default": {}, "backends": {}},
                "volumes": [{"type": "tmpfs", "target": "/var/lib/webhook", "tmpfs": {"mode": 0o1777}}],
            }
        services["nginx"] = {
            "image": ours["services"]["nginx"]["image"],
            "command": ["nginx", "-c", "/etc/old/nginx.conf", "-g", "daemon off;"],
            "user": "10002:10002",
            "tmpfs": ["/tmp"],  # noqa: S108  (inside the container)
            "ports": [f"127.0.0.1:{self.port}:8080"],
            "volumes": [f"{self._work / 'nginx'}:/etc/old:ro"],
            "depends_on": ["api-1", "api-2"],
        }
        backends = {"name": site.settings["site_backends_network"], "external": True}
        return {
            "services": services,
            "networks": {"backends": backends},
            "secrets": ours["secrets"],
        }


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:4])} … failed ({done.returncode}): {done.stderr[-2000:]}")
    return done.stdout
