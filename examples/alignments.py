"""
Alignments without training, under the same harness: what a reader makes of messages that it never learned to read.

  python examples/alfworld_small.py       # first: two readers, their demonstrations and messages
  python examples/unsure.py               # for the rows of the unsure sender
  python examples/smollm2.py --model ...  # for those of a pre-trained model
  python examples/alignments.py --fast    # a quarter of an hour: shows that it runs
  python examples/alignments.py           # two hours and a half on 2 cores, as many again with SmolLM2

Type this at the top of the repository, and again after a kill: every stage goes on where it was. What the other
examples have not left yet is left out, and added when there. SmolLM2's rows take 7 GB of disk.

The same plans, sent in seven ways to language models that are not trained any more: last states through no
adapter, through a rotation (Procrustes) and through an adapter that has learned only their words; vectors of words
instead of states; random vectors. Each row is played under the right message and under another game's. A row that
is high under both is read as "some message", and only what it loses under the other one, the pairing, was read in it.

What this shows: how much of what training buys an alignment gives that costs seconds. What it does not show: that
it would between strangers. Each sender and its readers have the same start, and one table for words in and out, so
a sender's embeddings are nearly the reader's and its states lie next to them; the readers knew plans in words. The
intervals are of games: of each model there is one, from one seed. In `random` each word has a random vector of its
own: all that `likeliest` tells, in a code that nobody has learned.

    1. what is sent   random vectors; the rows
    2. the readers    what the other examples have left
    3. the stages     of a row, each through its real script
    4. the report     alignments.json, a table, alignments.png
"""
import functools
import os
import statistics
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts are one folder up

from common import UserError, fingerprint, one_line_errors, read_json, remove, save_figure, seed_for, write_json  # noqa: E402
from examples.alfworld_small import SPLITS, wins_of  # noqa: E402
from examples.scratch import demo_parser, once, open_output, stage  # noqa: E402
from examples.unsure import likeliest, plan_is_right  # noqa: E402
from games import open_split  # noqa: E402
from model import open_shards  # noqa: E402
from variants import bootstrap_interval, differences  # noqa: E402

SIZES = {  # by --fast: demonstrations that an adapter is fitted on, its steps, games of each split at most
    False: {"fit": 512, "warm": 400, "games": 300, "few": 40},
    True: {"fit": 64, "warm": 20, "games": 8, "few": 2},
}

# ---- 1. What is sent -----------------------------------------------------------------------------

def noise(lm, hidden_states, logits):
    """Random vectors (n, D), as long as `likeliest` ones; of a word always the same, so in any batch as well."""
    words = likeliest(lm, hidden_states, logits)
    vectors = []
    for word in logits.argmax(-1).tolist():
        generator = torch.Generator().manual_seed(seed_for("noise", word))
        vectors.append(torch.randn(words.shape[1], generator=generator))
    return F.normalize(torch.stack(vectors)).to(words) * words.norm(dim=1, keepdim=True)


ROWS = {  # row: (--send, flags of train_actor.py)
    "none": ("last", "--adapter none"),
    "procrustes": ("last", "--adapter procrustes"),
    "warm_up": ("last", "--adapter_warmup_steps {warm}"),
    "trained": ("last", None),  # of the one reader that learned from messages: with its own adapter
    "expected": ("expected", "--adapter none"),
    "likeliest": ("examples.unsure:likeliest", "--adapter none"),
    "random": ("examples.alignments:noise", "--adapter none"),
}
MEANING = {
    "text": "the plan as text",
    "trained": "last states, adapter trained with the reader",
    "warm_up": "last states, adapter fitted to their words",
    "procrustes": "last states, rotated and scaled",
    "none": "last states as they are",
    "expected": "expected embedding of the next word",
    "likeliest": "embedding of the likeliest word",
    "random": "a random vector for each word",
    "no_comm": "no message",
}

# ---- 2. The readers ------------------------------------------------------------------------------

