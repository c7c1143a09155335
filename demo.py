"""
The whole of Interlat in minutes on a CPU: a tiny household, tiny language models made from scratch, all stages.

  python demo.py                 about three minutes on 2 cores: a table and demo_out/results.png
  python demo.py --task math     the same for problems instead of games (demo_math.py), in demo_out_math
  python demo.py --fast          under a minute, weaker

The sender has seen the house, so its prompt says where the one object of the goal lies. The actor reads the goal only;
the place can reach it through the message and through nothing else. Every stage runs through its real script.
"""
import argparse
import itertools
import os
import random
import shlex
import shutil
import time
import zlib

import matplotlib
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, get_cosine_schedule_with_warmup

import collect
import compress
import eval_alfworld
import train_actor
from common import Parser, UserError, atomic_path, read_json, run, wilson_interval, write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# The household

OBJECTS = "apple bowl bread cup egg mug pan plate potato tomato".split()
PLACES = [f"{name} {i}" for name, n in (("shelf", 2), ("cabinet", 8), ("drawer", 8)) for i in range(1, n + 1)]
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


def goal(kind, obj, target):
    """The goal in ALFWorld's words."""
    return f"put some {obj} in/on {target}" if kind == "put" else f"{kind} some {obj} and put it in/on {target}"


def all_tasks(split):
    """Every (type, object, target, place) of a split as a task, in an order that is shuffled once and for all."""
    product = itertools.product(TYPES, OBJECTS, TARGETS, PLACES)
    combinations = [c for c in product if held_out(*c[:3]) == (split == "test")]
    random.Random(split).shuffle(combinations)
    return [{"id": f"{split}-{i:04d}", "type": kind, "object": obj, "target": target, "place": place,
             "task": f"house memory : {place} has {obj} . your task is to : {goal(kind, obj, target)} ."}
            for i, (kind, obj, target, place) in enumerate(combinations)]


class Household:
    """ALFWorld in miniature: find one object, perhaps clean, heat or cool it, and put it where the goal says."""

    def tasks(self, split):
        """The episodes of "train" or "test"; `task` is what the sender reads, `reset` returns what the actor reads."""
        return all_tasks(split)[:EPISODES[split]]

    def reset(self, task):
        """Start an episode; returns the first human turn, which has the goal but not the place."""
        self.task, self.at, self.holding, self.treated, self.opened = task, None, None, None, set()
        rng = random.Random(task["id"])  # three more objects lie about
        others = rng.sample([obj for obj in OBJECTS if obj != task["object"]], 3)
        self.contents = {location: [] for location in LOCATIONS}
        for obj, place in [(task["object"], task["place"]), *((obj, rng.choice(PLACES)) for obj in others)]:
            self.contents[place].append(obj)
        return ("you are in a room . you see 2 shelf , 8 cabinet , 8 drawer . "
                f"your task is to : {goal(task['type'], task['object'], task['target'])} .")

    def step(self, action):
        """Do one action; returns (observation, reward, done, {"won", "invalid"})."""
        observation = self._act(action.split())
        won = (self.task["object"] in self.contents[f"{self.task['target']} 1"]
               and self.task["type"] in ("put", self.treated))
        return observation or "nothing happens .", float(won), won, {"won": won, "invalid": observation is None}

    def _act(self, words):
        """Change the house and describe it, or return None for an action that is not possible now."""
        match words:
            case ["go", "to", *name] if (location := " ".join(name)) in LOCATIONS:
                self.at = location
                return f"{location} is closed ." if self._closed() else f"on {location} , {self._look()}"
            case ["open", *name] if " ".join(name) == self.at and self._closed():
                self.opened.add(self.at)
                return f"you open {self.at} . {self._look()}"
            case ["take", obj, "from", *name] if (" ".join(name) == self.at and not self._closed() and not self.holding
                                                  and obj in self.contents[self.at]):
                self.contents[self.at].remove(obj)
                self.holding = obj
                return f"you pick up {obj} from {self.at} ."
            case ["clean" | "heat" | "cool" as verb, obj, "with", *name] if (
                    " ".join(name) == self.at == APPLIANCES[verb] and obj == self.holding):
                self.treated = verb if obj == self.task["object"] else self.treated
                return f"you {verb} {obj} with {self.at} ."
            case ["put", obj, "in/on", *name] if (" ".join(name) == self.at and not self._closed()
                                                  and obj == self.holding):
                self.contents[self.at].append(obj)
                self.holding = None
                return f"you put {obj} in/on {self.at} ."

    def _closed(self):
        return self.at is not None and self.at.startswith(("cabinet", "drawer")) and self.at not in self.opened

    def _look(self):
        return f"you see {' , '.join(self.contents[self.at]) or 'nothing'} ."


