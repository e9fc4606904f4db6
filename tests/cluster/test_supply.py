"""A site that signs its images: what cosign itself says of them, and what a host refuses to run.

One site for all; its tests go on where the one before ended.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import ansible.module_utils
import pytest

from tests.support.sites import REPO, Site

ansible.module_utils.__path__.insert(0, str(REPO / "module_utils"))

import docker  # noqa: E402
from ansible.module_utils.image_signature import tag_of  # noqa: E402
from ansible.module_utils.registry_api import RegistryClient  # noqa: E402

from tests.support.images import tags_of  # noqa: E402

NUMBER = 14
COSIGN = "wht-supply-cosign"
DOCKERFILE = (
    "ARG BASE\nFROM ${BASE}\nRUN apt-get -q update && apt-get -qy install --no-install-recommends cosign\n"
)
# The machine may be busy with other hosts of other tests.
VARIABLES = {"site_image_signatures": True, "rollout_health_timeout": 600}
OFFLINE = ("--allow-http-registry", "--allow-insecure-registry")


def output(*command: str, **options: str) -> str:
    """Output of a command; an AssertionError with all it said when it failed."""
    run = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert run.returncode == 0, f"{' '.join(command[:4])}: {run.stdout}{run.stderr}"
    return str(run.stdout)


@pytest.fixture(scope="module")
def cosign() -> Iterator[str]:
    """Debian's cosign, in a container on the base image that the site's images stand on."""
    engine = docker.from_env()
    base = tags_of(engine, "aisha-base")[0]
    engine.close()
    output("docker", "build", "-q", "--build-arg", f"BASE={base}", "-t", COSIGN, "-", input=DOCKERFILE)
    yield COSIGN
    subprocess.run(["docker", "image", "rm", "--force", COSIGN], capture_output=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A whole site with signatures on."""
    made = Site("wht-supply", tmp_path_factory.mktemp("wht-supply"), NUMBER, VARIABLES)
    try:
        made.site(timeout=1800).must_pass()
        yield made
    finally:
        made.teardown()


@pytest.fixture
def registry(site: Site) -> RegistryClient:
    return RegistryClient(f"http://{site.settings['site_registry']}", plain_http=True)


@pytest.fixture
def images(site: Site) -> dict[str, str]:
    """The images of the release that runs, by repository."""
    found: dict[str, str] = json.loads((site.home / "current" / "release.json").read_text())["images"]
    return found


