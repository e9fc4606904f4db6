"""What the reference pages list is what there is: metrics, settings, commands, variables, make's targets, pages."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import click
import pytest
from webhook_api.cli import main as service
from webhook_api.config import NEEDS_BACKENDS, NEEDS_SERVE, ConfigError, Need, load_settings

from tests.support.role_specs import role_variables

REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / "docs"
SERVICE = REPO / "webhook" / "webhook_api"
PAGES = [*sorted(REPO.glob("*.md")), *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("receiver/*.md"))]


def first_cells(text: str) -> str:
    """The first column of every table of a page."""
    return "\n".join(re.findall(r"^\| (.*?) \|", text, re.MULTILINE))


def code(text: str) -> list[str]:
    """What stands in backticks on one line, outside blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


# -- metrics -------------------------------------------------------------------------------------------------------------

MODULES = {path.stem for path in REPO.glob("library/*.py")}
#: Names that begin like a metric and are none: the package, fal's own words, modules.
NO_METRICS = {"webhook_api", "webhook_url", "webhook_ip_ranges"} | MODULES
#: Pages that explain metrics; the others only name them.
METRIC_PAGES = [DOCS / "monitoring.md", *sorted((DOCS / "receiver").glob("*.md"))]
#: What makes a metric, and how its name ends in Prometheus' format.
KINDS = {"Counter": "_total", "_counter": "_total"} | dict.fromkeys(
    ("Gauge", "_gauge", "GaugeMetricFamily", "Histogram"), ""
)


