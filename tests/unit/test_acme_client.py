"""The ACME client's own decisions: what a good certificate is, what is asked of certbot, how files are put in place."""

from __future__ import annotations

import importlib.util
import stat
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "roles" / "images" / "files" / "acme" / "acme_client.py"
SETTINGS = {"ACME_NAMES": "hook.example www.example", "ACME_SERVER": "https://ca.example/dir"}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program as a module, with its directories below tmp_path."""
    spec = importlib.util.spec_from_file_location("acme_client", SOURCE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "acme_client", module)
    spec.loader.exec_module(module)
    for name in ("STATE", "CHALLENGES", "CERTIFICATE"):
        place = tmp_path / name.lower()
        place.mkdir()
        monkeypatch.setattr(module, name, place)
    monkeypatch.setattr(module, "LINEAGE", tmp_path / "state" / "live" / "site")
    monkeypatch.setattr(module, "LAST", tmp_path / "state" / "last-attempt.json")
    return module


def certificate(place: Path, names: list[str], days: int = 90, issuer: bool = True) -> None:
    """A key and a certificate, by a CA of their own or by themselves."""
    place.mkdir(parents=True, exist_ok=True)
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    san = ",".join(f"DNS:{name}" for name in names)
    by = []
    if issuer:
        ca = [
            "openssl",
            "req",
            "-x509",
            *key,
            "-subj",
            "/CN=CA",
            "-keyout",
            "ca.key",
            "-out",
            "ca.pem",
            "-days",
            "365",
        ]
        subprocess.run(ca, cwd=place, check=True, capture_output=True)
        by = ["-CA", "ca.pem", "-CAkey", "ca.key"]
    command = ["openssl", "req", "-x509", *key, "-subj", "/CN=leaf", "-addext", f"subjectAltName={san}", *by]
    command += ["-keyout", "privkey.pem", "-out", "fullchain.pem", "-days", str(days)]
    subprocess.run(command, cwd=place, check=True, capture_output=True)


def state(client: ModuleType, place: Path) -> dict:
    return client.certificate_state(("hook.example", "www.example"), place / "fullchain.pem")


def test_a_cas_certificate_for_all_names_is_good(client, tmp_path) -> None:
    certificate(tmp_path / "c", ["hook.example", "www.example"])
    seen = state(client, tmp_path / "c")
    assert client.is_good(seen)
    assert (seen["issuer"], seen["days_left"]) == ("CN=CA", pytest.approx(90, abs=0.2))


@pytest.mark.parametrize(
    ("names", "issuer"), [(["hook.example", "www.example"], False), (["hook.example"], True)]
)
def test_one_of_our_own_or_without_a_name_is_not(client, tmp_path, names, issuer) -> None:
    certificate(tmp_path / "c", names, issuer=issuer)
    assert not client.is_good(state(client, tmp_path / "c"))


def test_no_certificate_and_a_damaged_one_are_told(client, tmp_path) -> None:
    assert not client.is_good(state(client, tmp_path / "nowhere"))
    (tmp_path / "fullchain.pem").write_text("none")
    assert not state(client, tmp_path)["present"]


def test_files_are_put_in_place_whole_and_for_nginx_alone(client) -> None:
    certificate(client.LINEAGE, ["hook.example", "www.example"])
    assert client.install(("hook.example",))
    for name in client.FILES:
        path = client.CERTIFICATE / name
        assert path.read_bytes() == (client.LINEAGE / name).read_bytes()
        assert stat.S_IMODE(path.stat().st_mode) == 0o400
    assert not client.install(("hook.example",)), "the same is not put there again"
    assert sorted(path.name for path in client.CERTIFICATE.iterdir()) == ["fullchain.pem", "privkey.pem"]


def test_what_is_asked_of_certbot(client) -> None:
    settings = client.Settings.from_environment(SETTINGS)
    words = client.command(settings)
    for word in ("--reuse-key", "--keep-until-expiring", "--webroot", "--register-unsafely-without-email"):
        assert word in words
    assert [words[n + 1] for n, word in enumerate(words) if word == "--domain"] == [
        "hook.example",
        "www.example",
    ]
    with_email = client.command(
        client.Settings.from_environment({**SETTINGS, "ACME_EMAIL": "a@b.example"}), force=True
    )
    assert with_email[with_email.index("--email") + 1] == "a@b.example"
    assert "--force-renewal" in with_email
    assert "--keep-until-expiring" not in with_email


def test_without_names_it_does_not_start(client) -> None:
    with pytest.raises(SystemExit) as caught:
        client.Settings.from_environment({"ACME_SERVER": "https://ca.example/dir"})
    assert caught.value.code == 78


def test_an_edge_that_serves_no_challenges_is_not_waited_for_for_ever(client) -> None:
    settings = client.Settings.from_environment({**SETTINGS, "ACME_EDGE": "http://127.0.0.1:9"})
    assert not client.edge_serves(settings, seconds=0)
    assert not list(client.CHALLENGES.rglob("probe-*")), "nothing is left among the challenges"
