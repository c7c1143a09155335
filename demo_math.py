r"""
MATH in miniature: what `python demo.py --task math` runs, through the same scripts as the household.

A problem is a chain of one-digit steps mod 10. Its level (1 to 5) is the number of steps, and its subject says which
operations occur. Sender and actor are the same small model and both read the whole problem: no fact is hidden from the
actor, only work is done for it. The plan gives every value on the way but never the last, which the actor computes.

What this shows: values that cost the sender several steps of writing reach the actor as latents, so that one step is
left to it at every level, where an actor without a message cannot follow the chain and guesses. So the gap between the
two opens with the level: none at level 1, where the plan has no value to give, and large from level 2 on.
What it does not show: that latents are better than text (they are a little worse), that they are cheaper (the sender
writes its plan, one token per latent), that different models understand each other, or anything about real MATH.
"""
import random
import zlib

import matplotlib
import numpy as np
import torch

import collect
import demo
import eval_math
import train_actor
from common import atomic_path, write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# The problems

OPERATIONS = {"plus": range(1, 10), "minus": range(1, 10), "times": (3, 7, 9), "max": range(1, 9), "min": range(1, 9)}
SUBJECTS = {"sums": ["plus"], "signs": ["plus", "minus"], "products": ["times"], "extremes": ["max", "min"],
            "mixed": list(OPERATIONS)}
ORDINALS = "first second third fourth fifth".split()
LEVELS = range(1, 6)
PROMPT = "{task} plan ?"  # what the sender is asked


def apply(operation, value, number):
    """One step of a chain, mod 10."""
    return {"plus": value + number, "minus": value - number, "times": value * number,
            "max": max(value, number), "min": min(value, number)}[operation] % 10


def chain(rng, level, weights=(1, 1, 1, 1, 1)):
    """A random problem of `level` steps: {"subject", "level", "start", "steps": [(operation, number), …]}."""
    subject = rng.choices(list(SUBJECTS), weights)[0]
    operations = rng.choices(SUBJECTS[subject], k=level)
    return {"subject": subject, "level": level, "start": rng.randrange(10),
            "steps": [(operation, rng.choice(OPERATIONS[operation])) for operation in operations]}


def question(problem):
    """The problem in words; an ordinal before each operation makes it easy to find again."""
    steps = " , ".join(f"{n} {operation} {number}" for n, (operation, number) in zip(ORDINALS, problem["steps"]))
    return f"{problem['subject']} : start {problem['start']} , {steps} . mod ten ?"


def values(problem):
    """The running value after each step; the last one is the answer."""
    value, out = problem["start"], []
    for operation, number in problem["steps"]:
        value = apply(operation, value, number)
        out.append(value)
    return out


def plan(problem):
    """The sender's plan: the value before each step and the step, but not the value after the last.

    Each value v is followed by its opposite, v + 5, so that only the order of the words tells which of the two is
    meant: a random rotation keeps the mean of the states, and would keep a value that stands alone."""
    before = [problem["start"], *values(problem)[:-1]]
    return " gives ".join(f"{value} {(value + 5) % 10} {ordinal} {operation} {number}" for value, ordinal,
                          (operation, number) in zip(before, ORDINALS, problem["steps"])) + " ."


def solution(problem):
    r"""The actor's reply, boxed as in MATH."""
    return rf"\boxed{{ {values(problem)[-1]} }}"


def held_out(problem):
    """True for the fifth of the problems that no model is trained on."""
    return zlib.crc32(question(problem).encode()) % 5 == 0


def problems(split, n):
    """n different problems of "train" or "test", the five levels in turn."""
    rng, found = random.Random(split), {}
    while len(found) < n:
        problem = chain(rng, len(found) % 5 + 1)
        if held_out(problem) == (split == "test"):
            found.setdefault(question(problem), problem)
    return list(found.values())


def records(split, n):
    """The problems with the fields of MATH's own files."""
    return [{"id": f"{split}-{i:04d}", "problem": question(p), "level": f"Level {p['level']}", "type": p["subject"],
             "solution": solution(p)} for i, p in enumerate(problems(split, n))]


# ---------------------------------------------------------------------------------------------------------------------
# The language model

def tokenizer():
    """Every word of the problems, the plans and the replies."""
    return demo.build_tokenizer([*SUBJECTS, *OPERATIONS, *ORDINALS, *map(str, range(10)), demo.PLAN_ANNOUNCEMENT,
                                 r"start gives mod ten plan : , . ? \boxed{ }"])


def examples(rng, plans=8, with_plan=8, without=8):
    """A step of `train_lm`: plans to write, and questions to answer with the plan as text and without one. In the
    same time, many small steps learn far more than few large ones."""
    drawn = []
    while len(drawn) < plans + with_plan + without:
        problem = chain(rng, rng.choice(LEVELS), weights=(1, 3, 1, 1, 2))  # minus mod ten is learned last by far
        if not held_out(problem):
            drawn.append(problem)
    out = [[(f"<user> {PROMPT.format(task=question(p))} <eos> <assistant>", False), (f"{plan(p)} <eos>", True)]
           for p in drawn[:plans]]
    for i, p in enumerate(drawn[plans:]):
        # the plan is supervised here too: half as many steps are enough
        message = [(f"{demo.PLAN_ANNOUNCEMENT} <bop>", False), (plan(p), True), ("<eop>", False)]
        out.append([(f"<user> {question(p)}", False), *(message if i < with_plan else []),
                    ("<eos> <assistant>", False), (f"{solution(p)} <eos>", True)])
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The stages, each through its real script

