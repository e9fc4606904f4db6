"""Every command of the pages names what is there: target, playbook, tag, variable, option, subcommand, container, file."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from webhook_api.cli import main as service

from tests.support.playbook_tags import site_tags
from tests.support.role_specs import role_variables

REPO = Path(__file__).resolve().parents[2]
PAGES = [
    *(REPO / name for name in ("README.md", "README.ru.md", "CONTRIBUTING.md")),
    *sorted(REPO.glob("docs/*.md")),
    *sorted(REPO.glob("docs/receiver/*.md")),
]
MAKEFILE = (REPO / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
MAKE_VARIABLES = set(re.findall(r"\$\((?:or \$\(|if \$\()?([A-Z]+)\b", MAKEFILE))
#: What an operator's machine has beside what this project brings.
PROGRAMS = {
    *(
        "apt",
        "apt-get",
        "cat",
        "cd",
        "chmod",
        "chown",
        "cosign",
        "cp",
        "curl",
        "echo",
        "git",
        "jq",
        "ls",
        "openssl",
    ),
    *(
        "pg_restore",
        "psql",
        "python3",
        "rm",
        "rsync",
        "sed",
        "sha256sum",
        "sleep",
        "ssh",
        "ssh-copy-id",
        "tail",
        "tar",
    ),
    *("base64", "ln", "touch"),
}
DOCKER = {
    "compose",
    "exec",
    "inspect",
    "load",
    "logs",
    "network",
    "ps",
    "push",
    "rename",
    "rm",
    "save",
    "stats",
    "stop",
    "system",
    "tag",
}
#: Options of ansible-playbook, and whether a value follows.
ANSIBLE = {
    "--check": False, "--diff": False, "--ask-vault-pass": False, "--ask-become-pass": False,
    "--vault-password-file": True, "--limit": True, "-e": True, "-i": True, "--tags": True,
}  # fmt: skip
#: Inventories that a page has the reader make.
OWN_INVENTORIES = {"inventory/mysite", "inventory/beside"}
#: Stands for what the reader has to put there.
PLACEHOLDER = re.compile(r"^[A-Z_]{3,}$|…")
CONTAINERS = {
    f"aisha-webhook-{name}" for name in ("api-1", "api-2", "worker", "acme", "postgres", "redis", "s3")
} | {"aisha-nginx-webhook"}
#: Of the site that docs/moving.md has the reader make beside the old system.
CONTAINERS |= {"aisha-beside-api-1", "aisha-beside-worker"}
SITE = "/opt/aisha-webhook/"


class Unknown(Exception):
    """A command names something that is not there."""


def need(condition: bool, what: str) -> None:
    if not condition:
        raise Unknown(what)


def variables() -> set[str]:
    # Short forms that are given on the command line alone.
    text = "".join(
        path.read_text() for path in [*REPO.glob("roles/*/*/*.yml"), *REPO.glob("playbooks/*.yml")]
    )
    return role_variables() | {name for name in ("list", "release", "bundle") if f"{name} | default(" in text}


VARIABLES = variables()
SITE_NAMES = {
    name
    for part in ("__teardown_made", "__teardown_kept")
    for name in yaml.safe_load((REPO / "roles/teardown/vars/main.yml").read_text())[part]
}


# -- what a page has -----------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[str]:
    """The lines of console, sh and plain blocks, and what stands inline as a command of make or of Ansible."""
    text = page.read_text()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = [line for line in block.splitlines() if line.strip()]
        if language == "console":
            yield from (line[2:] for line in lines if line.startswith("$ "))
        elif language in ("sh", "bash", ""):
            yield from (line for line in lines if not line.startswith("#"))
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for inline in re.findall(r"`([^`\n]+)`", outside):
        if re.match(r"(make|ansible-\w+|\S+/bin/ansible\S*|PATH=\S+ ansible\S*|docker exec) \S", inline):
            yield inline


def segments(command: str) -> Iterator[list[str]]:
    """The simple commands of a line, each as its words; redirections and assignments before it are left out."""
    # What $(…) stands for is a command of its own, and one word of the other.
    for inner in re.findall(r"\$\(([^()]*)\)", command):
        yield from segments(inner)
    command = re.sub(r"\$\([^()]*\)", "$x", command).replace("<site_name>", "aisha-webhook")
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    skip = False
    for token in [*lexer, ";"]:
        if set(token) <= set("|&;()"):
            while words and re.match(r"^[A-Za-z_]\w*=", words[0]):
                words.pop(0)
            if words and words != ["$"]:
                yield words
            words = []
        elif set(token) <= set("<>"):
            skip = True
        elif skip:
            skip = False
        else:
            words.append(token)


# -- what is known of it -------------------------------------------------------------------------------------------------


def check_line(command: str) -> None:
    need(
        not re.match(r"ansible-", command), "a program of .venv/bin without its path: it is on nobody's PATH"
    )
    for words in segments(command):
        check_command(words)
    for path in re.findall(rf"{SITE}([\w.-]+)", command):
        need(path in SITE_NAMES, f"there is no {SITE}{path}")


def check_command(words: list[str]) -> None:
    program, rest = words[0], words[1:]
    if program == "make":
        check_make(rest)
    elif program == "docker":
        check_docker(rest)
    elif program == "webhook-api":
        check_service(rest)
    elif program in ("ansible-playbook", ".venv/bin/ansible-playbook"):
        need((REPO / rest[0]).exists(), f"there is no playbook {rest[0]}")
        check_ansible(rest[1:])
    elif program.startswith((".venv/bin/ansible", "scripts/")):
        need(program.startswith(".venv") or (REPO / program).exists(), f"there is no {program}")
    else:
        need(program in PROGRAMS, f"{program} is no program that is known here")


def check_make(words: list[str]) -> None:
    target = words[0]
    need(target in TARGETS or bool(PLACEHOLDER.search(target)), f"make has no target {target}")
    for word in words[1:]:
        if PLACEHOLDER.search(word):
            continue
        name, equals, value = word.partition("=")
        need(bool(equals) and name in MAKE_VARIABLES, f"make {target} takes no {word}")
        if name == "ARGS":
            check_arguments(target, shlex.split(value))
        elif name == "CMD":
            check_command(shlex.split(value))


def check_arguments(target: str, words: list[str]) -> None:
    """What ARGS of a target hands on."""
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    script = re.search(r"scripts/(?!controller)(\w+)\.(py|sh)", recipe.group(1)) if recipe else None
    if target == "send":
        check_service(["send", "URL", *words])
    elif target == "logs":
        need(
            all(word in ("--follow", "--since", "--tail") for word in words if word[0] == "-"),
            f"logs {words}",
        )
    elif target == "soak":
        need(all(word in ("-k", "-x", "-v") for word in words if word[0] == "-"), f"soak {words}")
    elif script and target != "up":
        source = (REPO / script.group(0)).read_text()
        for word in words:
            need(not word.startswith("-") or f'"{word}"' in source, f"{script.group(0)} has no option {word}")
    elif not recipe or "$(PLAYBOOK)" in recipe.group(1) or target == "up":
        check_ansible(words)


def check_ansible(words: list[str]) -> None:
    rest = list(words)
    while rest:
        option, _, value = rest.pop(0).partition("=")
        need(option in ANSIBLE, f"ansible-playbook is not known to take {option}")
        if ANSIBLE[option] and not value:
            need(bool(rest), f"{option} takes a value")
            value = rest.pop(0)
        if option == "-e":
            given = json.loads(value) if value.startswith("{") else [value.partition("=")[0]]
            need(set(given) <= VARIABLES, f"no role has the variable {', '.join(set(given) - VARIABLES)}")
        elif option == "-i":
            need((REPO / value).exists() or value in OWN_INVENTORIES, f"there is no inventory {value}")
        elif option == "--tags":
            tags = {tag for tag in value.split(",") if not PLACEHOLDER.search(tag)}
            need(tags <= set(site_tags()), f"no task has the tag {', '.join(tags - set(site_tags()))}")


def check_docker(words: list[str]) -> None:
    need(words[0] in DOCKER, f"docker {words[0]}")
    if words[0] != "exec":
        return
    rest = words[1:]
    while rest[0].startswith("-"):
        rest.pop(0)
    container, inside = rest[0], rest[1:]
    need(container in CONTAINERS or container.startswith("$"), f"no container is called {container}")
    if inside[0] == "webhook-api":
        check_service(inside[1:])


def check_service(words: list[str]) -> None:
    """Against the command line itself."""
    command: click.Command = service
    context = click.Context(service)
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        found = command.get_command(context, name)
        need(found is not None, f"webhook-api has no command {name}")
        assert found is not None
        command = found
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    for word in rest:
        need(
            not word.startswith("--") or word.partition("=")[0] in options,
            f"{command.name} has no option {word}",
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_commands_name_what_is_there(page: Path) -> None:
    faults = []
    for command in commands(page):
        try:
            check_line(command)
        except (Unknown, ValueError) as error:
            faults.append(f"{command}: {error}")
    assert faults == []


def test_pages_that_are_about_commands_have_some() -> None:
    for name in (
        "releases",
        "rolling-back",
        "rollout",
        "edge",
        "backup",
        "air-gapped",
        "supply-chain",
        "tls",
        "troubleshooting",
        "moving",
        "updating",
        "fal-setup",
        "operations",
    ):
        assert list(commands(REPO / "docs" / f"{name}.md")), name


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("make upp", "target upp"),
        ("make up SITES=x", "takes no SITES=x"),
        ('make up ARGS="--tags edgy"', "tag edgy"),
        ('make up ARGS="-e stack_no_such=1"', "stack_no_such"),
        ('make up ARGS="-i inventory/nowhere"', "inventory/nowhere"),
        ('make up ARGS="--forks 3"', "--forks"),
        ('make vault ARGS="--reneww x"', "--reneww"),
        ('make send ARGS="--request 3"', "--request"),
        ("ansible-playbook site.yml", "PATH"),
        (".venv/bin/ansible-playbook playbooks/none.yml", "playbooks/none.yml"),
        ("docker exec aisha-webhook-api-9 webhook-api config", "aisha-webhook-api-9"),
        ("docker exec aisha-webhook-api-1 webhook-api deployment list", "no command deployment"),
        ("docker exec aisha-webhook-api-1 webhook-api deployments list --results x", "--results"),
        ("cat /opt/aisha-webhook/runs/x", "/opt/aisha-webhook/runs"),
        ("mak up", "no program"),
        ("make status | wibble", "wibble"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(command: str, word: str) -> None:
    with pytest.raises(Unknown, match=re.escape(word)):
        check_line(command)


def test_commands_that_are_right_pass() -> None:
    right: list[Any] = [
        'make rollback ARGS="-e list=true"  # a remark',
        "make up BUNDLE=../webhook-bundle.tar",
        "old=$(docker ps -q) && docker stop $old",
        'PATH="$PWD/.venv/bin:$PATH" ansible-playbook site.yml --tags NAME',
        """make up ARGS='-e stack_keep_releases=3 --check'""",
    ]
    for command in right:
        check_line(command)
