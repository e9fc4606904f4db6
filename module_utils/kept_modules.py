# SPDX-License-Identifier: MIT
"""Runs a module from a directory on the host that keeps it, or says that it is not kept there.

The action plugin `normal` sends this file's own text to the host, in the place of Ansible's wrapper: nothing but the
standard library may be imported here. Kept is what Ansible's wrapper would have unpacked, with the bytecode that Python
then writes beside it (docs/decisions/0525-modules-are-kept-on-the-host.md).
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time

PLACE = "/run/ansible-kept-modules"
"""Gone with the next boot, and root's alone: what lies in it is run as root."""
UNUSED = 24 * 3600
"""Seconds after which what no run used goes away."""
NOT_KEPT = "module_not_kept"
"""Key of the answer in the place of a result: "missing", or a reason why the host keeps nothing."""


def run(project: str, module: str, parameters: str, payload: str | None = None) -> None:
    """Run a module with JSON parameters. `project` names the state of all modules; `payload` is kept first, if given."""
    sys.path = [path for path in sys.path if path not in ("", ".")]
    directory = os.path.join(PLACE, project)
    try:
        if os.geteuid() != 0:
            raise PermissionError("only root's modules are kept")
        if payload is not None:
            keep(directory, module, payload)
        name = kept(directory, module)
    except FileNotFoundError:
        refuse("missing")
    except (OSError, ValueError) as error:
        refuse(str(error))
    else:
        sys.path.insert(0, directory)
        # Also where the environment forbids it: the bytecode beside what is kept is half of what keeping saves.
        sys.dont_write_bytecode = False
        from ansible.module_utils._internal._ansiballz import _loader

        _loader.run_module(
            json_params=parameters.encode(),
            profile="legacy",
            module_fqn=name,
            modlib_path=directory,
            extensions={},
        )


def refuse(reason: str) -> None:
    """Answer that the module did not run, in the place of a result."""
    print(json.dumps({NOT_KEPT: reason}))


def kept(directory: str, module: str) -> str:
    """The name under which a kept module is imported. FileNotFoundError, or PermissionError for what others can write."""
    root = os.lstat(PLACE)
    if not stat.S_ISDIR(root.st_mode) or root.st_uid != os.geteuid() or root.st_mode & 0o077:
        raise PermissionError(f"{PLACE} is not a directory of root's alone")
    with open(marker(directory, module)) as file:
        name = file.read()
    os.utime(directory)
    return name


def keep(directory: str, module: str, payload: str) -> None:
    """Unpack what Ansible's wrapper holds: each file whole or not at all, the marker last. Safe beside another run."""
    import base64
    import io
    import re
    import zipfile

    os.makedirs(PLACE, mode=0o700, exist_ok=True)
    remove_unused(directory)
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(payload))) as archive:
        for name in archive.namelist():
            if name.startswith("/") or ".." in name.split("/"):
                raise ValueError(f"a path that leaves the directory: {name}")
            write(os.path.join(directory, name), archive.read(name))
        found = [name for name in archive.namelist() if re.search(rf"/{re.escape(module)}\.py$", name)]
    modules = [name for name in found if "/module_utils/" not in name]
    if len(modules) != 1:
        raise ValueError(f"{module} is {len(modules)} times in what was sent")
    write(marker(directory, module), modules[0].removesuffix(".py").replace("/", ".").encode())


def marker(directory: str, module: str) -> str:
    """The file that says that a module is kept as a whole, and by which name."""
    return os.path.join(directory, f".{module}.kept")


def write(path: str, content: bytes) -> None:
    """Put a file in its place as a whole."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    part = f"{path}.{os.getpid()}.part"
    with open(part, "wb") as file:
        file.write(content)
    os.replace(part, path)


def remove_unused(directory: str) -> None:
    """Older states of the modules that no run used for a day are gone."""
    import shutil

    for name in os.listdir(PLACE):
        path = os.path.join(PLACE, name)
        if path != directory and time.time() - os.lstat(path).st_mtime > UNUSED:
            shutil.rmtree(path, ignore_errors=True)  # another run may be doing the same
