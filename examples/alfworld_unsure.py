"""
Who knows what, on ALFWorld's own games: a sender that is unsure, an actor that knows.

  python examples/alfworld_small.py --unsure --fast          # a quarter of an hour: shows that it runs
  python examples/alfworld_small.py --unsure --seeds 0 1 2   # five hours a seed on 2 cores
  python examples/alfworld_small.py --actor_knows 0 0.5 1    # two hours a seed

Type this at the top of the repository, and again after a kill. --unsure is unsure.py with the models of
alfworld_small.py, on all games that alfworld-download brings, those of train included:

    sender reads   You have seen this house: mug 1 is at shelf 2 or at drawer 4. You are in ...
    its plan       take mug 1 from drawer 4, heat it with microwave 1, put it in cabinet 2.

An actor that finds nothing where the plan says has to go to the other place, if it can read which that is.
Where a mug may lie and where mugs do lie are other kinds of places: a guess by kinds is right in 80 % of the
games. So the sender does not learn from the right plans only, but from both plans of a prompt.

--actor_knows Q: in a share Q of the games the actor is told what the sender is, in training and when it plays.

    1. the models        the sender, which is also the start of every actor
    2. the actors        messages, then a row of the table each
    3. the second place  a linear probe of the messages, the places that an actor visits
    4. the reports       unsure_games.json and .png, actor_knows.json and .png, a table each
"""
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

from common import read_json, read_rows, save_figure, write_json, write_text  # noqa: E402
from data import Conversations  # noqa: E402
from examples.alfworld_house import kind_of, told  # noqa: E402
from examples.alfworld_small import (  # noqa: E402
    SPLITS, make_lm, make_tokenizer, train_lm, unpack_demonstrations, write_planning, write_told)
from examples.scratch import PLAN_ANNOUNCEMENT, once, open_output, stage  # noqa: E402
from examples.unsure import folder_of  # noqa: E402
from model import open_shards  # noqa: E402
from variants import DIFFERENCES, bootstrap_interval  # noqa: E402

