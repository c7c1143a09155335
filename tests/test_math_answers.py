"""What is the answer in a reply, and is it right: MATH's published rules, and what no answer may do to a run."""
import json
import os
import random
import time

import pytest

from eval_math import extract_answer, is_equiv, load_grader

with open(os.path.join(os.path.dirname(__file__), "math_rules.jsonl")) as file:
    JUDGED = [json.loads(line) for line in file]  # real answers, the rules' verdict and a person's

EQUAL = [  # a pair or more for each rule, and for those that meet
    ("5", "5"), ("x+1", "x + 1"), ("1,000", "1, 000"), ("10,\\!000", "10,000"), ("1\n0", "10"),
    (r"\frac12", r"\frac{1}{2}"), (r"\dfrac{1}{2}", r"\tfrac{1}{2}"), (r"\frac1{72}", r"\frac{1}{72}"),
    (r"\frac 34", "3/4"), (r"\frac xy", r"\frac{x}{y}"), ("3/4", r"\frac{3}{4}"),
    ("-3/4", r"\frac{-3}{4}"), ("0/1", r"\frac{0}{1}"), (r"\\frac{1}{2}", r"\frac12"), (r"\\pi", r"\pi"),
    ("0.5", r"\frac12"), (".5", "1/2"), (".25", "0.25"), ("x + .5", "x + 0.5"), (r"\sqrt{.5}", r"\sqrt{0.5}"),
    (r"\sqrt3", r"\sqrt{3}"), (r"2\sqrt2", r"2\sqrt{2}"), (r"\sqrt{13}", r"\\sqrt{13}"),
    (r"\left(1,2\right)", "(1,2)"), ("90^\\circ", "90"), (r"90^{\circ}", "90"), (r"\$5", "5"),
    (r"50\%", "50%"), ("50%", "50"), (r"5\text{ cm}", "5"), (r"5 \text{ cm}^2", "5"), (r"\frac12\text{ miles}", "1/2"),
    ("x=5", "5"), ("x = 5", "5"), ("5=", ""), (r"x=\frac12", "0.5"), (r"\text{Sunday}", r"\text{Sunday}"),
    (r"1\text{ h } 5\text{ min}", r"1\text{ h } 5\text{ min}"),
]
UNEQUAL = [
    ("1", "2"), ("12", "21"), ("5", "-5"), ("A", "a"), ("4", "4.0"), ("1,000", "1000"), ("1,2", "2,1"),
    ("x+1", "1+x"), ("0.25", r"\frac14"), ("1.5", "3/2"), (r"\frac24", r"\frac12"), (r"-\frac12", r"\frac{-1}{2}"),
    (r"\frac{1}2", r"\frac12"), ("01/2", "1/2"), ("x/2", r"\frac{x}{2}"), ("1/2/3", r"\frac12"),
    (r"\sqrt 3", r"\sqrt3"), ("sqrt3", r"\sqrt3"), (r"\sqrt{12}", r"\sqrt12"), ("x^{2}", "x^2"), ("5_{8}", "5_8"),
    (r"(1,2)", "[1,2]"), (r"\{1,2\}", r"\{2,1\}"), ("abc=5", "5"), ("x=5", "y=6"), ("x=1,y=2", "1,2"), ("x=y=5", "5"),
    (r"\text{Sunday}", "Sunday"), (r"5\text{cm}", "5"), ("5 cm", "5"), (r"5\mbox{ cm}", "5"),
    (r"1\text{ h } 5\text{ min}", "1"), ("$5$", "5"), ("5.", "5"), ("90 degrees", "90"),
    (None, "5"), ("5", None), (None, None), ("", "5"),
]
EXTRACT = [
    (r"so \boxed{5}", "5"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"first \boxed{1}, then \boxed{2}.", "2"),
    (r"\fbox{7}", "7"), (r"\boxed{1} \fbox{2}", "2"), (r"\fbox{1} \boxed{2}", "2"), (r"\boxed{\boxed{3}}", "3"),
    (r"\boxed{x^{2^{3}}}", "x^{2^{3}}"), (r"$\boxed 5$", "5"), (r"$\boxed 5.$", "5"), (r"\boxed 5", "5"),
    (r"it is \boxed 12 apples", "12"), (r"\boxed 3.5$", "3.5"), (r"\boxed { 4 }", "4"), (r"\boxed{ 4 } <eos>", "4"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed{\text{a } b}", r"\text{a } b"), ("\\boxed{\n6\n}", "6"), (r"\boxed{(1,2]}", "(1,2]"),
    (r"\boxed{5", None), (r"\boxed{1} and \boxed{\frac{1}{2}", None), (r"\boxed{}", None), (r"\boxed", None),
    (r"\boxedtext{5}", None), ("no box: 5", None), ("", None), (None, None), (r"\boxed{\}", None),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\boxed{a}{b}", "a"), ("a\n#### 42", "42"), ("#### 1\n####  2 ", "2"), ("#### 1\n\\boxed{2}", "2"),
]


@pytest.mark.parametrize("pair", JUDGED, ids=lambda pair: f"{pair['reference']} {pair['answer']}")
def test_the_verdict_of_the_published_rules(pair):
    a, b, verdict = pair["answer"], pair["reference"], pair["published_rules"]
    assert is_equiv(a, b) == is_equiv(b, a) == verdict
    assert pair["equal"] or not verdict  # they never take a wrong answer for a right one


@pytest.mark.parametrize("a, b, equal", [*((*pair, True) for pair in EQUAL), *((*pair, False) for pair in UNEQUAL)])
def test_each_rule(a, b, equal):
    assert is_equiv(a, b) == is_equiv(b, a) == equal


@pytest.mark.parametrize("text, answer", EXTRACT)
def test_extract(text, answer):
    assert extract_answer(text) == answer


def test_math_verify_knows_more():
    pytest.importorskip("math_verify")
    correct = load_grader("math_verify")
    assert correct(r"\frac{4}{8}", "0.5") and correct("1+x", "x+1") and not correct("3", "2")
    assert not correct(None, "2") and not correct(None, "None")
    judged = [correct(pair["answer"], pair["reference"]) for pair in JUDGED]
    assert not any(right for right, pair in zip(judged, JUDGED) if not pair["equal"])
    assert sum(right == pair["equal"] for right, pair in zip(judged, JUDGED)) >= 75  # 76 of 79


PIECES = [r"\frac", r"\sqrt", r"\sqrt[", r"\text{", r"\text{ cm}", r"\boxed{", r"\left(", r"\right]", r"\frac{1}{",
          r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", r"\pm", r"\cup", r"\{", r"\}", r"\pi", r"\cdot", r"\,", "\\",
          "####", "°", "π", "²", "٣", "½", "\ud800", "\x00", "\n", "1e999", "nan", "1/", "x=",
          "_{", "^{", "9^{", *"{}()[]1234567890.,-+/^_ x=<>&;:|!'\"*$%aB"]


def test_nothing_that_a_model_writes_raises_or_stalls():
    """10,000 strings of pieces at random, and long ones of a piece. None of them is 41, and each takes no time."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(1, 30))) for _ in range(10000)]
    texts += [piece * n for piece in PIECES for n in (1, 100, 5000)]
    texts += ["{" * 20000 + "5" + "}" * 20000, r"\sqrt{" * 5000, "7" * 50000, "9^{" * 1000 + "}" * 1000]
    for text in texts:
        start = time.perf_counter()
        extract_answer(text), extract_answer(r"\boxed{" + text + "}")
        assert not is_equiv(text, "41") and is_equiv(text, text)
        assert time.perf_counter() - start < 2, text[:80]


@pytest.mark.long
@pytest.mark.parametrize("text", [
    "9^{9^{9^9}}", "2^{2^{2^{2^{2^{2}}}}}", "123456789^{123456789}", "((9!)!)!", r"\binom{10^9}{10^8}", "9" * 400,
    "9" * 5000, "{" * 2000 + "5" + "}" * 2000, r"\frac{" * 300 + "1" + "}{2}" * 300, "(" * 200 + "5" + ")" * 200])
def test_no_answer_stalls_math_verify(text):
    """Some of these would take minutes, or all memory."""
    pytest.importorskip("math_verify")
    start, correct = time.perf_counter(), load_grader("math_verify")
    assert not correct(text, "41") and not correct("41", text)
    assert time.perf_counter() - start < 45
