"""`mtp-jax chat`: a conversation from a pipe."""

import io

import pytest

import mtp_jax
from mtp_jax import cli
from mtp_jax.commands import chat
from mtp_jax.data.tokenizers.conventions import Conventions
from mtp_jax.decode.spans import visible
from mtp_jax.interop.importing import import_run
from support.pretrained import write

pytest.importorskip("jinja2", reason="chat templates are Jinja: pip install 'mtp_jax[hf]'")
pytest.importorskip("safetensors", reason="weights are read by safetensors: pip install 'mtp_jax[hf]'")


@pytest.fixture
def run(tmp_path):
    directory, *_ = write(tmp_path / "source", max_position_embeddings=128)
    return import_run(str(directory), tmp_path / "run")


def talk(monkeypatch, run, text, *options):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    cli.main(["chat", str(run), "--max-new-tokens", "5", *options])


def test_each_message_is_answered_with_all_that_was_said_before(run, monkeypatch, capsys):
    seen, whole = [], Conventions.render

    def render(self, messages, **options):
        seen.append([message["role"] for message in messages])
        return whole(self, messages, **options)

    monkeypatch.setattr(Conventions, "render", render)
    talk(monkeypatch, run, "Hi\n\nBye\n", "--system", "Be brief")
    assert seen[1:] == [["system", "user"], ["system", "user", "assistant", "user"]]
    assert capsys.readouterr().out.count("tokens/s") == 2


def test_one_message_is_answered_as_by_the_model_in_a_notebook(run, capsys):
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    loaded = mtp_jax.load(run)
    want = loaded.chat(messages, max_new_tokens=7)
    spans = list(loaded.stream(messages, max_new_tokens=7))
    assert "".join(span.text for span in spans[1:]) == want and spans[0].kind == "prompt"
    options = ["--max-new-tokens", "7", "--temperature", "0"]
    cli.main(["generate", str(run), "--chat", "--prompt", "Hi", "--system", "Be brief", *options])
    answer = capsys.readouterr().out.rpartition("\n[")[0]
    assert answer.endswith(visible(want)) and "[7 tokens" not in want


def test_a_conversation_that_fills_the_context_says_so(run, monkeypatch, capsys):
    talk(monkeypatch, run, "long " * 60 + "\nHi\n")
    out = capsys.readouterr().out
    assert "and the context holds 128. Begin again" in out and out.count("tokens/s") == 1


def test_ctrl_c_stops_the_answer_and_not_the_conversation(run, monkeypatch, capsys):
    answers, whole = [], chat._answer

    def answer(run, options, messages, turn, stopped):
        if turn == 0:
            stopped.set()
        answers.append(whole(run, options, messages, turn, stopped))
        return answers[-1]

    monkeypatch.setattr(chat, "_answer", answer)
    talk(monkeypatch, run, "Hi\nBye\n", "--seed", "4")
    out = capsys.readouterr().out
    assert "[1 tokens" in out.splitlines()[1] and "[5 tokens" in out