def look_into(place):
    """The actions that show what a place holds."""
    return [f"go to {place}"] if place.startswith("shelf") else [f"go to {place}", f"open {place}"]


def search_actions(task):
    """A search that does not know the place: the open shelves first, then every door, then the goal."""
    visited = PLACES[:PLACES.index(task["place"]) + 1]
    actions = [action for place in visited for action in look_into(place)]
    actions.append(f"take {task['object']} from {task['place']}")
    if task["type"] in APPLIANCES:
        appliance = APPLIANCES[task["type"]]
        actions += [f"go to {appliance}", f"{task['type']} {task['object']} with {appliance}"]
    return actions + [f"go to {task['target']} 1", f"put {task['object']} in/on {task['target']} 1"]


def expert(task):
    """The shortest action list, for one who knows the place."""
    actions = search_actions(task)
    return actions[actions.index(f"go to {task['place']}"):]


def plan(task):
    """The plan as text. It ends with the places in the order to look in them, and the first one is right.

    All numbers of a kind and all kinds occur in every plan, so it is their order that tells the place: the mean of the
    states does not. And a message cut to its first 8 vectors says the goal only."""
    kind, obj, target, place = (task[key] for key in ("type", "object", "target", "place"))
    steps = [f"to {goal(kind, obj, target)}", f"take {obj}"]
    if kind in APPLIANCES:
        steps.append(f"{kind} {obj} with {APPLIANCES[kind]}")
    name, number = place.split()
    numbers = [p.split()[1] for p in PLACES if p.startswith(name)]
    i = numbers.index(number)
    others = [other for other in dict.fromkeys(p.split()[0] for p in PLACES) if other != name]
    look = f"go to {place} else {' '.join(numbers[i + 1:] + numbers[:i])} else {' '.join(others)}"
    return " , ".join([*steps, f"put {obj} in/on {target} 1", look])


def conversation(task, actions):
    """The episode as turns [{"from": "human" | "gpt", "value"}, …]; it ends with the last action."""
    world = Household()
    turns = [{"from": "human", "value": world.reset(task)}]
    for action in actions:
        turns += [{"from": "gpt", "value": action}, {"from": "human", "value": world.step(action)[0]}]
    return turns[:-1]


def training_rows():
    """What train_actor.py reads: the expert's conversation for every training task."""
    return [{"id": task["id"], "conversations": conversation(task, expert(task))}
            for task in Household().tasks("train")]


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer and the language models

SPECIAL = ["<pad>", "<unk>", "<eos>", "<user>", "<assistant>", "<bop>", "<eop>"]
CHAT_TEMPLATE = ("{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <eos> {% endfor %}"
                 "{% if add_generation_prompt %}<assistant>{% endif %}")


