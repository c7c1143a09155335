r"""
MATH in miniature: the problems of `python demo.py --task math`.

A problem is a chain of one-digit steps mod 10. Its level (1 to 5) is the number of steps, and its subject
says which operations occur. Sender and actor are the same small model and both read the whole problem: no
fact is hidden from the actor, only work is done for it. The plan gives every value on the way but never the
last, which the actor computes:

    sender reads   signs : start 8 , first plus 7 , second minus 6 . mod ten ? plan ?
    its plan       8 3 first plus 7 gives 5 0 second minus 6 .
    actor reads    signs : start 8 , first plus 7 , second minus 6 . mod ten ? plan : <bop> message <eop>
    its reply      \boxed{ 9 }

What this shows: values that cost the sender several steps of writing reach the actor as latents, so that one
step is left to it at every level, where an actor without a message cannot follow the chain and guesses. So the
gap between the two opens with the level: none at level 1, where the plan has no value to give, and large from
level 2 on. What it does not show: that latents are better than text (they are a little worse), that they are
cheaper (the sender writes its plan, one token per latent), that different models understand each other, or
anything about real MATH.
"""
import random
import zlib

OPERATIONS = {  # with the numbers that a step may have
    "plus": range(1, 10),
    "minus": range(1, 10),
    "times": (3, 7, 9),
    "max": range(1, 9),
    "min": range(1, 9),
}
SUBJECTS = {
    "sums": ["plus"],
    "signs": ["plus", "minus"],
    "products": ["times"],
    "extremes": ["max", "min"],
    "mixed": list(OPERATIONS),
}
ORDINALS = "first second third fourth fifth".split()
LEVELS = range(1, 6)
PROMPT = "{task} plan ?"  # what the sender is asked
PLAN_ANNOUNCEMENT = "plan :"
WORDS = [*SUBJECTS, *OPERATIONS, *ORDINALS, *"0123456789", r"start gives mod ten plan : , . ? \boxed{ }"]


def apply(operation, value, number):
    """One step of a chain, mod 10."""
    match operation:
        case "plus":
            return (value + number) % 10
        case "minus":
            return (value - number) % 10
        case "times":
            return value * number % 10
        case "max":
            return max(value, number)
        case "min":
            return min(value, number)


def chain(rng, level, weights=(1, 1, 1, 1, 1)):
    """A random problem: {"subject", "level", "start", "steps": [(operation, number), ...]}."""
    # one operation is drawn per step, so "mixed" problems mix and "sums" do not
    subject = rng.choices(list(SUBJECTS), weights)[0]
    operations = rng.choices(SUBJECTS[subject], k=level)
    start = rng.randrange(10)
    steps = [(operation, rng.choice(OPERATIONS[operation])) for operation in operations]
    return {"subject": subject, "level": level, "start": start, "steps": steps}


def question(problem):
    """The problem in words; an ordinal before each operation makes it easy to find again."""
    steps = [f"{ordinal} {operation} {number}"
             for ordinal, (operation, number) in zip(ORDINALS, problem["steps"])]
    return f"{problem['subject']} : start {problem['start']} , {' , '.join(steps)} . mod ten ?"


def values(problem):
    """The start and the running value after each step; the last one is the answer."""
    # start 8 , first plus 7 , second minus 6 -> [8, 5, 9]
    running = [problem["start"]]
    for operation, number in problem["steps"]:
        running.append(apply(operation, running[-1], number))
    return running


def plan(problem):
    """The sender's plan: the value before each step and the step, but not the value after the last.

    Each value v is followed by its opposite, v + 5, so that only the order of the words tells which of the
    two is meant: a random rotation keeps the mean of the states, and would keep a value that stands alone."""
    # values (8, 5, 9) -> "8 3 first plus 7 gives 5 0 second minus 6 ."; zip leaves the 9 out
    parts = []
    for value, ordinal, (operation, number) in zip(values(problem), ORDINALS, problem["steps"]):
        opposite = (value + 5) % 10
        parts.append(f"{value} {opposite} {ordinal} {operation} {number}")
    return " gives ".join(parts) + " ."


def solution(problem):
    r"""The actor's reply, boxed as in MATH."""
    return rf"\boxed{{ {values(problem)[-1]} }}"


def held_out(problem):
    """True for the fifth of the problems that no model is trained on."""
    return zlib.crc32(question(problem).encode()) % 5 == 0


def problems(split, n):
    """n different problems of "train" or "test", the five levels in turn."""
    rng, drawn = random.Random(split), {}
    while len(drawn) < n:
        level = len(drawn) % 5 + 1  # the same again where a draw is refused or was drawn before
        problem = chain(rng, level)
        if held_out(problem) == (split == "test"):
            drawn.setdefault(question(problem), problem)
    return list(drawn.values())


def records(split, n):
    """The problems with the fields of MATH's own files."""
    out = []
    for i, problem in enumerate(problems(split, n)):
        out.append({
            "id": f"{split}-{i:04d}",
            "problem": question(problem),
            "level": f"Level {problem['level']}",
            "type": problem["subject"],
            "solution": solution(problem)})
    return out


# --------------------------------------------------------------------------------------------------
# Samples of the language model's first training, [(text, supervised?), ...] each

def sender_sample(problem):
    """The sender reads the problem and writes the plan."""
    prompt = PROMPT.format(task=question(problem))
    return [(f"<user> {prompt} <eos> <assistant>", False), (f"{plan(problem)} <eos>", True)]


def actor_sample(problem, with_plan):
    """The actor answers, with the plan as text or without it."""
    spans = [(f"<user> {question(problem)}", False)]
    if with_plan:  # the plan is supervised here too: half as many steps are enough
        spans += [(f"{PLAN_ANNOUNCEMENT} <bop>", False), (plan(problem), True), ("<eop>", False)]
    return spans + [("<eos> <assistant>", False), (f"{solution(problem)} <eos>", True)]


def samples(rng, size=8):
    """The samples of a step: `size` plans to write, as many questions with the plan, as many without one. In
    the same time, many small steps learn far more than few large ones."""
    drawn = []
    while len(drawn) < 3 * size:
        problem = chain(rng, rng.choice(LEVELS), weights=(1, 3, 1, 1, 2))  # minus mod ten is learned last
        if not held_out(problem):
            drawn.append(problem)
    plans = [sender_sample(problem) for problem in drawn[:size]]
    with_plan = [actor_sample(problem, True) for problem in drawn[size:2 * size]]
    return plans + with_plan + [actor_sample(problem, False) for problem in drawn[2 * size:]]