def find_readers(small, smollm2, unsure):
    """{reader: {"lm", "actor": itself where it has an adapter, "sender", "messages", "told": demonstrations, "env",
    "splits", "games": key of SIZES, "fit", "play": flags}}, of what is there. Raises UserError for nothing."""
    house = {"env": "examples.alfworld_house:SeenHouse", "splits": SPLITS, "actor": None}
    words = {"sender": f"{small}/base", "messages": f"{small}/base_train", "told": f"{small}/base_told.json",
             "games": "games", "fit": "--task_turn 2 --plan_announcement 'plan :'",
             "play": "--max_new_tokens 20 --batch_size 140"}
    trained = f"{small}/base_actor"
    readers = {
        "text": house | words | {"lm": f"{small}/base"},
        "latent": house | words | {"lm": trained, "actor": trained},
        "SmolLM2": house | {
            "lm": f"{smollm2}/text_actor", "sender": f"{smollm2}/sender", "messages": f"{smollm2}/messages",
            "told": f"{smollm2}/told.json", "games": "few", "fit": "--task_turn 2", "play": "--max_new_tokens 24"},
        "unsure": {
            "lm": f"{unsure}/base", "sender": f"{unsure}/base", "messages": f"{unsure}/messages_train",
            "told": f"{unsure}/train.json", "env": "examples.unsure:OneWord", "splits": ["test-0"], "actor": None,
            "games": "games", "fit": "--plan_announcement 'plan :'",
            "play": "--max_steps 10 --max_new_tokens 10 --batch_size 300"},
    }
    for name, reader in list(readers.items()):
        if not os.path.exists(f"{reader['lm']}/config.json"):
            print(f"{name} is left out: no model {reader['lm']}")
            del readers[name]
    if not readers:
        raise UserError(f"no models in {small}, {smollm2}, {unsure}: run python examples/alfworld_small.py")
    return readers


# ---- 3. The stages -------------------------------------------------------------------------------

def write_demonstrations(out, told, messages, n):
    """train.json: n demonstrations, with what their sender read and wrote, so that it need not write it again."""
    said, records = open_shards(messages).records, []
    for record in read_json(told)[:n]:
        names = {"id": record["id"], "conversations": record["conversations"]}
        records.append(names | {key: said[record["id"]][key] for key in ("task", "plan")})
    write_json(f"{out}/train.json", records)


def play_rows(out, reader, sizes):
    """Every row of a reader, nothing of its language model trained -> {row: {variant: {(split, game): won?}}}."""
    once(out, "demonstrations", functools.partial(
        write_demonstrations, out, reader["told"], reader["messages"], sizes["fit"]))
    settings = open_shards(reader["messages"]).sender
    run = functools.partial(stage, out, **{
        "lm": reader["lm"], "sender": reader["sender"], "env": reader["env"], "n": sizes[reader["games"]],
        "warm": sizes["warm"], "dtype": settings["dtype"], "plan": settings["max_new_tokens"]})
    wins = {}
    for row, (send, adapter) in ROWS.items():
        actor, messages = reader["actor"], reader["messages"]
        if not adapter and not actor:
            continue
        if send != "last":
            messages = f"{out}/messages_{row}"
            run(f"collect {row}", """collect.py custom --model_name_or_path {sender} --prompt_template '{{task}}'
                --dataset_path {out}/train.json --task_field task --plan_field plan --send {send}
                --torch_dtype {dtype} --output_dir {messages}""", send=send, messages=messages)
        if adapter:
            actor = f"{out}/{row}"
            run(f"fit {row}", f"""train_actor.py --model_name_or_path {{lm}} --train_file {{out}}/train.json
                --hidden_data {{messages}} --output_dir {{actor}} --max_steps 0 {reader['fit']} {adapter}""",
                messages=messages, actor=actor)
        variants = "latent cross_task text no_comm" if row == "none" else "latent cross_task"
        wins[row] = {variant: {} for variant in variants.split()}
        for split in reader["splits"]:
            # what is sent of the sender's states the evaluator knows from the actor
            run(f"play {row}, {split}", f"""eval_alfworld.py --env {{env}} --split {{split}} --num_episodes {{n}}
                --model_path {{actor}} --sender {{sender}} --max_plan_tokens {{plan}} --torch_dtype {{dtype}}
                --output_path {{out}}/play/{row}_{{split}} {reader['play']} --variants {variants}""",
                split=split, actor=actor)
            for variant, games in wins_of(f"{out}/play/{row}_{split}").items():
                wins[row][variant] |= {(split, game): won for game, won in games.items()}
    return wins


