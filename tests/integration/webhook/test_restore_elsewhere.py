"""A database elsewhere is restored by the role that the guide makes, which may create nothing outside of its schema."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import ansible.module_utils
import psycopg
import pytest
from ansible.parsing.vault import VaultLib, VaultSecret
from psycopg import sql
from webhook_api.migrate import migrate

from tests.support.databases import fresh_database
from tests.support.images import tags_of

REPO = Path(__file__).resolve().parents[3]
if str(REPO / "module_utils") not in ansible.module_utils.__path__:
    ansible.module_utils.__path__.append(str(REPO / "module_utils"))

from ansible.module_utils.site_backup import Backups, new_id  # noqa: E402

PASSPHRASE = "of the test"
CHECK = """
- hosts: webhook
  gather_facts: false
  tasks:
    - ansible.builtin.include_role: {name: restore, tasks_from: check}
    - ansible.builtin.assert: {that: restore_elsewhere_proven}
"""
GUIDE = REPO / "docs" / "WEBHOOK_DEPLOYMENT.md"
BOT = """
create table public.avatars (id bigint primary key, fal_request_id text, status text, training_progress integer,
    training_started_at timestamptz, training_completed_at timestamptz, training_error text, finetune_id text,
    diffusers_lora_file_url text, config_file_url text, fal_response_data jsonb, last_status_check timestamptz,
    updated_at timestamptz);
insert into public.avatars (id, fal_request_id) values (1, 'of-the-bot')
"""
#: The commands of the roles, by the variables that hold them.
PLAY = """
- hosts: localhost
  gather_facts: false
  vars_files: ["{repo}/roles/backup/vars/main.yml", "{repo}/roles/restore/vars/main.yml"]
  vars:
    role_path: "{repo}/roles/restore"
    backup_passphrase: ""
    backup_passphrase_file: ""
  tasks:
    - ansible.builtin.copy:
        dest: "{out}"
        mode: "0600"
        content: >-
          {{{{ {{'dump': backup_pg_dump, 'restore': __restore_database_command,
          'facts': backup_pg + ['psql', '-XAt', '--command', __restore_elsewhere_facts] + backup_pg_database}} | to_json }}}}
