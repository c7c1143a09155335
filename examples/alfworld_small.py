"""
ALFWorld's own games on two cores: a language model of 1.5 million parameters, made from scratch.

  pip install alfworld && alfworld-download             the games, in ~/.cache/alfworld or $ALFWORLD_DATA
  python examples/alfworld_small.py --fast              # nine minutes on 2 cores: shows that it runs
  python examples/alfworld_small.py                     # two hours on 2 cores
  python examples/alfworld_small.py --seeds 0 1 2       # three seeds; the unit stays the game

Type this at the top of the repository, and again after a kill: every stage goes on where it was.

ALFWorld's texts use some two hundred words, so a small model can learn all of its language. The sender has
seen the house: its prompt says where the things of the goal are. The actor, which starts from the same model
as the paper's two agents do, reads the room and the goal only:

    sender reads   You have seen this house: fork 3 is at diningtable 1. You are in the middle of a room. ...
                   Your task is to: clean some fork and put it in drawer.
    its plan       take fork 3 from diningtable 1, clean it with sinkbasin 1, put it in drawer 1.

    1. the demonstrations   conversations that win the 3,554 training games; assets/ has what was made by
                            python examples/alfworld_house.py demonstrate --split train --output_dir d
                            and xz -9e d/*.jsonl
    2. language models      from scratch: to plan, to act with a plan in words, to search without one
    3. the stages           each through its real script, on all 140 seen and 134 unseen games
    4. the report           alfworld.json, a table, alfworld.png

Its box is seed 0's models as assets/models holds them: what they won is what they win.
"""
import functools
import glob
import lzma
import os
import random
import re
import shutil
import statistics
import sys

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, pre_tokenizers
from transformers import (LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          get_cosine_schedule_with_warmup)

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts are one folder up

from common import (  # noqa: E402
    UserError, atomic_path, one_line_errors, plot_bars, progress, read_json, read_rows, remove, write_json, write_text)
from data import Conversations  # noqa: E402
from examples.scratch import (  # noqa: E402
    PLAN_ANNOUNCEMENT, build_tokenizer, demo_parser, made_by, once, open_output, stage)
from games import open_split  # noqa: E402
from model import collate, open_shards  # noqa: E402
from variants import bootstrap_interval, differences  # noqa: E402

SPLITS = ["valid_seen", "valid_unseen"]
SAVE_STEPS = 50  # of the language models
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
SIZES = {  # by --fast: steps and counts
    False: {"base": 1600, "llama": 500, "warm": 200, "actor": 120, "search": 300, "student": 1000, "games": 140},
    True: {"base": 60, "llama": 30, "warm": 20, "actor": 4, "search": 4, "student": 4, "games": 20},
}

# ---- 1. The demonstrations: direct.jsonl and search.jsonl of one who knows the place and of one who does not ----
def unpack_demonstrations(out):
    """Those of assets/; with --from_games they are made anew, and of all training games."""
    assets = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets")
    for name in ("direct", "search"):
        with lzma.open(f"{assets}/alfworld_train_{name}.jsonl.xz", "rt") as file:
            write_text(f"{out}/train_{name}.jsonl", file.read())


def write_planning(out):
    """What the sender learns from: it reads the place and the task, and writes the plan. A quarter of its
    prompts do not say the place, so that it can also be asked what the actor is told: its plan is a guess then."""
    records = []
    for n, record in enumerate(read_json(f"{out}/train_direct.jsonl")):
        reply = {"from": "gpt", "value": record["plan"]}
        _, told = record["sender_task"].split("\n\n", 1)
        for name, text in [("", record["sender_task"]), ("-guess", told)][:1 + (n % 3 == 0)]:
            turns = [{"from": "human", "value": text}, reply]
            records.append({"id": record["id"] + name, "conversations": turns})
    write_json(f"{out}/planning.json", records)


