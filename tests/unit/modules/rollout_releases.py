"""A release as `release.json` describes it, for tests of the rollout's rooms."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.rollout.model import parse_release

IMAGE = "127.0.0.1:5000/webhook-api@sha256:" + "1" * 64


def description(instances=2, webhook_release="s-new", edge="e-new"):
    label = {"org.aisha.release": webhook_release}
    api = [
        {
            "name": f"api-{number}",
            "kind": "api",
            "container": f"wht-api-{number}",
            "image": IMAGE,
            "label": label,
            "port": 8000 + number,
            "address": f"172.31.1.{10 + number}",
        }
        for number in range(1, instances + 1)
    ]
    worker = {"name": "worker", "kind": "worker", "container": "wht-worker", "image": IMAGE, "label": label}
    nginx = {"name": "nginx", "kind": "edge", "container": "wht-nginx", "image": IMAGE}
    return {
        "webhook_release": webhook_release,
        "project": "wht",
        "services": [*api, worker, nginx | {"label": {"org.aisha.edge": edge}}],
        "edge": edge,
        "edge_path": f"/opt/wht/edge/{edge}",
        "certificate_directory": "/opt/wht/ssl",
        "ports": {"http": 80, "https": [443, 8443, 443]},
        "migrate": True,
    }


def release(identity="r-000000000001", **options):
    return parse_release(identity, Path("/opt/wht/releases") / identity, description(**options))
