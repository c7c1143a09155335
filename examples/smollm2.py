"""
A real pre-trained model on ALFWorld's own games: SmolLM2-135M-Instruct is sender and actor.

  pip install alfworld && alfworld-download     the games, in ~/.cache/alfworld or $ALFWORLD_DATA
  python examples/smollm2.py --model HuggingFaceTB/SmolLM2-135M-Instruct --fast   # half an hour
  python examples/smollm2.py --model HuggingFaceTB/SmolLM2-135M-Instruct          # five hours on two cores

Type this at the top of the repository, and again after a kill: every stage goes on. --model is a
hub id or a folder. On some CPUs bf16 is faster than fp32 (--bf16 true): compare this line with the same for
torch.ones(2048, 2048).bfloat16():

  python -m timeit -s "import torch; a = torch.ones(2048, 2048)" "a @ a"

The sender is taught to plan from a prompt that says where things are. The actor learns to follow plans in
words, which a pre-trained model does in minutes; then its adapter alone learns to give the plan's words
(--adapter_warmup_steps); and only then both read pure latents, for a few steps. A second actor, the fair
baseline, learns from searches without messages.

    1. the data      training games of assets/, cut to what a step of a small machine can read
    2. the stages    each through its real script
    3. the report    smollm2.json
"""
import os
import sys


sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts are one folder up

from common import one_line_errors, read_json, wilson_interval, write_json  # noqa: E402
from examples.alfworld_small import SPLITS, unpack_demonstrations  # noqa: E402
from examples.scratch import demo_parser, made_by, once, open_output, stage  # noqa: E402
from games import open_split  # noqa: E402
from hf import load_tokenizer  # noqa: E402
from model import open_shards  # noqa: E402

SIZES = {  # by --fast: steps and counts
    False: {"sender": 18, "records": 950, "text": 20, "warm": 400, "actor": 10, "search": 20, "games": 140, "few": 40},
    True: {"sender": 2, "records": 64, "text": 2, "warm": 20, "actor": 1, "search": 1, "games": 4, "few": 2},
}
MEANING = {
    "latent": "the sender's states",
    "text": "its plan as text, same actor",
    "no_comm": "no message, same actor",
    "cross_task": "another game's states",
    "no_cot": "no message, an actor that learned to search",
    "randomrot": "states rotated at random",
    "untouched": "no message, the model as it came",
}

# ---- 1. The data ---------------------------------------------------------------------------------


def write_records(out, n_records):
    """planning.json for the sender; direct.json and search.json, n_records of each."""
    unpack_demonstrations(out)
    direct, search = (read_json(f"{out}/train_{name}.jsonl") for name in ("direct", "search"))
    planning = []
    for record in direct[:n_records]:
        turns = [{"from": "human", "value": record["sender_task"]}, {"from": "gpt", "value": record["plan"]}]
        planning.append({"id": record["id"], "conversations": turns})
    write_json(f"{out}/planning.json", planning)
    write_json(f"{out}/direct.json", direct[:n_records])
    write_json(f"{out}/search.json", search[:n_records])


def write_cut(out, model, longest=500):
    """told.json: demonstrations that do what their message says; both files are cut to 500 tokens."""
    tokenizer, plans = load_tokenizer(model), open_shards(f"{out}/messages").records

    def cut(record):
        """The turns that fit, up to an action."""
        turns, length = [], 0
        for turn in record["conversations"]:
            length += len(tokenizer(turn["value"]).input_ids) + 8  # and what the template writes
            if length > longest and len(turns) > 4:
                break
            turns.append(turn)
        return {"id": record["id"], "conversations": turns[:len(turns) - (turns[-1]["from"] == "human")]}

    direct = read_json(f"{out}/direct.json")
    told = [record for record in direct if plans[record["id"]]["plan"].strip() == record["plan"]]
    told = told if len(told) > len(direct) / 2 else direct  # --fast: it has hardly learned to plan
    write_json(f"{out}/told.json", [cut(record) for record in told])
    write_json(f"{out}/short_search.json", [cut(record) for record in read_json(f"{out}/search.json")])


