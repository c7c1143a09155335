"""
The whole of Interlat in minutes on a CPU: a tiny household, tiny language models, all stages.

  python examples/household.py          # about five minutes: a table and household_out/results.png
  python examples/household.py --fast   # under a minute, weaker

The sender has seen the house, so its prompt says where the one object of the goal lies. The actor reads
the goal only; the place can reach it through the message and through nothing else. Every stage runs through
its real script.

    1. the world             a game as eval_alfworld.py plays them, its expert, a plan that tells the place
    2. the language models   what sender and actor are taught, in words
    3. the stages            each command as one would type it
"""
import functools
import itertools
import os
import random
import sys
import zlib

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts are one folder up

from common import one_line_errors, read_json, wilson_interval, write_json  # noqa: E402
from examples.scratch import (  # noqa: E402
    PLAN_ANNOUNCEMENT, build_tokenizer, demo_parser, make_lm, one_turn, open_output, report, spans_of, stage)

# ---- 1. The world --------------------------------------------------------------------------------
OBJECTS = "apple bowl bread cup egg mug pan plate potato tomato".split()
FURNITURE = {"shelf": 2, "cabinet": 8, "drawer": 8}  # how many; shelves are open, the others have doors
PLACES = [f"{name} {i + 1}" for name, count in FURNITURE.items() for i in range(count)]
TARGETS = "coffeetable countertop desk diningtable garbagecan sidetable".split()
APPLIANCES = {"clean": "sinkbasin 1", "heat": "microwave 1", "cool": "fridge 1"}
TYPES = ["put", *APPLIANCES]
LOCATIONS = [*PLACES, *(f"{target} 1" for target in TARGETS), *APPLIANCES.values()]
EPISODES = {"train": 1500, "test": 300}
MAX_STEPS = 10


def held_out(name, obj, target):
    """True for the fifth of the (task type, object, target) combinations that no model is trained on."""
    return zlib.crc32(f"{name},{obj},{target}".encode()) % 5 == 0


def goal(task):
    """The goal in ALFWorld's words."""
    name, obj, target = task["type"], task["object"], task["target"]
    if name == "put":
        return f"put some {obj} in/on {target}"
    return f"{name} some {obj} and put it in/on {target}"


@functools.cache
def all_tasks(split):
    """Every (type, object, target, place) of a split as a task, shuffled once and for all."""
    combinations = list(itertools.product(TYPES, OBJECTS, TARGETS, PLACES))
    combinations = [c for c in combinations if held_out(*c[:3]) == (split == "test")]
    random.Random(split).shuffle(combinations)
    tasks = []
    for n, (name, obj, target, place) in enumerate(combinations):
        task = {"id": f"{split}-{n:04d}", "type": name, "object": obj, "target": target, "place": place}
        task["task"] = f"house memory : {place} has {obj} . your task is to : {goal(task)} ."
        tasks.append(task)
    return tasks


