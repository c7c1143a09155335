"""
Who knows what, on ALFWorld's own games: a sender that is unsure, an actor that knows.

  python examples/alfworld_small.py --unsure --fast          # a quarter of an hour: shows that it runs
  python examples/alfworld_small.py --unsure --seeds 0 1 2   # five hours a seed on 2 cores
  python examples/alfworld_small.py --actor_knows 0 0.5 1    # two hours a seed

--unsure is unsure.py on the games and with the models of alfworld_small.py. It plays those of train, too:

    sender reads   You have seen this house: mug 1 is at shelf 2 or at drawer 4. You are in ...
    its plan       take mug 1 from drawer 4, heat it with microwave 1, put it in cabinet 2.

An actor that finds nothing where the plan says has to go to the other place, if it can read which that is.
A guess by kinds of places is right in 80 % of the games, because mugs are seldom where a mug may lie as well. So
the sender learns both plans of a prompt: one that learned the right plan would not be unsure.

--actor_knows Q: in a share Q of the games the actor is told what the sender is, in training and when it plays.

    1. the models        the sender, which is also the start of every actor
    2. the actors        messages, then a row of the table each
    3. the second place  a linear probe of the messages, the places that an actor visits
    4. the reports       unsure_games.json and .png, actor_knows.json and .png, a table each
"""
import functools
import glob
import statistics

import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from common import read_json, read_rows, save_figure, write_json
from data import Conversations
from examples.alfworld_house import followed, second_visits, told, what_is_named, write_lessons
from examples.alfworld_small import (
    SPLITS, make_lm, make_tokenizer, train_lm, unpack_demonstrations, write_planning, write_told)
from examples.scratch import PLAN_ANNOUNCEMENT, made_by, once, open_output, stage
from examples.unsure import folder_of, plot
from model import open_shards
from variants import bootstrap_interval, differences

