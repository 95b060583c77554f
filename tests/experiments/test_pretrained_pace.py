"""What the stages of the pretrained recipe are expected to take."""

import runpy
import sys

import pytest

from support import REPOSITORY


@pytest.fixture(scope="module")
def recipe():
    folder = str(REPOSITORY / "experiments")
    sys.path.insert(0, folder)
    yield runpy.run_path(f"{folder}/pretrained.py", run_name="recipe")
    sys.path.remove(folder)


def test_later_stages_are_expected_at_the_pace_of_the_earlier_ones(recipe):
    pace = recipe["Pace"]()
    assert pace.about(None) == ""
    assert pace.about(1) == " (about 1 minute on two cores with AMX)"
    pace.add(2, 6.0)
    pace.add(4, 6.0)
    assert pace.about(10) == " (about 20 minutes, as the stages before went)"
    pace.add(None, 9.0)  # of which nothing was expected
    pace.add(5, 0.0)  # which was there
    assert pace.about(10) == " (about 20 minutes, as the stages before went)"


def test_a_stage_that_goes_on_says_nothing_of_the_pace(recipe, tmp_path, monkeypatch, capsys):
    """Stages take ten times as long as expected; the second had begun before. How long the training takes is known by
    then, and is no matter of the pace."""
    said, trained = [], []
    size = recipe["Size"](1, 3, 1, steps=1200, training_minutes=15, minutes=(1, 2, 3, 4, 5, 6, 7))
    took = iter([10.0, 1.0, 30.0, 40.0, 3.0, 50.0, 60.0, 70.0])

    def stage(title, about, made, *command, mark=False):
        said.append(about)
        if "step?" in title:
            made.write_text('{"steps": 460, "minutes": 14}')
        if "Train" in title:
            trained.extend(command)
        return 0.0 if "Import" in title else next(took)

    main = recipe["main"]
    monkeypatch.setitem(main.__globals__["SIZES"], "small", size)
    monkeypatch.setitem(main.__globals__, "stage", stage)
    monkeypatch.setitem(main.__globals__, "model", lambda into: "model.gguf")
    (tmp_path / ".own.partial").mkdir()
    main("small", tmp_path)
    minutes = [int(about.split()[1]) for about in said if about]
    assert minutes == [1, 20, 30, 40, 14, 50, 60, 70]
    assert trained[trained.index("--steps") + 1] == 460
    assert trained[trained.index("--eval-every") + 1] == 115
