"""Secret files: who may read them, what stays, what is told, and that no value is ever told."""

from __future__ import annotations

import base64
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils import secret_files
from ansible.module_utils.secret_files import (
    SecretError,
    SecretFiles,
    SecretSpec,
    ed25519_public_key,
    generate,
    jwks,
    spec_faults,
    version,
)
from ansible.module_utils.whole_files import write_file

ME = os.geteuid()


def spec(name: str, **changes: Any) -> SecretSpec:
    return SecretSpec(name, **({"owner": ME, "group": os.getegid()} | changes))


def run(path: Path, *specs: SecretSpec) -> SecretFiles:
    files = SecretFiles(path, specs)
    if files.plan():
        files.apply()
    return files


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# -- what is written


def test_given_generated_and_derived_secrets_stand(tmp_path: Path) -> None:
    home = tmp_path / "secrets"
    files = run(
        home,
        spec("given", value="the value"),
        spec("password", generate="password", length=40),
        spec("key", generate="ed25519"),
        spec("api/keys.json", derive="jwks", derive_from="key", mode=0o444),
        spec("api/copy", derive="copy", derive_from="password"),
    )
    values = files.values()
    assert (home / "given").read_text() == "the value"
    assert len(values["password"]) == 40
    assert values["api/copy"] == values["password"] == (home / "api/copy").read_text()
    assert json.loads((home / "api/keys.json").read_text())["keys"][0]["kty"] == "OKP"
    assert {mode(home / n) for n in ("given", "password", "key", "api/copy")} == {0o400}
    assert mode(home / "api/keys.json") == 0o444
    assert mode(home) == mode(home / "api") == 0o711


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    specs = [
        spec("a", generate="password", length=32),
        spec("b/c", value="x"),
        spec("d", generate="hex", length=64),
    ]
    first = run(tmp_path / "s", *specs)
    before = {p: p.lstat().st_ino for p in (tmp_path / "s").rglob("*")}
    second = SecretFiles(tmp_path / "s", specs)
    assert second.plan() is False
    second.apply()
    assert second.values() == first.values()
    assert second.version() == first.version()
    assert {p: p.lstat().st_ino for p in (tmp_path / "s").rglob("*")} == before


def test_check_mode_writes_nothing_and_has_usable_stand_ins(tmp_path: Path) -> None:
    files = SecretFiles(
        tmp_path / "s",
        [
            spec("a", generate="password", length=32),
            spec("k", generate="ed25519"),
            spec("j", derive="jwks", derive_from="k", mode=0o444),
        ],
    )
    assert files.plan() is True
    assert not (tmp_path / "s").exists()
    assert files.placeholders() == ["a", "j", "k"]
    assert bytes.fromhex(files.values()["k"])
    assert files.actions() == {"a": ["generate"], "k": ["generate"], "j": ["create"]}


def test_a_given_value_replaces_a_generated_one_and_the_other_way_round_nothing_is_lost(
    tmp_path: Path,
) -> None:
    run(tmp_path / "s", spec("a", generate="password", length=32))
    files = run(tmp_path / "s", spec("a", generate="password", length=32, value="mine"))
    assert files.actions() == {"a": ["replace"]}
    assert run(tmp_path / "s", spec("a", generate="password", length=32)).values() == {"a": "mine"}


def test_a_file_that_was_emptied_counts_as_absent(tmp_path: Path) -> None:
    run(tmp_path / "s", spec("a", value="x"))
    (tmp_path / "s/a").chmod(0o600)
    (tmp_path / "s/a").write_text("")
    assert len(run(tmp_path / "s", spec("a", generate="password", length=32)).values()["a"]) == 32


def test_an_editors_newline_is_no_part_of_a_secret(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o711)
    (tmp_path / "s").chmod(0o711)
    (tmp_path / "s/a").write_text("typed\n")
    (tmp_path / "s/a").chmod(0o400)
    files = SecretFiles(tmp_path / "s", [spec("a", generate="password", length=32)])
    files.plan()
    assert files.values() == {"a": "typed"}
    assert files.actions() == {}


