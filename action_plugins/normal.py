# SPDX-License-Identifier: MIT
"""Ansible's own way to run a module, but for this project's and a few more, which a host keeps after the first call.

Ansible makes a module's archive anew in each run, sends it with each call, and compiles all of it on the host each time:
about 0.4 s a call. Here a call sends a page of text and the parameters; what is not kept, or can't be, runs as ever
(docs/decisions/0525-modules-are-kept-on-the-host.md, with what was measured).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins import action
from ansible.release import __version__ as version

try:
    from ansible.executor.module_common import InterpreterDiscoveryRequiredError as NotFoundYet
    from ansible.executor.module_common import _BuiltModule, _get_shebang
    from ansible.module_utils.common.json import Direction, get_module_encoder
except ImportError:
    VERSION_FITS = False
else:
    VERSION_FITS = version.startswith("2.19.")


def ansibles_own() -> Any:
    """The class of this name that comes with Ansible: its module's name is taken by this file."""
    spec = importlib.util.spec_from_file_location(
        "ansibles_own_normal", Path(action.__path__[0], "normal.py")
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"Ansible {version} has no action plugin normal.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ActionModule


PROJECT = Path(__file__).resolve().parents[1]
LIBRARY = PROJECT / "library"
OF_ANSIBLE = ("file", "slurp", "stat")
"""Modules that come with Ansible and are kept, too: what the roles call again and again."""
ORIGINS = ("", "ansible.builtin", "ansible.legacy")
HOST_SIDE = PROJECT / "module_utils" / "kept_modules.py"
NOT_KEPT = "module_not_kept"
ARCHIVE = re.compile(rb"^\s*zip_data='([A-Za-z0-9+/=]+)',$", re.MULTILINE)


class ActionModule(ansibles_own()):  # type: ignore[misc]
    """Runs a module: a kept one by its name, any other one as Ansible does."""

    __kept = False
    __archive: str | None = None

    def _execute_module(
        self,
        module_name: str | None = None,
        module_args: dict[str, Any] | None = None,
        tmp: Any = None,  # noqa: ARG002  (Ansible's signature)
        task_vars: dict[str, Any] | None = None,
        wrap_async: bool = False,
        **others: Any,
    ) -> dict[str, Any]:
        """Run a module; of this project's, first by its name, then with its archive to be kept, then as Ansible does."""
        call = {"module_name": module_name, "module_args": module_args, "task_vars": task_vars, **others}
        origin, _, name = (module_name or self._task.action).rpartition(".")
        # A collection may have one of the same name.
        if origin not in ORIGINS or wrap_async or not self.__may_be_kept(name):
            return self.__plainly(call, wrap_async)
        self.__kept, self.__archive = True, None
        result = super()._execute_module(**call)
        # A single task may only look in a run that does change the host.
        if result.get(NOT_KEPT) == "missing" and not (task_vars or {}).get("ansible_check_mode"):
            self.__archive = self.__archive_of(name, task_vars)
            if self.__archive:
                result = super()._execute_module(**call)
        return self.__plainly(call, wrap_async) if NOT_KEPT in result else result

    def __plainly(self, call: dict[str, Any], wrap_async: bool) -> dict[str, Any]:
        self.__kept = False
        result: dict[str, Any] = super()._execute_module(**call, wrap_async=wrap_async)
        return result

    def __may_be_kept(self, name: str) -> bool:
        """Whether this is one of those, on a connection on which Ansible sends modules through standard input."""
        return (
            VERSION_FITS
            and (name in OF_ANSIBLE or (LIBRARY / f"{name}.py").is_file())
            and not self._task.async_val
            and self._is_pipelining_enabled("new")
        )

    def __archive_of(self, name: str, task_vars: dict[str, Any] | None) -> str | None:
        """The archive that Ansible makes of a module, in base64."""
        built, _ = super()._configure_module(name, {}, task_vars)
        found = ARCHIVE.search(built.b_module_data)
        return found[1].decode() if found else None

    def _configure_module(
        self, module_name: str, module_args: dict[str, Any], task_vars: dict[str, Any]
    ) -> tuple[Any, str]:
        """What is sent to the host."""
        if not self.__kept:
            return super()._configure_module(module_name, module_args, task_vars)
        variables = task_vars
        if self._task.delegate_to:
            variables = task_vars["ansible_delegated_vars"][self._task.delegate_to]
        try:
            shebang, _ = _get_shebang(
                "/usr/bin/python",
                variables,
                self._templar,
                remote_is_local=bool(getattr(self._connection, "_remote_is_local", False)),
            )
        except NotFoundYet:
            self.__kept = False
            return super()._configure_module(module_name, module_args, task_vars)
        name = module_name.rpartition(".")[2]
        text = script(shebang, name, parameters(name, module_args), self.__archive)
        return _BuiltModule(
            b_module_data=text.encode(), module_style="new", shebang=shebang, serialization_profile="legacy"
        ), f"{name} (kept)"


def parameters(name: str, module_args: dict[str, Any]) -> str:
    """A module's parameters, as Ansible writes them. Raises AnsibleError for what JSON has no word for."""
    encoder = get_module_encoder("legacy", Direction.CONTROLLER_TO_MODULE)
    try:
        return json.dumps({"ANSIBLE_MODULE_ARGS": module_args}, cls=encoder)
    except TypeError as error:
        raise AnsibleError(f"Failed to serialize arguments for the {name!r} module.") from error


def script(shebang: str, module: str, given: str, archive: str | None) -> str:
    """The program that a host runs: its side of this, and the call."""
    call = f"run({state()!r}, {module!r}, {given!r}, {archive!r})"
    return f"{shebang}\n{HOST_SIDE.read_text()}\n\n{call}\n"


def state() -> str:
    """A name for the state of all modules: what is kept under it is the same wherever it is."""
    digest = hashlib.sha256(version.encode())
    for file in sorted([*LIBRARY.glob("*.py"), *(PROJECT / "module_utils").rglob("*.py")]):
        content = file.read_bytes()
        digest.update(f"\n{file.relative_to(PROJECT)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:32]
