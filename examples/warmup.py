"""
What an adapter warm-up saves: held-out loss against steps of train_actor.py, with and without it; for a
sender with the actor's words, for one that writes in pieces of three letters, and for a real model.

  python examples/household.py                          # leaves the models and messages in household_out
  python examples/warmup.py                             # three minutes on two cores
  python examples/warmup.py --smollm2 smollm2_out       # beside what smollm2.py left: 10 minutes more

Without a warm-up the adapter has to find the map from states to embeddings through the whole LM. With
it, the adapter alone learns first to give the plan's words (model.py, 4), and the LM starts from messages
that it can read; at a rate that does not undo this. What it does not show: that this helps where a state
says more than its word (examples/unsure.py has that).
"""
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts are one folder up

from common import one_line_errors, read_json, read_rows, save_figure, write_json  # noqa: E402
from examples.household import household_tokenizer, sender_samples  # noqa: E402
from examples.scratch import demo_parser, made_by, make_lm, open_output, stage  # noqa: E402

COLLECT = """collect.py custom --env examples.household:Household --model_name_or_path {out}/sender
    --prompt_template '{{task}}' --max_new_tokens 120 --batch_size 64 --torch_dtype fp32 --split train
    --max_samples {n} --output_dir {out}/messages_pieces"""
HOUSEHOLD = """train_actor.py --model_name_or_path {models}/base --train_file {models}/train.json
    --hidden_data {messages} --plan_announcement 'plan :' --global_batch_size 32
    --per_device_train_batch_size 32 --plan_similarity_weight 0.5 --random_contrast_weight 0.1
    --eval_ratio 0.05 --eval_steps {every} --logging_steps {every} --max_steps {steps} --output_dir {out}/{run} """
# as smollm2.py trains its actor, which is the other curve
SMOLLM2 = """train_actor.py --model_name_or_path {models}/text_actor --train_file {models}/told.json --task_turn 2
    --hidden_data {models}/messages --global_batch_size 12 --per_device_train_batch_size 4 --adam_beta2 0.95
    --warmup_ratio 0.1 --curriculum 0 --plan_similarity_weight 0 --random_contrast_weight 0 --eval_ratio 0.04
    --eval_steps {every} --save_steps 2 --max_steps {steps} --bf16 {bf16} --output_dir {out}/{run} """
RUNS = {  # name of the curve: (world, flags)
    "household": (HOUSEHOLD, "--learning_rate 1e-3 --adapter_learning_rate 3e-3"),
    "household, warmed up": (HOUSEHOLD, "--learning_rate 3e-4 --adapter_warmup_steps 50"),
    "pieces": (HOUSEHOLD, "--learning_rate 1e-3 --adapter_learning_rate 3e-3"),
    "pieces, warmed up": (HOUSEHOLD, "--learning_rate 1e-3 --adapter_learning_rate 3e-4 "
                          "--adapter_warmup_steps 200"),
    "SmolLM2": (SMOLLM2, "--learning_rate 1e-4 --adapter_learning_rate 2e-3"),
}
# how many, and every how many the loss is taken
STEPS = {"household": (140, 10), "pieces": (140, 10), "SmolLM2": (10, 5)}


def curve(folder):
    """[[step, held-out loss], ...] of a run."""
    rows = read_rows(f"{folder}/loss_log.csv")
    return [[int(row["step"]), float(row["eval_loss"])] for row in rows if row["eval_loss"]]


def plot(curves, path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4), layout="constrained")
    worlds = [world for world in STEPS if world in curves]
    for n, world in enumerate(worlds):
        axes = figure.add_subplot(1, len(worlds), n + 1)
        for name, color in ((world, "tab:orange"), (f"{world}, warmed up", "tab:blue")):
            axes.plot(*zip(*curves[name]), ".-", color=color, label=name)
        axes.set(yscale="log", xlabel="step of train_actor.py", ylabel="held-out loss, nats per token")
        axes.legend()
    save_figure(figure, path)


@one_line_errors("warmup.py")
def main(argv=None):
    parser = demo_parser("warmup.py", __doc__, "warmup_out", "two steps: shows that it runs")
    parser.flag("--household", "household_out", "what examples/household.py left")
    parser.flag("--smollm2", None, "what examples/smollm2.py left; default: none")
    args = parser.parse_args(argv)
    out = args.output_dir
    folders = {"household": args.household, "pieces": args.household, "SmolLM2": args.smollm2}
    open_output(out, {"example": "warmup", "folders": folders, "fast": args.fast}, args.fresh)

    # --- another sender for the household: its tokens are pieces of three letters, the actor's are words
    n = read_json(f"{args.household}/settings.json")["sizes"]["train"]
    tokenizer, steps = household_tokenizer(letters=3), 2 if args.fast else 500
    make_lm(f"{out}/sender", tokenizer, "sender", sender_samples, 0, steps)
    stage(out, "collect pieces", COLLECT, n=n)

    curves = {}
    for name, (command, flags) in RUNS.items():
        world = name.split(",")[0]
        if folders[world] is None:
            continue
        steps, every = (2, 1) if args.fast else STEPS[world]
        settings = read_json(f"{folders[world]}/settings.json")
        run = name.replace(", ", "_").replace(" ", "_")
        messages = f"{out}/messages_pieces" if world == "pieces" else f"{args.household}/messages_train"
        torch.set_num_threads(os.cpu_count() if world == "SmolLM2" else 1)  # with tiny matrices a second one waits
        stage(out, name, command + flags, models=folders[world], messages=messages, run=run, steps=steps,
              every=every, bf16=settings.get("bf16", "auto"))
        curves[name] = curve(f"{out}/{run}")
    if args.smollm2:  # step 0: the warm-up alone, over the text actor
        fitted = read_json(f"{args.smollm2}/warm_actor/trainer_state.json")["best_eval_loss"]
        curves["SmolLM2, warmed up"] = [[0, fitted]] + curve(f"{args.smollm2}/actor")
    for name, points in curves.items():
        print(f"{name}: " + ", ".join(f"{loss:.4f} ({step})" for step, loss in points))
    write_json(f"{out}/warmup.json", made_by() | {"curves": curves, "seconds": read_json(f"{out}/seconds.json")})
    plot(curves, f"{out}/warmup.png")
    print(f"wrote {out}/warmup.json and {out}/warmup.png")


if __name__ == "__main__":
    main()