def test_a_certificate_keeps_its_last_newline(tmp_path: Path) -> None:
    pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    run(tmp_path / "s", spec("cert.pem", value=pem))
    assert (tmp_path / "s/cert.pem").read_text() == pem
    assert SecretFiles(tmp_path / "s", [spec("cert.pem", value=pem)]).plan() is False


def test_mode_and_owner_are_brought_back(tmp_path: Path) -> None:
    run(tmp_path / "s", spec("a", value="x"))
    before = (tmp_path / "s/a").stat().st_ino
    (tmp_path / "s/a").chmod(0o644)
    (tmp_path / "s").chmod(0o755)
    files = run(tmp_path / "s", spec("a", value="x"))
    assert files.actions() == {"a": ["mode"]}
    assert (mode(tmp_path / "s/a"), mode(tmp_path / "s")) == (0o400, 0o711)
    assert (tmp_path / "s/a").stat().st_ino == before, "containers that have it mounted go on having it"


@pytest.mark.skipif(ME != 0, reason="only root gives files away")
def test_a_file_belongs_to_its_reader(tmp_path: Path) -> None:
    run(tmp_path / "s", spec("a", value="x", owner=10001, group=10002))
    status = (tmp_path / "s/a").stat()
    assert (status.st_uid, status.st_gid) == (10001, 10002)
    assert SecretFiles(tmp_path / "s", [spec("a", value="x", owner=10001, group=10002)]).plan() is False


def test_a_reader_never_sees_half_a_secret(tmp_path: Path) -> None:
    target, seen, stop = tmp_path / "a", set(), threading.Event()
    texts = {letter * 200_000 for letter in "xy"}
    write_file(target, "x" * 200_000, owner=ME, group=os.getegid(), mode=0o400)

    def read() -> None:
        while not stop.is_set():
            seen.add(target.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for letter in "yxyxyxyx":
        write_file(target, letter * 200_000, owner=ME, group=os.getegid(), mode=0o400)
    stop.set()
    reader.join()
    assert seen <= texts
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, spec("a", value="old"))
    monkeypatch.setattr(
        os, "rename", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    files = SecretFiles(tmp_path, [spec("a", value="new-and-hidden")])
    files.plan()
    with pytest.raises(SecretError, match="No space left") as caught:
        files.apply()
    assert caught.value.reason == "unwritable"
    assert "new-and-hidden" not in str(caught.value)
    assert (tmp_path / "a").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == [".version-key", "a"]


def test_a_link_in_place_of_a_secret_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("x")
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SecretError) as caught:
        SecretFiles(tmp_path / "s", [spec("a", value="x")]).plan()
    assert caught.value.reason == "unreadable"


# -- what is wrong


@pytest.mark.parametrize(
    ("specs", "fault"),
    [
        ([spec("../etc/passwd", value="x")], "not the name of a secret"),
        ([spec("/etc/passwd", value="x")], "not the name of a secret"),
        ([spec("a//b", value="x")], "not the name of a secret"),
        ([spec(".version-key", value="x")], "not the name of a secret"),
        ([spec("a\n", value="x")], "not the name of a secret"),
        ([spec("a", value="x"), spec("a", value="y")], "named twice"),
        ([spec("a", value="x"), spec("a/b", value="y")], "can't be a file and the directory"),
        ([spec("a", generate="password", length=8)], "at least 16"),
        ([spec("a", derive="jwks", derive_from="b")], "not in the list"),
        ([spec("a", value="x"), spec("b", derive="copy", derive_from="a", value="y")], "takes no value"),
        ([spec("a", value="x", mode=0o444)], "would let others read"),
        (
            [spec("a", value="x"), spec("b", derive="copy", derive_from="a", mode=0o444)],
            "would let others read",
        ),
        ([spec("a", value="x", mode=0o460)], "would let others read or write"),
    ],
)
def test_a_wrong_list_is_refused(specs: list[SecretSpec], fault: str, tmp_path: Path) -> None:
    assert any(fault in text for text in spec_faults(specs))
    with pytest.raises(SecretError) as caught:
        SecretFiles(tmp_path, specs).plan()
    assert caught.value.reason == "invalid"
    assert os.listdir(tmp_path) == []