def build_tokenizer(texts):
    """One token per word of `texts`, and the special tokens."""
    words = SPECIAL + sorted({word for text in texts for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # `in/on` and `\boxed{` stay one word
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", padding_side="left",
        extra_special_tokens=SPECIAL[3:], chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False)


def collate(examples, vocabulary):
    """Examples -> input_ids, labels, both (B, T) int64, padded on the right; labels are -100 where not supervised."""
    width = max(sum(len(text.split()) for text, _ in spans) for spans in examples)
    input_ids = torch.full((len(examples), width), vocabulary["<pad>"])
    labels = torch.full((len(examples), width), -100)
    for row, spans in enumerate(examples):
        start = 0
        for text, supervised in spans:
            ids = torch.tensor([vocabulary[word] for word in text.split()])
            input_ids[row, start:start + len(ids)] = ids
            if supervised:
                labels[row, start:start + len(ids)] = ids
            start += len(ids)
    return input_ids, labels


def train_lm(tokenizer, role, draw, seed, steps, layers=3, feed_forward=192, learning_rate=5e-3):
    """A small Qwen2 from scratch. draw(rng) gives the examples of a step, each a list [(text, supervised?), …]."""
    rng = random.Random(f"{role} {seed}")
    torch.manual_seed(rng.getrandbits(32))  # from the same start two roles would share embeddings: no need to adapt
    vocabulary = tokenizer.get_vocab()
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.1,  # a model this small does not learn to copy with the usual 0.02
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=20, num_training_steps=steps)
    progress = tqdm(range(steps), desc=f"train the {role} from scratch")
    for _ in progress:
        input_ids, labels = collate(draw(rng), vocabulary)
        # no attention mask: the padding is on the right, where causal attention does not look
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def make_lm(seconds, path, tokenizer, role, *args, **sizes):
    """`train_lm` into a directory, unless it is there."""
    start = time.perf_counter()
    if not os.path.isdir(path):
        lm = train_lm(tokenizer, role, *args, **sizes)
        with atomic_path(path) as temporary:
            lm.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    seconds[os.path.basename(path)] = round(time.perf_counter() - start, 1)


def household_tokenizer():
    """Every word that the household can say."""
    texts = [PLAN_ANNOUNCEMENT, "nothing happens .", "you see nothing ."]
    for task in all_tasks("train"):
        texts += [task["task"], plan(task), *(turn["value"] for turn in conversation(task, expert(task)))]
    return build_tokenizer(texts)


def sender_example(task):
    """[(text, supervised?), …] of one sender sequence: the house and the task, then the plan."""
    return [(f"<user> {task['task']} <eos> <assistant>", False), (f"{plan(task)} <eos>", True)]


def actor_example(task, with_plan):
    """[(text, supervised?), …] of one actor sequence: the expert with the plan as text, or a search without one."""
    first, *turns = conversation(task, expert(task) if with_plan else search_actions(task))
    message = f" {PLAN_ANNOUNCEMENT} <bop> {plan(task)} <eop>" if with_plan else ""
    spans = [(f"<user> {first['value']}{message} <eos> <assistant>", False)]
    for turn in turns:
        spans.append((f"{turn['value']} <eos>", True) if turn["from"] == "gpt"
                     else (f"<user> {turn['value']} <eos> <assistant>", False))
    return spans


