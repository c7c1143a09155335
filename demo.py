"""
The whole of Interlat in minutes on a CPU: a tiny household, tiny language models, all stages.

  python demo.py                 # about three minutes on 2 cores: a table and demo_out/results.png
  python demo.py --task math     # problems instead of games (demo_math.py), in demo_out_math
  python demo.py --fast          # under a minute, weaker

The sender has seen the house, so its prompt says where the one object of the goal lies. The actor reads
the goal only; the place can reach it through the message and through nothing else. Every stage runs through
its real script.

    1. the household     a game as eval_alfworld.py plays them, its expert, a plan that tells the place
    2. language models   one token per word, a Qwen2 of width 64 trained in seconds
    3. the stages        household() and math(), each command as one would type it
    4. the report        summary.json, a table, a picture
"""
import argparse
import functools
import importlib
import itertools
import os
import random
import shlex
import time
import zlib

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, get_cosine_schedule_with_warmup

import demo_math
from common import (Parser, UserError, atomic_path, one_line_errors, plot_bars, progress, read_json, remove,
                    wilson_interval, write_json)
from model import build_sample, collate

# --------------------------------------------------------------------------------------------------
# 1. The household

OBJECTS = "apple bowl bread cup egg mug pan plate potato tomato".split()
FURNITURE = {"shelf": 2, "cabinet": 8, "drawer": 8}  # how many; shelves are open, the others have doors
PLACES = [f"{name} {i + 1}" for name, count in FURNITURE.items() for i in range(count)]
TARGETS = "coffeetable countertop desk diningtable garbagecan sidetable".split()
APPLIANCES = {"clean": "sinkbasin 1", "heat": "microwave 1", "cool": "fridge 1"}
TYPES = ["put", *APPLIANCES]
LOCATIONS = [*PLACES, *(f"{target} 1" for target in TARGETS), *APPLIANCES.values()]
EPISODES = {"train": 1500, "test": 300}
MAX_STEPS = 10
PLAN_ANNOUNCEMENT = "plan :"


def held_out(kind, obj, target):
    """True for the fifth of the (task type, object, target) combinations that no model is trained on."""
    return zlib.crc32(f"{kind},{obj},{target}".encode()) % 5 == 0


def goal(task):
    """The goal in ALFWorld's words."""
    kind, obj, target = task["type"], task["object"], task["target"]
    if kind == "put":
        return f"put some {obj} in/on {target}"
    return f"{kind} some {obj} and put it in/on {target}"