class Household:
    """ALFWorld in miniature: find an object, perhaps clean, heat or cool it, put it where the goal says."""

    def tasks(self, split):
        """The episodes of a split. `task` is what the sender reads; the actor reads what `reset` returns."""
        return all_tasks(split)[:EPISODES[split]]

    def reset(self, task):
        """Start an episode -> the first human turn, which has the goal but not the place."""
        self.task = task
        self.at = self.holding = None
        self.treated = None  # what was done to the object of the goal: clean, heat or cool
        self.opened = set()
        self.contents = {location: [] for location in LOCATIONS}
        self.contents[task["place"]].append(task["object"])
        # three other objects lie about, the same ones in every run
        rng = random.Random(task["id"])
        for other in rng.sample([obj for obj in OBJECTS if obj != task["object"]], 3):
            self.contents[rng.choice(PLACES)].append(other)
        view = "you are in a room . you see 2 shelf , 8 cabinet , 8 drawer ."
        return f"{view} your task is to : {goal(task)} ."

    def step(self, action):
        """Do one action -> (observation, reward, done, {"won", "invalid"})."""
        observation = self.act(action)
        at_target = self.task["object"] in self.contents[f"{self.task['target']} 1"]
        won = at_target and self.task["type"] in ("put", self.treated)
        # eval_alfworld.py counts `won`; `invalid` is a column of its table
        info = {"won": won, "invalid": observation is None}
        return observation or "nothing happens .", float(won), won, info

    def act(self, action):
        """Change the house and describe it, or return None for an action that is not possible now."""
        words = action.split()
        words, place = words[:-2], " ".join(words[-2:])  # every place has two words: drawer 3
        if words == ["go", "to"] and place in LOCATIONS:
            self.at = place
            return f"{place} is closed ." if self.closed() else f"on {place} , {self.look()}"
        if place != self.at:  # all else is done where one stands
            return None
        if words == ["open"] and self.closed():
            self.opened.add(place)
            return f"you open {place} . {self.look()}"
        if self.closed():
            return None
        match words:
            case ["take", obj, "from"] if obj in self.contents[place] and not self.holding:
                self.contents[place].remove(obj)
                self.holding = obj
                return f"you pick up {obj} from {place} ."
            case [verb, obj, "with"] if obj == self.holding and place == APPLIANCES.get(verb):
                if obj == self.task["object"]:
                    self.treated = verb
                return f"you {verb} {obj} with {place} ."
            case ["put", obj, "in/on"] if obj == self.holding:
                self.contents[place].append(obj)
                self.holding = None
                return f"you put {obj} in/on {place} ."

    def closed(self):
        """Whether the actor stands before a door that it has not opened."""
        return self.at.startswith(("cabinet", "drawer")) and self.at not in self.opened

    def look(self):
        return f"you see {' , '.join(self.contents[self.at]) or 'nothing'} ."


def look_into(place):
    """The actions that show what a place holds."""
    return [f"go to {place}"] if place.startswith("shelf") else [f"go to {place}", f"open {place}"]


def finish(task):
    """The actions of one who sees the object: take it, clean, heat or cool it, put it where it belongs."""
    name, obj, target = task["type"], task["object"], task["target"]
    actions = [f"take {obj} from {task['place']}"]
    if name in APPLIANCES:
        actions += [f"go to {APPLIANCES[name]}", f"{name} {obj} with {APPLIANCES[name]}"]
    return actions + [f"go to {target} 1", f"put {obj} in/on {target} 1"]


def expert(task):
    """The shortest action list, for one who knows the place."""
    return look_into(task["place"]) + finish(task)


def search_actions(task):
    """A search that does not know the place: the open shelves first, then every door, then the goal."""
    actions = []
    for place in PLACES[:PLACES.index(task["place"]) + 1]:
        actions += look_into(place)
    return actions + finish(task)


def plan(task):
    """The plan as text. It ends with the places in the order to look in them, and the first one is right.

    All numbers of a piece of furniture and all furniture occur in every plan, so it is their order that tells
    the place: the mean of the states does not. And a message cut to its first 8 vectors says the goal only."""
    name, obj, place = task["type"], task["object"], task["place"]
    furniture, number = place.split()
    first, last = int(number), FURNITURE[furniture]
    numbers = [*range(first + 1, last + 1), *range(1, first)]  # drawer 3 of 8 -> 4 5 6 7 8 1 2
    others = [other for other in FURNITURE if other != furniture]

    # to put some mug in/on desk , take mug , put mug in/on desk 1 , go to drawer 3 else 4 5 6 ...
    steps = [f"to {goal(task)}", f"take {obj}"]
    if name in APPLIANCES:
        steps.append(f"{name} {obj} with {APPLIANCES[name]}")
    steps.append(f"put {obj} in/on {task['target']} 1")
    steps.append(f"go to {place} else {' '.join(map(str, numbers))} else {' '.join(others)}")
    return " , ".join(steps)