def write_told(out, sender):
    """The demonstrations that do what this sender's message says.

    Where several drawers would do, the sender may name another than the demonstration opens: in a quarter of
    the games. An actor that is told one and shown the other learns not to listen."""
    plans = open_shards(f"{out}/{sender}_train").records
    records = read_json(f"{out}/train_direct.jsonl")
    told = [record for record in records
            if re.sub(" ([.,])", r"\1", plans[record["id"]]["plan"]) == record["plan"]]
    # the senders of --fast have hardly learned to plan
    write_json(f"{out}/{sender}_told.json", told if len(told) > len(records) / 2 else records)


# ---- 2. Language models --------------------------------------------------------------------------
def make_tokenizer(out):
    """One token for each word of the training games; commas and full stops are words."""
    texts = [PLAN_ANNOUNCEMENT]
    for record in [*read_json(f"{out}/train_direct.jsonl"), *read_json(f"{out}/train_search.jsonl")]:
        texts += [record.get("sender_task", ""), record.get("plan", "")]
        texts += [turn["value"] for turn in record["conversations"]]
    tokenizer = build_tokenizer(re.sub("([.,])", r" \1 ", text) for text in texts)
    punctuation = pre_tokenizers.Split(Regex("[.,]"), "isolated")
    split = pre_tokenizers.Sequence([punctuation, pre_tokenizers.WhitespaceSplit()])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    tokenizer.chat_template_kwargs = {}  # nothing for its template, as hf.py's load_tokenizer would say
    return tokenizer


def make_lm(config_class, lm_class, tokenizer, seed):
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=len(tokenizer),
        **SHAPE,
        max_position_embeddings=2048,
        # with the demo's 100 the model copies badly over the hundreds of tokens of a game
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        initializer_range=0.06,  # with the usual 0.02 so small a model does not learn to copy
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    return lm_class(config)


def train_lm(path, lm, tokenizer, groups, seed, steps):
    """Train a model into a directory, unless it is there; after a kill from where it was.

    groups: [(Conversations, kind of their messages, samples in a step)]; each is a batch of its own, because
    the conversations of different groups differ in length."""
    if os.path.isdir(path):
        return
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=steps)
    parts, first, checkpoint = (lm, optimizer, schedule), 0, f"{path}.pt"
    if os.path.exists(checkpoint):
        first, states = torch.load(checkpoint, weights_only=True)
        for part, state in zip(parts, states):
            part.load_state_dict(state)

    name = os.path.basename(path)
    bar = progress(range(first, steps), desc=f"train {name} from scratch", unit="step")
    for step in bar:
        rng, losses = random.Random(f"{name} {seed} {step}"), []
        for data, kind, size in groups:
            batch = collate([data.sample(n, kind) for n in rng.choices(range(len(data)), k=size)])
            # no attention mask: the padding is on the right, where causal attention does not look
            loss = lm(input_ids=batch["input_ids"], labels=batch["labels"]).loss
            loss.backward()
            losses.append(f"{loss.item():.4f}")
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_STEPS == 0:
            bar.write(f"step {step + 1}/{steps} losses {' '.join(losses)}")
            with atomic_path(checkpoint) as temporary:
                torch.save((step + 1, [part.state_dict() for part in parts]), temporary)

    with atomic_path(path) as temporary:
        lm.bfloat16().save_pretrained(temporary)  # half the bytes, before any message is collected
        tokenizer.save_pretrained(temporary)
    remove(checkpoint)


def language_models(out, seed, sizes):
    """{out}/base, sender and start of the actors, and {out}/llama, a sender of another family."""
    write_planning(out)
    tokenizer = make_tokenizer(out)
    planning = Conversations(f"{out}/planning.json", tokenizer, kind="none")
    direct = Conversations(f"{out}/train_direct.jsonl", tokenizer, kind="text", announcement=PLAN_ANNOUNCEMENT,
                           task_turn=2)
    search = Conversations(f"{out}/train_search.jsonl", tokenizer, kind="none", task_turn=2)
    groups = [(direct, "text", 12), (search, "none", 4), (planning, "none", 12)]
    base = make_lm(Qwen2Config, Qwen2ForCausalLM, tokenizer, seed)
    train_lm(f"{out}/base", base, tokenizer, groups, seed, sizes["base"])
    llama = make_lm(LlamaConfig, LlamaForCausalLM, tokenizer, seed + 1000)
    train_lm(f"{out}/llama", llama, tokenizer, [(planning, "none", 24)], seed, sizes["llama"])


