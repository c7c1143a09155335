"""
Who knows what, on ALFWorld's own games: a sender that is unsure, an actor that knows.

  python examples/alfworld_small.py --unsure --fast               # a quarter of an hour: shows that it runs
  python examples/alfworld_small.py --unsure --seeds 0 1 2        # five hours a seed on 2 cores
  python examples/alfworld_small.py --actor_knows 0 0.5 1         # two hours a seed

Type this at the top of the repository, and again after a kill. --unsure plays the training games, too: it needs
all splits that alfworld-download brings. It is unsure.py on real games, with the models of alfworld_small.py:

    sender reads   You have seen this house: mug 1 is at shelf 2 or at drawer 4. You are in ...
    its plan       take mug 1 from drawer 4, heat it with microwave 1, put it in cabinet 2.

The mug is at the one or at the other. Where a mug may lie and where one does are different kinds of places (a guess
by kinds is right in 80 % of the games), so a sender that learned from the right plans would not be unsure: it
learns both plans of a prompt, each as often. An actor that finds nothing where the plan says goes to the other
place, if it can read which that is.

--actor_knows Q tells the actor, too, what the sender reads, in a share Q of the games, in training and when it
plays: how much of what a message adds is left.

    1. the models        the sender, which is also the start of every actor
    2. the actors        messages, a table's row each, by train_actor.py and eval_alfworld.py
    3. the second place  a linear probe of the messages, the places that an actor visits
    4. the reports       unsure_games.json and .png, actor_knows.json and .png, a table each
"""
import csv
import functools
import glob
import json
import os
import re
import statistics
import sys

import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts are one folder up

from common import read_json, save_figure, write_json, write_text  # noqa: E402
from data import Conversations  # noqa: E402
from examples.alfworld_house import is_told  # noqa: E402
from examples.alfworld_small import (  # noqa: E402
    SPLITS, make_lm, make_tokenizer, train_lm, unpack_demonstrations, write_planning, write_told)
from examples.scratch import PLAN_ANNOUNCEMENT, once, open_output, stage  # noqa: E402
from examples.unsure import folder_of  # noqa: E402
from model import open_shards  # noqa: E402
from variants import DIFFERENCES, bootstrap_interval  # noqa: E402

SIZES = {  # by --fast: steps and counts. `actor` and `every` are of --unsure, `knowing` is of --actor_knows
    False: {"base": 1600, "both": 500, "warm": 200, "actor": 800, "every": 100, "knowing": 120, "train": 3554,
            "games": 140},
    True: {"base": 60, "both": 30, "warm": 20, "actor": 4, "every": 2, "knowing": 4, "train": 60, "games": 20},
}
ACTORS = {  # row of the table: (its messages, what an evaluation calls them, flags of train_actor.py)
    "latent": ("messages", "latent", "--curriculum 0"),
    "text": ("messages", "text", "--message text"),
    "text of both places": ("both", "text", "--message text"),
    "likeliest word": ("likeliest", "latent", "--curriculum 0"),
    "expected word": ("expected", "latent", "--curriculum 0"),
    "latent, adapter warmed up": ("messages", "latent", "--curriculum 0 --adapter_warmup_steps {warm}"),
    "no message": ("search", "no_comm", "--message none"),
}
SENDERS = {  # messages: (the sender, what it sends of its states)
    "messages": ("base", "last"),
    "both": ("both", "last"),
    "likeliest": ("base", "examples.unsure:likeliest"),
    "expected": ("base", "expected"),
}
CURVES = {"latent": "tab:blue", "latent, adapter warmed up": "tab:red"}
HOUSES = {0.0: "SeenHouse", 0.5: "HalfToldHouse", 1.0: "ToldHouse"}  # by the share of games that tell the actor

# ---- 1. The models -------------------------------------------------------------------------------

def either(record):
    """A demonstration's plan, as one writes it who says both places."""
    return record["plan"].replace(f"from {record['named']},", f"from {' or '.join(record['places'])},")


def write_samples(out, root):
    """What the models learn from. planning.json: a prompt and its plans, of the right place and of the decoy.
    both.json: the plan of both places. train_direct.jsonl: demonstrations that follow each of the three."""
    samples = {"planning": [], "both": [], "acting": []}
    for record in [*read_json(f"{root}/train_right.jsonl"), *read_json(f"{root}/train_wrong.jsonl")]:
        plans = {"planning": record["plan"]}
        if record["named"] == record["places"][0]:  # "shelf 2 or drawer 4": go to shelf 2 first
            plans["both"] = either(record)
        for name, plan in plans.items():
            sample = {"id": f"{record['id']} {plan}", "sender_task": record["sender_task"], "plan": plan}
            turns = [{"from": "human", "value": record["sender_task"]}, {"from": "gpt", "value": plan}]
            samples[name].append({**sample, "conversations": turns})
            samples["acting"].append({**sample, "conversations": record["conversations"]})
    write_text(f"{out}/train_direct.jsonl", "\n".join(map(json.dumps, samples.pop("acting"))))
    for name, records in samples.items():
        write_json(f"{out}/{name}.json", records)


