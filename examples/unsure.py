"""
A sender that is unsure: where a message says more than its own text.

  python examples/unsure.py                      # under ten minutes: latent, text and the controls
  python examples/unsure.py --all                # the rest of the table, three quarters of an hour more
  python examples/unsure.py --all --seeds 0 1 2  # as in assets/unsure.json and assets/unsure.png

Type this at the top of the repository. The sender's prompt names two places where a mug was seen, each as
likely to be right, and its plan names one of them:

    sender reads   house memory : mug seen at drawer5 cabinet3 . your task is to : put some mug in/on desk .
    its plan       take mug from cabinet3 , put mug in/on desk1

The actor goes where the plan says. Where that is the wrong place, it has the time for one more. The text of
the plan does not tell which; the state that chose the word `cabinet3` held `drawer5` as well. An actor trained
on states goes to the second place, one trained on the texts has to guess.

What this shows: a state holds the distribution over the next word, a text one draw from it. What it does not
show: that only a state can say it (a sender that is taught to write "cabinet3 or drawer5" says it in words),
or anything about the size of this in large models. It takes a training that shows the actor pure latent
messages, --curriculum 0, and a few hundred steps in which nothing seems to happen.

    1. the world           two sightings, plans, demonstrations
    2. the language model  one for the sender and the start of the actor
    3. the stages          each row of the table is an actor of train_actor.py, played by eval_alfworld.py
    4. the report          unsure.json, a table, unsure.png
"""
import functools
import itertools
import os
import random
import re
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts are one folder up

from collect import inspect  # noqa: E402
from common import one_line_errors, read_json, read_rows, save_figure, wilson_interval, write_json  # noqa: E402
from examples.household import (  # noqa: E402
    APPLIANCES, LOCATIONS, OBJECTS, PLACES, TARGETS, TYPES, Household, conversation, expert, goal, held_out, look_into)
from examples.scratch import (  # noqa: E402
    PLAN_ANNOUNCEMENT, build_tokenizer, demo_parser, made_by, make_lm, one_turn, open_output, spans_of, stage)
from model import open_shards  # noqa: E402

# ---- 1. The world: the household, where the object was seen at two places ------------------------
EPISODES = {"train": 4000, "test": 300}
NOUNS = "|".join(sorted({location.split()[0] for location in LOCATIONS}))  # cabinet|coffeetable|...
GOALS = {"train": [], "test": []}  # (type, object, target), shared out as in household.py
for combination in itertools.product(TYPES, OBJECTS, TARGETS):
    GOALS["test" if held_out(*combination) else "train"].append(combination)


def one_word(text):
    """cabinet 3 -> cabinet3: one state of the sender speaks of the whole place."""
    return re.sub(rf"\b({NOUNS}) (\d)", r"\1\2", text)


def two_words(text):
    """cabinet3 -> cabinet 3, as the household spells it."""
    return re.sub(rf"\b({NOUNS})(\d)", r"\1 \2", text)


class OneWord(Household):
    """The household. A task has two `places`; the object is at one of them, `place`."""
    spell = staticmethod(one_word)
    twice = False  # whether one place was seen twice; each sighting is as likely to be the right one
    reads_or = True  # whether the language model has read plans of two places before it reads latents

    def tasks(self, split):
        """"train-0", "test-0": the tasks of seed 0."""
        rng = random.Random(split)
        part, _ = split.split("-")
        tasks = []
        for n in range(EPISODES[part]):
            task = self.draw(rng, part)
            tasks.append({**task, "id": f"{split}-{n:04d}"})
        return tasks

    def draw(self, rng, part):
        """A random task of "train" or "test"."""
        name, obj, target = rng.choice(GOALS[part])
        seen = rng.sample(PLACES, 2)
        seen += seen[:1] * self.twice
        rng.shuffle(seen)
        task = {
            "id": str(rng.random()),
            "type": name,
            "object": obj,
            "target": target,
            "place": rng.choice(seen),
            "places": list(dict.fromkeys(seen))}
        memory = f"house memory : {obj} seen at {' '.join(seen)} ."
        task["task"] = self.spell(f"{memory} your task is to : {goal(task)} .")
        return task

    def reset(self, task):
        first = super().reset(task)
        # the house holds nothing else: now and then so small an actor takes whatever it sees
        self.contents = {location: [] for location in LOCATIONS}
        self.contents[task["place"]] = [task["object"]]
        return self.spell(first)

    def step(self, action):
        """An action is understood in either spelling."""
        observation, *rest = super().step(two_words(action))
        return self.spell(observation), *rest

    def written(self, task):
        """The places that the sender is taught to write: the right one, so it writes one of the two."""
        return [task["place"]]


