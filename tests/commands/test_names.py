"""Names that a shell, a glob or a terminal would take for something else: a run is used under any name."""

import json
import os
import re
import shutil

import pytest

import mtp_jax
from mtp_jax import cli
from mtp_jax.commands import joined
from mtp_jax.decode.spans import visible
from support.commands import last_line

# What is looked at here is the command line; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = {
    "brackets": "lr[0.1]",
    "a star": "a*b",
    "a question mark": "rank?",
    "a space": " my first run ",
    "letters": "größe-模型",
    "other bytes": os.fsdecode(b"caf\xe9"),
    "a dash": "-x",
    "dots": "...",
    "a trailing slash": "slash/",
    "markup": "[red]{rank}%d",
    "an end of markup": "a[/red]",
    "quotes": 'it\'s "$HOME" `x` \\n',
    "a line break": "a\nb",
    "a link": "link",
    "like a command": "runs=1,2;#x",
}


@pytest.fixture(scope="module")
def said(trained):
    """What the run answers under its own name."""
    run = mtp_jax.load(trained.dir)
    return run.generate("The 3", max_new_tokens=8, temperature=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_read_under_any_name(name, trained, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = NAMES[name]
    copy = tmp_path / ("behind" if name == "a link" else given)
    shutil.copytree(trained.dir, copy)
    if name == "a link":
        (tmp_path / given).symlink_to(copy)
    run = mtp_jax.load(given)
    assert run.generate("The 3", max_new_tokens=8, temperature=0.0) == said
    tokens = ("--max-new-tokens", "8", "--temperature", "0")
    cli.main(["generate", given, "--prompt", "The 3", *tokens])
    assert f"The 3{visible(said)}\n" in capsys.readouterr().out
    cli.main(["generate", given, "--held-out", "1", "--prompt-tokens", "8", *tokens])
    page = copy / "completions.html"
    # What a stream does not have is escaped.
    shown = f"{tmp_path / given}/completions.html".encode("utf-8", "backslashreplace").decode()
    assert page.is_file() and f"The same in colour: {shown}" in capsys.readouterr().out
    cli.main(["eval", given, "--batches", "1"])
    assert last_line(capsys.readouterr().out)["run"] == f"./{given}" * (name == "a dash") or given


def test_documents_and_pages_are_called_what_they_are_called(copy, tmp_path, monkeypatch, capsys):
    """Also those of a site whose files are called by a pattern."""
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "[slug]"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"[id]{i}[bold]{NAMES['other bytes']}.txt").write_text(f"The {i}th text of this kind.\n" * 9)
    config = json.loads((copy / "config.json").read_text())
    config["data"] |= {"files": "[slug]/*.txt", "valid_fraction": 0.5}
    (copy / "config.json").write_text(json.dumps(config))
    out = tmp_path / "[out]" / "[red].html"
    out.parent.mkdir()
    options = ("--prompt-tokens", "8", "--max-new-tokens", "2", "--out", "[out]/[red].html")
    cli.main(["generate", str(copy), "--held-out", "3", *options])
    printed = capsys.readouterr().out
    assert len(re.findall(r"\[id\]\d+\[bold\]caf\\udce9\.txt, continued at", printed)) == 3, printed
    assert "The same in colour: [out]/[red].html" in printed and "[id]" in out.read_text()


def test_an_argument_that_begins_with_a_dash_is_what_it_can_be(tmp_path, monkeypatch):
    """A value where a text or a place is asked for, a path where one is called so, and else an option."""
    monkeypatch.chdir(tmp_path)
    for name in ("-x", "-h", "--there"):
        (tmp_path / name).mkdir()
    assert joined(["-x", "--k", "-5", "--prompt", "-x", "--out", "-y"]) == [
        "./-x",
        "--k",
        "-5",
        "--prompt=-x",
        "--out=-y",
    ]
    assert joined(["--run-dir", "-x", "--resume"]) == ["--run-dir=-x", "--resume"]
    for same in (["-h"], ["-y"], ["-"], ["--there"], ["--run-dir", "--resume"], ["--run-dir", "x"], ["--out"], []):
        assert joined(same) == same
    assert joined(["--prompt", "--run-dir", "-y"]) == ["--prompt=--run-dir", "-y"]