def conversation(world, task, actions):
    """The episode as turns [{"from": "human" | "gpt", "value"}, ...]; it ends with the last action."""
    turns = [{"from": "human", "value": world.reset(task)}]
    for action in actions:
        observation = world.step(action)[0]
        turns += [{"from": "gpt", "value": action}, {"from": "human", "value": observation}]
    return turns[:-1]


# ---- 2. The language models ----------------------------------------------------------------------
def household_tokenizer(letters=None):
    """Every word that the household can say, or every piece of so many letters."""
    # the training tasks hold them all: what is held out are combinations
    texts = [PLAN_ANNOUNCEMENT, "nothing happens .", "you see nothing ."]
    for task in all_tasks("train"):
        turns = conversation(Household(), task, expert(task))
        texts += [task["task"], plan(task), *(turn["value"] for turn in turns)]
    return build_tokenizer(texts, letters)


def sender_samples(rng, size=8):
    """A step of the sender: it reads the house and the task and writes the plan. A quarter of its prompts are the
    actor's, without the place, so that it can also be asked what the actor is told: its plan is a guess then."""
    tasks, world = rng.choices(all_tasks("train"), k=size), Household()
    return [one_turn(task["task"] if n % 4 else world.reset(task), plan(task)) for n, task in enumerate(tasks)]


@functools.cache
def searchable_tasks():
    """The training tasks whose search ends in time."""
    return [task for task in all_tasks("train") if len(search_actions(task)) <= MAX_STEPS]