def all_tasks(split):
    """Every (type, object, target, place) of a split as a task, shuffled once and for all."""
    combinations = list(itertools.product(TYPES, OBJECTS, TARGETS, PLACES))
    combinations = [c for c in combinations if held_out(*c[:3]) == (split == "test")]
    random.Random(split).shuffle(combinations)
    tasks = []
    for n, (kind, obj, target, place) in enumerate(combinations):
        task = {"id": f"{split}-{n:04d}", "type": kind, "object": obj, "target": target, "place": place}
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
    kind, obj, target = task["type"], task["object"], task["target"]
    actions = [f"take {obj} from {task['place']}"]
    if kind in APPLIANCES:
        actions += [f"go to {APPLIANCES[kind]}", f"{kind} {obj} with {APPLIANCES[kind]}"]
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

    All numbers of a kind and all kinds occur in every plan, so it is their order that tells the place: the
    mean of the states does not. And a message cut to its first 8 vectors says the goal only."""
    kind, obj, place = task["type"], task["object"], task["place"]
    name, number = place.split()
    first, last = int(number), FURNITURE[name]
    numbers = [*range(first + 1, last + 1), *range(1, first)]  # drawer 3 of 8 -> 4 5 6 7 8 1 2
    others = [other for other in FURNITURE if other != name]

    # to put some mug in/on desk , take mug , put mug in/on desk 1 , go to drawer 3 else 4 5 6 ...
    steps = [f"to {goal(task)}", f"take {obj}"]
    if kind in APPLIANCES:
        steps.append(f"{kind} {obj} with {APPLIANCES[kind]}")
    steps.append(f"put {obj} in/on {task['target']} 1")
    steps.append(f"go to {place} else {' '.join(map(str, numbers))} else {' '.join(others)}")
    return " , ".join(steps)


def conversation(task, actions):
    """The episode as turns [{"from": "human" | "gpt", "value"}, ...]; it ends with the last action."""
    world = Household()
    turns = [{"from": "human", "value": world.reset(task)}]
    for action in actions:
        observation = world.step(action)[0]
        turns += [{"from": "gpt", "value": action}, {"from": "human", "value": observation}]
    return turns[:-1]


# --------------------------------------------------------------------------------------------------
# 2. Language models. A training sample of theirs is a list of (text, whether it is supervised)

# the markers are words from the start, so that the base model learns them with plans as text
SPECIAL = ["<pad>", "<unk>", "<eos>", "<user>", "<assistant>", "<bop>", "<eop>"]
# a space after <eos>: the tokenizer tells words apart by their spaces
CHAT_TEMPLATE = """
{%- for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <eos> {% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


def build_tokenizer(texts):
    """A tokenizer with one token per word of `texts`, and the special ones."""
    words = SPECIAL + sorted(set(" ".join(texts).split()))
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # `in/on` and `\boxed{` stay one word
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        extra_special_tokens=SPECIAL[3:],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE)


def encode(spans, vocabulary):
    """[(text, supervised?), ...] -> a sample for model.py's `collate`; labels are -100 where not supervised."""
    input_ids, labels = [], []
    for text, supervised in spans:
        ids = [vocabulary[word] for word in text.split()]
        input_ids += ids
        labels += ids if supervised else [-100] * len(ids)
    return build_sample([], input_ids, labels)


def train_lm(tokenizer, role, draw, seed, steps, layers=3, feed_forward=192, learning_rate=5e-3):
    """A small Qwen2, trained from scratch and in eval mode. draw(rng) gives the samples of a step."""
    rng = random.Random(f"{role} {seed}")
    torch.manual_seed(rng.getrandbits(32))  # from one start two roles would share embeddings: none to adapt
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.1,  # a model this small does not learn to copy with the usual 0.02
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=20, num_training_steps=steps)
    vocabulary = tokenizer.get_vocab()
    bar = progress(total=steps, desc=f"train the {role} from scratch", unit="step")
    for _ in range(steps):
        batch = collate([encode(spans, vocabulary) for spans in draw(rng)])
        # no attention mask: the padding is on the right, where causal attention does not look
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.update(1)
    bar.close()
    print(f"{role}: loss {loss.item():.3f} after {steps} steps")
    return model.eval()


def make_lm(seconds, path, tokenizer, role, draw, seed, steps, **sizes):
    """`train_lm` into a directory, unless it is there."""
    start = time.perf_counter()
    if not os.path.isdir(path):
        lm = train_lm(tokenizer, role, draw, seed, steps, **sizes)
        with atomic_path(path) as temporary:
            lm.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    seconds[os.path.basename(path)] = round(time.perf_counter() - start, 1)


def household_tokenizer():
    """Every word that the household can say."""
    # the training tasks hold them all: what is held out are combinations
    texts = [PLAN_ANNOUNCEMENT, "nothing happens .", "you see nothing ."]
    for task in all_tasks("train"):
        turns = conversation(task, expert(task))
        texts += [task["task"], plan(task), *(turn["value"] for turn in turns)]
    return build_tokenizer(texts)


def sender_sample(task):
    """The sender reads the house and the task and writes the plan."""
    return [(f"<user> {task['task']} <eos> <assistant>", False), (f"{plan(task)} <eos>", True)]


def actor_sample(task, with_plan):
    """The actor does as the expert with the plan as text, or searches without one."""
    first, *turns = conversation(task, expert(task) if with_plan else search_actions(task))
    message = f"{PLAN_ANNOUNCEMENT} <bop> {plan(task)} <eop>" if with_plan else ""
    spans = [(f"<user> {first['value']} {message} <eos> <assistant>", False)]
    for turn in turns:
        if turn["from"] == "gpt":
            spans.append((f"{turn['value']} <eos>", True))
        else:
            spans.append((f"<user> {turn['value']} <eos> <assistant>", False))
    return spans


def sender_samples(tasks, size=8):
    """draw(rng) of the sender for `train_lm`."""
    return lambda rng: [sender_sample(task) for task in rng.choices(tasks, k=size)]


