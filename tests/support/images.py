"""What the engine calls its images."""

from __future__ import annotations

import docker


def tags_of(engine: docker.DockerClient, repository: str | None = None) -> list[str]:
    """Tags of all images, or of a repository's, the newest first.

    One question: the client's own list asks for each image once more, and fails when another test has removed one.
    """
    images = sorted(engine.api.images(name=repository), key=lambda image: image["Created"], reverse=True)
    return [tag for image in images for tag in image["RepoTags"] or () if tag != "<none>:<none>"]