def train_base(out, tokenizer, seed, steps, more=()):
    """The sender and start of the actors, by the recipe of alfworld_small.py; more: groups of `train_lm`."""
    direct = Conversations(f"{out}/train_direct.jsonl", tokenizer, kind="text", announcement=PLAN_ANNOUNCEMENT,
                           task_turn=2)
    search = Conversations(f"{out}/train_search.jsonl", tokenizer, kind="none", task_turn=2)
    planning = Conversations(f"{out}/planning.json", tokenizer, kind="none")
    groups = [(direct, "text", 12), (search, "none", 4), (planning, "none", 12), *more]
    base = make_lm(Qwen2Config, Qwen2ForCausalLM, tokenizer, seed)
    train_lm(f"{out}/base", base, tokenizer, groups, seed, steps)


def unsure_models(out, root, seed, sizes):
    """{out}/base, whose plans name one of two places, and {out}/both, a sender that has learned to name both."""
    unpack_demonstrations(out)  # the searches; the others are written anew
    write_samples(out, root)
    tokenizer = make_tokenizer(out)
    train_base(out, tokenizer, seed, sizes["base"])
    both = Conversations(f"{out}/both.json", tokenizer, kind="none")
    lm = make_lm(Qwen2Config, Qwen2ForCausalLM, tokenizer, seed + 1000)
    train_lm(f"{out}/both", lm, tokenizer, [(both, "none", 24)], seed, sizes["both"])


def knowing(records, share):
    """Demonstrations whose actor is told, in this share of the games, what the sender is."""
    changed = []
    for record in records:
        turns = list(record["conversations"])
        if is_told(record["id"], share):
            turns[2] = {"from": "human", "value": record["sender_task"]}
        changed.append({**record, "conversations": turns})
    return changed


def knowing_model(out, seed, sizes):
    """{out}/base for every share: it has also learned to act on what it is told itself."""
    unpack_demonstrations(out)
    write_planning(out)
    write_json(f"{out}/knowing.json", knowing(read_json(f"{out}/train_direct.jsonl"), 1.0))
    tokenizer = make_tokenizer(out)
    told = Conversations(f"{out}/knowing.json", tokenizer, kind="none", task_turn=2)
    train_base(out, tokenizer, seed, sizes["base"], [(told, "none", 4)])


# ---- 2. The actors -------------------------------------------------------------------------------

COLLECT = """collect.py custom --model_name_or_path {out}/{sender} --prompt_template '{{task}}'
    --max_new_tokens 40 --batch_size 140 --torch_dtype fp32 --send {send}
    --output_dir {out}/{messages}_{split} """
TRAIN = """train_actor.py --model_name_or_path {out}/base --task_turn 2 --plan_announcement 'plan :'
    --global_batch_size 32 --per_device_train_batch_size 16 --adam_beta2 0.98 --eval_ratio 0.03
    --eval_steps {every} --save_steps {every} --logging_steps 10 --seed {seed} --output_dir {out}/{folder} """
PLAY = """eval_alfworld.py --env examples.alfworld_house:{house} --split {split} --num_episodes {games}
    --model_path {out}/{folder} --hidden_data {out}/{messages}_{split} --max_new_tokens 20 --batch_size 140
    --torch_dtype fp32 --seed {seed} --output_path {out}/play/{name}_{split} --variants """


def play(out, name, variants, **values):
    """Play the games of both splits -> {variant: {game: steps until it was won, or None}}."""
    episodes = {}
    for split in SPLITS:
        stage(out, f"play {name}, {split}", PLAY + variants, name=name, split=split, **values)
        with open(f"{out}/play/{name}_{split}/results.csv", newline="") as file:
            for row in csv.DictReader(file):
                steps = int(row["steps"]) if row["success"] == "True" else None
                episodes.setdefault(row["variant"], {})[f"{split}/{row['id']}"] = steps
    return episodes


def named_place(plan):
    match = re.search(r"from (\S+ \d+)", plan)
    return match and match[1]


def write_followed(out, root, messages):
    """For each message the demonstration that does what its plan says, if there is one (see `write_told`)."""
    plans, followed, every = open_shards(f"{out}/{messages}_train").records, [], []
    for name in ("right", "wrong"):
        for record in read_json(f"{root}/train_{name}.jsonl"):
            plan = re.sub(" ([.,])", r"\1", plans[record["id"]]["plan"])
            first = re.sub(r"(from \S+ \d+) or \S+ \d+", r"\1", plan)  # of a plan of both places
            followed += [record] * (first == record["plan"])
            every += [record] * (name == "right")
    print(f"{messages}: {len(followed)} of {len(every)} plans are followed by a demonstration")
    write_json(f"{out}/{messages}.json", followed if len(followed) > len(every) / 2 else every)  # --fast