def actor_samples(tasks, size=8):
    """draw(rng) of the actor for `train_lm`: half of a step has a plan."""
    # without a plan it learns successful searches only: cut-off ones would make no_comm look too bad
    searchable = [task for task in tasks if len(search_actions(task)) <= MAX_STEPS]

    def draw(rng):
        samples = [actor_sample(task, True) for task in rng.choices(tasks, k=size // 2)]
        return samples + [actor_sample(task, False) for task in rng.choices(searchable, k=size // 2)]
    return draw


# --------------------------------------------------------------------------------------------------
# 3. The stages, each through its real script

SIZES = {  # by task and --fast; steps and counts, measured so that the whole takes minutes on 2 cores
    ("household", False): {"base": 550, "sender": 250, "train": 1500, "test": 300, "actor": 140, "student": 1300},
    ("household", True): {"base": 300, "sender": 200, "train": 800, "test": 60, "actor": 70, "student": 120},
    ("math", False): {"base": 1400, "train": 3000, "test": 300, "actor": 200, "baseline": 200},
    ("math", True): {"base": 850, "train": 800, "test": 100, "actor": 60, "baseline": 40},
}


def stage(seconds, values, name, command):
    """Run one stage through its script's main(argv), printing the command as one would type it -> what main
    returns. Words are told apart before `values` are filled in, so an --output_dir may have spaces."""
    script, *argv = [word.format(**values) for word in shlex.split(command)]
    print(f"\n[{name}] $ python {script} {shlex.join(argv)}", flush=True)
    start = time.perf_counter()
    # main(argv) is all that `python collect.py ...` runs; here torch is imported once for all stages
    result = importlib.import_module(script.removesuffix(".py")).main(argv)
    seconds[name] = round(time.perf_counter() - start, 1)
    return result


def stage_once(out, values, name, command):
    """A stage, unless an earlier run has done it: {out}/seconds.json knows."""
    path = f"{out}/seconds.json"
    seconds = read_json(path) if os.path.exists(path) else {}
    if name not in seconds:
        stage(seconds, {"out": out, **values}, name, command)
        write_json(path, seconds)


def open_output(out, settings, fresh=False):
    """A directory holds one demo. Raises UserError if it was made with other settings."""
    if fresh:
        remove(out)
    path = f"{out}/settings.json"
    before = read_json(path) if os.path.exists(path) else settings
    if before != settings:
        raise UserError(f"{out} was made with other flags or sizes ({before}): add --fresh to start over, or give "
                        f"another --output_dir")
    write_json(path, settings)


def household(out, seed, sizes, seconds):
    """All stages of the household -> {row of the table: {"success", "interval", ...}}."""
    run = functools.partial(stage, seconds, {"out": out, "seed": seed, **sizes})
    game, tasks = Household(), all_tasks("train")

    # --- two LMs that never shared a parameter. With one LM for both, tied embeddings make the adapter look
    # unnecessary: its states are already close to its words
    tokenizer = household_tokenizer()
    make_lm(seconds, f"{out}/base", tokenizer, "actor", actor_samples(tasks), seed, sizes["base"])
    make_lm(seconds, f"{out}/sender", tokenizer, "sender", sender_samples(tasks), seed, sizes["sender"])

    # --- stage 1: the sender writes plans, its states are the messages; with --c 8 only the first of them,
    # to compare with the 8 latent steps of stage 3
    collect = """collect.py custom --env demo:Household --model_name_or_path {out}/sender
        --prompt_template '{{task}}' --max_new_tokens 60 --batch_size 64 --torch_dtype fp32"""
    run("collect train", collect + " --split train --max_samples {train} --output_dir {out}/messages_train")
    run("collect test", collect + " --split test --max_samples {test} --output_dir {out}/messages_test")
    run("collect 8 states", collect + " --split test --max_samples {test} --c 8 --output_dir {out}/messages_cut")

    # --- stage 2: the actor learns to read them
    demonstrations = [{"id": task["id"], "conversations": conversation(task, expert(task))}
                      for task in game.tasks("train")[:sizes["train"]]]
    write_json(f"{out}/train.json", demonstrations)
    run("train actor", """
        train_actor.py --model_name_or_path {out}/base --train_file {out}/train.json
        --hidden_data {out}/messages_train --output_dir {out}/actor --plan_announcement 'plan :'
        --max_steps {actor} --global_batch_size 32 --per_device_train_batch_size 32
        --learning_rate 1e-3 --adapter_learning_rate 3e-3
        --plan_similarity_weight 0.5 --random_contrast_weight 0.1
        --eval_ratio 0.05 --eval_steps 40 --logging_steps 20 --seed {seed}""")

    # --- stage 3: the sender learns to say it in 8 latent steps
    run("compress", """
        compress.py --teacher_model_name_or_path {out}/actor --student_model_name_or_path {out}/sender
        --train_file {out}/train.json --hidden_data {out}/messages_train --output_dir {out}/student
        --prompt_template '{{task}}' --K 8
        --max_steps {student} --global_batch_size 8 --per_device_train_batch_size 8
        --learning_rate 2e-3 --adam_beta2 0.98 --lambda_kl 0.3 --lambda_align 0.2
        --eval_ratio 0.05 --eval_steps 500 --logging_steps 100 --seed {seed}""")

    # --- stage 4: play; each evaluation is one table of eval_alfworld.py, ours has a row of each
    play = """eval_alfworld.py --env demo:Household --split test --num_episodes {test} --batch_size {test}
        --max_steps 10 --max_new_tokens 10 --torch_dtype fp32 --seed {seed}"""
    results = run("eval", play + """ --model_path {out}/actor --hidden_data {out}/messages_test
        --variants latent text no_comm cross_task randomrot --output_path {out}/eval""")
    # without a trained bridge the same sender thinks 8 steps that the actor never learned to read
    thoughts = " --latent_steps 8 --prompt_template '{{task}}' --sender_batch_size 64"
    others = {
        "no_comm_base": "--model_path {out}/base --variants no_comm",
        "keep8": "--model_path {out}/actor --hidden_data {out}/messages_cut",
        "k8": "--model_path {out}/actor --sender {out}/student" + thoughts,
        "k8_untrained": "--model_path {out}/actor --sender {out}/sender" + thoughts,
    }
    for name, flags in others.items():
        figures = run(f"eval {name}", f"{play} {flags} --output_path {{out}}/eval_{name}")
        results[name], = figures.values()
    # what luck gives: a search wins where the place comes early enough
    wins = [len(search_actions(task)) <= MAX_STEPS for task in game.tasks("test")[:sizes["test"]]]
    results["search"] = {"success": sum(wins) / len(wins), "interval": wilson_interval(sum(wins), len(wins))}
    return results


def math(out, seed, sizes, seconds):
    """All stages of the problems but compression -> {row of the table: {"accuracy", "interval", ...}}."""
    run = functools.partial(stage, seconds, {"out": out, "seed": seed, **sizes})
    torch.set_num_threads(1)  # the matrices are tiny: a second thread waits more than it computes

    # --- one LM is both sender and base of the actor
    tokenizer = build_tokenizer(demo_math.WORDS)
    make_lm(seconds, f"{out}/base", tokenizer, "base", demo_math.samples, seed, sizes["base"], layers=2,
            feed_forward=384, learning_rate=6e-3)

    # --- stage 1
    collect = """collect.py math --model_name_or_path {out}/base --prompt_template '{{task}} plan ?'
        --question_template '{{task}}' --max_new_tokens 40 --batch_size 100 --torch_dtype fp32"""
    for split in ("train", "test"):
        write_json(f"{out}/{split}.json", demo_math.records(split, sizes[split]))
        run(f"collect {split}", f"{collect} --dataset_path {{out}}/{split}.json --output_dir {{out}}/messages_{split}")

    # --- stage 2: small steps for the actor, or it forgets how to do without a message; the adapter is new
    train = """train_actor.py --model_name_or_path {out}/base --train_file {out}/messages_train/train.json
        --global_batch_size 32 --per_device_train_batch_size 32 --logging_steps 50 --seed {seed}"""
    run("train actor", train + """
        --hidden_data {out}/messages_train --plan_announcement 'plan :' --output_dir {out}/actor
        --max_steps {actor} --learning_rate 3e-5 --adapter_learning_rate 6e-3
        --adapter_scale 1.0 --adapter_output_scale 0.3
        --plan_similarity_weight 0.5 --random_contrast_weight 0.1""")
    run("train without messages", train + """
        --message none --output_dir {out}/actor_no_message --max_steps {baseline} --learning_rate 1e-3""")

    # --- stage 4: answer
    results = run("eval", """
        eval_math.py --model_path {out}/actor --baseline_path {out}/actor_no_message
        --hidden_data {out}/messages_test --dataset {out}/test.json --question_template '{{task}}'
        --variants latent text no_comm no_cot cross_task randomrot
        --max_length 8 --batch_size {test} --torch_dtype fp32 --seed {seed} --output_dir {out}/eval""")
    for level in results["latent"]["by_level"]:  # what the message is worth at each
        for name in ("latent", "no_comm"):
            results[f"{name}, level {level}"] = results[name]["by_level"][level]
    return results


# --------------------------------------------------------------------------------------------------
# 4. The report

MEANING = {
    "latent": "latent message",
    "text": "the plan as text, same actor",
    "no_comm": "no message, same actor",
    "no_comm_base": "no message, base model",
    "no_cot": "no message, base fine-tuned for it",
    "cross_task": "another task's message",
    "randomrot": "message rotated at random",
    "search": "scripted search, no message",
    "k8": "8 latent steps, trained",
    "k8_untrained": "8 latent steps, untrained",
    "keep8": "full message cut to 8 states",
}


def report(out, results, rate, seconds, n_tasks):
    """summary.json, results.png and the table of results {name: {rate, "interval", ...}}."""
    write_json(f"{out}/summary.json", {"tasks": n_tasks, "results": results, "seconds": seconds})
    labels = [MEANING.get(name, name) for name in results]
    rates = [figures[rate] for figures in results.values()]
    intervals = [figures["interval"] for figures in results.values()]
    xlabel = f"{rate} on {n_tasks} held-out tasks (95 % interval)"
    plot_bars(f"{out}/results.png", labels, rates, intervals, xlabel)

    print(f"\n{n_tasks} held-out tasks")
    print(f"{'name':18s}{'what the actor gets':36s}{rate:10s}95 % interval   states  ms per message")
    for name, figures in results.items():
        low, high = figures["interval"]
        line = f"{name:18s}{MEANING.get(name, ''):36s}{figures[rate]:.3f}     [{low:.3f}, {high:.3f}]"
        if figures.get("message_length"):
            line += f"  {figures['message_length']:6.1f}"
        if figures.get("sender_ms"):
            line += f"  {figures['sender_ms']:6.2f}"
        print(line)
    print(f"\n{sum(seconds.values()):.0f} s: " + ", ".join(f"{k} {v:g}" for k, v in seconds.items()))
    print(f"wrote {out}/summary.json and {out}/results.png")


def get_args(argv):
    parser = Parser(prog="demo.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["household", "math"], default="household", help="games or problems")
    parser.add_argument("--output_dir", help="models, messages, results, which a second run reuses; default: "
                                             "demo_out, with --task math demo_out_math")
    parser.add_argument("--seed", type=int, default=0, help="of the models and of everything drawn")
    parser.add_argument("--fast", action="store_true", help="under a minute: fewer steps, weaker results")
    parser.add_argument("--fresh", action="store_true", help="delete --output_dir first")
    return parser.parse_args(argv)


@one_line_errors("demo.py")
def main(argv=None):
    args = get_args(argv)
    out = args.output_dir or {"household": "demo_out", "math": "demo_out_math"}[args.task]
    sizes, seconds = SIZES[args.task, args.fast], {}
    open_output(out, {"task": args.task, "seed": args.seed, "sizes": sizes}, args.fresh)

    # --- all stages, and what they showed
    if args.task == "household":
        results = household(out, args.seed, sizes, seconds)
        report(out, results, "success", seconds, sizes["test"])
    else:
        results = math(out, args.seed, sizes, seconds)
        report(out, results, "accuracy", seconds, sizes["test"])
    sender = "sender" if args.task == "household" else "base"
    print(f"look inside a message: python collect.py inspect {out}/messages_test "
          f"--model_name_or_path {out}/{sender}")


if __name__ == "__main__":
    main()