# ---- 2. The stages -------------------------------------------------------------------------------
def smollm2(out, model, bf16, seed, sizes):
    """Every stage -> {split: {row: the evaluator's figures}}, {split: differences}."""
    dtype = "bf16" if bf16 == "true" else "fp32"

    def run(name, command, **values):
        stage(out, name, command, model=model, bf16=bf16, dtype=dtype, seed=seed, **sizes, **values)

    # --- the sender learns to plan; its messages
    once(out, "demonstrations", lambda: write_records(out, sizes["records"]))
    train = """train_actor.py --bf16 {bf16} --adam_beta2 0.95 --save_steps 2 --logging_steps 1 --seed {seed}
        --warmup_ratio 0.1 --output_dir {out}/"""
    run("sender", train + """sender --model_name_or_path {model} --message none --train_file {out}/planning.json
        --max_steps {sender} --global_batch_size 16 --per_device_train_batch_size 8 --learning_rate 2e-4""")
    collect = """collect.py custom --model_name_or_path {out}/sender --prompt_template '{{task}}'
        --max_new_tokens 40 --batch_size 32 --torch_dtype {dtype} """
    run("messages", collect + "--dataset_path {out}/direct.json --task_field sender_task --output_dir {out}/messages")
    for split in SPLITS:
        run(f"messages, {split}", collect + """--env examples.alfworld_house:SeenHouse --split {split}
            --max_samples {games} --output_dir {out}/messages_{split}""", split=split)
    once(out, "training files", lambda: write_cut(out, model))

    # --- the actor reads words, then its adapter learns them, then both read states; a baseline
    act = train + """{actor_dir} --task_turn 2 --global_batch_size 12 --per_device_train_batch_size 4
        --train_file {out}/{file} """
    run("text actor", act + """--model_name_or_path {out}/sender --message text --hidden_data {out}/messages
        --max_steps {text} --learning_rate 2e-4 --eval_ratio 0.04 --eval_steps 10""",
        actor_dir="text_actor", file="told.json")
    latent = act + """--model_name_or_path {out}/text_actor --hidden_data {out}/messages
        --adapter_warmup_steps {warm} --curriculum 0 --plan_similarity_weight 0 --random_contrast_weight 0
        --learning_rate 3e-5 --adapter_learning_rate 1e-4 --eval_ratio 0.04 --eval_steps 5 """
    run("warm-up alone", latent + "--max_steps 0", actor_dir="warm_actor", file="told.json")
    run("actor", latent + "--max_steps {actor}", actor_dir="actor", file="told.json")
    run("search actor", act + """--model_name_or_path {out}/sender --message none --max_steps {search}
        --learning_rate 2e-4""", actor_dir="search_actor", file="short_search.json")

    # --- play
    play = """eval_alfworld.py --env examples.alfworld_house:SeenHouse --split {split} --max_new_tokens 24
        --torch_dtype {dtype} --seed {seed} --output_path {out}/play/{table}_{split} """
    tables = {
        "main": """--model_path {out}/actor --hidden_data {out}/messages_{split} --num_episodes {games}
            --baseline_path {out}/search_actor --variants latent text no_comm cross_task no_cot""",
        "randomrot": """--model_path {out}/actor --hidden_data {out}/messages_{split} --num_episodes {few}
            --variants randomrot""",
        "untouched": "--model_path {model} --num_episodes {few} --variants no_comm",
    }
    rows, differences = {}, {}
    for split in SPLITS:
        rows[split] = {}
        for table, flags in tables.items():
            run(f"play {table}, {split}", play + flags, split=split, table=table)
            summary = read_json(f"{out}/play/{table}_{split}/summary.json")
            if table == "main":
                rows[split] |= summary["variants"]
                differences[split] = summary["differences"]
            else:
                rows[split][table], = summary["variants"].values()
    return rows, differences


# ---- 3. The report -------------------------------------------------------------------------------
def report(out, model, rows, differences):
    """smollm2.json and the table."""
    results = {split: {row: [round(figures[row]["success"] * figures[row]["games"]), figures[row]["games"]]
                       for row in MEANING} for split, figures in rows.items()}
    print(f"\n{'':12s}{'what the actor gets':46s}" + "".join(f"{split:28s}" for split in results))
    for row, meaning in MEANING.items():
        line = f"{row:12s}{meaning:46s}"
        for counts in results.values():
            wins, games = counts[row]
            low, high = wilson_interval(wins, games)
            line += f"{wins:3d} of {games:3d} {wins / games:.3f} [{low:.2f}, {high:.2f}]  "
        print(line)
    logs = {name: read_json(f"{out}/{name}/trainer_state.json")["best_eval_loss"]
            for name in ("text_actor", "warm_actor", "actor")}
    write_json(f"{out}/smollm2.json", made_by() | {
        "model": os.path.basename(model.rstrip("/")), "held_out_loss": logs, **results, "differences": differences,
        "latent_by_type": {split: figures["latent"]["by_type"] for split, figures in rows.items()},
        "seconds": read_json(f"{out}/seconds.json")})
    print(f"held-out loss: {logs}\nwrote {out}/smollm2.json")


@one_line_errors("smollm2.py")
def main(argv=None):
    parser = demo_parser("smollm2.py", __doc__, "smollm2_out", "a few steps and games")
    parser.flag("--model", ..., "SmolLM2-135M-Instruct or another chat model: a folder or a hub id")
    parser.flag("--bf16", "false", "of training and play, on a CPU", choices=["true", "false"])
    parser.flag("--seed", 0, "of all that is drawn")
    args = parser.parse_args(argv)
    for split in SPLITS:
        open_split("alfworld", split)  # an hour from now it would be late to say that they are missing
    out, sizes = args.output_dir, SIZES[args.fast]
    settings = {"example": "smollm2", "model": args.model, "bf16": args.bf16, "seed": args.seed, "sizes": sizes}
    open_output(out, settings, args.fresh)
    report(out, args.model, *smollm2(out, args.model, args.bf16, args.seed, sizes))


if __name__ == "__main__":
    main()