def test_all_missing_secrets_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(SecretError) as caught:
        run(tmp_path / "s", spec("one"), spec("two"), spec("three", value="x"))
    assert caught.value.reason == "missing"
    assert "one has no value" in str(caught.value)
    assert "two has no value" in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_a_broken_seed_is_named_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(SecretError, match="key is no Ed25519 seed") as caught:
        run(tmp_path / "s", spec("key", generate="ed25519", value="hidden-and-wrong"))
    assert "hidden-and-wrong" not in str(caught.value)


# -- what is told


def test_the_diff_has_words_and_no_values(tmp_path: Path) -> None:
    run(tmp_path / "s", spec("a", value="old-secret"))
    files = SecretFiles(tmp_path / "s", [spec("a", value="new-secret"), spec("b", value="other-secret")])
    files.plan()
    assert files.diff() == {
        "before": "a: present\nb: absent\n",
        "after": "a: present (replace)\nb: present (create)\n",
    }
    assert "secret'" not in repr(files.secrets)
    assert "new-secret" not in repr([s.spec for s in files.secrets])


def test_versions_follow_the_secrets_and_say_nothing_about_them(tmp_path: Path) -> None:
    one = run(tmp_path / "one", spec("a", value="x"), spec("b", value="y"))
    same = run(tmp_path / "one", spec("b", value="y"), spec("a", value="x"))
    assert one.version() == same.version()
    changed = run(tmp_path / "one", spec("a", value="x"), spec("b", value="z"))
    assert changed.version() != one.version()
    assert changed.versions()["a"] == one.versions()["a"]
    assert changed.versions()["b"] != one.versions()["b"]
    elsewhere = run(tmp_path / "two", spec("a", value="x"), spec("b", value="y"))
    assert elsewhere.version() != one.version(), "without the key a version must not be guessable"


def test_names_and_values_do_not_run_together() -> None:
    assert version(b"k", {"a": "b", "c": "d"}) != version(b"k", {"a": "bc", "": "d"})


# -- values


@pytest.mark.parametrize(
    ("kind", "length", "alphabet"), [("hex", 33, "0123456789abcdef"), ("password", 20, None)]
)
def test_generated_secrets_have_the_length_and_differ(kind: str, length: int, alphabet: str | None) -> None:
    made = {generate(kind, length) for _ in range(50)}
    assert len(made) == 50
    assert {len(text) for text in made} == {length}
    assert all(text.isalnum() and (not alphabet or set(text) <= set(alphabet)) for text in made)


@pytest.mark.parametrize(
    ("seed", "public"),
    [  # RFC 8032, section 7.1
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        ),
        (
            "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
            "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        ),
    ],
)
def test_public_keys_are_those_of_the_rfc(seed: str, public: str) -> None:
    assert ed25519_public_key(bytes.fromhex(seed)).hex() == public
    x = json.loads(jwks(seed))["keys"][0]["x"]
    assert base64.urlsafe_b64decode(x + "=").hex() == public
    assert "=" not in x


def test_the_public_key_is_that_of_the_library_the_service_verifies_with() -> None:
    signing = pytest.importorskip("nacl.signing")
    for _ in range(5):
        seed = os.urandom(32)
        assert ed25519_public_key(seed) == bytes(signing.SigningKey(seed).verify_key)


