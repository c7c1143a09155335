r"""
MATH in miniature: chains of one-digit steps, tiny language models, all stages but compression.

  python examples/arithmetic.py          # about two minutes on 2 cores: a table and arithmetic_out/results.png
  python examples/arithmetic.py --fast   # under a minute, weaker

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

    1. the world             chains, questions, plans, in the fields of MATH's own files
    2. the language model    one for the sender and the start of the actors
    3. the stages            each command as one would type it
"""
import functools
import os
import random
import sys
import zlib

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts are one folder up

from common import one_line_errors, read_json, write_json  # noqa: E402
from examples.scratch import (  # noqa: E402
    PLAN_ANNOUNCEMENT, build_tokenizer, demo_parser, make_lm, one_turn, open_output, report, stage)

# ---- 1. The world --------------------------------------------------------------------------------
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


# ---- 2. The language model -----------------------------------------------------------------------
def actor_sample(problem):
    """The actor answers with the plan in words, which is supervised too: half as many steps are enough."""
    return [
        (f"<user> {question(problem)} {PLAN_ANNOUNCEMENT} <bop>", False),
        (plan(problem), True),
        ("<eop> <eos> <assistant>", False),
        (f"{solution(problem)} <eos>", True)]


def samples(rng, size=8):
    """The samples of a step: `size` plans to write, as many questions with the plan, as many without one. In
    the same time, many small steps learn far more than few large ones."""
    drawn = []
    while len(drawn) < 3 * size:
        problem = chain(rng, rng.choice(LEVELS), weights=(1, 3, 1, 1, 2))  # minus mod ten is learned last
        if not held_out(problem):
            drawn.append(problem)
    plans = [one_turn(f"{question(problem)} plan ?", plan(problem)) for problem in drawn[:size]]
    with_plan = [actor_sample(problem) for problem in drawn[size:2 * size]]
    return plans + with_plan + [one_turn(question(problem), solution(problem)) for problem in drawn[2 * size:]]


# ---- 3. The stages -------------------------------------------------------------------------------
SIZES = {  # by --fast: steps and counts
    False: {"base": 1400, "train": 3000, "test": 300, "actor": 200, "baseline": 200},
    True: {"base": 850, "train": 800, "test": 100, "actor": 60, "baseline": 40},
}
MEANING = {
    "latent": "latent message",
    "text": "the plan as text, same actor",
    "no_comm": "no message, same actor",
    "no_cot": "no message, base fine-tuned for it",
    "cross_task": "another problem's message",
    "randomrot": "message rotated at random",
}


def arithmetic(out, seed, sizes):
    """All stages but compression -> {row of the table: {"accuracy", "interval", ...}}."""
    run = functools.partial(stage, out, seed=seed, **sizes)

    # --- one LM is both sender and base of the actor
    tokenizer = build_tokenizer(WORDS)
    make_lm(f"{out}/base", tokenizer, "base", samples, seed, sizes["base"], layers=2, feed_forward=384,
            learning_rate=6e-3)

    # --- stage 1
    collect = """collect.py math --model_name_or_path {out}/base --prompt_template '{{task}} plan ?'
        --question_template '{{task}}' --max_new_tokens 40 --batch_size 100 --torch_dtype fp32 """
    for split in ("train", "test"):
        write_json(f"{out}/{split}.json", records(split, sizes[split]))
        run(f"collect {split}", f"{collect} --dataset_path {{out}}/{split}.json --output_dir {{out}}/messages_{split}")

    # --- stage 2: small steps for the actor, or it forgets how to do without a message; the adapter is new
    train = """train_actor.py --model_name_or_path {out}/base --train_file {out}/messages_train/train.json
        --global_batch_size 32 --per_device_train_batch_size 32 --logging_steps 50 --seed {seed} """
    run("train actor", train + """
        --hidden_data {out}/messages_train --plan_announcement 'plan :' --output_dir {out}/actor
        --max_steps {actor} --learning_rate 3e-5 --adapter_learning_rate 6e-3
        --adapter_scale 1.0 --adapter_output_scale 0.3
        --plan_similarity_weight 0.5 --random_contrast_weight 0.1""")
    run("train without messages", train + """
        --message none --output_dir {out}/actor_no_message --max_steps {baseline} --learning_rate 1e-3""")

    # --- stage 4: answer
    run("eval", """
        eval_math.py --model_path {out}/actor --baseline_path {out}/actor_no_message
        --hidden_data {out}/messages_test --dataset {out}/test.json --question_template '{{task}}'
        --variants latent text no_comm no_cot cross_task randomrot
        --max_length 8 --batch_size {test} --torch_dtype fp32 --seed {seed} --output_dir {out}/eval""")
    results = read_json(f"{out}/eval/summary.json")["variants"]
    for level in LEVELS:  # what the message is worth at each
        for row in ("latent", "no_comm"):
            results[f"{row}, level {level}"] = results[row]["by_level"][str(level)]
    return results


def get_args(argv):
    parser = demo_parser("arithmetic.py", __doc__, "arithmetic_out", "under a minute: fewer steps, weaker results")
    parser.flag("--seed", 0, "of the model and of everything drawn")
    return parser.parse_args(argv)


@one_line_errors("arithmetic.py")
def main(argv=None):
    args = get_args(argv)
    out, sizes = args.output_dir, SIZES[args.fast]
    torch.set_num_threads(1)  # the matrices are tiny: a second thread waits more than it computes
    open_output(out, {"example": "arithmetic", "seed": args.seed, "sizes": sizes}, args.fresh)
    results = arithmetic(out, args.seed, sizes)
    report(out, results, "accuracy", MEANING, sizes["test"])
    print(f"look inside a message: python collect.py inspect {out}/messages_test --model_name_or_path {out}/base")


if __name__ == "__main__":
    main()