def unsure_seed(out, root, seed, sizes, with_curves):
    """All stages of a seed -> {"episodes": {row: {game: steps or None}}, "named": {game: "right" | "wrong" |
    None}, "visits": {row: figures}, "probe": figures, "curves": {row: lists}}."""
    values = {"house": "UnsureHouse", "seed": seed, "root": root, **sizes}
    once(out, "language models", functools.partial(unsure_models, out, root, seed, sizes))
    for messages, (sender, send) in SENDERS.items():
        for split in ("train", *SPLITS):
            stage(out, f"{messages}, {split}", COLLECT + """--dataset_path {root}/{split}_right.jsonl
                --task_field sender_task""", sender=sender, send=send, messages=messages, split=split, root=root)
        once(out, f"{messages}, followed", functools.partial(write_followed, out, root, messages))
    result = {"episodes": {}, "named": {}, "visits": {}, "curves": {}}
    others = {}  # {game: (the place that its plan names, the other one)}
    for split in SPLITS:
        plans = open_shards(f"{out}/messages_{split}").records
        for record in read_json(f"{root}/{split}_right.jsonl"):
            game, named = f"{split}/{record['id']}", named_place(plans[record["id"]]["plan"])
            result["named"][game] = None
            if named in record["places"]:
                result["named"][game] = "right" if named == record["named"] else "wrong"
                other, = set(record["places"]) - {named}
                others[game] = (named, other)
    result["probe"] = probe(out, root)

    for row, (messages, variant, flags) in ACTORS.items():
        folder, of_row = folder_of(row), {**values, "messages": messages}
        command = TRAIN + """--max_steps {actor} --learning_rate 1e-3 --adapter_learning_rate 3e-3
            --plan_similarity_weight 0 --random_contrast_weight 0 --save_total_limit 99 """ + flags
        if messages == "search":
            stage(out, f"train {row}", command + " --train_file {out}/train_search.jsonl", folder=folder, **of_row)
            of_row["messages"] = "messages"  # there is nobody to read them
        else:
            stage(out, f"train {row}", command + """ --train_file {out}/{messages}.json
                --hidden_data {out}/{messages}_train""", folder=folder, **of_row)
        variants = "latent cross_task no_comm" if row == "latent" else variant
        played = play(out, folder, variants, folder=folder, **of_row)
        result["episodes"][row] = played.pop(variant)
        for name, episodes in played.items():
            result["episodes"][f"{name}, the latent actor"] = episodes
        wrong = {game: pair for game, pair in others.items() if result["named"][game] == "wrong"}
        result["visits"][row] = visits(f"{out}/play/{folder}", variant, wrong)
        if row in CURVES and with_curves:
            result["curves"][row] = curve(out, folder, variant, wrong, of_row)
    return result


def curve(out, folder, variant, wrong, values):
    """How the second place is learned -> {"step", "loss", "success"}, three lists: the held-out loss, and the
    success where the plan named the wrong place."""
    points = {"step": [], "loss": [], "success": []}
    with open(f"{out}/{folder}/loss_log.csv", newline="") as file:
        evaluations = [record for record in csv.DictReader(file) if record["eval_loss"]]
    for record in evaluations:
        step = int(record["step"])
        played = play(out, f"{folder}-{step}", variant, folder=f"{folder}/checkpoint-{step}", **values)[variant]
        points["step"].append(step)
        points["loss"].append(float(record["eval_loss"]))
        points["success"].append(sum(played[game] is not None for game in wrong) / max(1, len(wrong)))
    return points