class BothWritten(OneWord):
    """What words could have said: the sender is taught to write both places."""

    def written(self, task):
        return task["places"]


class TwoWords(OneWord):
    """No state has the number of the second place as a next word."""
    spell = staticmethod(two_words)


class TwoToOne(OneWord):
    """One place was seen twice: there the object is with probability 2/3."""
    twice = True


class NeverOr(OneWord):
    """An actor that has never been told of two places, not in words either."""
    reads_or = False


WORLDS = {world.__name__: world() for world in (OneWord, BothWritten, NeverOr, TwoWords, TwoToOne)}


def plan(world, task, places):
    """A plan that names these places."""
    name, obj = task["type"], task["object"]
    steps = [f"take {obj} from {' or '.join(places)}"]
    if name in APPLIANCES:
        steps.append(f"{name} {obj} with {APPLIANCES[name]}")
    steps.append(f"put {obj} in/on {task['target']} 1")
    return world.spell(" , ".join(steps))


def named_place(text):
    """The place that a plan names first, as the household spells it, or None."""
    match = re.search(rf"from ({NOUNS}) ?(\d)", text)
    return f"{match[1]} {match[2]}" if match else None


def demonstration(task, named):
    """The actions of one who follows the plan: to the place it names, if that is empty to the other one."""
    if named == task["place"]:
        return expert(task)
    return look_into(named) + expert(task)


def search(task, rng):
    """The actions of one who looks everywhere, in random order."""
    places = rng.sample(PLACES, len(PLACES))
    actions = []
    for place in places[:places.index(task["place"])]:
        actions += look_into(place)
    return actions + expert(task)


def episode(world, task, actions):
    """The episode as turns, in the spelling of this world."""
    return conversation(world, task, [world.spell(action) for action in actions])


# ---- 2. The language model: the sender, and where every actor starts -----------------------------
def samples(world, rng):
    """draw(rng) for `train_lm`: a step teaches the sender or the actor, whose samples are five times as long.

    The actor knows plans of one place and plans of two, "cabinet3 or drawer5", before it reads any latents."""
    if rng.random() < 0.5:
        tasks = [world.draw(rng, "train") for _ in range(32)]
        return [one_turn(task["task"], plan(world, task, world.written(task))) for task in tasks]
    drawn = []
    for n in range(8):
        task = world.draw(rng, "train")
        places = task["places"] if n % 2 and world.reads_or else [rng.choice(task["places"])]
        turns = episode(world, task, demonstration(task, places[0]))
        drawn.append(spans_of(turns, plan(world, task, places)))
    while len(drawn) < 12:
        task = world.draw(rng, "train")
        actions = search(task, rng)
        if len(actions) <= 14:
            drawn.append(spans_of(episode(world, task, actions)))
    return drawn


def vocabulary(world):
    """Every word of a world, from enough of its tasks."""
    texts = [PLAN_ANNOUNCEMENT, "nothing happens .", "you see nothing ."]
    for task in world.tasks("train-0"):
        turns = episode(world, task, demonstration(task, task["places"][0]))
        texts += [task["task"], plan(world, task, task["places"]), *(turn["value"] for turn in turns)]
    return texts


