"""
Alignments without training, under the same harness: what readers make of messages that they never learned.

  python examples/alfworld_small.py       # first: two readers, demonstrations, messages
  python examples/unsure.py               # for the rows of the unsure sender
  python examples/smollm2.py --model ...  # for those of a pre-trained model, 7 GB of disk more
  python examples/alignments.py --fast    # a quarter of an hour: shows that it runs
  python examples/alignments.py           # two hours on 2 cores, one more with SmolLM2 on 20 games a split

Type this at the top of the repository, and again after a kill: every stage goes on where it was. What the
other examples have not left yet is left out, and joins in later.

The same plans reach language models in seven ways: as last states, through no adapter, a rotation, an adapter
fitted to their words or one that learned the task; as vectors of words; as random vectors. Each row is played
under the right message and under another game's: their difference, the pairing, is what was read in it.

What this shows: how much of what training buys an alignment gives for seconds of fitting. What it does not
show: that it would do so between strangers. A sender and its readers have the same start and one table for
words in and out, so its embeddings are nearly theirs and its states lie near them; and all of them knew plans
in words. Intervals are over games: there is one model of a kind, of one seed.
"""
import collections
import os
import statistics
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts are one folder up

from common import UserError, fingerprint, one_line_errors, read_json, remove, save_figure, write_json  # noqa: E402
from examples.alfworld_small import wins_of  # noqa: E402
from examples.scratch import demo_parser, made_by, open_output, stage  # noqa: E402
from examples.unsure import likeliest, plan_is_right  # noqa: E402
from model import open_shards  # noqa: E402
from variants import bootstrap_interval, differences  # noqa: E402

SIZES = {  # by --fast: demonstrations to fit on, steps of the warm-up, games of a split at most
    False: {"fit": 512, "warm": 400, "games": 300, "few": 20},
    True: {"fit": 64, "warm": 20, "games": 8, "few": 2},
}

# ---- What is sent --------------------------------------------------------------------------------
def noise(lm, hidden_states, logits):
    """Random vectors (n, D) as long as `likeliest` ones, for a word always the same, whatever the batch: all
    that `likeliest` tells, in a code that nobody has learned."""
    words = likeliest(lm, hidden_states, logits)
    generators = [torch.Generator().manual_seed(word) for word in logits.argmax(-1).tolist()]
    vectors = [torch.randn(words.shape[1], generator=generator) for generator in generators]
    return F.normalize(torch.stack(vectors)).to(words) * words.norm(dim=1, keepdim=True)


ROWS = {  # row: (what the reader gets, --send, the adapter as train_actor.py's flags)
    "text": ("the plan as text", None, None),
    "trained": ("last states, adapter trained with its LM", "last", None),
    "warm_up": ("last states, adapter fitted to their words", "last", "--adapter_warmup_steps {warm}"),
    "procrustes": ("last states, rotated and scaled", "last", "--adapter procrustes"),
    "none": ("last states as they are", "last", "--adapter none"),
    "expected": ("expected embedding of the next word", "expected", "--adapter none"),
    "likeliest": ("embedding of the likeliest word", "examples.unsure:likeliest", "--adapter none"),
    "random": ("a random vector for each word", "examples.alignments:noise", "--adapter none"),
    "no_comm": ("no message", None, None),
}

# ---- The readers: what the other examples left, flags for fitting and for play ---------------------
SMALL = {
    "sender": "{small}/base", "messages": "{small}/base_train", "told": "{small}/base_told.json",
    "env": "examples.alfworld_house:SeenHouse", "splits": "valid_seen valid_unseen",
    "fit_flags": "--task_turn 2 --plan_announcement 'plan :' ",
    "play_flags": "--num_episodes {games} --max_new_tokens 20 --batch_size 140"}
READERS = {
    "text": SMALL | {"lm": "{small}/base"},
    "latent": SMALL | {"lm": "{small}/base_actor", "actor": "{small}/base_actor"},
    "SmolLM2": SMALL | {
        "lm": "{smollm2}/text_actor", "sender": "{smollm2}/sender", "messages": "{smollm2}/messages",
        "told": "{smollm2}/told.json", "fit_flags": "--task_turn 2 ",
        "play_flags": "--num_episodes {few} --max_new_tokens 24"},
    "unsure": {
        "lm": "{unsure}/base", "sender": "{unsure}/base", "messages": "{unsure}/messages_train",
        "told": "{unsure}/train.json", "env": "examples.unsure:OneWord", "splits": "test-0",
        "fit_flags": "--plan_announcement 'plan :' ",
        "play_flags": "--num_episodes {games} --max_new_tokens 10 --max_steps 10 --batch_size 300"},
}

TITLES = {
    "text": "a reader of text", "latent": "a reader of latents", "SmolLM2": "SmolLM2, a reader of text"}

