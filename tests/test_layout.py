"""The README's tree: one line for each file of the package, and nothing that is absent; and its links."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def tree() -> dict[str, str]:
    """{path: what it is for}, folders with a final slash."""
    block = re.search(r"^```text\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)[1]
    listed: dict[str, str] = {}
    folders: list[tuple[int, str]] = []
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        name, *words = line.split()
        while folders and folders[-1][0] >= indent:
            folders.pop()
        path = (folders[-1][1] if folders else "") + name
        assert path not in listed, f"{path} is listed twice"
        listed[path] = " ".join(words)
        if name.endswith("/"):
            folders.append((indent, path))
    return listed


def files(folder: str) -> set[str]:
    """The files below a folder; a folder stands for its __init__.py, the tiny model's for all its files."""
    found = set()
    for path in (ROOT / folder).rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            short = path.relative_to(ROOT).as_posix()
            if path.name == "__init__.py" or "/assets/" in short:
                short = path.parent.relative_to(ROOT).as_posix() + "/"
            found.add(short)
    return found


def test_tree_lists_every_file_of_the_package():
    assert files("src/medplib") - set(tree()) == set()


def test_tree_lists_every_example():
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.*") if path.is_file()}
    assert found - set(tree()) == set()


def test_tree_lists_nothing_that_is_absent():
    for path in tree():
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


def test_tree_says_what_each_thing_is_for_in_one_line():
    assert all(tree().values())
    assert max(len(line) for line in TEXT.split("```text\n")[1].split("```")[0].splitlines()) <= 110


def test_links_lead_somewhere():
    links = re.findall(r'\]\(([^)#]+)\)|<img src="([^"]+)"', TEXT)
    for link in (a or b for a, b in links):
        assert re.match(r"https?://", link) or (ROOT / link).exists(), link