def test_parameters_are_read_with_their_defaults() -> None:
    made = SecretSpec.from_params({"name": "a", "owner": 10001, "generate": {"kind": "hex", "length": None}})
    assert (made.owner, made.group, made.mode, made.length) == (10001, 10001, 0o400, 64)
    public = SecretSpec.from_params({"name": "j", "derive": {"kind": "jwks", "from": "a"}})
    assert public.mode == 0o444
    assert SecretSpec.from_params({"name": "c", "derive": {"kind": "copy", "from": "a"}}).mode == 0o400
    assert (made.keep, made.retire) == (False, False)
    assert SecretSpec.from_params({"name": "c", "value": "x", "keep": True, "retire": True}).keep


def test_the_version_key_is_for_root_alone(tmp_path: Path) -> None:
    run(tmp_path / "s", spec("a", value="x"))
    assert mode(tmp_path / "s" / secret_files.VERSION_KEY) == 0o400


# -- what is kept until a release has proven what replaced it

CURRENT = "r-000000000001"


def rotate(path: Path, *specs: SecretSpec, release: str = CURRENT) -> SecretFiles:
    files = SecretFiles(path, specs, release=release)
    if files.plan():
        files.apply()
    return files


def test_a_replaced_secret_is_kept_as_it_was_while_a_release_serves_with_it(tmp_path: Path) -> None:
    run(tmp_path / "s", spec("api/a", value="old", keep=True))
    before = (tmp_path / "s/api/a").stat().st_ino
    files = rotate(tmp_path / "s", spec("api/a", value="new", keep=True))
    assert (tmp_path / "s/api/a").read_text() == "new"
    assert (tmp_path / "s/.before/api/a").stat().st_ino == before
    assert files.kept() == ["api/a"]
    rotate(tmp_path / "s", spec("api/a", value="newer", keep=True))
    assert (tmp_path / "s/.before/api/a").read_text() == "old", "what `current` was proven with"


def test_only_what_is_asked_for_is_kept_and_nothing_where_no_release_serves(tmp_path: Path) -> None:
    run(tmp_path / "s", spec("a", value="old"), spec("b", value="old", keep=True))
    files = rotate(tmp_path / "s", spec("a", value="new"), spec("b", value="old", keep=True))
    assert files.kept() == []
    files = rotate(tmp_path / "s", spec("a", value="new"), spec("b", value="new", keep=True), release="")
    assert files.kept() == []
    assert not (tmp_path / "s/.before").exists()


def test_a_new_owner_or_mode_is_no_rotation(tmp_path: Path) -> None:
    run(tmp_path / "s", spec("a", value="x", keep=True))
    (tmp_path / "s/a").chmod(0o600)
    assert rotate(tmp_path / "s", spec("a", value="x", keep=True)).actions() == {"a": ["mode"]}
    assert not (tmp_path / "s/.before").exists()


def test_that_a_secret_is_new_is_kept_as_well(tmp_path: Path) -> None:
    run(tmp_path / "s", spec("a", value="x", keep=True))
    files = rotate(tmp_path / "s", spec("a", value="x", keep=True), spec("b", value="y", keep=True))
    assert files.kept() == ["b"]
    assert (tmp_path / "s/.before/b").stat().st_size == 0


def test_a_second_run_and_check_mode_keep_nothing_anew_and_say_the_same(tmp_path: Path) -> None:
    run(tmp_path / "s", spec("a", value="old", keep=True))
    wanted = spec("a", value="new", keep=True)
    asked = SecretFiles(tmp_path / "s", [wanted], release=CURRENT)
    assert asked.plan()
    assert asked.kept() == ["a"]
    assert not (tmp_path / "s/.before").exists()
    done = rotate(tmp_path / "s", wanted)
    assert (done.kept(), done.actions()) == (asked.kept(), asked.actions())
    before = {path: path.lstat().st_ino for path in (tmp_path / "s").rglob("*")}
    second = SecretFiles(tmp_path / "s", [wanted], release=CURRENT)
    assert second.plan() is False
    assert second.kept() == ["a"]
    assert {path: path.lstat().st_ino for path in (tmp_path / "s").rglob("*")} == before