# ---- 4. The report -------------------------------------------------------------------------------

def make_table(wins, chosen):
    """{row: its figures} over the chosen games, in the order of MEANING."""
    table = {}
    for row in MEANING:
        told = wins.get(row) or {"latent": wins["none"].get(row)}  # text and no_comm are played with row none
        if not told["latent"]:
            continue
        told = {variant: {game: games[game] for game in chosen} for variant, games in told.items()}
        won = list(told["latent"].values())
        table[row] = {"success": statistics.fmean(won), "interval": bootstrap_interval(won), "games": len(won)}
        if "cross_task" in told:
            table[row]["cross_task"] = statistics.fmean(told["cross_task"].values())
            table[row]["pairing"] = differences(told)["pairing"]
    return table


def show(panels, path):
    """The tables on screen, and their picture: success by row, the fuller the larger the pairing."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(2.6 * len(panels) + 1, 4))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, table) in zip(axes, panels.items()):
        print(f"\n{name:46s}success                 another game's  pairing")
        for row, result in table.items():
            (low, high), success = result["interval"], result["success"]
            line = f"{MEANING[row]:46s}{success:.3f} [{low:.2f}, {high:.2f}]"
            color = "lightgrey"  # no message to exchange
            if "pairing" in result:
                pairing, lowest, highest = result["pairing"]
                line += f"    {result['cross_task']:.3f}           {pairing:+.3f} [{lowest:+.2f}, {highest:+.2f}]"
                color = ("tab:blue", min(max(pairing, 0), 1))
            print(line)
            axis.barh(list(MEANING).index(row), success, xerr=[[success - low], [high - success]], color=color,
                      edgecolor="tab:blue", capsize=2)
        axis.set(xlim=(0, 1), title=f"{name}, {result['games']} games", xlabel="success (95 % interval)")
    axes[0].set_yticks(range(len(MEANING)), MEANING.values())
    axes[0].invert_yaxis()
    save_figure(figure, path)


@one_line_errors("alignments.py")
def main(argv=None):
    parser = demo_parser("alignments.py", __doc__, "alignments_out", "a few games and steps")
    parser.flag("--small", "alfworld_out/seed0", "a seed of alfworld_small.py")
    parser.flag("--smollm2", "smollm2_out", "--output_dir of smollm2.py")
    parser.flag("--unsure", "unsure_out/seed0/OneWord", "seed 0 of unsure.py")
    args = parser.parse_args(argv)
    out, sizes = args.output_dir, SIZES[args.fast]
    readers = find_readers(args.small, args.smollm2, args.unsure)
    for reader in readers.values():
        for split in reader["splits"]:
            open_split(reader["env"], split)  # an hour from now it would be late to say that games are missing
    if args.fresh:
        remove(out)

    tables, panels = {}, {}
    for name, reader in readers.items():
        models = {key: fingerprint(reader[key]) for key in ("lm", "sender")}
        open_output(f"{out}/{name}", {"example": "alignments", "models": models, "sizes": sizes})
        wins = play_rows(f"{out}/{name}", reader, sizes)
        games = list(wins["none"]["latent"])
        if name != "unsure":
            panels[name] = tables[name] = make_table(wins, games)
            continue
        right, tables[name] = plan_is_right(args.unsure, "OneWord", 0), {}
        for part, is_right in (("right", True), ("wrong", False)):
            chosen = [(split, game) for split, game in games if right.get(game) == is_right]
            if chosen:
                panels[f"plan names the {part} place"] = tables[name][part] = make_table(wins, chosen)
    show(panels, f"{out}/alignments.png")
    seconds = {name: read_json(f"{out}/{name}/seconds.json") for name in readers}
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}"
    write_json(f"{out}/alignments.json", tables | {
        "command": " ".join(sys.argv), "machine": machine, "sizes": sizes, "seconds": seconds})
    print(f"\nwrote {out}/alignments.json and {out}/alignments.png")


if __name__ == "__main__":
    main()