# ---- 3. The stages -------------------------------------------------------------------------------
def pack(model, box):
    """Into the box: settings, tokenizer, and the weights in bf16, half the bytes. No checkpoints, no logs."""
    with atomic_path(box) as temporary:
        os.mkdir(temporary)
        for path in glob.glob(f"{model}/*.*"):
            name = os.path.basename(path)
            if name.endswith(".safetensors"):
                tensors = {key: tensor.bfloat16() for key, tensor in load_file(path).items()}
                save_file(tensors, f"{temporary}/{name}", metadata={"format": "pt"})
            elif name.endswith((".json", ".jinja")):
                shutil.copy(path, temporary)


def one_seed(out, seed, sizes, from_games):
    """Every stage -> {split: {row: {game: whether it was won}}}."""
    run = functools.partial(stage, out, seed=seed, **sizes)

    # --- demonstrations, and the models that learn from them
    if from_games:
        run("demonstrations", "examples/alfworld_house.py demonstrate --split train --output_dir {out}")
    else:
        once(out, "demonstrations", functools.partial(unpack_demonstrations, out))
    once(out, "language models", functools.partial(language_models, out, seed, sizes))

    # --- stage 1: the messages of both senders
    collect = """collect.py custom --model_name_or_path {out}/{sender} --prompt_template '{{task}}'
        --max_new_tokens 40 --batch_size 140 --torch_dtype fp32 --output_dir {out}/{name}_{split} """
    from_file = collect + "--dataset_path {out}/train_direct.jsonl --task_field sender_task"
    from_game = collect + "--env examples.alfworld_house:SeenHouse --split {split} --max_samples {games}"
    for sender in ("base", "llama"):
        run(f"{sender}, train", from_file, sender=sender, name=sender, split="train")
        write_told(out, sender)

    # --- stage 2: an actor for each sender, whose adapter first learns alone, in seconds; the rate is one that does
    # not undo that. And an actor that has learned to search without messages
    train = """train_actor.py --model_name_or_path {out}/base --task_turn 2 --plan_announcement 'plan :'
        --global_batch_size 32 --per_device_train_batch_size 16 --adam_beta2 0.98 --eval_ratio 0.03
        --eval_steps 20 --save_steps 20 --logging_steps 10 --seed {seed} """
    read = """--train_file {out}/{sender}_told.json --hidden_data {out}/{sender}_train
        --output_dir {out}/{sender}_actor --adapter_warmup_steps {warm} --max_steps {actor} --learning_rate 3e-4
        --curriculum 0 --plan_similarity_weight 0.5 --random_contrast_weight 0.1"""
    for sender in ("base", "llama"):
        run(f"actor of {sender}", train + read, sender=sender)
    run("actor without messages", train + """--max_steps {search} --learning_rate 1e-3
        --train_file {out}/train_search.jsonl --message none --output_dir {out}/search_actor""")
    for model, name in (("base", "base"), ("base_actor", "actor"), ("search_actor", "search_actor")):
        once(out, f"box, {name}", functools.partial(pack, f"{out}/{model}", f"{out}/box/{name}"))

    # --- stage 3: the sender learns to say it in 8 latent steps
    run("student", """
        compress.py --teacher_model_name_or_path {out}/box/actor --student_model_name_or_path {out}/box/base
        --train_file {out}/base_told.json --task_turn 2 --hidden_data {out}/base_train
        --prompt_template '{{task}}' --output_dir {out}/student --K 8 --max_steps {student}
        --global_batch_size 8 --per_device_train_batch_size 8 --learning_rate 2e-3 --adam_beta2 0.98
        --lambda_kl 0.3 --lambda_align 0.2 --eval_ratio 0.03 --eval_steps 200
        --save_steps 100 --logging_steps 20 --seed {seed}""")
    once(out, "box, student", functools.partial(pack, f"{out}/student", f"{out}/box/student"))

    # --- stage 4: what is in the box plays; rows that need another sender or actor have a table of their own
    play = """eval_alfworld.py --env examples.alfworld_house:SeenHouse --split {split} --num_episodes {games}
        --max_new_tokens 20 --batch_size 140 --torch_dtype fp32 --seed {seed} --max_plan_tokens 40
        --sender_batch_size 140 --output_path {out}/play/{table}_{split} """
    tables = {
        "main": """--model_path {out}/box/actor --sender {out}/box/base --baseline_path {out}/box/search_actor
            --variants latent text no_comm no_cot cross_task self randomrot whitenoise
            --messages keep8={out}/keep8_{split} k8_untrained={out}/untrained_{split}""",
        "llama": "--model_path {out}/llama_actor --sender {out}/llama",
        "k8": "--model_path {out}/box/actor --sender {out}/box/student",
    }
    wins = {}
    for split in SPLITS:
        run(f"first 8 states, {split}", from_game + " --c 8", sender="base", name="keep8", split=split)
        run(f"8 steps, untrained, {split}", from_game + " --latent_steps 8", sender="base", name="untrained",
            split=split)
        rows = {}
        for table, flags in tables.items():
            run(f"play {table}, {split}", play + flags, split=split, table=table)
            played = wins_of(f"{out}/play/{table}_{split}")
            rows |= played if table == "main" else {table: next(iter(played.values()))}
        wins[split] = {row: rows[row] for row in MEANING}
    return wins


