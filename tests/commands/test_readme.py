"""The first page and the site tell the truth: their commands parse, their paths exist, their Python runs."""

import contextlib
import functools
import io
import re
import shlex

import pytest

from mtp_jax import cli
from support import REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
MADE = ("docs/_build/", "docs/cli.md", "docs/notebooks/", "docs/results/")  # by `make docs`
PAGES = [page for page in PAGES if not str(page.relative_to(REPOSITORY)).startswith(MADE)]
NAMES = [str(page.relative_to(REPOSITORY)) for page in PAGES]
README = PAGES[0].read_text()


def code(text, language):
    """The code blocks of a page in one text; indented ones are commands."""
    parts = re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    indented = [re.sub("^    ", "", text, flags=re.M)] if language == "sh" else []
    return "\n".join([*indented, *parts])


def commands(text):
    """The words of each call of `mtp-jax`, without comments, in blocks and in prose."""
    lines = re.sub(r"\\\n\s*", " ", code(text, "sh")).splitlines()
    lines += [" ".join(span.split()) for span in re.findall(r"`(mtp-jax [^`]+)`", text)]
    found = (shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mtp-jax "))
    return sorted({tuple(words) for words in found if words})


def anchors(text):
    """What a link may name behind a #: headings as GitHub and MyST write them."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@functools.cache
def help_of(*command):
    """What `--help` of a command prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main([*command, "--help"])
    return printed.getvalue()


STAND_IN = {"train": "code_cpu", "doctor": "code_cpu", "sweep": "rank_code"}  # for a file that is the reader's own


def options_of(words):
    """What `--help` tells of the command that is called."""
    name = words[:2] if words[0] in ("bench", "data", "tokenizer") else words[:1]
    kind = name[-1] if name[0] != "tokenizer" else ""
    if kind not in STAND_IN:
        return help_of(*name)
    file = (*words, "")[len(name)].partition("@")[0]
    own = file.endswith(".py") and (REPOSITORY / file).exists()
    return help_of(*name, str(REPOSITORY / (file if own else f"experiments/{STAND_IN[kind]}.py")))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_has_the_options_that_are_given(page):
    for words in commands(page.read_text()):
        assert words[0] in cli.COMMANDS and options_of(words).startswith("usage"), words
        for word in words[1:]:
            if re.match("--[a-z]", word) and word != "--help":
                option = re.escape(word.partition("=")[0])
                assert re.search(rf"(?<![\w-]){option}(?![\w-])", options_of(words)), (word, words)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_to_a_file(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        if not target.startswith(("http", "mailto")):
            path = (page.parent / target).resolve() if target else page
            made = str(path.relative_to(REPOSITORY)).startswith(MADE)
            assert path.exists() or (made and page.name != "README.md"), target
            assert made or not anchor or anchor in anchors(path.read_text()), (target, anchor)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_target_of_make_and_every_script_is_there(page):
    text, makefile = page.read_text(), (REPOSITORY / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.M).group(1).split())
    called = re.findall(r"(?:^ *|`)make ((?:[a-z-]+ ?)+)", text, re.M)
    assert {word for words in called for word in words.split()} <= targets
    for path in re.findall(r"\bpython (experiments/[\w/]+\.py)", text):
        assert (REPOSITORY / path).exists(), path


def test_the_first_page_is_short_and_every_file_that_it_names_is_there():
    assert len(README.splitlines()) <= 150
    folders = "|".join(("docs", "experiments", "launch", "mtp_jax", "tests"))
    for path in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w/.-]*[\w/]", README):
        assert (REPOSITORY / path).exists(), path


@pytest.mark.parametrize("name", ["README.md", "docs/get-started.md"])
def test_its_python_runs(name, run):
    source = code((REPOSITORY / name).read_text(), "python").replace("runs/code_cpu", str(run.dir))
    source = source.replace("max_new_tokens=100", "max_new_tokens=12").replace("max_new_tokens=64", "max_new_tokens=12")
    assert "mtp_jax.load(" in source
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, name, "exec"), {})
    assert "def main(" in printed.getvalue()