# ---- 3. The stages -------------------------------------------------------------------------------
SIZES = {  # by --fast: steps and counts
    False: {"base": 1000, "train": 4000, "test": 300, "actor": 800, "every": 100},
    True: {"base": 40, "train": 64, "test": 8, "actor": 4, "every": 2},
}
ACTORS = {  # row of the table: (world, its messages, flags of train_actor.py)
    "latent": ("OneWord", "messages", "--curriculum 0"),
    "text": ("OneWord", "messages", "--message text"),
    "text of both places": ("BothWritten", "messages", "--message text"),
    "likeliest word": ("OneWord", "likeliest", "--curriculum 0"),
    "expected word": ("OneWord", "expected", "--curriculum 0"),
    "latent, adapter warmed up": ("OneWord", "messages", "--curriculum 0 --adapter_warmup_steps 100"),
    "latent, usual curriculum": ("OneWord", "messages", ""),
    "latent, plan similarity": ("OneWord", "messages", "--curriculum 0 --plan_similarity_weight 0.5"),
    "latent, no 'or' read before": ("NeverOr", "messages", "--curriculum 0"),
    "latent, places of two words": ("TwoWords", "messages", "--curriculum 0"),
    "text, places of two words": ("TwoWords", "messages", "--message text"),
    "latent, sightings 2:1": ("TwoToOne", "messages", "--curriculum 0"),
    "text, sightings 2:1": ("TwoToOne", "messages", "--message text"),
}
SHORT = ["latent", "text"]  # the rows without --all
CURVES = {"latent": "tab:blue", "latent, adapter warmed up": "tab:red", "text": "tab:orange",
          "latent, no 'or' read before": "tab:green"}
SENDS = {"messages": "last", "expected": "expected", "likeliest": "examples.unsure:likeliest"}  # what --send sends
CONTROLS = {"no_comm": "no message", "cross_task": "another task's message", "randomrot": "rotated at random"}


def folder_of(row):
    """latent, places of two words -> latent_places_of_two_words"""
    return re.sub(r"\W+", "_", row)


def variant_of(flags):
    """What eval_alfworld.py calls the message that an actor was trained on."""
    return "text" if "--message text" in flags else "latent"


def prepare(out, name, seed, sizes):
    """The language model, its plans and messages, and the demonstrations that follow them."""
    world = WORLDS[name]
    tokenizer, draw = build_tokenizer(vocabulary(world)), functools.partial(samples, world)
    make_lm(f"{out}/base", tokenizer, "base", draw, seed, sizes["base"])
    collect(out, name, "messages", seed, sizes)
    records = open_shards(f"{out}/messages_train").records
    demonstrations, n_named = [], 0
    for task in world.tasks(f"train-{seed}")[:sizes["train"]]:
        named = named_place(records[task["id"]]["plan"])
        n_named += named in task["places"]
        named = named if named in task["places"] else task["places"][0]
        turns = episode(world, task, demonstration(task, named))
        demonstrations.append({"id": task["id"], "conversations": turns})
    print(f"{n_named} of {len(demonstrations)} plans name one of the two places")
    write_json(f"{out}/train.json", demonstrations)


def likeliest(lm, hidden_states, logits):
    """Between state and word: the embedding of the likeliest word. (`expected`, the mean under the sender's
    distribution, is CIPHER's, arXiv 2310.06272.)"""
    return lm.get_input_embeddings()(logits.argmax(-1))


def collect(out, world, messages, seed, sizes):
    """The messages of both splits; greedy plans are the same whatever is sent of their states."""
    for split in ("train", "test"):
        stage(out, f"collect {messages} {split}", """
            collect.py custom --env examples.unsure:{world} --split {split}-{seed} --max_samples {n}
            --model_name_or_path {out}/base --prompt_template '{{task}}' --max_new_tokens 20 --batch_size 100
            --torch_dtype fp32 --send {send} --output_dir {out}/{messages}_{split}""",
              world=world, split=split, seed=seed, n=sizes[split], send=SENDS[messages], messages=messages)


def train(out, folder, messages, flags, seed, sizes):
    """An actor; all of them have the same start, demonstrations and steps."""
    stage(out, f"train {folder}", """
        train_actor.py --model_name_or_path {out}/base --train_file {out}/train.json
        --hidden_data {out}/{messages}_train --output_dir {out}/{folder} --plan_announcement 'plan :'
        --max_steps {actor} --global_batch_size 32 --per_device_train_batch_size 32
        --learning_rate 1e-3 --adapter_learning_rate 3e-3 --adam_beta2 0.98
        --plan_similarity_weight 0 --random_contrast_weight 0 --eval_ratio 0.05 --eval_steps {every}
        --save_steps {every} --save_total_limit 99 --logging_steps {every} --seed {seed} """ + flags,
          folder=folder, messages=messages, seed=seed, **sizes)


