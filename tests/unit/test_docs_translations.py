"""The Russian pages say what the English ones say: the same commands, figures, names and links."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PAIRS = {"README.md": "README.ru.md", "docs/WEBHOOK_DEPLOYMENT.md": "docs/WEBHOOK_DEPLOYMENT.ru.md"}
SHELL = ("console", "sh", "bash", "")
pairs = pytest.mark.parametrize(("english", "russian"), PAIRS.items(), ids=list(PAIRS))


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and text of each block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[tuple[str, str]]:
    """What is typed, block by block; remarks behind a command are in the page's own language."""
    return [
        (language, re.sub(r"\s+#\s.*$", "", block, flags=re.MULTILINE))
        for language, block in blocks(text)
        if language in (*SHELL, "sql")
    ]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def code(text: str) -> Counter[str]:
    """What stands in backticks; what the reader puts in the place of <…> is in the page's own language."""
    return Counter(re.sub(r"<[^>]*>", "<>", part) for part in re.findall(r"`([^`\n]+)`", prose(text)))


def figures(text: str) -> Counter[str]:
    """Numbers: 1,800 and 1800 are one."""
    return Counter(re.findall(r"\d+", re.sub(r"(?<=\d)[,  ](?=\d{3}\b)", "", prose(text))))


def links(text: str) -> Counter[str]:
    """Files that are linked, without places in them; pictures and the pages that have a translation apart."""
    own = {Path(name).name for pair in PAIRS.items() for name in pair}
    targets = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)", text)
    return Counter(target for target in targets if Path(target).name not in own or target == "docs/README.md")


def headings(text: str) -> list[int]:
    return [len(level) for level in re.findall(r"^(#+) ", prose(text), re.MULTILINE)]


def differences(english: str, russian: str) -> dict[str, object]:
    """What is in the one and not in the other, by kind; empty where the two say the same."""
    found: dict[str, object] = {}
    for kind in (commands, code, figures, links, headings):
        one, other = kind(english), kind(russian)
        if one != other:
            found[kind.__name__] = (one, other)
            if isinstance(one, Counter) and isinstance(other, Counter):
                found[kind.__name__] = (one - other, other - one)
    return found


@pairs
def test_both_say_the_same(english: str, russian: str) -> None:
    one, other = (REPO / english).read_text(), (REPO / russian).read_text()
    assert len(commands(one)) >= 2
    assert differences(one, other) == {}


@pairs
def test_each_leads_to_the_other_at_its_top(english: str, russian: str) -> None:
    for page, target in ((english, russian), (russian, english)):
        top = "\n".join((REPO / page).read_text().splitlines()[:4])
        assert f"({Path(target).name})" in top, page


@pytest.mark.parametrize("russian", PAIRS.values())
def test_the_russian_page_is_russian(russian: str) -> None:
    for paragraph in re.split(r"\n\s*\n", prose((REPO / russian).read_text())):
        words = re.sub(r"`[^`]*`|\[[^\]]*\]\([^)]*\)|[^A-Za-zА-Яа-яЁё ]", " ", paragraph)
        latin, cyrillic = len(re.findall(r"[a-z]", words)), len(re.findall(r"[а-яё]", words))
        assert cyrillic >= latin or latin < 40, paragraph


PAGE = "# T\n\nIt took 1,800 s: `make up`, [guide](a.md).\n```console\n$ make up    # all\n```\n"


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        (PAGE.replace("$ make up", "$ make down"), "commands"),
        (PAGE.replace("`make up`", "`make upp`"), "code"),
        (PAGE.replace("1,800", "1,900"), "figures"),
        (PAGE.replace("a.md", "b.md"), "links"),
        (PAGE + "## More\n", "headings"),
    ],
)
def test_what_differs_is_found(changed: str, kind: str) -> None:
    assert list(differences(PAGE, changed)) == [kind]


def test_what_may_differ_is_not() -> None:
    russian = PAGE.replace("It took 1,800 s", "Заняло 1800 с").replace("# all", "# всё")
    assert differences(PAGE, russian) == {}
