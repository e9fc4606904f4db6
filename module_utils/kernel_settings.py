# SPDX-License-Identifier: MIT
"""Kernel settings (sysctl) read from and written to /proc/sys, and kept over a reboot by a file of sysctl.d.

Works where procps (the `sysctl` command) is not installed, as on a minimal Debian.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

HEADER = "# Written by the deployment of this site; read at boot by sysctl.d.\n"
_FORMER = " was "


class KernelSettingsError(Exception):
    """A setting that could not be read or written. `reason` is for programs, the message for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Setting:
    """One wanted setting.

    `at_most`: a lower value than the wanted one is right as well. `optional`: a kernel without it is no fault.
    """

    name: str
    value: int
    at_most: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Change:
    """A setting that is not as wanted: its name, the value that it has, and the one that it should have."""

    name: str
    before: int
    after: int


def setting_path(root: Path, name: str) -> Path:
    """Where the kernel shows a setting below `root` (usually /proc/sys): dots are directories."""
    return root.joinpath(*name.split("."))


def read_setting(root: Path, name: str) -> int | None:
    """The value of a setting, or None where this kernel has no such setting."""
    try:
        text = setting_path(root, name).read_text(encoding="ascii").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise KernelSettingsError("unreadable", f"{name} could not be read: {error.strerror}.") from error
    try:
        return int(text)
    except ValueError:
        raise KernelSettingsError("not_a_number", f"{name} holds {text!r}, not one number.") from None


def differences(wanted: list[Setting], current: dict[str, int | None]) -> list[Change]:
    """What must change, in the given order. Raises KernelSettingsError for a missing setting that is not optional."""
    changes = []
    for setting in wanted:
        value = current[setting.name]
        if value is None:
            if setting.optional:
                continue
            raise KernelSettingsError("missing", f"This kernel has no setting {setting.name}.")
        right = value <= setting.value if setting.at_most else value == setting.value
        if not right:
            changes.append(Change(setting.name, value, setting.value))
    return changes


def kept_settings(text: str) -> dict[str, int]:
    """The settings of a sysctl.d file that this module wrote; lines that it cannot read are left out."""
    kept = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.lstrip().startswith(("#", ";")) and value.strip().isdigit():
            kept[name.strip()] = int(value)
    return kept


def former_values(text: str) -> dict[str, int]:
    """The values that the settings of such a file had before, as far as it says them."""
    found = {}
    for line in text.splitlines():
        name, is_former, value = line.removeprefix("#").partition(_FORMER)
        if line.startswith("#") and is_former and value.strip().isdigit():
            found[name.strip()] = int(value)
    return found


def undone(text: str, current: dict[str, int | None]) -> list[Change]:
    """What gives the kernel back the values that it had before; a setting that somebody has changed since is left alone."""
    former = former_values(text)
    return [
        Change(name, value, former[name])
        for name, value in kept_settings(text).items()
        if name in former and current.get(name) == value != former[name]
    ]


def other_files(file: Path) -> str:
    """What the files of other sites on this machine say, one after the other."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(file.parent.glob("*.conf")) if path != file)
    return "".join(text for text in texts if text.startswith(HEADER))


def file_text(
    before: str,
    wanted: list[Setting],
    changes: list[Change],
    current: dict[str, int | None],
    others: str = "",
) -> str:
    """The sysctl.d file that keeps what was changed, now or by an earlier run. Empty when there is nothing to keep.

    A setting that the system itself already has right is left to the system; one that is right because of another
    site (`others`) is kept here too, for that site may go. Above each stands the value that it had before the first run.
    """
    kept = kept_settings(others) | kept_settings(before)
    former = (
        {change.name: change.before for change in changes} | former_values(others) | former_values(before)
    )
    changed = {change.name: change.after for change in changes}
    lines = []
    for setting in wanted:
        value = changed.get(setting.name, current[setting.name] if setting.name in kept else None)
        if value is not None:
            note = f"#{setting.name}{_FORMER}{former[setting.name]}\n" if setting.name in former else ""
            lines.append(f"{note}{setting.name} = {value}\n")
    return HEADER + "".join(lines) if lines else ""


def write_setting(root: Path, name: str, value: int) -> None:
    """Apply a setting to the running kernel. Raises KernelSettingsError with the remedy."""
    try:
        setting_path(root, name).write_text(f"{value}\n", encoding="ascii")
    except OSError as error:
        raise KernelSettingsError(
            "unwritable",
            f"{name} could not be set to {value}: {error.strerror}. Where /proc/sys is read-only (a container), "
            f"set it on the host that runs the container, or make /proc/sys writable (mount -o remount,rw /proc/sys).",
        ) from error


def write_file(path: Path, text: str) -> None:
    """Put `text` at `path` with mode 0644, whole or not at all; an empty text removes the file."""
    if not text:
        path.unlink(missing_ok=True)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise KernelSettingsError(
            "file_unwritable", f"{path} could not be written: {error.strerror}."
        ) from error