def household_examples(role, rows=8):
    """draw(rng) for `train_lm`: the sender learns to write plans, the actor to act with a plan and without one."""
    tasks = all_tasks("train")
    # the actor without a plan learns successful searches only: imitating cut-off ones would make no_comm look too bad
    searchable = [task for task in tasks if len(search_actions(task)) <= MAX_STEPS]

    def draw(rng):
        if role == "sender":
            return [sender_example(task) for task in rng.choices(tasks, k=rows)]
        examples = [actor_example(task, True) for task in rng.choices(tasks, k=rows // 2)]
        return examples + [actor_example(task, False) for task in rng.choices(searchable, k=rows // 2)]
    return draw


# ---------------------------------------------------------------------------------------------------------------------
# The stages, each through its real script

SETTINGS = {  # steps and sizes: measured so that the whole takes minutes on 2 cores
    False: {"base": 550, "sender": 250, "collect": 1500, "episodes": 300, "actor": 140, "student": 1300},
    True: {"base": 300, "sender": 200, "collect": 800, "episodes": 60, "actor": 70, "student": 120},
}


def stage(seconds, name, script, command):
    """Run one stage through its script's main, printing the command as one would type it."""
    argv = shlex.split(command)
    print(f"\n[{name}] $ python {script.__name__}.py {shlex.join(argv)}", flush=True)
    start = time.perf_counter()
    result = script.main(argv)
    seconds[name] = round(time.perf_counter() - start, 1)
    return result


def household(args, out):
    """Base LMs, messages, actor, evaluation -> success, intervals and seconds by name."""
    n, seconds, success, interval, message = SETTINGS[args.fast], {}, {}, {}, {}
    tokenizer, game = household_tokenizer(), Household()
    tasks = {split: game.tasks(split) for split in ("train", "test")}
    tasks["train"], tasks["test"] = tasks["train"][:n["collect"]], tasks["test"][:n["episodes"]]
    for split in tasks:
        write_json(f"{out}/tasks_{split}.json", tasks[split])
    write_json(f"{out}/train.json", training_rows()[:n["collect"]])

    # two LMs that never shared a parameter: with one LM for both, the adapter would have nothing to do
    for name, role in (("base", "actor"), ("sender", "sender")):
        make_lm(seconds, f"{out}/{name}", tokenizer, role, household_examples(role), args.seed, n[name])

    for split in tasks:
        stage(seconds, f"collect {split}", collect,
              f"custom --model_name_or_path {out}/sender --dataset_path {out}/tasks_{split}.json --prompt_template "
              f"'{{task}}' --output_dir {out}/messages_{split} --max_new_tokens 60 --batch_size "
              f"{128 if split == 'train' else 16} --torch_dtype fp32")
    stage(seconds, "train actor", train_actor,
          f"--model_name_or_path {out}/base --train_file {out}/train.json --hidden_data {out}/messages_train "
          f"--output_dir {out}/actor --max_steps {n['actor']} --global_batch_size 32 --per_device_train_batch_size "
          f"32 --learning_rate 1e-3 --adapter_learning_rate 3e-3 --plan_similarity_weight 0.5 "
          f"--random_contrast_weight 0.1 --plan_announcement '{PLAN_ANNOUNCEMENT}' --eval_ratio 0.05 --eval_steps 40 "
          f"--logging_steps 20 --seed {args.seed}")

    def play(name, model, variants, flags="", names=None):
        summary = stage(seconds, name, eval_alfworld,
                        f"--model_path {model} --env demo:Household --split test --num_episodes {n['episodes']} "
                        f"--variants {variants} --max_steps {MAX_STEPS} --batch_size {n['episodes']} --max_new_tokens "
                        f"10 --torch_dtype fp32 --seed {args.seed} --output_path {out}/{name.replace(' ', '_')} "
                        f"{flags}")
        for label, figures in summary.items():
            key = (names or {}).get(label, label)
            success[key], interval[key] = figures["success"], figures["interval"]
            message[key] = figures["message_rows"], figures["sender_ms"]

    play("eval", f"{out}/actor", "none text no_comm cross_task randomrot", f"--hidden_data {out}/messages_test")
    # stage 3: the same sender model learns to say it in 8 steps; untrained, and the full message cut to 8, beside it
    stage(seconds, "compress", compress,
          f"--teacher_model_name_or_path {out}/actor --student_model_name_or_path {out}/sender --train_file "
          f"{out}/train.json --hidden_data {out}/messages_train --output_dir {out}/student --prompt_template "
          f"'{{task}}' --K 8 --max_steps {n['student']} --global_batch_size 8 --per_device_train_batch_size 8 "
          f"--learning_rate 2e-3 --adam_beta2 0.98 --lambda_kl 0.3 --lambda_align 0.2 --eval_ratio 0.05 --eval_steps "
          f"500 --logging_steps 100 --seed {args.seed}")
    live = "--prompt_template '{task}' --latent_steps 8 --sender"
    play("eval k8", f"{out}/actor", "none", f"{live} {out}/student", {"none_k8": "k8"})
    play("eval k8 untrained", f"{out}/actor", "none", f"{live} {out}/sender", {"none_k8": "k8_untrained"})
    stage(seconds, "collect 8 rows", collect,
          f"custom --model_name_or_path {out}/sender --dataset_path {out}/tasks_test.json --prompt_template '{{task}}' "
          f"--output_dir {out}/messages_cut --max_new_tokens 60 --c 8 --batch_size 16 --torch_dtype fp32")
    play("eval cut", f"{out}/actor", "none", f"--hidden_data {out}/messages_cut", {"none": "keep8"})
    play("eval base", f"{out}/base", "no_comm", names={"no_comm": "no_comm_base"})
    wins = sum(len(search_actions(task)) <= MAX_STEPS for task in tasks["test"])
    success["search"], interval["search"] = wins / len(tasks["test"]), wilson_interval(wins, len(tasks["test"]))
    return {"success": success, "interval": interval, "seconds": seconds, "episodes": len(tasks["test"]),
            "message": message}


MEANING = {"none": "latent message", "text": "the plan as text, same actor", "no_comm": "no message, same actor",
           "no_comm_base": "no message, base model", "cross_task": "another task's message",
           "randomrot": "message rotated at random", "search": "scripted search, no message",
           "k8": "8 latent steps, trained", "k8_untrained": "8 latent steps, untrained",
           "keep8": "full message cut to 8 rows"}


def report(summary, out):
    """summary.json, results.png and the table."""
    write_json(f"{out}/summary.json", summary)
    names = [name for name in MEANING if name in summary["success"]]
    success = np.array([summary["success"][name] for name in names])
    low, high = np.array([summary["interval"][name] for name in names]).T
    special = {"none": "tab:blue", "k8": "tab:blue", "search": "tab:gray"}
    colors = [special.get(name, "lightsteelblue") for name in names]
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.38 * len(names)))
    axes.barh([MEANING[name] for name in names], success, xerr=[success - low, high - success], color=colors, capsize=3)
    axes.set(xlim=(0, 1), xlabel=f"success on {summary['episodes']} held-out tasks (95 % Wilson interval)")
    axes.invert_yaxis()
    with atomic_path(f"{out}/results.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    print(f"\n{summary['episodes']} held-out tasks\n{'name':14s} {'what the actor gets':32s} success  "
          f"{'95 % interval':14s} rows  ms per message")
    for name, p, a, b in zip(names, success, low, high):
        rows, ms = summary["message"].get(name, (0, 0))
        sent = f"{rows:4.0f}  {ms:6.2f}" if rows else ""
        print(f"{name:14s} {MEANING[name]:32s} {p:7.3f}  [{a:.3f}, {b:.3f}] {sent}")
    print_end(summary["seconds"], out, f"{out}/sender")


def print_end(seconds, out, sender):
    print(f"\n{sum(seconds.values()):.0f} s: " + ", ".join(f"{k} {v:g}" for k, v in seconds.items()))
    print(f"wrote {out}/summary.json and {out}/results.png; look inside a message: python collect.py inspect "
          f"{out}/messages_test --model_name_or_path {sender}")


def demo(args):
    out = args.output_dir or {"household": "demo_out", "math": "demo_out_math"}[args.task]
    if args.fresh and os.path.isdir(out):
        shutil.rmtree(out)
    settings = {"task": args.task, "seed": args.seed, "fast": args.fast}
    if os.path.exists(f"{out}/settings.json") and (before := read_json(f"{out}/settings.json")) != settings:
        raise UserError(f"{out} was made with other flags ({before}): add --fresh to start over, or give another "
                        f"--output_dir")
    write_json(f"{out}/settings.json", settings)
    if args.task == "math":
        import demo_math  # which imports this file
        demo_math.report(demo_math.math(args, out), out)
    else:
        report(household(args, out), out)


def main(argv=None):
    parser = Parser(prog="demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parser.add_argument("--task", choices=["household", "math"], default="household", help="games or problems")
    parser.add_argument("--output_dir", help="models, messages, results, which a second run reuses; default: demo_out, "
                                             "with --task math demo_out_math")
    parser.add_argument("--seed", type=int, default=0, help="of the models and of everything drawn")
    parser.add_argument("--fast", action="store_true", help="under a minute: fewer steps and episodes, weaker results")
    parser.add_argument("--fresh", action="store_true", help="delete --output_dir first")
    args = parser.parse_args(argv)
    run(parser, demo, args)


if __name__ == "__main__":
    main()
