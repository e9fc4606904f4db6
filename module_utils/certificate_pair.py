# SPDX-License-Identifier: MIT
"""Whether a certificate and its key stand on a host so that a server can use them. Changes nothing, and shows no key."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from ansible.module_utils.docker_cli import DockerError, find_program, run


class Pair(NamedTuple):
    """The certificate's text (empty where there is none), and what is wrong with the two, one sentence each."""

    certificate: str
    faults: list[str]


def look(certificate: Path, key: Path, owner: int, *, ours: bool) -> Pair:
    """Look at both.

    :param owner: number of the user that reads the key.
    :param ours: whether nobody but that user may read it. Else it is enough that this one can.
    """
    try:
        text = certificate.read_text(encoding="utf-8")
    except OSError as error:
        return Pair("", [f"{certificate} can't be read: {error.strerror}"])
    except UnicodeDecodeError:
        return Pair("", [f"{certificate} is not PEM"])
    return Pair(text, _key_faults(key, owner, ours=ours) or _faults_together(certificate, key))


def _key_faults(key: Path, owner: int, *, ours: bool) -> list[str]:
    try:
        found = key.stat()
    except OSError as error:
        return [f"{key} can't be read: {error.strerror}"]
    mode = stat.S_IMODE(found.st_mode)
    if ours and (found.st_uid, mode) != (owner, 0o400):
        return [f"{key} belongs to user {found.st_uid} with mode {mode:04o}, and not to {owner} with 0400"]
    readable = (
        (found.st_uid == owner and mode & 0o400) or (found.st_gid == owner and mode & 0o040) or mode & 0o004
    )
    return [] if readable else [f"{key} can't be read by user {owner}, as which nginx runs"]


def _faults_together(certificate: Path, key: Path) -> list[str]:
    program = find_program("openssl")
    if not program:
        return []
    asked = (
        [program, "x509", "-in", os.fspath(certificate), "-noout", "-pubkey"],
        [program, "pkey", "-in", os.fspath(key), "-passin", "pass:", "-pubout"],
    )
    try:
        ours, theirs = (run(command, timeout=20) for command in asked)
    except DockerError as error:
        return [f"openssl: {error}"]
    if ours.code != 0:
        return [f"{certificate} is no certificate that openssl can read"]
    if theirs.code != 0:
        return [f"{key} is no private key that openssl can read"]
    return [] if ours.out.split() == theirs.out.split() else [f"{key} is not the key of {certificate}"]