@cache
def exported_metrics() -> dict[str, set[str]]:
    """The metrics that the service defines, as they are asked for, with their labels."""
    found: dict[str, set[str]] = {}
    for path in SERVICE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Name)
                and call.func.id in KINDS
                and call.args
            ):
                continue
            name, *rest = call.args
            if not (isinstance(name, ast.Constant) and str(name.value).startswith("webhook_")):
                continue
            # The help comes first; labels are a list, or texts behind it.
            parts = [
                *rest[1:],
                *(word.value for word in call.keywords if word.arg in ("labels", "labelnames")),
            ]
            labels = {
                str(node.value)
                for part in parts
                for node in ast.walk(part)
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
            found[str(name.value) + KINDS[call.func.id]] = labels
    return found


def explained_metrics() -> set[str]:
    """Those in the first column of a table of metrics; tables of symptoms name some as well."""
    found = set()
    for page in METRIC_PAGES:
        for table in re.findall(r"^\| metric \|.*\n(?:\|.*\n)+", page.read_text(), re.MULTILINE):
            for part in code(first_cells(table)):
                found |= set(re.findall(r"^(webhook_\w+)(?:\{[a-z_,]*\})?$", part))
    return found


def test_no_metric_is_made_in_a_way_that_this_file_does_not_see() -> None:
    source = "\n".join(path.read_text() for path in SERVICE.rglob("*.py"))
    names = set(re.findall(r'"(webhook_\w+)"', source)) - {"webhook_api", "webhook_deliveries"}
    known = {name.removesuffix("_total") for name in exported_metrics()}
    assert names - known == set()


def test_every_metric_is_explained() -> None:
    assert len(exported_metrics()) > 55
    assert set(exported_metrics()) - explained_metrics() == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_no_metric_is_named_that_there_is_not(page: Path) -> None:
    named = set(re.findall(r"(?<![\w/.=-])webhook_[a-z_]+\b(?![/.]\w)", page.read_text())) - NO_METRICS
    known = exported_metrics()
    assert {name for name in named if re.sub(r"_(bucket|sum|count)$", "", name) not in known} == set()


def test_labels_that_a_page_names_are_those_of_the_metric() -> None:
    known = exported_metrics()
    named = [
        (name, set(labels.split(",")))
        for page in METRIC_PAGES
        for name, labels in re.findall(r"`(webhook_\w+)\{([a-z_,]+)\}`", page.read_text())
    ]
    assert len(named) > 20
    assert [(name, labels) for name, labels in named if known[name] != labels] == []


# -- settings ------------------------------------------------------------------------------------------------------------

#: Asked for by other parts than the reader of the settings, and documented where they belong.
ELSEWHERE = {
    "OTEL_SERVICE_NAME": "receiver/tracing.md",
    "WEBHOOK_OPERATOR": "receiver/cli.md",
}
#: Of the process itself or of the caller's shell: nothing to set.
INTERNAL = {"PROMETHEUS_MULTIPROC_DIR", "SUDO_USER"}
NAME = re.compile(r"[A-Z][A-Z_]+")


class Asked(dict[str, str]):
    """An environment that remembers what was asked for."""

    def __init__(self, given: dict[str, str]) -> None:
        super().__init__(given)
        self.names: set[str] = set()

    def get(self, name: str, default: str = "") -> str:  # type: ignore[override]
        """The value, noted."""
        self.names.add(name)
        return super().get(name, default)


@cache
def settings_of_the_service() -> set[str]:
    """Every name that is asked for while settings are read, by whichever process, with each feature off and on."""
    names: set[str] = set()
    features = {
        "FORWARD_URL": "https://x.example/", "NOTICE_URL": "https://x.example/", "TELEGRAM_CHAT_ID": "1",
        "FORWARD_SECRET": "x", "TELEGRAM_BOT_TOKEN": "x", "FAL_JWKS_CACHE_FILE": "/x", "RECONCILE_MODELS": "a=b",
        "FAL_WEBHOOK_SECRET_PREVIOUS": "x", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x",
    }  # fmt: skip
    for given in ({}, features):
        for needs in (NEEDS_SERVE, NEEDS_BACKENDS, frozenset(Need)):
            environment = Asked(given)
            with suppress(ConfigError):
                load_settings(environment, needs)
            names |= environment.names
    return {name for name in names if name.removesuffix("_FILE") not in names or not name.endswith("_FILE")}


def table_of_settings() -> set[str]:
    return set(NAME.findall(" ".join(code(first_cells((DOCS / "settings.md").read_text())))))


def test_every_setting_of_the_service_is_documented_and_no_other() -> None:
    asked = settings_of_the_service()
    assert len(asked) > 75
    assert asked - table_of_settings() == set()
    assert table_of_settings() - asked == set()


def test_settings_that_are_written_in_the_source_are_asked_for_when_settings_are_read() -> None:
    """So that the list above is whole."""
    source = "\n".join(path.read_text() for path in SERVICE.glob("config*.py"))
    written = set(
        re.findall(
            r'(?:reader\.\w+|_required|_secret|_hosts|_host_ports|_place|_by_type)\((?:reader, )?"([A-Z_]+)"',
            source,
        )
    )
    assert len(written) > 75
    assert written - settings_of_the_service() == set()


def test_the_environment_is_asked_for_nothing_else() -> None:
    source = "\n".join(path.read_text() for path in SERVICE.rglob("*.py"))
    asked = set(re.findall(r'os\.environ(?:\.get\(|\[)"(\w+)"', source))
    known = settings_of_the_service() | INTERNAL | set(ELSEWHERE)
    assert asked - known == set()
    for name, page in ELSEWHERE.items():
        assert f"`{name}`" in (DOCS / page).read_text(), name


# -- commands of the service ---------------------------------------------------------------------------------------------


def commands(command: click.Command, name: str = "") -> Iterator[str]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for part in command.list_commands(context):
            inner = command.get_command(context, part)
            assert inner is not None
            yield from commands(inner, f"{name} {part}".strip())
    else:
        yield name


def test_the_page_of_the_command_line_has_each_command_and_no_other() -> None:
    page = (DOCS / "receiver" / "cli.md").read_text()
    table = page[page.index("| command |") : page.index("\n\n", page.index("| command |"))]
    listed = code(first_cells(table))
    there = list(commands(service))
    assert len(there) > 35
    assert sorted(listed) == sorted(there)


def test_the_bots_page_has_each_field_of_an_entry_and_no_other() -> None:
    source = (SERVICE / "effects" / "stream.py").read_text()
    body = source[source.index("def fields(") : source.index("def replay_of(")]
    made = re.findall(r'"([a-z_]+)": ', body)
    page = (DOCS / "receiver" / "bot.md").read_text()
    start = page.index("## An entry")
    table = page[page.index("| field |", start) : page.index("\n\n", page.index("| field |", start))]
    assert len(made) == 10
    assert sorted(code(first_cells(table))) == sorted(made)


# -- variables, targets ----------------------------------------------------------------------------------------------------


#: Begins like a variable of a role and is something else: paths and fields of nginx, a log event, modules.
NO_VARIABLES = {
    "edge_alive",
    "edge_state",
    "edge_connections",
    "edge_request_id",
    "prune_step_failed",
} | MODULES
#: Handed from one part of a role to another: nothing that an inventory sets.
FACTS = {"rollback_to", "rollback_from"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_no_variable_is_named_that_there_is_not(page: Path) -> None:
    roles = "|".join(sorted(path.name for path in (REPO / "roles").iterdir()))
    pattern = re.compile(rf"^((?:{roles})_[a-z0-9_]+)(?:: .*)?$")
    named = {match[1] for part in code(page.read_text()) if (match := pattern.match(part))}
    assert named - role_variables() - NO_VARIABLES == set()


def test_every_variable_is_on_the_page_of_variables() -> None:
    variables = role_variables() - FACTS
    assert len(variables) > 200
    listed = Counter(
        re.findall(r"^\| `([a-z][a-z0-9_]*)` \|", (DOCS / "configuration.md").read_text(), re.MULTILINE)
    )
    assert variables - set(listed) == set()
    assert set(listed) - variables == set()


def test_settings_that_a_variable_sets_name_one_that_there_is() -> None:
    rows = re.findall(r"^\| [^|]*\| [^|]*\| ([^|]*) \|", (DOCS / "settings.md").read_text(), re.MULTILINE)
    named = {name for cell in rows for name in code(cell) if "_" in name}
    assert len(named) > 10
    assert named - role_variables() == set()


def test_every_target_of_make_is_on_a_page() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (REPO / "Makefile").read_text(), re.MULTILINE))
    assert len(targets) > 25
    text = "\n".join(page.read_text() for page in PAGES)
    named = {target for target in targets if re.search(rf"\bmake {target}\b(?!-)", text)}
    assert targets - named == {"clean"}, "what is not on any page (clean is said by its name)"


# -- pages ---------------------------------------------------------------------------------------------------------------


def test_the_index_has_each_page_once_and_no_other() -> None:
    linked = re.findall(r"\]\(([^)#]+\.md)\)", (DOCS / "README.md").read_text())
    there = {str(path.relative_to(DOCS)) for path in [*DOCS.glob("*.md"), *DOCS.glob("receiver/*.md")]} - {
        "README.md"
    }
    inside = [name for name in linked if not name.startswith(("..", "decisions/"))]
    assert sorted(inside) == sorted(there)
    assert "decisions/README.md" in linked
    assert "(docs/README.md)" in (REPO / "README.md").read_text()


def test_every_decision_is_on_its_list() -> None:
    linked = re.findall(r"\]\(([^)#]+\.md)\)", (DOCS / "decisions" / "README.md").read_text())
    there = {path.name for path in DOCS.glob("decisions/*.md")} - {"README.md"}
    assert sorted(linked) == sorted(there)
