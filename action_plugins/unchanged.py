# SPDX-License-Identifier: MIT
"""Goes through a task file for one host, in one process, as far as nothing changes: says whether that was to its end.

Ansible starts a process for each task and host, which costs more than most tasks do. Where nothing is left to do on a host,
one task of this action stands for all that would find that out. It never fails: what would change something, what fails and
what cannot be done here is left to the tasks that follow, one by one and for everyone to see
(docs/decisions/0526-what-is-unchanged-is-found-out-in-one-process.md).

    - name: Nothing is left to do on this host
      unchanged:
        tasks: tasks/unchanged.yml
        group: unchanged

`tasks` is a file of ordinary tasks; those that would change something need `check_mode: true`. `group` gets the host when
nothing did. Result: `msg`, what debug tasks said, or where it ended.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from ansible import constants
from ansible.executor.process import worker
from ansible.executor.task_executor import TaskExecutor
from ansible.playbook.block import Block
from ansible.playbook.helpers import load_list_of_blocks
from ansible.playbook.included_file import IncludedFile
from ansible.plugins.action import ActionBase
from ansible.plugins.strategy import StrategyBase
from ansible.release import __version__ as version
from ansible.utils.display import Display
from ansible.vars.clean import module_response_deepcopy, strip_internal_keys

try:
    from ansible._internal._task import TaskContext
    from ansible.executor.task_result import _RawTaskResult
except ImportError:
    VERSION_FITS = False
else:
    VERSION_FITS = version.startswith("2.19.")


class Ended(Exception):
    """A task changed something, failed, or cannot be done here: what is to be said of it."""


class ActionModule(ActionBase):  # type: ignore[misc]
    """The action of this name."""

    _requires_connection = False
    _VALID_ARGS = frozenset({"tasks", "group"})

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Go through the file; the host is in the group afterwards, or it is said what is left to do."""
        result: dict[str, Any] = super().run(tmp, task_vars) | {
            "changed": False,
            "_ansible_verbose_always": True,
        }
        _, arguments = self.validate_argument_spec(
            {"tasks": {"type": "str", "required": True}, "group": {"type": "str", "required": True}}
        )
        try:
            walk = self._walked(arguments["tasks"])
        except Ended as end:
            return result | {"msg": f"Something is left to do: {end}"}
        except Exception as fault:  # the tasks that follow meet it as well, and say it in their own words
            Display().vvv(traceback.format_exc())
            return result | {"msg": f"It is not known what is left to do: {type(fault).__name__}: {fault}"}
        return result | {"msg": walk.said, "warnings": walk.warnings, "add_group": arguments["group"]}

    def _walked(self, tasks: str) -> Walk:
        if not VERSION_FITS or worker.current_worker is None:
            raise Ended(f"every task is asked, with ansible-core {version}")
        walk = Walk(worker.current_worker, self._task)
        walk.through(self._find_needle("", tasks))
        return walk


class Silence:
    """In the place of the queue to the main process, which knows no tasks but those that it has begun itself."""

    def send_callback(self, *_arguments: Any, **_more: Any) -> None:
        """Results of a loop's items: they are in the result of the whole as well."""

    send_task_result = send_callback


class Walk:
    """Tasks of one host, one after the other, in this process; what they set and register is known to those that follow."""

    def __init__(self, current: Any, task: Any) -> None:
        self._worker, self._task = current, task
        self._host, self._loader = current._host, current._loader
        self._variables = current._variable_manager
        self._play = task.get_play()
        self.said: list[str] = []
        self.warnings: list[Any] = []

    def through(self, file: str) -> None:
        """All tasks of a file. Raises Ended."""
        self._blocks(
            load_list_of_blocks(
                self._loader.load_from_file(file, trusted_as_template=True),
                play=self._play,
                parent_block=self._task._parent,
                loader=self._loader,
                variable_manager=self._variables,
            )
        )

    def _blocks(self, blocks: Iterable[Any]) -> None:
        for block in blocks:
            for entry in [*block.block, *block.always]:
                if isinstance(entry, Block):
                    self._blocks([entry])
                elif entry.action not in constants._ACTION_META:
                    self._one(entry)

    def _one(self, task: Any) -> None:
        begun = time.monotonic()
        result = self._executed(task)
        Display().vv(f"{time.monotonic() - begun:.2f} s: {task.get_name()}", host=self._host.name)
        if result.is_unreachable():
            raise Ended(f"the host cannot be reached for {task.get_name()!r}")
        if result.is_failed():
            hidden = result._return_data.get("_ansible_no_log")
            Display().vv("hidden" if hidden else str(result._return_data.get("msg")), host=self._host.name)
            raise Ended(f"{task.get_name()!r} does not succeed")
        if result.is_changed():
            raise Ended(f"{task.get_name()!r} would change something")
        if not result.is_skipped():
            self._remember(task, result._return_data)
        self._register(task, result._return_data)
        for included in IncludedFile.process_include_results(
            [result],
            iterator=SimpleNamespace(_play=self._play),
            loader=self._loader,
            variable_manager=self._variables,
        ):
            self._blocks(self._included(included))

    def _executed(self, task: Any) -> Any:
        variables = self._variables.get_vars(play=self._play, host=self._host, task=task)
        current = self._worker
        with TaskContext(task):
            answer = TaskExecutor(
                self._host,
                task,
                variables,
                current._play_context,
                self._loader,
                current._shared_loader_obj,
                Silence(),
                self._variables,
            ).run()
        return _RawTaskResult(host=self._host, task=task, return_data=answer, task_fields={})

    def _included(self, included: Any) -> list[Any]:
        """The blocks of a file or role that a task has included, as Ansible's strategies load them."""
        helper = SimpleNamespace(_loader=self._loader, _variable_manager=self._variables)
        helper._copy_included_file = lambda file: StrategyBase._copy_included_file(helper, file)
        if included._is_role:
            task = helper._copy_included_file(included)
            blocks, _ = task.get_block_list(
                play=self._play, variable_manager=self._variables, loader=self._loader
            )
        else:
            blocks = StrategyBase._load_included_file(
                helper, included, SimpleNamespace(_play=self._play), handle_stats_and_callbacks=False
            )
        found: list[Any] = blocks
        return found

    def _remember(self, task: Any, answer: dict[str, Any]) -> None:
        """What a task has said, warned of and set."""
        answers = answer.get("results", []) if task.loop else [answer]
        for one in answers:
            self.warnings += one.pop("warnings", None) or []
            if task.action in constants._ACTION_DEBUG and "msg" in one:
                self.said += one["msg"] if isinstance(one["msg"], list) else [str(one["msg"])]
            elif task.action in constants._ACTION_SET_FACT:
                self._variables.set_nonpersistent_facts(self._host.name, one["ansible_facts"].copy())

    def _register(self, task: Any, answer: dict[str, Any]) -> None:
        if task.register:
            kept = strip_internal_keys(module_response_deepcopy(answer))
            self._variables.set_nonpersistent_facts(self._host.name, {task.register: kept})