def actor_samples(rng, size=8):
    """A step of the actor: half of it does as the expert with the plan in words, half searches without one."""
    samples, world = [], Household()
    for task in rng.choices(all_tasks("train"), k=size // 2):
        samples.append(spans_of(conversation(world, task, expert(task)), plan(task)))
    # successful searches only: cut-off ones would make no_comm look too bad
    for task in rng.choices(searchable_tasks(), k=size // 2):
        samples.append(spans_of(conversation(world, task, search_actions(task))))
    return samples


# ---- 3. The stages -------------------------------------------------------------------------------
SIZES = {  # by --fast; steps and counts, measured so that the whole takes minutes on 2 cores
    False: {"base": 550, "sender": 250, "train": 1500, "test": 300, "actor": 40, "student": 1300},
    True: {"base": 300, "sender": 200, "train": 800, "test": 60, "actor": 30, "student": 120},
}
MEANING = {
    "latent": "latent message",
    "text": "the plan as text, same actor",
    "no_comm": "no message, same actor",
    "cross_task": "another task's message",
    "self": "of the sender, not told the place",
    "randomrot": "message rotated at random",
    "no_comm_base": "no message, base model",
    "keep8": "full message cut to 8 states",
    "k8": "8 latent steps, trained",
    "k8_untrained": "8 latent steps, untrained",
    "search": "scripted search, no message",
}


def household(out, seed, sizes):
    """All stages -> {row of the table: {"success", "interval", ...}}."""
    run = functools.partial(stage, out, seed=seed, **sizes)

    # --- two LMs that never shared a parameter. With one LM for both, tied embeddings make the adapter look
    # unnecessary: its states are already close to its words
    tokenizer = household_tokenizer()
    make_lm(f"{out}/base", tokenizer, "actor", actor_samples, seed, sizes["base"])
    make_lm(f"{out}/sender", tokenizer, "sender", sender_samples, seed, sizes["sender"])

    # --- stage 1: the sender writes plans, its states are the messages. To compare with stage 3: the first 8
    # of them, and 8 latent steps of a sender that has not learned to think
    collect = """collect.py custom --env examples.household:Household --model_name_or_path {out}/sender
        --prompt_template '{{task}}' --max_new_tokens 60 --batch_size 64 --torch_dtype fp32 """
    run("collect train", collect + "--split train --max_samples {train} --output_dir {out}/messages_train")
    run("collect 8 states", collect + "--split test --max_samples {test} --c 8 --output_dir {out}/keep8")
    run("collect untrained", collect + """--split test --max_samples {test} --latent_steps 8
        --output_dir {out}/untrained""")

    # --- stage 2: the actor learns to read them: first its adapter alone, in seconds, then all of it. Without the
    # warm-up it takes three times as many steps, and a rate that would now undo it
    game, demonstrations = Household(), []
    for task in game.tasks("train")[:sizes["train"]]:
        demonstrations.append({"id": task["id"], "conversations": conversation(game, task, expert(task))})
    write_json(f"{out}/train.json", demonstrations)
    run("train actor", """
        train_actor.py --model_name_or_path {out}/base --train_file {out}/train.json
        --hidden_data {out}/messages_train --output_dir {out}/actor --plan_announcement 'plan :'
        --max_steps {actor} --global_batch_size 32 --per_device_train_batch_size 32
        --adapter_warmup_steps 50 --learning_rate 3e-4
        --plan_similarity_weight 0.5 --random_contrast_weight 0.1
        --eval_ratio 0.05 --eval_steps 20 --logging_steps 10 --seed {seed}""")

    # --- stage 3: the sender learns to say it in 8 latent steps
    run("compress", """
        compress.py --teacher_model_name_or_path {out}/actor --student_model_name_or_path {out}/sender
        --train_file {out}/train.json --hidden_data {out}/messages_train --output_dir {out}/student
        --prompt_template '{{task}}' --K 8
        --max_steps {student} --global_batch_size 8 --per_device_train_batch_size 8
        --learning_rate 2e-3 --adam_beta2 0.98 --lambda_kl 0.3 --lambda_align 0.2
        --eval_ratio 0.05 --eval_steps 500 --logging_steps 100 --seed {seed}""")

    # --- stage 4: play; a row that needs another actor or another sender has an evaluation of its own
    play = """eval_alfworld.py --env examples.household:Household --split test --num_episodes {test}
        --batch_size {test} --max_steps 10 --max_new_tokens 10 --torch_dtype fp32 --seed {seed} """
    run("eval", play + """--model_path {out}/actor --output_path {out}/eval
        --sender {out}/sender --max_plan_tokens 60 --sender_batch_size 64
        --variants latent text no_comm cross_task self randomrot
        --messages keep8={out}/keep8 k8_untrained={out}/untrained""")
    results = read_json(f"{out}/eval/summary.json")["variants"]
    others = {
        "no_comm_base": "--model_path {out}/base --variants no_comm",
        "k8": "--model_path {out}/actor --sender {out}/student --sender_batch_size 64",
    }
    for row, flags in others.items():
        run(f"eval {row}", f"{play} {flags} --output_path {{out}}/eval_{row}")
        results[row], = read_json(f"{out}/eval_{row}/summary.json")["variants"].values()
    # what luck gives: a search wins where the place comes early enough
    wins = [len(search_actions(task)) <= MAX_STEPS for task in game.tasks("test")[:sizes["test"]]]
    results["search"] = {"success": sum(wins) / len(wins), "interval": wilson_interval(sum(wins), len(wins))}
    return {row: results[row] for row in MEANING}


def get_args(argv):
    parser = demo_parser("household.py", __doc__, "household_out", "under a minute: fewer steps, weaker results")
    parser.flag("--seed", 0, "of the models and of everything drawn")
    return parser.parse_args(argv)


@one_line_errors("household.py")
def main(argv=None):
    args = get_args(argv)
    out, sizes = args.output_dir, SIZES[args.fast]
    torch.set_num_threads(1)  # the matrices are tiny: a second thread waits more than it computes
    open_output(out, {"example": "household", "seed": args.seed, "sizes": sizes}, args.fresh)
    results = household(out, args.seed, sizes)
    report(out, results, "success", MEANING, sizes["test"])
    print(f"look inside a message: python collect.py inspect {out}/eval/messages --model_name_or_path {out}/sender")


if __name__ == "__main__":
    main()