def knowing_seed(out, shares, seed, sizes):
    """All stages of a seed -> {share: {"latent" | "no_comm" | "cross_task": {game: steps or None}}}."""
    once(out, "language model", functools.partial(knowing_model, out, seed, sizes))
    collect = functools.partial(stage, out, sender="base", send="last", messages="base", **sizes)
    collect("base, train", COLLECT + "--dataset_path {out}/train_direct.jsonl --task_field sender_task",
            split="train")
    for split in SPLITS:
        collect(f"base, {split}", COLLECT + """--env examples.alfworld_house:SeenHouse --split {split}
            --max_samples {games}""", split=split)
    write_told(out, "base")
    result = {}
    for share in shares:
        values = {**sizes, "seed": seed, "messages": "base", "folder": f"actor_{share:g}", "house": HOUSES[share]}
        values["every"] = max(2, sizes["knowing"] // 6)
        write_json(f"{out}/told_{share:g}.json", knowing(read_json(f"{out}/base_told.json"), share))
        stage(out, f"train with {share:g} told", TRAIN + """--train_file {out}/told_{share:g}.json
            --hidden_data {out}/base_train --adapter_warmup_steps {warm} --max_steps {knowing} --curriculum 0
            --learning_rate 3e-4 --plan_similarity_weight 0.5 --random_contrast_weight 0.1""", share=share, **values)
        result[share] = play(out, f"told_{share:g}", "latent no_comm cross_task", **values)
    return result


# ---- 3. The second place -------------------------------------------------------------------------

def visits(folder, variant, wrong):
    """Where the actor goes if the plan names the wrong place -> counts of games: "first": it goes where the plan
    says; "kind", "place": the second place is of the other one's kind, or it. wrong: {game: (named, other)}."""
    counts = {"games": 0, "first": 0, "kind": 0, "place": 0}
    for split in SPLITS:
        for path in glob.glob(f"{folder}_{split}/episodes/{variant}/run0/*.json"):
            episode = read_json(path)
            if f"{split}/{episode['id']}" in wrong:
                named, other = wrong[f"{split}/{episode['id']}"]
                actions = " ".join(f"{turn['action']}," for turn in episode["turns"])
                seen = list(dict.fromkeys(re.findall(r"(?:go to|examine) ([a-z]+ \d+),", actions))) + ["", ""]
                counts["games"] += 1
                counts["first"] += seen[0] == named
                counts["kind"] += seen[1].split(" ")[0] == other.split(" ")[0]
                counts["place"] += seen[1] == other
    return counts


def probe(out, root):
    """What a linear map reads of the place that the plan does not name, from the state that predicts the kind of the
    named one ("drawer"), from the one that predicts its number, and from these two words instead of states: all
    that a text tells. Fitted on training messages -> {vector: {"kind" | "number": share right of valid games}}."""
    vectors, others = {}, {"train": [], "valid": []}
    words = sorted({word for record in open_shards(f"{out}/messages_train").records.values()
                    for word in record["plan"].split()})
    for split in ("train", *SPLITS):
        part, shards = split.split("_")[0], open_shards(f"{out}/messages_{split}")
        for record in read_json(f"{root}/{split}_right.jsonl"):
            plan = shards.records[record["id"]]["plan"].split()  # a word is a token
            named = named_place(" ".join(plan))
            if named in record["places"]:
                n, states = plan.index("from") + 1, shards[record["id"]].float()
                said = torch.tensor([[word == plan[k] for word in words] for k in (n, n + 1)])
                for name, vector in {"state of the kind": states[n], "state of the number": states[n + 1],
                                     "the two words": said.flatten().float()}.items():
                    vectors.setdefault((name, part), []).append(vector)
                others[part] += [place.split(" ") for place in record["places"] if place != named]
    if not others["train"] or not others["valid"]:  # the senders of --fast have hardly learned to plan
        return {}
    right = {}
    for name in ("state of the kind", "state of the number", "the two words"):
        x = {part: torch.stack(vectors[name, part]) for part in others}
        mean, std = x["train"].mean(0), x["train"].std(0) + 1e-6
        x = {part: (vector - mean) / std for part, vector in x.items()}
        right[name] = {}
        for k, what in enumerate(("kind", "number")):
            labels = {part: [other[k] for other in pairs] for part, pairs in others.items()}
            classes = sorted(set(labels["train"]))
            predicted = fit_linear(x["train"], [classes.index(label) for label in labels["train"]])(x["valid"])
            hits = [classes[n] == label for n, label in zip(predicted.argmax(1), labels["valid"])]
            right[name][what] = statistics.fmean(hits)
    return right


def fit_linear(x, y, weight_decay=1e-3):
    """x (N, d), y: N classes -> a linear map (N, d) -> (N, classes), by logistic regression."""
    linear, y = torch.nn.Linear(x.shape[1], max(y) + 1), torch.tensor(y)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(linear(x), y) + weight_decay * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return linear


# ---- 4. The reports ------------------------------------------------------------------------------

def summarize(by_seed, lowest=0.0):
    """[{game: a value, `lowest` to 1} of each seed] -> its mean over games, each averaged over seeds first, the
    interval, the mean of each seed; None where there is no game."""
    games = {}
    for values in by_seed:
        for game, value in values.items():
            games.setdefault(game, []).append(value)
    if not games:
        return None
    values = [statistics.fmean(of_game) for of_game in games.values()]
    return {
        "mean": statistics.fmean(values),
        "interval": bootstrap_interval(values, lowest),
        "games": len(values),
        "by_seed": [statistics.fmean(values.values()) if values else None for values in by_seed],
    }


def apart(first, second):
    """Two rows {game: steps or None} -> {game: won by the first - won by the second}."""
    return {game: (steps is not None) - (second[game] is not None) for game, steps in first.items()}