def play(out, folder, world, seed, sizes, model, messages, variants):
    """Play the held-out tasks -> {variant: {"all" | "right" | "wrong": [successes, tasks]}}, by what the plan
    named: the right place or the wrong one."""
    stage(out, f"play {folder}", """
        eval_alfworld.py --env examples.unsure:{world} --split test-{seed} --num_episodes {test}
        --model_path {out}/{model} --hidden_data {out}/{messages}_test --max_steps 10 --max_new_tokens 10
        --batch_size {test} --torch_dtype fp32 --seed {seed} --output_path {out}/play/{folder}
        --variants """ + variants,
          folder=folder, world=world, model=model, messages=messages, seed=seed, **sizes)
    right = plan_is_right(out, world, seed)
    counts = {}
    for row in read_rows(f"{out}/play/{folder}/results.csv"):
        parts = counts.setdefault(row["variant"], {"all": [0, 0], "right": [0, 0], "wrong": [0, 0]})
        for part in ("all", "right" if right[row["id"]] else "wrong"):
            parts[part][0] += row["success"] == "True"
            parts[part][1] += 1
    return counts


def plan_is_right(out, world, seed):
    """{id of a held-out task: whether its plan names the right place}."""
    records, right = open_shards(f"{out}/messages_test").records, {}
    for task in WORLDS[world].tasks(f"test-{seed}"):
        if task["id"] in records:
            right[task["id"]] = named_place(records[task["id"]]["plan"]) == task["place"]
    return right


def learning_curve(out, row, seed, sizes):
    """How the second place is learned -> {"step", "loss", "success"}, three lists: the held-out loss, and the
    success where the plan named the wrong place."""
    world, messages, flags = ACTORS[row]
    folder, variant = folder_of(row), variant_of(flags)
    curve = {"step": [], "loss": [], "success": []}
    evaluations = [record for record in read_rows(f"{out}/{folder}/loss_log.csv") if record["eval_loss"]]
    for record in evaluations:
        step = int(record["step"])
        checkpoint = f"{folder}/checkpoint-{step}"
        counts = play(out, f"{folder}-{step}", world, seed, sizes, checkpoint, messages, variant)
        wins, tasks = counts[variant]["wrong"]
        curve["step"].append(step)
        curve["loss"].append(float(record["eval_loss"]))
        curve["success"].append(wins / max(tasks, 1))
    return curve


def one_row(out, row, seed, sizes):
    """Train and play the actor of a row -> {row: counts}, with the controls where it is the latent one."""
    world, messages, flags = ACTORS[row]
    folder, variant = folder_of(row), variant_of(flags)
    if not os.path.exists(f"{out}/train.json"):
        prepare(out, world, seed, sizes)
    collect(out, world, messages, seed, sizes)
    train(out, folder, messages, flags, seed, sizes)

    controls = CONTROLS if row == "latent" else {}
    counts = play(out, folder, world, seed, sizes, folder, messages, " ".join([variant, *controls]))
    rows = {row: counts[variant]}
    for name, meaning in controls.items():
        rows[meaning] = counts[name]
    return rows


def one_seed(out, rows, seed, sizes):
    """Every row of a seed -> {"rows": {row: counts}, "curves": {row: curve}, "seconds": {world: seconds}}."""
    result = {"rows": {}, "curves": {}, "seconds": {}}
    for row in rows:
        world = ACTORS[row][0]
        path = f"{out}/{world}"
        result["rows"] |= one_row(path, row, seed, sizes)
        if row in CURVES:
            result["curves"][row] = learning_curve(path, row, seed, sizes)
        result["seconds"][world] = read_json(f"{path}/seconds.json")
    return result


# ---- 4. The report -------------------------------------------------------------------------------
def pool(seeds):
    """The counts of all seeds together -> {row: {part: (share, low, high)}}."""
    counts = {}
    for result in seeds.values():
        for row, parts in result["rows"].items():
            for part, (wins, tasks) in parts.items():
                total = counts.setdefault(row, {}).setdefault(part, [0, 0])
                total[0] += wins
                total[1] += tasks
    table = {}
    for row, parts in counts.items():
        table[row] = {}
        for part, (wins, tasks) in parts.items():
            table[row][part] = (wins / max(tasks, 1), *wilson_interval(wins, tasks))
    return table