# ---- The stages ----------------------------------------------------------------------------------
def play_rows(out, reader, sizes):
    """Every row of a reader, whose LM stays as it is -> {variant_row: {(split, game): whether it was won}}."""
    shards, records = open_shards(reader["messages"]), read_json(reader["told"])[:sizes["fit"]]
    for record in records:  # what the sender read and wrote: with --plan_field it need not write it again
        record |= {key: shards.records[record["id"]][key] for key in ("task", "plan")}
    write_json(f"{out}/train.json", records)
    settings = shards.sender | reader | sizes  # the sender's: dtype, prompt_template, max_new_tokens
    wins = collections.defaultdict(dict)
    for row, (_, send, adapter) in ROWS.items():
        if send is None or adapter is None and "actor" not in reader:
            continue
        values = settings | {"row": row, "send": send}
        if send != "last":
            values["messages"] = f"{out}/messages_{row}"
            stage(out, f"collect {row}", """
                collect.py custom --model_name_or_path {sender} --prompt_template {prompt_template}
                --dataset_path {out}/train.json --task_field task --plan_field plan --send {send}
                --torch_dtype {dtype} --output_dir {messages}""", **values)
        if adapter:
            values["actor"] = f"{out}/{row}"
            stage(out, f"fit {row}", """
                train_actor.py --model_name_or_path {lm} --train_file {out}/train.json --hidden_data {messages}
                --output_dir {actor} --max_steps 0 """ + reader["fit_flags"] + adapter, **values)
        # the evaluator has its --sender send what the actor learned to read
        play = """
            eval_alfworld.py --env {env} --split {split} --model_path {actor} --sender {sender}
            --torch_dtype {dtype} --max_plan_tokens {max_new_tokens} --output_path {out}/play/{row}_{split}
            --variants latent cross_task """ + ("text no_comm " if row == "none" else "") + reader["play_flags"]
        for split in reader["splits"].split():
            stage(out, f"play {row}, {split}", play, split=split, **values)
            for variant, games in wins_of(f"{out}/play/{row}_{split}").items():
                label = variant if variant in ROWS else f"{variant}_{row}"
                wins[label] |= {(split, game): won for game, won in games.items()}
    return wins


# ---- The report ----------------------------------------------------------------------------------
def make_table(wins):
    """What `play_rows` gives -> {row: its figures}."""
    table, compared = {}, differences(wins)
    for row in ROWS:
        won = list(wins.get(f"latent_{row}", wins.get(row, {})).values())
        if won:
            interval = bootstrap_interval(won)
            table[row] = {"success": statistics.fmean(won), "interval": interval, "games": len(won)}
        if f"pairing_{row}" in compared:
            other = wins[f"cross_task_{row}"].values()
            table[row] |= {"cross_task": statistics.fmean(other), "pairing": compared[f"pairing_{row}"]}
    return table


def show(tables, path):
    """The tables on screen, and their picture: success by row, the fuller the larger its pairing."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(2 + 3 * len(tables), 4))
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axes, (name, table) in zip(panels, tables.items()):
        print(f"\n{name:46s}  success     from       to    other  pairing     from       to")
        for row, figures in table.items():
            numbers, color = [figures["success"], *figures["interval"]], "lightgrey"
            if "pairing" in figures:
                numbers += [figures["cross_task"], *figures["pairing"]]
                color = "tab:blue", max(figures["pairing"][0], 0)  # and its opacity
            print(f"{ROWS[row][0]:46s}", *map("{:8.3f}".format, numbers))
            n = list(ROWS).index(row)
            axes.barh(n, figures["success"], color=color, edgecolor="tab:blue")
            axes.plot(figures["interval"], [n, n], color="black")
        axes.set(xlim=(0, 1), title=name)
    figure.supxlabel("success (95 % interval); the fuller a bar, the larger its pairing", y=0)
    panels[0].set_yticks(range(len(ROWS)), [meaning for meaning, *_ in ROWS.values()])
    panels[0].invert_yaxis()
    save_figure(figure, path)


@one_line_errors("alignments.py")
def main(argv=None):
    parser = demo_parser("alignments.py", __doc__, "alignments_out", "a few games and steps")
    parser.flag("--small", "alfworld_out/seed0", "a seed of alfworld_small.py")
    parser.flag("--smollm2", "smollm2_out", "--output_dir of smollm2.py")
    parser.flag("--unsure", "unsure_out/seed0/OneWord", "seed 0 of unsure.py")
    args = parser.parse_args(argv)
    out, sizes, content, tables = args.output_dir, SIZES[args.fast], {}, {}
    if args.fresh:
        remove(out)
    for name, texts in READERS.items():
        reader = {key: text.format(**vars(args), **sizes) for key, text in texts.items()}
        if not all(map(os.path.exists, (f"{reader['lm']}/config.json", reader["told"]))):
            print(name, "is left out: not both of", reader["lm"], "and", reader["told"])
            continue
        open_output(f"{out}/{name}", reader | sizes | {"model": fingerprint(reader["lm"])})
        wins = play_rows(f"{out}/{name}", reader, sizes)
        if name != "unsure":
            content[name] = tables[TITLES[name]] = make_table(wins)
            continue
        named, content[name] = plan_is_right(args.unsure, "OneWord", 0), {}
        for part, right in (("right", True), ("wrong", False)):
            chosen = {label: {game: won for game, won in games.items() if named.get(game[1]) is right}
                      for label, games in wins.items()}
            content[name][part] = tables[f"unsure, {part} place named"] = make_table(chosen)
    if not tables:
        raise UserError("no reader is there: run python examples/alfworld_small.py first")
    show(tables, f"{out}/alignments.png")
    write_json(f"{out}/alignments.json", made_by() | content)
    print("\nwrote alignments.json and alignments.png to", out)


if __name__ == "__main__":
    main()
