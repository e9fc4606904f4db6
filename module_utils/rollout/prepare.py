"""All that can be refused before the first container is touched: images, nginx's configuration, the migration."""

from __future__ import annotations

from collections.abc import Sequence

from ansible.module_utils.docker_cli import Docker, DockerError, Result, last_lines
from ansible.module_utils.docker_engine import Engine
from ansible.module_utils.rollout.model import Release, RolloutError, Settings

PULL_SECONDS, TEST_SECONDS = 900.0, 60.0
#: The service's exit code for a setting that is missing or wrong (EX_CONFIG).
BAD_SETTING = 78
MIGRATE = "migrate"
TEST_LABEL = "org.aisha.throwaway"


class Preparation:
    """Brings images here and tries what can be tried, and replaces nothing."""

    def __init__(self, docker: Docker, engine: Engine, settings: Settings) -> None:
        self._docker = docker
        self._engine = engine
        self._settings = settings

    def missing(self, release: Release) -> list[str]:
        """Images of the release that this host does not have."""
        wanted = dict.fromkeys(service.image for service in release.services)
        return [image for image in wanted if not self._engine.image_names(image)]

    def pull(self, images: Sequence[str]) -> None:
        """Pull by digest. `RolloutError` (image_missing) with what the registry said."""
        config = self._settings.docker_config
        options = {"env": {"DOCKER_CONFIG": config}} if config else {}
        for image in images:
            try:
                result = self._docker.attempt("pull", "--quiet", image, timeout=PULL_SECONDS, **options)
            except DockerError as error:
                if error.reason != "timeout":
                    raise
                result = Result(1, "", str(error))
            if result.code != 0:
                raise RolloutError(
                    "image_missing",
                    f"{image} is not on this host, and cannot be pulled: {last_lines(result.err or result.out, 4)}",
                    "See that the registry answers this host and has the image (--tags images pushes it again)",
                )

    def test_edge(self, release: Release) -> None:
        """`nginx -t` in a throw-away container. It has no network: on the host's it would take connections away."""
        command = ["run", "--rm", "--network=none", "--read-only", "--user=10002:10002", "--cap-drop=ALL"]
        command += [
            "--security-opt=no-new-privileges",
            "--tmpfs=/tmp:mode=1777",
            "--volume=/var/cache/nginx-body",
        ]
        command += [f"--label={TEST_LABEL}={release.project}", "--pull=never"]
        command += [f"--volume={release.edge_path}:/etc/nginx/site:ro"]
        command += [f"--volume={release.certificate_directory}:/etc/nginx/ssl:ro", release.nginx.image]
        command += ["nginx", "-e", "stderr", "-c", "/etc/nginx/site/nginx.conf", "-t"]
        result = self._docker.attempt(*command, timeout=TEST_SECONDS)
        if result.code != 0:
            raise RolloutError(
                "edge_refused",
                f"nginx refuses the configuration in {release.edge_path}: {last_lines(result.err or result.out, 4)}",
                "Correct the edge_ variables or the certificate that it names (--tags edge)",
                service=release.nginx.name,
            )

    def migrate(self, release: Release) -> str:
        """Run the release's migrations once. Old and new code both work on the new schema, so the old goes on serving."""
        compose = ["compose", "-p", release.project, "-f", str(release.compose_file), "--profile", MIGRATE]
        run = ["run", "--rm", "--no-deps", "-T", MIGRATE]
        try:
            result = self._docker.attempt(*compose, *run, timeout=self._settings.migrate_timeout)
        except DockerError as error:
            if error.reason != "timeout":
                raise
            result = Result(124, "", f"it took longer than {self._settings.migrate_timeout:g} s")
        if result.code == 0:
            return str(result.out).strip()
        said = last_lines(result.out + "\n" + result.err, 8)
        raise RolloutError(
            "migration_failed",
            f"the database could not be migrated (exit code {result.code}): {said}",
            "Correct the stack_ variable or the secret that it names"
            if result.code == BAD_SETTING
            else f"See that PostgreSQL answers at the DATABASE_URL of {release.path}/prod.env, and takes its password",
            service=MIGRATE,
        )