SIZES = {  # by --fast: steps and counts; `actor` is of --unsure, `knowing` of --actor_knows
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
    "no message": ("messages", "no_comm", "--message none"),  # it has learned to search
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

def write_samples(out, root):
    """What the models learn from. planning.json: a prompt and its plans, of the right place and of the decoy.
    both.json: the plan of both places. train_direct.jsonl: demonstrations that follow each of the three."""
    samples = {"planning": [], "both": [], "acting": []}
    for record in [*read_json(f"{root}/train_right.jsonl"), *read_json(f"{root}/train_wrong.jsonl")]:
        plans = {"planning": record["plan"]}
        if record["named"] == record["places"][0]:  # "shelf 2 or drawer 4": go to shelf 2 first
            plans["both"] = record["plan_of_both"]
        for name, plan in plans.items():
            sample = {**record, "id": f"{record['id']} {plan}", "plan": plan}
            samples["acting"].append(sample)
            turns = [{"from": "human", "value": record["sender_task"]}, {"from": "gpt", "value": plan}]
            samples[name].append({**sample, "conversations": turns})
    write_json(f"{out}/planning.json", samples["planning"])
    write_json(f"{out}/both.json", samples["both"])
    write_text(f"{out}/train_direct.jsonl", "\n".join(map(json.dumps, samples["acting"])))


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
    unpack_demonstrations(out)  # of the searches; the others are written anew
    write_samples(out, root)
    tokenizer = make_tokenizer(out)
    train_base(out, tokenizer, seed, sizes["base"])
    both = Conversations(f"{out}/both.json", tokenizer, kind="none")
    lm = make_lm(Qwen2Config, Qwen2ForCausalLM, tokenizer, seed + 1000)
    train_lm(f"{out}/both", lm, tokenizer, [(both, "none", 24)], seed, sizes["both"])


def knowing_model(out, seed, sizes):
    """{out}/base for every share: it has also learned to act on what it is told itself."""
    unpack_demonstrations(out)
    write_planning(out)
    write_json(f"{out}/told.json", [told(record, 1.0) for record in read_json(f"{out}/train_direct.jsonl")])
    tokenizer = make_tokenizer(out)
    knowing = Conversations(f"{out}/told.json", tokenizer, kind="none", task_turn=2)
    train_base(out, tokenizer, seed, sizes["base"], [(knowing, "none", 4)])


# ---- 2. The actors -------------------------------------------------------------------------------

COLLECT = """collect.py custom --model_name_or_path {out}/{sender} --prompt_template '{{task}}' --send {send}
    --max_new_tokens 40 --batch_size 140 --torch_dtype fp32 --output_dir {out}/{messages}_{split} """
TRAIN = """train_actor.py --model_name_or_path {out}/base --task_turn 2 --plan_announcement 'plan :'
    --global_batch_size 32 --per_device_train_batch_size 16 --adam_beta2 0.98 --eval_ratio 0.03
    --eval_steps {every} --save_steps {every} --logging_steps 10 --seed {seed} --output_dir {out}/{folder}
    --train_file {out}/{train_file} --hidden_data {out}/{messages}_train """
PLAY = """eval_alfworld.py --env examples.alfworld_house:{house} --split {split} --num_episodes {games}
    --model_path {out}/{folder} --hidden_data {out}/{messages}_{split} --max_new_tokens 20 --batch_size 140
    --torch_dtype fp32 --seed {seed} --output_path {out}/play/{folder}_{split} --variants """


def play(out, folder, variants, **values):
    """An actor plays the games of both splits -> {variant: {game: steps until it was won, or None}}."""
    episodes = {}
    for split in SPLITS:
        stage(out, f"play {folder}, {split}", PLAY + variants, folder=folder, split=split, **values)
        for row in read_rows(f"{out}/play/{folder}_{split}/results.csv"):
            steps = int(row["steps"]) if row["success"] == "True" else None
            episodes.setdefault(row["variant"], {})[f"{split}/{row['id']}"] = steps
    return episodes


def plans_of(out, root, split):
    """{id: (the place that its plan names, the other one, "right" | "wrong")}; not of plans that name neither."""
    records, plans = open_shards(f"{out}/messages_{split}").records, {}
    for record in read_json(f"{root}/{split}_right.jsonl"):
        match = re.search(r"from (\S+ \d+)", records[record["id"]]["plan"])
        if match and match[1] in record["places"]:
            other, = set(record["places"]) - {match[1]}
            plans[record["id"]] = match[1], other, "right" if match[1] == record["named"] else "wrong"
    return plans


def write_followed(out, root, messages):
    """Of each training message the demonstration that does what its plan says, if there is one (`write_told`)."""
    plans, followed, every = open_shards(f"{out}/{messages}_train").records, [], []
    for name in ("right", "wrong"):
        for record in read_json(f"{root}/train_{name}.jsonl"):
            plan = re.sub(" ([.,])", r"\1", plans[record["id"]]["plan"])
            first = re.sub(r"(from \S+ \d+) or \S+ \d+", r"\1", plan)  # of a plan of both places
            followed += [record] * (first == record["plan"])
            every += [record] * (name == "right")
    print(f"{messages}: {len(followed)} of {len(every)} plans are followed by a demonstration")
    # the senders of --fast have hardly learned to plan
    write_json(f"{out}/{messages}.json", followed if len(followed) > len(every) / 2 else every)


def unsure_seed(out, root, seed, sizes, with_curves):
    """All stages of a seed -> {"episodes": {row: {game: steps or None}}, "plans": {game: as `plans_of`},
    "probe": figures, "visits": {row: counts}, "curves": {row: lists}}."""
    once(out, "language models", functools.partial(unsure_models, out, root, seed, sizes))
    for messages, (sender, send) in SENDERS.items():
        for split in ("train", *SPLITS):
            stage(out, f"{messages}, {split}", COLLECT + """--dataset_path {root}/{split}_right.jsonl
                --task_field sender_task""", sender=sender, send=send, messages=messages, split=split, root=root)
        write_followed(out, root, messages)
    plans = {f"{split}/{key}": plan for split in SPLITS for key, plan in plans_of(out, root, split).items()}
    result = {"episodes": {}, "plans": plans, "probe": probe(out, root), "visits": {}, "curves": {}}

    for row, (messages, variant, flags) in ACTORS.items():
        folder = folder_of(row)
        values = {**sizes, "house": "UnsureHouse", "seed": seed, "messages": messages}
        stage(out, f"train {row}", TRAIN + """--max_steps {actor} --learning_rate 1e-3
            --adapter_learning_rate 3e-3 --plan_similarity_weight 0 --random_contrast_weight 0
            --save_total_limit 99 """ + flags, folder=folder, **values,
              train_file="train_search.jsonl" if variant == "no_comm" else f"{messages}.json")
        controls = " cross_task no_comm" if row == "latent" else ""
        played = play(out, folder, variant + controls, **values)
        for name, episodes in played.items():
            result["episodes"][row if name == variant else f"latent's {name}"] = episodes
        result["visits"][row] = visits(f"{out}/play/{folder}", variant, plans)
        if row not in CURVES or not with_curves:
            continue
        points = result["curves"][row] = {"step": [], "loss": [], "success": []}  # the latter of wrong plans
        for record in read_rows(f"{out}/{folder}/loss_log.csv"):
            if record["eval_loss"]:
                played = play(out, f"{folder}/checkpoint-{record['step']}", variant, **values)[variant]
                won = [played[game] is not None for game, plan in plans.items() if plan[2] == "wrong"]
                points["step"].append(int(record["step"]))
                points["loss"].append(float(record["eval_loss"]))
                points["success"].append(sum(won) / max(1, len(won)))
    return result


def knowing_seed(out, shares, seed, sizes):
    """All stages of a seed -> {share: {"latent" | "no_comm" | "cross_task": {game: steps or None}}}."""
    once(out, "language model", functools.partial(knowing_model, out, seed, sizes))
    values = {**sizes, "seed": seed, "sender": "base", "send": "last", "messages": "base"}
    for split in ("train", *SPLITS):
        source = "--env examples.alfworld_house:SeenHouse --split {split} --max_samples {games}"
        if split == "train":
            source = "--dataset_path {out}/train_direct.jsonl --task_field sender_task"
        stage(out, f"base, {split}", COLLECT + source, split=split, **values)
    write_told(out, "base")
    result = {}
    for share in shares:
        folder = f"told_{share:g}"
        records = [told(record, share) for record in read_json(f"{out}/base_told.json")]
        write_json(f"{out}/{folder}.json", records)
        stage(out, f"train {folder}", TRAIN + """--curriculum 0 --adapter_warmup_steps {warm}
            --max_steps {knowing} --learning_rate 3e-4 --plan_similarity_weight 0.5
            --random_contrast_weight 0.1""", folder=folder, train_file=f"{folder}.json", **values)
        result[share] = play(out, folder, "latent no_comm cross_task", house=HOUSES[share], **values)
    return result


# ---- 3. The second place -------------------------------------------------------------------------

def visits(folder, variant, plans):
    """Where an actor goes whose plan names the wrong place -> counts of games: "first": where the plan says;
    "kind", "place": the next place is of the kind of the other one, is that one."""
    counts = {"games": 0, "first": 0, "kind": 0, "place": 0}
    for path in glob.glob(f"{folder}_valid_*/episodes/{variant}/run0/*.json"):
        episode = read_json(path)
        named, other, which = plans.get(f"{episode['split']}/{episode['id']}", (None, None, None))
        if which == "wrong":
            actions = " ".join(f"{turn['action']}," for turn in episode["turns"])
            seen = re.findall(r"(?:go to|examine) ([a-z]+ \d+),", actions)
            first, second = [*dict.fromkeys(seen), " ", " "][:2]
            counts["games"] += 1
            counts["first"] += first == named
            counts["kind"] += kind_of(second) == kind_of(other)
            counts["place"] += second == other
    return counts


def probe(out, root):
    """What a linear map, fitted on the training messages, reads of the place that a plan does not name -> {what
    it reads: {"kind" | "number": share right of valid games}}: the state that predicts the kind of the named
    place ("drawer"), the one that predicts its number, or these two words, which are what a text tells."""
    parts = {"train": [], "valid": []}  # of (vectors, kind and number)
    for split in ("train", *SPLITS):
        shards = open_shards(f"{out}/messages_{split}")
        for key, (_, other, _) in plans_of(out, root, split).items():
            n = shards.records[key]["plan"].split().index("from") + 1  # a word is a token
            words = torch.tensor(shards.records[key]["plan_token_ids"][n:n + 2])
            vectors = [*shards[key][n:n + 2], F.one_hot(words, 1024).flatten()]
            parts[split.split("_")[0]].append((vectors, other.split()))
    shares = {}
    for k, name in enumerate(("state of the kind", "state of the number", "their words")):
        shares[name] = {}
        for m, what in enumerate(("kind", "number") if all(parts.values()) else ()):
            x = {part: torch.stack([vectors[k].float() for vectors, _ in pairs]) for part, pairs in parts.items()}
            labels = {part: [label[m] for _, label in pairs] for part, pairs in parts.items()}
            shares[name][what] = read_linearly(x["train"], labels["train"], x["valid"], labels["valid"])
    return shares


def read_linearly(x, labels, valid_x, valid_labels):
    """Logistic regression of labels on vectors (N, d) -> the share of the valid ones that it tells."""
    classes = sorted(set(labels))
    y = torch.tensor([classes.index(label) for label in labels])
    linear = torch.nn.Linear(x.shape[1], len(classes))
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(500):
        F.cross_entropy(linear(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    told_classes = [classes[n] for n in linear(valid_x).argmax(1)]
    return statistics.fmean(said == label for said, label in zip(told_classes, valid_labels))


# ---- 4. The reports ------------------------------------------------------------------------------

def summarize(by_seed, lowest=0.0):
    """[{game: a value, `lowest` to 1} of each seed] -> the mean over games, whose seeds are averaged first, its
    interval, the mean of each seed."""
    games = {}
    for values in by_seed:
        for game, value in values.items():
            games.setdefault(game, []).append(value)
    means = [statistics.fmean(values) for values in games.values()] or [0.0]  # --fast: no plan names a place
    return {
        "mean": statistics.fmean(means),
        "interval": bootstrap_interval(means, lowest),
        "games": len(games),
        "by_seed": [sum(values.values()) / max(1, len(values)) for values in by_seed],
    }


def wins(first, second=None):
    """Rows {game: steps or None} -> {game: whether the first won it, less whether the second did}."""
    return {game: (steps is not None) - bool(second and second[game] is not None) for game, steps in first.items()}