def wins_of(folder):
    """What an evaluation played -> {row: {game: whether it was won}}. Raises UserError for a game that
    crashed, because that was not lost."""
    wins = {}
    for episode in read_rows(f"{folder}/results.csv"):
        if episode["crash"]:
            raise UserError(f"{folder}: {episode['id']} crashed ({episode['crash']}): take this stage out "
                            "of seconds.json, and start the same command again")
        wins.setdefault(episode["variant"], {})[episode["id"]] = episode["success"] == "True"
    return wins


def obedience(folder):
    """Under another game's message: games whose first visit is where that message says -> [games, of all]."""
    plans, obeyed = open_shards(f"{folder}/messages").records, []
    for path in sorted(glob.glob(f"{folder}/episodes/cross_task/run0/*.json")):
        episode = read_json(path)
        said = re.search(r"from (\S+ \d+)", plans[episode["message_of"]]["plan"])
        visits = [turn["action"] for turn in episode["turns"] if re.match("(go to|examine) ", turn["action"] or "")]
        obeyed.append(bool(said and visits and visits[0].endswith(f" {said[1]}")))
    return [sum(obeyed), len(obeyed)]


# ---- 4. The report -------------------------------------------------------------------------------
MEANING = {
    "latent": "the sender's states",
    "text": "its plan as text, same actor",
    "no_comm": "no message, same actor",
    "no_cot": "no message, an actor that learned to search",
    "cross_task": "another game's states",
    "self": "of the sender, not told the place",
    "randomrot": "states rotated at random",
    "whitenoise": "states in noise of their power",
    "llama": "a Llama's states, an actor that learned them",
    "keep8": "the first 8 states",
    "k8": "8 latent steps, trained",
    "k8_untrained": "8 latent steps, untrained",
}


def pool(wins, splits):
    """{row: {game: its wins, averaged over seeds}}: whatever the number of seeds, the unit is the game."""
    table = {}
    for row in MEANING:
        by_seed = [{(split, game): won for split in splits for game, won in of_seed[split][row].items()}
                   for of_seed in wins.values()]
        table[row] = {game: statistics.fmean(won[game] for won in by_seed) for game in by_seed[0]}
    return table