def run_cosign(image: str, *arguments: str, files: Path) -> subprocess.CompletedProcess[str]:
    """cosign with a directory of files at /files, on the host's network, where the registry is."""
    command = [
        "docker",
        "run",
        "--rm",
        "--network",
        "host",
        "--volume",
        f"{files}:/files",
        "--env",
        "COSIGN_PASSWORD=",
    ]
    command += ["--env", "HOME=/tmp", "--entrypoint", "cosign", image, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def started(site: Site) -> dict[str, str]:
    """When each container of the stack was started."""
    names = [f"{site.name}-{name}" for name in ("api-1", "api-2", "worker", "nginx")]
    return {name: output("docker", "inspect", "--format", "{{.State.StartedAt}}", name) for name in names}


def test_cosign_accepts_what_the_site_signed(
    site: Site, images: dict[str, str], cosign: str, tmp_path: Path
) -> None:
    (tmp_path / "key.pub").write_text((site.home / "image-signing.pub").read_text())
    for image in images.values():
        verified = run_cosign(
            cosign,
            "verify",
            "--key",
            "/files/key.pub",
            "--insecure-ignore-tlog",
            *OFFLINE,
            image,
            files=tmp_path,
        )
        assert verified.returncode == 0, verified.stderr
        (claim,) = json.loads(verified.stdout)
        assert claim["critical"]["image"]["docker-manifest-digest"] == image.partition("@")[2]
        assert claim["optional"]["org.aisha.sbom"].startswith("sha256:")
    output(
        "openssl",
        "genpkey",
        "-algorithm",
        "EC",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-out",
        str(tmp_path / "o"),
    )
    output("openssl", "pkey", "-in", str(tmp_path / "o"), "-pubout", "-out", str(tmp_path / "other.pub"))
    refused = run_cosign(
        cosign,
        "verify",
        "--key",
        "/files/other.pub",
        "--insecure-ignore-tlog",
        *OFFLINE,
        image,
        files=tmp_path,
    )
    assert refused.returncode != 0


def test_the_bills_of_materials_are_read_by_one_command(
    site: Site, images: dict[str, str], tmp_path: Path
) -> None:
    shown = site.playbook("playbooks/sbom.yml", "-e", f"sbom_directory={tmp_path}").must_pass()
    assert "signed by the site" in shown.output
    written = {path.name.partition("-sha")[0].rsplit("-", 1)[0]: path for path in tmp_path.glob("*.cdx.json")}
    assert set(written) == {"webhook-api", "nginx-webhook"}
    names = {c["name"] for c in json.loads(written["webhook-api"].read_text())["components"]}
    assert {"libc6", "python3", "flask", "gunicorn", "webhook-api"} <= names
    assert "nginx" in {c["name"] for c in json.loads(written["nginx-webhook"].read_text())["components"]}


def test_a_run_without_changes_signs_nothing(site: Site, registry: RegistryClient) -> None:
    before = registry.tags("webhook-api"), started(site)
    assert site.site().must_pass().recap["changed"] == 0
    assert (registry.tags("webhook-api"), started(site)) == before


def test_an_unsigned_image_is_not_run(site: Site, registry: RegistryClient, images: dict[str, str]) -> None:
    digest = images["webhook-api"].partition("@")[2]
    registry.delete_manifest("webhook-api", registry.manifest_digest("webhook-api", tag_of(digest)))
    for path in (site.home / "signatures").iterdir():
        path.unlink()
    before = started(site)
    change = ("-e", '{"stack_log_level": "DEBUG"}')
    refused = site.site("--tags", "stack,rollout", *change)
    assert refused.code != 0
    assert f"{images['webhook-api']} is not signed" in refused.output
    assert "Traceback" not in refused.output
    assert started(site) == before, "what runs goes on"

    # The builder signs what it finds unsigned, out of its own engine; then it runs.
    site.site("--tags", "update").must_pass()
    assert registry.find_digest("webhook-api", tag_of(digest)) is not None


def test_what_cosign_signed_is_run_where_hosts_go_by_its_key(
    site: Site, registry: RegistryClient, images: dict[str, str], cosign: str, tmp_path: Path
) -> None:
    """A site may keep its key elsewhere and sign with cosign itself."""
    made = run_cosign(cosign, "generate-key-pair", "--output-key-prefix", "/files/own", files=tmp_path)
    assert made.returncode == 0, made.stderr
    own = {"signatures_public_key": (tmp_path / "own.pub").read_text()}
    refused = site.site("--tags", "signatures", "-e", json.dumps(own))
    assert refused.code != 0
    assert "is signed, but not with" in " ".join(refused.output.split())
    for image in images.values():
        signed = run_cosign(
            cosign,
            "sign",
            "--yes",
            "--tlog-upload=false",
            "--key",
            "/files/own.key",
            *OFFLINE,
            image,
            files=tmp_path,
        )
        assert signed.returncode == 0, signed.stderr
    site.site("--tags", "signatures", "-e", json.dumps(own)).must_pass()
    assert (site.home / "image-signing.pub").read_text().strip() == own["signatures_public_key"].strip()
    site.site("--tags", "images,signatures").must_pass()
    assert (site.home / "image-signing.pub").read_text().strip() != own["signatures_public_key"].strip()


def test_with_another_key_images_are_signed_anew_and_nothing_restarts(
    site: Site, images: dict[str, str]
) -> None:
    before, old = started(site), (site.home / "image-signing.pub").read_text()
    os.unlink(site.home / "secrets" / "image_signing_key")
    site.site().must_pass()
    assert (site.home / "image-signing.pub").read_text() != old
    assert json.loads((site.home / "current" / "release.json").read_text())["images"] == images
    assert started(site) == before