def print_table(table, seeds):
    """Shares with their intervals, then the share of each seed."""
    print(f"\n{'':28s}{'all':24s}{'right place named':24s}{'wrong place named':24s}all, by seed")
    for row, parts in table.items():
        line = f"{row:28s}"
        for share, low, high in parts.values():
            line += f"{share:.3f} [{low:.3f}, {high:.3f}]    "
        for result in seeds.values():
            wins, tasks = result["rows"].get(row, {}).get("all", (0, 0))
            line += f"{wins / tasks:.3f} " if tasks else "-     "
        print(line)
    for seed, result in seeds.items():
        for world, seconds in result["seconds"].items():
            print(f"seed {seed}, {world}: {sum(seconds.values()):.0f} s")


def plot(table, seeds, path):
    """The bars of the table, split by what the plan named, and how the second place is learned."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 6))
    bars = figure.add_subplot(1, 2, 1)
    for part, shift, color in (("right", -0.2, "lightsteelblue"), ("wrong", 0.2, "tab:blue")):
        for n, parts in enumerate(table.values()):
            share, low, high = parts[part]
            error = [[share - low], [high - share]]
            bars.barh(n + shift, share, height=0.38, color=color, xerr=error, capsize=2)
        bars.barh(0, 0, color=color, label=f"the plan named the {part} place")
    bars.set_yticks(range(len(table)), list(table))
    bars.set(xlim=(0, 1), xlabel="success (95 % interval)")
    bars.invert_yaxis()
    bars.legend(loc="lower right", bbox_to_anchor=(1, 1))  # above the bars

    success = figure.add_subplot(2, 2, 2)
    loss = figure.add_subplot(2, 2, 4)
    for result in seeds.values():
        for row, curve in result["curves"].items():
            success.plot(curve["step"], curve["success"], ".-", color=CURVES[row])
            loss.plot(curve["step"], curve["loss"], ".-", color=CURVES[row])
    for row in result["curves"]:
        success.plot([], [], color=CURVES[row], label=row)
    success.set(ylim=(0, 1), ylabel="success, wrong place named")
    loss.set(ylim=(0, None), ylabel="held-out loss", xlabel="step of train_actor.py (a line per seed)")
    success.legend(loc="lower right", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def get_args(argv):
    parser = demo_parser("unsure.py", __doc__, "unsure_out", "seconds: shows that it runs, and nothing else")
    parser.add_argument("--all", action="store_true", help="every row, not only latent, text and the controls")
    parser.flag("--seeds", [0], "of the models, the tasks and all that is drawn; the table pools them", nargs="+",
                type=int)
    return parser.parse_args(argv)


@one_line_errors("unsure.py")
def main(argv=None):
    args = get_args(argv)
    torch.set_num_threads(1)  # the matrices are tiny: a second thread waits more than it computes
    out, sizes, seeds = args.output_dir, SIZES[args.fast], {}
    open_output(out, {"example": "unsure", "sizes": sizes}, args.fresh)

    # --- every stage of every row
    for seed in args.seeds:
        rows = list(ACTORS) if args.all else SHORT
        seeds[seed] = one_seed(f"{out}/seed{seed}", rows, seed, sizes)

    # --- a message whose plan names the wrong place: where the place is chosen, its state holds both
    path = f"{out}/seed{args.seeds[0]}/OneWord"
    right = plan_is_right(path, "OneWord", args.seeds[0])
    inspect(f"{path}/messages_test", min(right, key=right.get), f"{path}/base", top_k=3)  # False comes first

    # --- what they showed
    table = pool(seeds)
    write_json(f"{out}/unsure.json", made_by() | {"sizes": sizes, "table": table, "seeds": seeds})
    plot(table, seeds, f"{out}/unsure.png")
    print_table(table, seeds)
    print(f"\nwrote {out}/unsure.json and {out}/unsure.png")


if __name__ == "__main__":
    main()