def report(out, wins, sizes, seconds):
    """alfworld.json, the table and its picture. wins: {seed: {split: {row: {game: whether it was won}}}}."""
    tables, compared = {}, {}
    for part, splits in {"seen": SPLITS[:1], "unseen": SPLITS[1:], "all": SPLITS}.items():
        games = pool(wins, splits)
        seeds = [pool({seed: wins[seed]}, splits) for seed in wins]
        compared[part] = differences(games)
        tables[part] = {}
        for row, won in games.items():
            tables[part][row] = {
                "success": statistics.fmean(won.values()),
                "interval": bootstrap_interval(list(won.values())),
                "games": len(won),
                "by_seed": [statistics.fmean(table[row].values()) for table in seeds],
            }
    obeyed = {seed: {split: obedience(f"{out}/seed{seed}/play/main_{split}") for split in SPLITS} for seed in wins}

    print(f"\n{'':14s}{'what the actor gets':46s}" + "".join(f"{part:22s}" for part in tables) + "all, by seed")
    for row, meaning in MEANING.items():
        line = f"{row:14s}{meaning:46s}"
        for table in tables.values():
            low, high = table[row]["interval"]
            line += f"{table[row]['success']:.3f} [{low:.2f}, {high:.2f}]    "
        print(line + " ".join(f"{success:.3f}" for success in tables["all"][row]["by_seed"]))
    for name, (value, low, high) in compared["all"].items():
        print(f"{name:14s}{value:+.3f} [{low:+.2f}, {high:+.2f}] over all games, whose seeds are averaged")
    counts = [count for splits in obeyed.values() for count in splits.values()]
    games, of_all = map(sum, zip(*counts))
    print(f"cross_task: in {games} of {of_all} games the first visit is where the other game's message says")

    rows = tables["all"].values()
    plot_bars(f"{out}/alfworld.png", list(MEANING.values()), [row["success"] for row in rows],
              [row["interval"] for row in rows],
              f"share of {tables['all']['latent']['games']} games won that no model was trained on (95 % interval)")
    hours = {seed: round(sum(stages.values()) / 3600, 2) for seed, stages in seconds.items()}
    write_json(f"{out}/alfworld.json", made_by() | {
        "hours": hours, "sizes": sizes, "seconds": seconds, "tables": tables, "differences": compared,
        "obeyed": obeyed})
    print(f"\nhours by seed: {hours}\nwrote {out}/alfworld.json and {out}/alfworld.png")


def get_args(argv):
    parser = demo_parser("alfworld_small.py", __doc__, "alfworld_out", "20 games of each split, weak models")
    parser.flag("--seeds", [0], "of the models and of all that is drawn; a game's wins are averaged over them",
                nargs="+", type=int)
    parser.add_argument("--from_games", action="store_true", help="play the training games anew for their "
                        "demonstrations, an hour, instead of unpacking those of assets/")
    parser.add_argument("--unsure", action="store_true", help="instead, in OUTPUT_DIR/unsure: a sender who knows two "
                        "places and not which is right (alfworld_unsure.py); five hours a seed, or --fast")
    parser.flag("--actor_knows", None, "instead, in OUTPUT_DIR/actor_knows: the actor is told the place too, in this "
                "share of the games; two hours a seed, or --fast", nargs="+", type=float, choices=[0, 0.5, 1])
    return parser.parse_args(argv)


@one_line_errors("alfworld_small.py")
def main(argv=None):
    args = get_args(argv)
    for split in SPLITS:
        open_split("alfworld", split)  # an hour from now it would be late to say that they are missing
    if args.unsure or args.actor_knows:
        from examples.alfworld_unsure import who_knows  # it builds on this file
        return who_knows(args.output_dir, args.actor_knows, args.seeds, args.fast, args.fresh)
    out, sizes = args.output_dir, SIZES[args.fast]
    open_output(out, {"example": "alfworld_small", "sizes": sizes, "from_games": args.from_games}, args.fresh)

    wins, seconds = {}, {}
    for seed in args.seeds:
        wins[seed] = one_seed(f"{out}/seed{seed}", seed, sizes, args.from_games)
        seconds[seed] = read_json(f"{out}/seed{seed}/seconds.json")
    report(out, wins, sizes, seconds)


if __name__ == "__main__":
    main()