def test_the_value_of_before_given_again_is_the_file_of_before(tmp_path: Path) -> None:
    """Whoever takes a rotation back before it was rolled out leaves nothing to roll out."""
    run(tmp_path / "s", spec("a", value="old", keep=True))
    before = (tmp_path / "s/a").stat().st_ino
    rotate(tmp_path / "s", spec("a", value="new", keep=True))
    files = rotate(tmp_path / "s", spec("a", value="old", keep=True))
    assert files.actions() == {"a": ["replace"]}
    assert (tmp_path / "s/a").stat().st_ino == before
    assert files.kept() == []
    assert not (tmp_path / "s/.before").exists()


def test_a_kept_file_that_belongs_to_somebody_else_now_is_not_taken(tmp_path: Path) -> None:
    run(tmp_path / "s", spec("a", value="old", keep=True, mode=0o440))
    rotate(tmp_path / "s", spec("a", value="new", keep=True, mode=0o440))
    rotate(tmp_path / "s", spec("a", value="old", keep=True))
    assert mode(tmp_path / "s/a") == 0o400
    assert mode(tmp_path / "s/.before/a") == 0o440


def test_a_failed_write_keeps_what_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "s", spec("a", value="old", keep=True))
    files = SecretFiles(tmp_path / "s", [spec("a", value="new-and-hidden", keep=True)], release=CURRENT)
    files.plan()
    monkeypatch.setattr(os, "link", lambda *a, **k: (_ for _ in ()).throw(OSError(1, "not permitted")))
    with pytest.raises(SecretError, match="not permitted") as caught:
        files.apply()
    assert caught.value.reason == "unwritable"
    assert (tmp_path / "s/a").read_text() == "old", "nothing is replaced that could not be kept"


# -- what is no longer wanted


def test_a_retired_secret_is_worthless_and_its_file_stands(tmp_path: Path) -> None:
    """Kept releases mount the file: it stays, and lets nobody in."""
    run(tmp_path / "s", spec("a", value="x"), spec("b", value="old-secret", retire=True))
    files = run(tmp_path / "s", spec("a", value="x"), spec("b", retire=True))
    text = (tmp_path / "s/b").read_text()
    assert text.startswith("retired-")
    assert len(text) >= 40
    assert files.actions() == {"b": ["retire"]}
    assert files.values() == {"a": "x"}
    assert files.versions().keys() == {"a"}
    again = SecretFiles(tmp_path / "s", [spec("a", value="x"), spec("b", retire=True)])
    assert again.plan() is False
    assert (tmp_path / "s/b").read_text() == text


def test_where_no_file_stands_nothing_is_retired(tmp_path: Path) -> None:
    files = run(tmp_path / "s", spec("a", value="x"), spec("b", retire=True))
    assert files.actions() == {"a": ["create"]}
    assert not (tmp_path / "s/b").exists()


def test_a_given_value_wins_over_retiring(tmp_path: Path) -> None:
    run(tmp_path / "s", spec("b", value="x", retire=True))
    run(tmp_path / "s", spec("b", retire=True))
    assert run(tmp_path / "s", spec("b", value="y", retire=True)).values() == {"b": "y"}


def test_what_is_retired_is_kept_until_that_is_proven(tmp_path: Path) -> None:
    run(tmp_path / "s", spec("b", value="old-secret", retire=True, keep=True))
    files = rotate(tmp_path / "s", spec("b", retire=True, keep=True))
    assert files.kept() == ["b"]
    assert (tmp_path / "s/.before/b").read_text() == "old-secret"


@pytest.mark.parametrize(
    "changes", [{"generate": "password", "length": 32}, {"derive": "copy", "derive_from": "a"}]
)
def test_only_a_given_secret_can_be_retired(tmp_path: Path, changes: dict[str, Any]) -> None:
    (fault,) = spec_faults([spec("a", value="x"), spec("b", retire=True, **changes)])
    assert "can't be retired" in fault
