"""The prompts that experiments make themselves."""

import collections

import pytest

from experiments import prompts as made


def texts(records):
    return [record["messages"][0]["content"] for record in records]


def test_prompts_are_of_three_kinds_none_twice_and_the_same_each_time():
    records = made.prompts(1800)
    kinds = collections.Counter(record["category"] for record in records)
    assert kinds == {"instruction": 600, "code": 600, "math": 600}
    assert len(set(texts(records))) == 1800 and not any("{" in text for text in texts(records))
    assert made.prompts(60) == records[:60] != made.prompts(60, seed=1)


def test_what_is_held_out_is_about_other_things():
    known, held_out = texts(made.prompts(1800)), texts(made.prompts(150, held_out=True))
    assert not set(known) & set(held_out)
    for text in (made.SUBJECTS, made.TASKS):
        kept = made.share(made.parts(text), held_out=True)
        assert len(kept) >= 12 and any(part in one for part in kept for one in held_out)
        assert not any(part in one for part in kept for one in known)


def test_more_than_the_templates_give_is_refused():
    with pytest.raises(ValueError, match="and 9000 were asked for"):
        made.prompts(9000)
