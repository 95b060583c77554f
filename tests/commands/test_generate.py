"""What `mtp-jax generate` shows, and what it refuses."""

import re

import pytest

from mtp_jax import cli
from mtp_jax.data.preparation import prepare
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.decode import tune
from mtp_jax.runs import loading
from mtp_jax.runs.layout import read_config
from support.runs import contents

# What is looked at here is the command line; faster code would take longer to compile.
pytestmark = pytest.mark.usefixtures("quick_compilation")


GENERATE = ("--max-new-tokens", "12", "--seed", "3")
# The noise decides, which drafts and target share: most drafts are accepted.
HOT = ("--temperature", "2")


GREEN = "1;32"
ANSI = re.compile("\x1b\\[([0-9;]*)m")


def styled(output):
    """Every character of `output` with the ANSI codes that it is shown in."""
    plain, *rest = ANSI.split(output)
    pieces = [("", plain), *zip(rest[::2], rest[1::2], strict=True)]
    return [("" if codes == "0" else codes, character) for codes, text in pieces for character in text]


def letters(self, ids):
    """In place of `decode_bytes`: each token is one letter, so that none is lost or joined with its neighbour."""
    return bytes(97 + int(i) % 26 for i in ids)


def test_colour_is_the_users_choice(run, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(ByteTokenizer, "decode_bytes", letters)
    outputs = {}
    for color in ("always", "never", "auto"):
        options = (*HOT, "--color", color, *GENERATE)
        cli.main(["generate", str(run.dir), "--prompt", "The 1st of", *options])
        outputs[color] = capsys.readouterr().out
    assert f"\x1b[{GREEN}m" in outputs["always"]
    assert "\x1b" not in outputs["never"] and outputs["auto"] == outputs["never"]
    assert "".join(character for _, character in styled(outputs["always"])) == outputs["never"]


@pytest.mark.parametrize("k", [2, 0])
def test_what_is_green_are_the_accepted_drafts(run, capsys, monkeypatch, k):
    import mtp_jax.decode.generate as decode

    stream, parts = decode.stream, []

    def record(*args, **options):
        for tokens, accepted in stream(*args, **options):
            parts.append((letters(None, tokens).decode(), accepted))
            yield tokens, accepted

    monkeypatch.setattr(ByteTokenizer, "decode_bytes", letters)
    monkeypatch.setattr(decode, "stream", record)
    options = ("--k", str(k), *HOT, "--color", "always", *GENERATE)
    cli.main(["generate", str(run.dir), "--prompt", "The 1st of", *options])
    text, summary = capsys.readouterr().out.splitlines()
    prompt = letters(None, b"The 1st of").decode()
    expected = [("2", character) for character in prompt]
    expected += [(GREEN * (i < accepted), character) for text, accepted in parts for i, character in enumerate(text)]
    assert styled(text) == expected
    drafts = sum(accepted for _, accepted in parts)
    assert (drafts > 0) == (k > 0)
    emitted = sum(len(text) for text, _ in parts)
    assert f"[{emitted} tokens, {drafts} of them accepted drafts; {len(parts) - 1} forwards after prefill" in summary


def test_k_auto_is_chosen_once_and_said(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MTP_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "measure", lambda *_: ({0: 1.0, 1: 1.2, 2: 9.0}, [0.5, 0.1]))
    printed = []
    for k in "auto", "1":
        cli.main(["generate", str(run.dir), "--prompt", "The 1st of", "--k", k, *GENERATE])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "tokens per forward, k = 1]" in printed[0]
    assert len(list((tmp_path / "tune").iterdir())) == 1


def test_text_ends_before_a_stop_string(run, capsys, monkeypatch):
    """It may come in pieces; what turns out not to be one is printed, in its own colours."""
    import mtp_jax.decode.generate as decode

    parts = [(b"ab<", 2), (b"<EN", 1), (b"Dx", 0), (b"c<E", 3), (b"ND>z", 1), (b"never", 1)]
    monkeypatch.setattr(decode, "stream", lambda *args, **options: ((list(text), n) for text, n in parts))
    options = ("--prompt", "x", "--color", "always", *GENERATE, "--stop", "<END>", "@@")
    cli.main(["generate", str(run.dir), *options])
    text, summary = capsys.readouterr().out.splitlines()
    green = [(GREEN, character) for character in "ab"], [(GREEN, "<")], [(GREEN, "c")]
    plain = [("", character) for character in "<ENDx"]
    assert styled(text) == [("2", "x"), *green[0], plain[0], *green[1], *plain[1:], *green[2]]
    assert "[15 tokens, 7 of them" in summary


def test_a_character_in_two_forwards_is_one_character(run, capsys, monkeypatch):
    """It has the colour of its last byte. Half a character at the end is shown as such."""
    import mtp_jax.decode.generate as decode

    parts = [(b"a\xc3", 1), (b"\xa9b", 1), (b"c\xe2\x82", 0), (b"\xacd\xc3", 2)]
    monkeypatch.setattr(decode, "stream", lambda *args, **options: [(list(text), n) for text, n in parts])
    cli.main(["generate", str(run.dir), "--prompt", "x", "--color", "always", *GENERATE])
    text = capsys.readouterr().out.splitlines()[0]
    green = [(GREEN, character) for character in "a\xe9\u20acd"]
    assert styled(text) == [("2", "x"), *green[:2], ("", "b"), ("", "c"), *green[2:], ("", "\ufffd")]


def test_generate_refuses_before_it_loads_or_prints(run, refused, monkeypatch):
    before = contents(run.dir)
    monkeypatch.setattr(loading, "load", lambda *args, **options: pytest.fail("this was to be refused before"))
    for options, words in (
        (("--k", 9), "k is 9 and the head's window is 3; k must lie in 0..2."),
        (("--k", -1), "k must lie in 0..2."),
        (("--max-new-tokens", 0), "max_new_tokens is 0; it must be at least 1."),
        (("--max-new-tokens", 128), "Prompt 0 has 1 tokens and max_new_tokens is 128, 129 together"),
        (("--temperature", -1), "temperature is -1.0; it must be at least 0."),
        (("--top-p", 0), "top_p is 0.0; it must lie in (0, 1]."),
        (("--top-k", -1), "top_k is -1; it must be at least 0."),
        (("--stop", ""), "an empty string stops everything"),
        (("--seed", 2**32), f"seed is {2**32}; it must lie in 0..4294967295"),
    ):
        message = refused("generate", run.dir, "--prompt", "x", *options)
        assert words in message and message.startswith("mtp-jax: error:")
    message = refused("generate", run.dir, "--prompt", "x" * 100, "--max-new-tokens", 29)
    assert "Prompt 0 has 100 tokens and max_new_tokens is 29, 129 together" in message
    assert "--prompt is ''" in refused("generate", run.dir, "--prompt", "")
    held_out = ("generate", run.dir, "--held-out", 2, "--max-new-tokens")
    assert "Prompt 0 has 100 tokens" in refused(*held_out, 29, "--prompt-tokens", 100)
    assert "--prompt-tokens is 0" in refused(*held_out, 29, "--prompt-tokens", 0)
    assert contents(run.dir) == before


def test_held_out_documents_are_continued(run, capsys):
    cli.main(["generate", str(run.dir), "--held-out", "2", "--prompt-tokens", "16", "--color", "never", *GENERATE])
    output = capsys.readouterr().out
    names = re.findall(r"(\d+\.txt), continued at temperature 0.7", output)
    assert len(set(names)) == 2 and output.count("tokens per forward]") == 2
    assert set(names) <= set(prepare(read_config(run.dir).data).valid.names)
    page = (run.dir / "completions.html").read_text()
    assert all(name in page for name in names)
    for name in names:
        begin = (run.dir.parents[1] / "corpus" / name).read_text()[:16]
        assert begin in output, "a prompt is the beginning of its document"


def test_a_page_may_be_a_picture(run, tmp_path, capsys):
    picture = tmp_path / "some.svg"
    cli.main(["generate", str(run.dir), "--prompt", "One and two", "--out", str(picture), *GENERATE])
    shown = picture.read_text()
    assert shown.startswith("<svg") and "One&#160;and&#160;two" in shown and "url(" not in shown.replace("url(#", "")
    assert str(picture) in capsys.readouterr().out