SIZES = {  # by --fast: steps and counts; `actor` is of --unsure, `knowing` of --actor_knows
    False: {"base": 1600, "both": 500, "warm": 200, "actor": 800, "every": 100, "knowing": 120, "train": 3554,
            "games": 140},
    True: {"base": 100, "both": 100, "warm": 20, "actor": 4, "every": 2, "knowing": 4, "train": 60, "games": 20},
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
CURVES = ["latent", "latent, adapter warmed up"]  # rows that are played at every checkpoint
HOUSES = {0.0: "SeenHouse", 0.5: "HalfToldHouse", 1.0: "ToldHouse"}  # by the share of games that tell the actor

# ---- 1. The models -------------------------------------------------------------------------------
def train_base(out, tokenizer, seed, steps, more=()):
    """The sender and start of the actors, as in alfworld_small.py; more: groups of samples."""
    direct = Conversations(
        f"{out}/train_direct.jsonl",
        tokenizer,
        kind="text",
        announcement=PLAN_ANNOUNCEMENT,
        task_turn=2)
    search = Conversations(f"{out}/train_search.jsonl", tokenizer, kind="none", task_turn=2)
    planning = Conversations(f"{out}/planning.json", tokenizer, kind="none")
    groups = [(direct, "text", 12), (search, "none", 4), (planning, "none", 12), *more]
    base = make_lm(Qwen2Config, Qwen2ForCausalLM, tokenizer, seed)
    train_lm(f"{out}/base", base, tokenizer, groups, seed, steps)


def unsure_models(out, root, seed, sizes):
    """{out}/base, whose plans name one of two places, and {out}/both, a sender that has learned to name both."""
    unpack_demonstrations(out)  # those that search; the others are written anew
    write_lessons(root, out)
    tokenizer = make_tokenizer(out)
    train_base(out, tokenizer, seed, sizes["base"])
    both = Conversations(f"{out}/both.json", tokenizer, kind="none")
    lm = make_lm(Qwen2Config, Qwen2ForCausalLM, tokenizer, seed + 1000)
    train_lm(f"{out}/both", lm, tokenizer, [(both, "none", 24)], seed, sizes["both"])


def knowing_model(out, seed, sizes):
    """{out}/base for every share: it has also learned to act on what it is told itself."""
    unpack_demonstrations(out)
    write_planning(out)
    write_json(f"{out}/told.json", told(read_json(f"{out}/train_direct.jsonl"), 1.0))
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


def plans_of(out, messages, split):
    return {key: record["plan"] for key, record in open_shards(f"{out}/{messages}_{split}").records.items()}


def unsure_seed(out, root, seed, sizes):
    """All stages of a seed -> {"episodes": {row: {game: steps or None}}, "named": {game: as in `what_is_named`},
    "probe": figures, "visits": {row: counts}, "curves": {row: lists}}."""
    once(out, "language models", functools.partial(unsure_models, out, root, seed, sizes))

    # --- messages, and of each plan the demonstration that does what it says, if there is one
    right, wrong = (read_json(f"{root}/train_{name}.jsonl") for name in ("right", "wrong"))
    for messages, (sender, send) in SENDERS.items():
        for split in ("train", *SPLITS):
            stage(
                out, f"{messages}, {split}",
                COLLECT + "--dataset_path {root}/{split}_right.jsonl --task_field sender_task",
                root=root, split=split, messages=messages, sender=sender, send=send)
        kept = followed(right + wrong, plans_of(out, messages, "train"))
        # the senders of --fast have hardly learned to plan
        write_json(f"{out}/{messages}.json", kept if len(kept) > len(right) / 2 else right)
    named, games = {}, {}
    for split in ("train", *SPLITS):
        records = read_json(f"{root}/{split}_right.jsonl")
        named[split] = what_is_named(records, plans_of(out, "messages", split))
        for task_id, places in named[split].items():
            games[f"{split}/{task_id}"] = places
    result = {
        "episodes": {},
        "named": games,
        "probe": probe(out, named),
        "visits": {},
        "curves": {},
    }

    # --- actors, which all have the same start and steps
    for row, (messages, variant, flags) in ACTORS.items():
        folder = folder_of(row)
        values = {**sizes, "house": "UnsureHouse", "seed": seed, "messages": messages}
        train_file = "train_search.jsonl" if variant == "no_comm" else f"{messages}.json"
        stage(
            out, f"train {row}",
            TRAIN + """--max_steps {actor} --learning_rate 1e-3 --adapter_learning_rate 3e-3
                --plan_similarity_weight 0 --random_contrast_weight 0 --save_total_limit 99 """ + flags,
            folder=folder, train_file=train_file, **values)
        controls = " cross_task no_comm" if row == "latent" else ""
        played = play(out, folder, variant + controls, **values)
        for name, episodes in played.items():
            result["episodes"][row if name == variant else f"latent's {name}"] = episodes
        paths = glob.glob(f"{out}/play/{folder}_valid_*/episodes/{variant}/run0/*.json")
        result["visits"][row] = second_visits(map(read_json, paths), games)
        if row in CURVES:
            result["curves"][row] = learning_curve(out, folder, variant, games, values)
    return result


def learning_curve(out, folder, variant, named, values):
    """How the second place is learned -> {"step", "loss", "success"}, three lists: the held-out loss, and the
    success where the plan named the wrong place."""
    curve = {"step": [], "loss": [], "success": []}
    for record in read_rows(f"{out}/{folder}/loss_log.csv"):
        if record["eval_loss"]:
            checkpoint = f"{folder}/checkpoint-{record['step']}"
            episodes = play(out, checkpoint, variant, **values)[variant]
            won = [steps is not None for game, steps in episodes.items() if named[game][2] == "wrong"]
            curve["step"].append(int(record["step"]))
            curve["loss"].append(float(record["eval_loss"]))
            curve["success"].append(statistics.fmean(won or [0]))
    return curve


def knowing_seed(out, shares, seed, sizes):
    """All stages of a seed -> {share: {"latent" | "no_comm" | "cross_task": {game: steps or None}}}."""
    once(out, "language model", functools.partial(knowing_model, out, seed, sizes))
    values = {**sizes, "seed": seed, "sender": "base", "send": "last", "messages": "base"}
    from_game = "--env examples.alfworld_house:SeenHouse --split {split} --max_samples {games}"
    stage(
        out, "base, train",
        COLLECT + "--dataset_path {out}/train_direct.jsonl --task_field sender_task",
        split="train", **values)
    for split in SPLITS:
        stage(out, f"base, {split}", COLLECT + from_game, split=split, **values)
    write_told(out, "base")

    result = {}
    for share in shares:
        folder = f"told_{share:g}"
        train_file = f"{folder}.json"
        write_json(f"{out}/{train_file}", told(read_json(f"{out}/base_told.json"), share))
        stage(
            out, f"train {folder}",
            TRAIN + """--curriculum 0 --adapter_warmup_steps {warm} --max_steps {knowing} --learning_rate 3e-4
                --plan_similarity_weight 0.5 --random_contrast_weight 0.1""",
            folder=folder, train_file=train_file, **values)
        result[share] = play(out, folder, "latent no_comm cross_task", house=HOUSES[share], **values)
    return result


# ---- 3. The second place -------------------------------------------------------------------------
def probe(out, named):
    """What a linear map, fitted on the training messages, tells of the place that a plan does not name -> {what
    it reads: [share of valid games in which its kind is right, and its number]}: the two words of the named place
    ("drawer 4"), which a text has as well, alone or with the state that predicts the first or the second."""
    states, words, others, n_train = [], [], [], 0
    for split, places in named.items():  # train is the first
        shards = open_shards(f"{out}/messages_{split}")
        for key, (place, other, _) in places.items():
            if place:
                record = shards.records[key]
                n = record["plan"].split().index("from") + 1  # a word is a token
                states.append(shards[key][n:n + 2].float())
                words.append(torch.tensor(record["plan_token_ids"][n:n + 2]))
                others.append(other.split())
        if split == "train":
            n_train = len(others)
    if not 0 < n_train < len(others):  # the senders of --fast have hardly learned to plan
        return {}
    kind, number = torch.stack(states).unbind(1)  # (N, d)
    both_words = F.one_hot(torch.stack(words)).flatten(1).float()  # (N, 2 V)
    vectors = {
        "words": both_words,
        "words, state of the kind": torch.cat([both_words, kind], dim=1),
        "words, state of the number": torch.cat([both_words, number], dim=1),
    }
    shares = {}
    for name, x in vectors.items():
        shares[name] = [read_linearly(x, labels, n_train) for labels in zip(*others)]
    return shares


def read_linearly(x, labels, n_train):
    """Logistic regression on the first n_train of x (N, d) and labels -> the share of the others that it tells."""
    classes = sorted(set(labels))
    y = torch.tensor([classes.index(label) for label in labels])
    linear = torch.nn.Linear(x.shape[1], len(classes))
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(500):
        F.cross_entropy(linear(x[:n_train]), y[:n_train]).backward()
        optimizer.step()
        optimizer.zero_grad()
    hits = linear(x[n_train:]).argmax(1) == y[n_train:]
    return hits.float().mean().item()


# ---- 4. The reports ------------------------------------------------------------------------------
def of_part(result, row, part):
    """The episodes of a row, {game: steps or None}, where the plan named the "right" or "wrong" place, or "all"."""
    episodes, named = result["episodes"][row], result["named"]
    return {game: steps for game, steps in episodes.items() if part in ("all", named[game][2])}


def over_seeds(rows):
    """A row's episodes of each seed -> {game: the share of the seeds in which it was won}."""
    wins = {}
    for episodes in rows:
        for game, steps in episodes.items():
            wins.setdefault(game, []).append(steps is not None)
    return {game: statistics.fmean(won) for game, won in wins.items()}


def apart(rows, others):
    """The same of one row less another, a list."""
    less = over_seeds(others)
    return [won - less[game] for game, won in over_seeds(rows).items()]


def with_interval(values, lowest=0.0):
    """Values of games -> [mean, low, high]."""
    values = list(values) or [0.0]  # no plan of --fast may name a place
    return [statistics.fmean(values), *bootstrap_interval(values, lowest)]


def in_words(figures):
    return " ".join(f"{figure:+.3f}" for figure in figures)


def report_unsure(out, seeds, sizes):
    """unsure_games.json and .png, the table. seeds: {seed: what `unsure_seed` gives}."""
    table, bars, results = {}, {}, list(seeds.values())
    for part in ("all", "right", "wrong"):
        print(f"\nplans: {part:21s}success               steps won  latent less this row    the same by seed")
        latent = [of_part(result, "latent", part) for result in results]
        for row in results[0]["episodes"]:
            rows = [of_part(result, row, part) for result in results]
            by_seed = [apart([one], [other]) or [0] for one, other in zip(latent, rows)]
            steps = [steps for episodes in rows for steps in episodes.values() if steps]
            figures = {
                "success": with_interval(over_seeds(rows).values()),
                "steps_won": statistics.fmean(steps or [0]),
                "latent_less_this": with_interval(apart(latent, rows), lowest=-1.0),
                "by_seed": list(map(statistics.fmean, by_seed)),
            }
            table.setdefault(row, {})[part] = figures
            bars.setdefault(row, {})[part] = figures["success"]
            success, steps_won, less, by_seed = figures.values()
            print(f"{row:28s}{in_words(success)} {steps_won:8.1f}   {in_words(less)}   {in_words(by_seed)}")

    content = made_by() | {"sizes": sizes, "table": table}
    for name in ("probe", "visits", "curves"):
        content[name] = {seed: result[name] for seed, result in seeds.items()}
    for seed, result in seeds.items():
        print(f"\nseed {seed}: of the other place a linear map reads [kind, number] from")
        for name, shares in result["probe"].items():
            print(f"{name:28s}{in_words(shares)}")
        print("first and second visits where the plan names the wrong place")
        for row, counts in result["visits"].items():
            print(f"{row:28s}{counts}")
    write_json(f"{out}/unsure_games.json", content)
    plot(bars, seeds, f"{out}/unsure_games.png")


def report_knowing(out, seeds, sizes):
    """actor_knows.json and .png, the table. seeds: {seed: what `knowing_seed` gives}."""
    from matplotlib.figure import Figure
    table, axes = {}, Figure(figsize=(7, 4)).subplots()
    for share in next(iter(seeds.values())):
        games = {}
        for variant in ("latent", "no_comm", "cross_task"):
            games[variant] = over_seeds([result[share][variant] for result in seeds.values()])
        table[share] = {"success of latent": with_interval(games["latent"].values()), **differences(games)}
        print(f"\n{share:g} of the actors know the place")
        for name, figures in table[share].items():
            print(f"{name:20s}{in_words(figures)}")
    write_json(f"{out}/actor_knows.json", made_by() | {"sizes": sizes, "table": table})

    for name in table[share]:
        values, low, high = zip(*(figures[name] for figures in table.values()))
        axes.plot(list(table), values, "o-", label=name)
        axes.fill_between(list(table), low, high, alpha=0.15)
    axes.set(xlabel="share of games in which the actor knows the place", ylabel="share of games (95 % interval)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(axes.figure, f"{out}/actor_knows.png")


# --------------------------------------------------------------------------------------------------

def who_knows(out, shares, seeds, fast, fresh):
    """`alfworld_small.py --actor_knows` the `shares`, or without them `--unsure`."""
    name, sizes, results = "actor_knows" if shares else "unsure", SIZES[fast], {}
    out = f"{out}/{name}"
    open_output(out, {"example": name, "sizes": sizes}, fresh)
    for split in () if shares else ("train", *SPLITS):
        n = sizes["train" if split == "train" else "games"]
        stage(
            out, f"demonstrations, {split}",
            """examples/alfworld_house.py demonstrate --env examples.alfworld_house:UnsureHouse
                --split {split} --max_samples {n} --output_dir {out}""",
            split=split, n=n)
    for seed in seeds:
        if shares:
            results[seed] = knowing_seed(f"{out}/seed{seed}", shares, seed, sizes)
        else:
            results[seed] = unsure_seed(f"{out}/seed{seed}", out, seed, sizes)
    report = report_knowing if shares else report_unsure
    report(out, results, sizes)