"""


@dataclass
class Elsewhere:
    """A bot's database with the documented role in it."""

    superuser: str
    owner: str
    address: str
    password: str
    image: str
    commands: dict[str, list[str]]

    def run(self, name: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(self.commands[name], input=given, capture_output=True, check=False)

    def done(self, name: str, given: bytes = b"") -> bytes:
        answer = self.run(name, given)
        assert answer.returncode == 0, answer.stderr.decode()
        return answer.stdout

    def ask(self, query: str) -> list[tuple[object, ...]]:
        with psycopg.connect(self.superuser) as connection:
            return connection.execute(query).fetchall()  # type: ignore[arg-type]

    def tell(self, *queries: str) -> None:
        with psycopg.connect(self.superuser, autocommit=True) as connection:
            for query in queries:
                connection.execute(query)  # type: ignore[arg-type]

    def note(self, *names: str) -> None:
        """Rows of our own, by the service's role, whose migrations run first as before every start."""
        with psycopg.connect(self.owner, autocommit=True) as connection:
            migrate(connection)
            for name in names:
                connection.execute(
                    "insert into webhook.audit (operation, who, instance, action, affected) "
                    "values (%s, %s, 'test', 'noted', 0)",
                    (uuid.uuid4(), name),
                )


def documented(role: str, password: str) -> list[str]:
    """The statements of the guide, for a role of the test's own name."""
    (block,) = re.findall(r"^```sql\n(CREATE ROLE .*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    text = block.replace("aisha_webhook", role).replace("…", password)
    return [statement.strip() for statement in text.split(";") if statement.strip()]


def client_image(server: int) -> str:
    """Where this machine's programs are older than the server: the image of the embedded one."""
    if shutil.which("pg_dump"):
        said = subprocess.run(["pg_dump", "--version"], capture_output=True, text=True, check=True).stdout
        if int(re.findall(r"\d+", said)[0]) >= server:
            return ""
    import docker

    return tags_of(docker.from_env(), "aisha-postgres")[0]


def commands(directory: Path, address: str, password: str, image: str) -> dict[str, list[str]]:
    secret, out, play = directory / "password", directory / "commands.json", directory / "play.yml"
    secret.write_text(password)
    secret.chmod(0o644)
    play.write_text(PLAY.format(repo=REPO, out=out))
    given = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "site_dir": str(directory),
        "site_name": "test",
        "stack_database_url": address,
        "backup_postgres_image": image,
        "backup_pg_password_file": str(secret),
    }
    program = str(Path(sys.executable).parent / "ansible-playbook")
    command = [program, "-i", "localhost,", str(play), "-e", json.dumps(given)]
    made = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    found: dict[str, list[str]] = json.loads(out.read_text())
    return found


@pytest.fixture
def elsewhere(database_url: str, tmp_path: Path) -> Iterator[Elsewhere]:
    role, password = f"webhook_{uuid.uuid4().hex[:8]}", uuid.uuid4().hex
    with fresh_database(database_url) as url:
        parts = urlsplit(url)
        owner = urlunsplit(parts._replace(netloc=f"{role}:{password}@{parts.hostname}:{parts.port}"))
        try:
            with psycopg.connect(url, autocommit=True) as connection:
                for statement in [*BOT.split(";"), *documented(role, password)]:
                    connection.execute(statement)  # type: ignore[arg-type]
                server = connection.info.server_version // 10000
            address, image = owner.replace(f":{password}@", "@"), client_image(server)
            made = commands(tmp_path, address, password, image)
            yield Elsewhere(url, owner, address, password, image, made)
        finally:
            with psycopg.connect(url, autocommit=True) as connection:
                name = sql.Identifier(role)
                connection.execute(sql.SQL("drop owned by {0} cascade; drop role {0}").format(name))


def rows(place: Elsewhere) -> list[str]:
    return [str(row[0]) for row in place.ask("select who from webhook.audit order by id")]


def test_what_came_after_the_backup_is_gone_and_the_bots_tables_are_as_they_were(
    elsewhere: Elsewhere,
) -> None:
    elsewhere.note("early")
    dump = elsewhere.done("dump")
    assert b"of-the-bot" not in dump
    elsewhere.note("late")
    elsewhere.tell("update public.avatars set status = 'as the bot left it'")
    elsewhere.done("restore", dump)
    assert rows(elsewhere) == ["early"]
    assert elsewhere.ask("select status from public.avatars") == [("as the bot left it",)]
    elsewhere.note("afterwards")  # triggers, sequences and the table of migrations work on


def test_an_empty_schema_takes_the_backup(elsewhere: Elsewhere) -> None:
    elsewhere.note("early")
    dump = elsewhere.done("dump")
    owner = elsewhere.ask("select nspowner::regrole::text from pg_namespace where nspname = 'webhook'")[0][0]
    elsewhere.tell("drop schema webhook cascade", f"create schema webhook authorization {owner}")
    facts = json.loads(elsewhere.done("facts"))
    assert (facts["inbox"], facts["writable"]) == (False, True)
    elsewhere.done("restore", dump)
    assert rows(elsewhere) == ["early"]
    assert json.loads(elsewhere.done("facts"))["inbox"] is True


def test_what_a_newer_version_has_made_goes_too(elsewhere: Elsewhere) -> None:
    elsewhere.note("early")
    dump = elsewhere.done("dump")
    with psycopg.connect(elsewhere.owner, autocommit=True) as connection:
        connection.execute("create table webhook.newer (id bigint references webhook.deliveries (id))")
        connection.execute("create view webhook.newest as select * from webhook.newer")
        connection.execute("create type webhook.kind as enum ('a')")
        connection.execute("create function webhook.later() returns int language sql as 'select 1'")
    elsewhere.done("restore", dump)
    assert elsewhere.ask("select to_regclass('webhook.newer'), to_regtype('webhook.kind')") == [(None, None)]
    assert elsewhere.ask("select to_regproc('webhook.later')") == [(None,)]


def test_a_dump_that_breaks_off_changes_nothing(elsewhere: Elsewhere) -> None:
    elsewhere.note(*(f"early-{number}" for number in range(500)))
    dump = elsewhere.done("dump")
    elsewhere.note("late")
    answer = elsewhere.run("restore", dump[: len(dump) * 9 // 10])
    assert answer.returncode != 0
    assert rows(elsewhere)[-1] == "late"


def test_what_others_hang_on_our_tables_keeps_it_from_beginning(elsewhere: Elsewhere) -> None:
    elsewhere.note("early")
    dump = elsewhere.done("dump")
    elsewhere.tell("create view public.report as select * from webhook.audit")
    answer = elsewhere.run("restore", dump)
    assert answer.returncode != 0
    assert b"report" in answer.stderr
    assert rows(elsewhere) == ["early"]


def test_a_role_without_its_schema_is_known_before(elsewhere: Elsewhere) -> None:
    elsewhere.tell("drop schema webhook cascade")
    assert json.loads(elsewhere.done("facts"))["writable"] is False


def made_backup(root: Path, password: str) -> None:
    """A backup as the role makes them, as far as the checks look at it; its secrets have the database's password."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        member = tarfile.TarInfo("secrets/api/postgres_webhook_password")
        member.size = len(password)
        tar.addfile(member, io.BytesIO(password.encode()))
    key = VaultSecret(PASSPHRASE.encode())
    sealed = VaultLib([("default", key)]).encrypt(base64.b64encode(plain.getvalue()), key)
    backups, identity = Backups(root, "wht-else"), new_id("wht-else", datetime.now(UTC))
    backups.begin(identity, 0)
    backups.write(identity, "database", "database.dump", lambda meter: meter.write(b"dump") and None)
    backups.write(identity, "secrets", "secrets.vault", lambda meter: meter.write(sealed) and None)
    told = {
        "started": "2026-11-23T04:00:00Z",
        "site_dir": "/opt/wht-else",
        "database": {"schema": 1},
        "sealed": ["secrets"],
    }
    backups.finish(identity, told, 7)


def checked(place: Elsewhere, directory: Path, **given: object) -> subprocess.CompletedProcess[str]:
    """The checks that come before anything is touched, on a machine where nothing stands."""
    home = directory / f"check-{uuid.uuid4().hex[:6]}"
    home.mkdir()
    made_backup(home / "backups", place.password)
    (home / "play.yml").write_text(CHECK)
    host = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    (home / "hosts.yml").write_text(json.dumps({"webhook": {"hosts": {"localhost": host}}}))
    variables = {
        "site_name": "wht-else",
        "site_dir": str(home / "site"),
        "site_environment": "production",
        "backup_dir": str(home / "backups"),
        "backup_passphrase": PASSPHRASE,
        "backup_postgres_image": place.image,
        "stack_database_url": place.address,
        **given,
    }
    program = str(Path(sys.executable).parent / "ansible-playbook")
    command = [program, "-i", str(home / "hosts.yml"), str(home / "play.yml"), "-e", json.dumps(variables)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert not (home / "site").exists()
    assert place.password not in done.stdout + done.stderr
    done.stdout = " ".join(done.stdout.split())
    return done


def test_a_database_that_holds_deliveries_is_refused_before_anything_is_touched(
    elsewhere: Elsewhere, tmp_path: Path
) -> None:
    elsewhere.note("early")
    said = checked(elsewhere, tmp_path)
    assert said.returncode != 0
    assert "Nothing was touched" in said.stdout
    assert "holds deliveries of a stack already" in said.stdout
    assert "restore_over=true" in said.stdout
    over = checked(elsewhere, tmp_path, restore_over=True)
    assert over.returncode == 0, over.stdout


def test_an_empty_database_is_taken_with_the_inventorys_password_first(
    elsewhere: Elsewhere, tmp_path: Path
) -> None:
    assert checked(elsewhere, tmp_path).returncode == 0
    given = {"postgres_webhook_password": elsewhere.password}
    assert checked(elsewhere, tmp_path, secrets_given=given).returncode == 0


def test_a_database_that_is_not_there_or_not_ours_is_refused_before(
    elsewhere: Elsewhere, tmp_path: Path
) -> None:
    away = checked(elsewhere, tmp_path, stack_database_url="postgresql://aisha_webhook@127.0.0.1:9/aisha")
    assert away.returncode != 0
    assert "Nothing was touched: the database of stack_database_url cannot be asked" in away.stdout
    elsewhere.tell("drop schema webhook cascade")
    poor = checked(elsewhere, tmp_path)
    assert poor.returncode != 0
    assert "may not write into the schema webhook" in poor.stdout
