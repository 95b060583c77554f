"""Prompts for a small chat model, no text of anybody's: instructions, code and sums made of templates, and what the
model itself expects to be asked.

    python experiments/prompts.py prompts.jsonl --count 700 --base runs/base   # to be answered and learnt from
    python experiments/prompts.py dev.jsonl --count 48 --held-out              # of subjects that the others do not have

With `--base` each fourth prompt is invented by that model: it goes on where in its chat template the user's words begin
(Magpie, arXiv 2406.08464). Templates are few, and a head that learns from them alone drafts well for them alone.
A line has `messages` and a `category`. The same arguments make the same file on the same machine.

Cost: of SmolLM2-135M in bfloat16 two minutes for 437 that are invented, on two cores with AMX.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import mtp_jax

SUBJECTS = """
a bakery; a bicycle; a black hole; a budget for a family; a city garden; a compost heap; a coral reef; a debate club
a first job interview; a food market; a forest fire; a glacier; a good night's sleep; a guitar; a haiku; a hospital ward
a job in sales; a lighthouse; a long train journey; a marathon; a museum of clocks; a new language; a noisy neighbour
a photograph of the sea; a power cut; a rainy Sunday; a school trip; a small library; a solar panel; a startup; a storm
a vegetable soup; a village school; a weather forecast; an aquarium; an earthquake; an electric car; an old violin
artificial intelligence; bees; chess; climate change; coffee; democracy; desert plants; dinosaurs; email; evolution
folk music; friendship; gravity; healthy breakfasts; inflation; kindness; learning to swim; magnets; meditation
migrating birds; mountains in winter; online shopping; painting; patience; photosynthesis; pirates; public transport
recycling; remote work; robots; running shoes; saving water; shyness; street art; tea; the Internet; the Moon
the Olympic Games; the Roman Empire; the human heart; the ocean floor; the printing press; theatre; vaccines; volcanoes
"""
INSTRUCTIONS = """
Write a short story about {}.
Write a poem of eight lines about {}.
Explain {} to a child of ten.
Explain what matters most about {} in three sentences.
Give me five tips about {}.
List ten words that come to mind when you think of {}.
Write a friendly email to a colleague about {}.
Write the opening paragraph of an essay about {}.
What are the advantages and disadvantages of {}?
Describe {} for somebody who has never heard of it.
Write a dialogue between two friends about {}.
Suggest three titles for an article about {}, and say why each would work.
Write a product description that has something to do with {}.
Compose a tweet about {}.
Make a list of questions for an interview about {}.
Summarise what people usually believe about {}, and what is wrong with it.
Write a speech of one minute about {}.
Give a step by step plan for a week with {}.
Create a quiz with four questions and answers about {}.
What would you ask an expert about {}?
Tell me a joke about {} and explain it.
Compare {} with something from everyday life.
Write a review, with stars, of {}.
How has {} changed over the last hundred years?
"""
TASKS = """
adds two numbers given as strings; balances brackets in an expression; capitalises every word of a sentence
checks whether a number is a perfect square; checks whether a number is prime; checks whether a string is a palindrome
checks whether a word has repeated letters; checks whether a year is a leap year; checks whether two words are anagrams
computes the greatest common divisor of two numbers; computes the area of a polygon; computes the factorial of a number
computes the median of a list; computes the moving average of a list; computes the n-th Fibonacci number
computes the power of a number without the operator for it; converts a binary string to a number
converts a list of pairs to a dictionary; converts minutes to hours and minutes; converts temperatures between scales
counts how often each word occurs in a text; counts the days between two dates; counts the digits of a number
counts the set bits of a number; counts the vowels of a string; draws a triangle of stars
finds all pairs of a list with a given sum; finds the common elements of two lists; finds the first repeated character
finds the index of a value in a sorted list; finds the largest sum of neighbouring elements; finds the longest word
finds the longest common prefix of some strings; finds the missing number between 1 and n; finds the mode of a list
finds the second largest number of a list; finds the shortest path through a grid; flattens a nested list
generates a random password; generates all permutations of a string; generates all subsets of a list
generates the first n rows of Pascal's triangle; groups words by their first letter; inserts into a binary search tree
implements a queue with two stacks; implements a simple cache; implements a stack; implements merge sort
implements quick sort; implements bubble sort; inverts a dictionary; merges two sorted lists; moves all zeros to the end
multiplies two matrices; parses a line of CSV; prints a calendar of a month; prints a multiplication table
prints the numbers from 1 to 100 with fizz and buzz; reads a file and counts its lines; removes duplicates from a list
removes the vowels of a string; replaces the spaces of a string; returns the prime factors of a number
reverses a linked list; reverses the words of a sentence; rotates a list by k places; rounds a price to five cents
searches a matrix for a word; simulates a dice; solves a quadratic equation; sorts a dictionary by its values
sorts words by their length; splits a list into parts of equal size; sums the digits of a number
sums the even numbers of a list; swaps two variables; transposes a matrix; turns a number into Roman numerals
turns a sentence into pig latin; validates an email address; validates a card number; zips two lists together
"""
CODE = """
Write a Python function that {}.
Write a function in Python that {}, with a docstring.
Write a Python function that {}, and show how it is called.
Give me a short Python program that {}.
I need a Python function that {}. Explain how it works.
Write a JavaScript function that {}.
Write a Python function that {}, with tests.
How would you write a function that {}?
Write a Python function with type hints that {}.
Write a Java method that {}.
"""
NAMES = "Ada; Ben; Carla; Dmitri; Elif; Femi; Grace; Hugo; Ines; Jun; Kofi; Lena; Mateo; Nadia; Omar; Priya; Rosa"
THINGS = "apples; books; buttons; cards; coins; cookies; eggs; flowers; marbles; pencils; shells; stamps; tickets"
SUMS = """
{a} has {m} {x} and {b} has {n} more than {a}. How many {x} do they have together?
{a} buys {n} {x} for ${p} each and pays with a ${q} note. How much money does {a} get back?
A train travels {m} miles in {p} hours. How far does it travel in {n} hours at the same speed?
{a} reads {n} pages a day. A book has {m} pages. On which day is the book finished?
{a} shares {m} {x} equally among {p} friends and keeps what is left. How many {x} does each friend get?
A shop sells {x} in boxes of {n}. {a} needs {m} {x}. How many boxes must {a} buy, and how many {x} are left over?
{a} earns ${n} an hour and works {p} hours a day, five days a week. How much does {a} earn in four weeks?
The price of a coat is ${m}. It is reduced by {n} percent. What does the coat cost now?
{a} is {n} years old and {b} is {p} years younger. How old will {b} be in {n} years?
A rectangle is {m} cm long and {n} cm wide. What are its area and its perimeter?
{a} had {m} {x}, gave {n} to {b} and lost {p}. How many {x} are left?
{a} runs {p} miles on each weekday and {n} miles on each day of the weekend. How many miles is that in {p} weeks?
A tank holds {m} litres. {n} litres flow in each minute and {p} litres flow out. When is the empty tank full?
{a}, {b} and a friend collected {m}, {n} and {p} {x}. What is the average?
Half of the {m} children of a school play football, and {p} of those also swim. How many play football only?
{a} plants {p} rows of {m} trees. {n} percent of them grow. How many trees is that?
{a} saves ${n} a week and already has ${m}. After how many weeks can {a} buy a bicycle for $600?
A recipe for {p} people needs {n} eggs. How many eggs are needed for {m} people?
"""


def parts(text: str) -> list[str]:
    """What a text lists."""
    return [part.strip() for line in text.strip().splitlines() for part in line.split(";")]


def share(found: list[str], held_out: bool) -> list[str]:
    """Of a list each sixth, which is held out, or the others."""
    return [part for i, part in enumerate(found) if (i % 6 == 5) == held_out]


def about(templates: str, subjects: str, held_out: bool, chance: random.Random) -> Iterator[str]:
    """Every template with every subject, in an order of chance."""
    texts = [template.format(it) for template in parts(templates) for it in share(parts(subjects), held_out)]
    chance.shuffle(texts)
    return iter(texts)


def sums(held_out: bool, chance: random.Random) -> Iterator[str]:
    """Templates with names and numbers."""
    seen = set()
    while True:
        a, b = chance.sample(parts(NAMES), 2)
        m, n, p = chance.randint(40, 180), chance.randint(11, 36), chance.randint(2, 9)
        numbers = {"m": m, "n": n, "p": p, "q": -(-n * p // 50) * 50}
        text = chance.choice(share(parts(SUMS), held_out)).format(a=a, b=b, x=chance.choice(parts(THINGS)), **numbers)
        if text not in seen:
            seen.add(text)
            yield text


def invented(base: str) -> Iterator[str]:
    """What the model of a run writes where the user's words would be, if it comes to an end; no more where of 64 texts
    fewer than eight are new and do. 51 of SmolLM2-135M's first 64 do."""
    run, seen = mtp_jax.load(base, decoding_only=True), set()
    one, other = (run.conversation([{"role": "user", "content": text}]) for text in ("a", "b"))
    begin = one[: np.argmax(one != other)]
    for seed in itertools.count():
        before = len(seen)
        out = run.generate_tokens([begin] * 64, max_new_tokens=96, temperature=1.0, top_p=0.95, seed=seed, k=0)
        for ids in out.tokens:
            text = run.tokenizer.decode(ids[:-1]).strip()
            if ids[-1] in run.stop_tokens and len(text) >= 16 and text not in seen:
                seen.add(text)
                yield text
        if len(seen) < before + 8:
            return


def prompts(count: int, held_out: bool = False, base: str = "", seed: int = 0) -> list[dict]:
    """So many records of the kinds in turn. Raises `ValueError` where the templates do not give so many."""
    chance = random.Random(f"{seed} {held_out}")
    kinds = {
        "instruction": about(INSTRUCTIONS, SUBJECTS, held_out, chance),
        "code": about(CODE, TASKS, held_out, chance),
        "math": sums(held_out, chance),
    }
    own = iter(invented(base) if base else ())
    found = []
    while len(found) < count:
        for category, texts in (*kinds.items(), ("invented", own)):
            text = next(texts, None)
            if text is None and category in kinds:
                raise ValueError(f"The templates give {len(found)} prompts, and {count} were asked for.")
            if text:
                found.append({"messages": [{"role": "user", "content": text}], "category": category})
    return found[:count]


def write(path: Path, count: int, held_out: bool = False, base: str = "") -> None:
    """A file of so many, whole or not at all."""
    lines = [json.dumps(record) + "\n" for record in prompts(count, held_out, base)]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(lines))
    partial.replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=700)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--base", default="", metavar="RUN", help="the model of this run invents each fourth")
    options = parser.parse_args()
    write(options.out, options.count, options.held_out, options.base)
