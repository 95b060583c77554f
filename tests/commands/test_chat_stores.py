"""`mtp-jax data prepare --chat --base RUN`, and `data show` of what it makes."""

import re

import pytest
from rich.console import Console

from mtp_jax import cli
from mtp_jax.commands import data as data_command
from mtp_jax.data.config import DataConfig
from mtp_jax.data.preparation import prepare
from mtp_jax.data.store import Store
from mtp_jax.interop.importing import import_run
from support.chats import chat_tokenizer, supervised, turns, write_chats
from support.pretrained import write

pytest.importorskip("jinja2", reason="chat templates are Jinja: pip install 'mtp_jax[hf]'")
pytest.importorskip("safetensors", reason="weights are read by safetensors: pip install 'mtp_jax[hf]'")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The run directory of an imported model, whose texts begin with `<s>`; its template writes that itself."""
    root = tmp_path_factory.mktemp("base")
    directory, *_ = write(root / "source")
    return import_run(str(directory), root / "run")


@pytest.fixture
def chats(tmp_path):
    return write_chats(tmp_path / "chats.jsonl", [turns(f"question {i}?", f"héllo [b]{i}[/b]") for i in range(40)])


def test_conversations_become_a_store_that_can_be_looked_into(base, chats, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = ["data", "prepare", "--source", str(chats), "--chat", "--base", str(base), "--out", str(out)]
    arguments += ["--processes", "1", "--valid-fraction", "0.2"]
    cli.main(arguments)
    said = capsys.readouterr().out
    store = Store.open(out)
    found = [supervised(split, store.tokenizer()) for split in (store.train, store.valid)]
    runs = {run for split in found for runs in split.values() for run in runs}
    assert runs == {f" héllo [b]{i}[/b]<|end|>" for i in range(40)}
    assert (store.train.tokens == 258).sum() == len(store.train), "one BOS"
    assert re.search(r"[\d,]+ of the tokens are supervised \(\d\d\.\d%\), in ", said), said
    train = said[said.index("Train on it: ") :].split()[3:]
    assert train[:2] == ["--data.source", str(out)] and f"hf:{base}/tokenizer" in train
    # What it says opens the store.
    options = dict(zip(train[::2], train[1::2], strict=True))
    config = DataConfig(
        options["--data.source"],
        tokenizer=options["--data.tokenizer"],
        end_of_document=options["--data.end-of-document"].strip("'"),
        valid_fraction=float(options["--data.valid-fraction"]),
    )
    assert prepare(config).sha256 == store.sha256
    cli.main(arguments)
    assert "was prepared before" in capsys.readouterr().out

    cli.main(["data", "show", str(out), "--documents", "2"])
    shown = capsys.readouterr().out
    count, of_them = len(store.train.tokens), store.train.mask.sum()
    assert f"{count:,} tokens, {of_them:,} of them supervised ({of_them / count:.1%})" in shown and "Batch" not in shown
    number = re.search(r"question (\d+)", shown).group(1)
    assert f"<s>user: question {number}?<|end|>assistant:⟦ héllo [b]{number}[/b]<|end|>⟧\n" in shown

    coloured = Console(force_terminal=True, color_system="truecolor", width=200)
    monkeypatch.setattr(data_command, "console", lambda: coloured)
    monkeypatch.delenv("NO_COLOR", raising=False)
    cli.main(["data", "show", str(out), "--documents", "1", "--characters", "50"])
    shown = capsys.readouterr().out
    assert re.search(r"assistant:\x1b\[1;32m héllo.*\x1b\[0m\.\.\.", shown) and "⟦" not in shown


def test_plain_text_takes_the_tokenizer_of_a_base(base, tmp_path, capsys):
    file = write_chats(tmp_path / "t.jsonl", [{"text": f"text {i}"} for i in range(40)])
    out = tmp_path / "out"
    cli.main(["data", "prepare", "--source", str(file), "--base", str(base), "--out", str(out), "--processes", "1"])
    store = Store.open(out)
    assert not store.masked and store.manifest["tokenizer"]["conventions"]
    assert store.tokenizer().decode(store.train[0]).startswith("text ")
    assert store.train[0][-1] == store.tokenizer().end_of_document
    assert "supervised" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, words",
    [
        (["--chat"], "--chat is given and --base is not: conversations are written by a model's own template"),
        (["--chat", "--base", "nowhere"], "--base is 'nowhere'; it must be a run directory, which `mtp-jax import"),
        (["--base", "BASE", "--tokenizer", "hf:x"], "--tokenizer is 'hf:x' and --base"),
        (["--base", "BASE", "--end-of-document", "<s>"], "--end-of-document is '<s>' and --base"),
    ],
)
def test_what_does_not_fit_is_refused(options, words, base, chats, tmp_path, refused):
    options = [str(base) if option == "BASE" else option for option in options]
    assert words in refused("data", "prepare", "--source", chats, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_conversations_that_are_taken_for_text_say_so(chats, tmp_path, refused):
    message = refused("data", "prepare", "--source", chats, "--out", tmp_path / "out", "--processes", 1, status=1)
    assert "there is no field 'text'; it has 'messages'" in message
    assert "data prepare --chat reads conversations" in message


def test_a_base_that_does_not_chat_is_refused(chats, tmp_path, refused):
    directory, *_ = write(tmp_path / "source")
    (directory / "tokenizer_config.json").write_text("{}")
    run = import_run(str(directory), tmp_path / "run")
    message = refused("data", "prepare", "--source", chats, "--chat", "--base", run, "--out", tmp_path / "out")
    assert "has no chat template, which conversations are written by" in message and "--base RUN" in message


def test_pieces_of_a_document_have_all_of_its_text(tmp_path):
    tokenizer = chat_tokenizer(tmp_path, "")
    ids = tokenizer.encode_special("<s>é<|im_end|>")
    mask = (ids != tokenizer.special["<s>"]).astype("uint8")
    assert list(data_command.supervision(ids, mask, tokenizer)) == [("<s>", False), ("é<|im_end|>", True)]