SETTINGS = {  # steps and sizes: measured so that the whole takes minutes on 2 cores
    False: {"base": 1400, "collect": 3000, "problems": 300, "actor": 200, "no message": 200},
    True: {"base": 850, "collect": 800, "problems": 100, "actor": 60, "no message": 40},
}
MEANING = {"none": "latent message", "text": "the plan as text, same actor", "no_comm": "no message, same actor",
           "no_comm_base": "no message, base fine-tuned for it", "cross_task": "another problem's message",
           "randomrot": "message rotated at random"}


def math(args, out):
    """Base LM, messages, two actors, evaluation -> accuracy by name and level, and seconds."""
    torch.set_num_threads(1)  # the matrices are tiny: a second thread saves nothing, and waits where others compute
    n, seconds = SETTINGS[args.fast], {}
    demo.make_lm(seconds, f"{out}/base", tokenizer(), "base", examples, args.seed, n["base"], layers=2,
                 feed_forward=384, learning_rate=6e-3)
    for split, size in (("train", n["collect"]), ("test", n["problems"])):
        write_json(f"{out}/{split}.json", records(split, size))
        demo.stage(seconds, f"collect {split}", collect,
                   f"math --model_name_or_path {out}/base --dataset_path {out}/{split}.json --output_dir "
                   f"{out}/messages_{split} --prompt_template '{PROMPT}' --question_template '{{task}}' "
                   f"--max_new_tokens 40 --batch_size 100 --torch_dtype fp32")
    train = (f"--model_name_or_path {out}/base --train_file {out}/messages_train/train.json --global_batch_size 32 "
             f"--per_device_train_batch_size 32 --logging_steps 50 --seed {args.seed}")
    # a small step for the actor, or it forgets how to do without a message; the adapter starts from nothing
    demo.stage(seconds, "train actor", train_actor,
               f"{train} --hidden_data {out}/messages_train --output_dir {out}/actor --max_steps {n['actor']} "
               f"--learning_rate 3e-5 --adapter_learning_rate 6e-3 --adapter_scale 1.0 --adapter_output_scale 0.3 "
               f"--plan_similarity_weight 0.5 --random_contrast_weight 0.1 "
               f"--plan_announcement '{demo.PLAN_ANNOUNCEMENT}'")
    demo.stage(seconds, "train without messages", train_actor,
               f"{train} --message none --output_dir {out}/actor_no_message --max_steps {n['no message']} "
               f"--learning_rate 1e-3")
    found = demo.stage(seconds, "eval", eval_math,
                       f"--model_path {out}/actor --baseline_path {out}/actor_no_message --hidden_data "
                       f"{out}/messages_test --dataset {out}/test.json --question_template '{{task}}' --variants none "
                       f"text no_comm no_cot cross_task randomrot --max_length 8 --batch_size {n['problems']} "
                       f"--torch_dtype fp32 --seed {args.seed} --output_dir {out}/eval")
    found["no_comm_base"] = found.pop("no_cot")  # the base model, fine-tuned to answer without a message
    return {"accuracy": {name: found[name]["accuracy"] for name in MEANING},
            "interval": {name: found[name]["interval"] for name in MEANING},
            "by_level": {name: {level: {key: cell[key] for key in ("questions", "accuracy", "interval")}
                                for level, cell in found[name]["by_level"].items()} for name in MEANING},
            "problems": n["problems"], "seconds": seconds}


def report(summary, out):
    """summary.json, results.png and what the message is worth at each level."""
    write_json(f"{out}/summary.json", summary)
    levels = list(summary["by_level"]["none"])
    accuracy = {name: np.array([cell["accuracy"] for cell in cells.values()])
                for name, cells in summary["by_level"].items()}
    gap = accuracy["none"] - accuracy["no_comm"]
    figure, axes = plt.subplots(figsize=(8, 4.5))
    colors = ("tab:blue", "tab:cyan", "tab:orange", "tab:red", "silver", "gray")
    for i, (name, color) in enumerate(zip(MEANING, colors)):
        low, high = np.array([cell["interval"] for cell in summary["by_level"][name].values()]).T
        x = np.arange(len(levels)) + 0.03 * (i - 2.5)  # side by side, so that all bars are seen
        axes.errorbar(x, accuracy[name], yerr=[accuracy[name] - low, high - accuracy[name]], color=color, marker="o",
                      capsize=2, label=f"{MEANING[name]} ({summary['accuracy'][name]:.2f})")
    axes.fill_between(range(len(levels)), accuracy["no_comm"], accuracy["none"], color="tab:blue", alpha=0.1)
    for x, points in enumerate(100 * gap):
        axes.text(x, 1.05, f"{points:+.0f} points", ha="center", color="tab:blue")
    axes.set_xticks(range(len(levels)), levels)
    axes.set(ylim=(0, 1.12), xlabel="level: the number of steps", ylabel="accuracy (95 % Wilson interval)",
             title=f"{summary['problems']} held-out problems; above: latent message minus no message")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    with atomic_path(f"{out}/results.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    print(f"\n{summary['problems']} held-out problems\n{'name':14s} {'what the actor gets':36s} accuracy  95 % "
          f"interval")
    for name, meaning in MEANING.items():
        low, high = summary["interval"][name]
        print(f"{name:14s} {meaning:36s} {summary['accuracy'][name]:8.3f}  [{low:.3f}, {high:.3f}]")
    print("none minus no_comm, in points: " + ", ".join(f"level {k} {100 * g:+.0f}" for k, g in zip(levels, gap)))
    demo.print_end(summary["seconds"], out, f"{out}/base")
