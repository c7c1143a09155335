"""
A game of one's own: the sender knows the code of a safe, the actor stands in front of it.

Type this at the top of the repository; half a minute in all on a CPU:

  python examples/safe.py                        # writes safe/train.json and two tiny language models
  python collect.py custom --env examples.safe:Safe --split train --model_name_or_path safe/sender \\
      --prompt_template '{task}' --max_new_tokens 12 --batch_size 100 --torch_dtype fp32 \\
      --output_dir safe/messages
  python train_actor.py --model_name_or_path safe/base --train_file safe/train.json \\
      --hidden_data safe/messages --plan_announcement 'plan :' --output_dir safe/actor --max_steps 40 \\
      --global_batch_size 32 --per_device_train_batch_size 32 --curriculum 0 --learning_rate 3e-4 \\
      --adapter_warmup_steps 50 --logging_steps 10
  python eval_alfworld.py --env examples.safe:Safe --split test --model_path safe/actor \\
      --sender safe/sender --prompt_template '{task}' --max_plan_tokens 12 \\
      --variants latent text no_comm cross_task --torch_dtype fp32 --batch_size 200 --max_new_tokens 8 \\
      --output_path safe/results
  python collect.py inspect safe/messages --id 001 --model_name_or_path safe/sender

The actor then dials codes that it was never trained on and that only the states of `dial 1 2 3` can tell it:
latent and text near 1, no_comm and cross_task near 0. (--adapter_warmup_steps: the adapter learns alone first. Without
it, and with the paper's mixtures of states and words, so small an actor takes 300 steps.) With real models, their
names replace safe/sender and safe/base, the flags from --max_steps to --learning_rate go, and so does the second
half of this file.
"""
import os
import random
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts are one folder up

from common import Parser, one_line_errors, write_json  # noqa: E402
from examples.scratch import PLAN_ANNOUNCEMENT, build_tokenizer, one_turn, train_lm  # noqa: E402

FRONT = "you stand in front of a safe with three dials ."
CODES = [" ".join(f"{number:03d}") for number in range(1000)]  # 7 -> 0 0 7
random.Random(0).shuffle(CODES)


# `task` is what the sender reads, `reset` gives what the actor reads first, `step` answers its replies
class Safe:
    def tasks(self, split):
        codes = {"test": CODES[:200], "train": CODES[200:]}[split]
        return [{"id": code.replace(" ", ""), "code": code, "task": f"the code is {code} . pass it on ."}
                for code in codes]

    def reset(self, task):
        self.code, self.tries = task["code"], 3
        return FRONT

    def step(self, action):  # -> what the actor sees next, reward, whether the episode is over, {"won"}
        self.tries -= 1
        won = action.strip() == self.code
        return "it opens ." if won else "nothing moves .", float(won), won or self.tries == 0, {"won": won}


# ---- Two tiny language models, made from scratch -------------------------------------------------
def sender_samples(rng):
    """A step of the sender: it passes the code on."""
    tasks = rng.choices(Safe().tasks("train"), k=16)
    return [one_turn(task["task"], f"dial {task['code']}") for task in tasks]


def actor_samples(rng):
    """A step of the actor: it dials what a plan in words says, and guesses where there is none."""
    samples = []
    for n, task in enumerate(rng.choices(Safe().tasks("train"), k=16)):
        plan = f"dial {task['code']}" if n % 2 else None
        samples.append(one_turn(FRONT, task["code"], plan))
    return samples


@one_line_errors("safe.py")
def main(argv=None):
    parser = Parser(prog="safe.py", description=__doc__)
    parser.flag("--output_dir", "safe", "gets train.json, sender and base")
    parser.flag("--steps", 250, "of each model's training")
    parser.flag("--seed", 0, "of both models")
    args = parser.parse_args(argv)

    # --- what train_actor.py reads: the first turn, and what an expert says to it
    demonstrations = []
    for task in Safe().tasks("train"):
        first = {"from": "human", "value": Safe().reset(task)}
        reply = {"from": "gpt", "value": task["code"]}
        demonstrations.append({"id": task["id"], "conversations": [first, reply]})
    write_json(f"{args.output_dir}/train.json", demonstrations)

    # --- two models that share no parameter
    torch.set_num_threads(1)  # the matrices are tiny: a second thread waits more than it computes
    words = "the code is pass it on dial opens nothing moves 0 1 2 3 4 5 6 7 8 9"
    tokenizer = build_tokenizer([FRONT, PLAN_ANNOUNCEMENT, words])
    for name, draw in (("sender", sender_samples), ("base", actor_samples)):
        lm = train_lm(tokenizer, name, draw, args.seed, args.steps)
        lm.save_pretrained(f"{args.output_dir}/{name}")
        tokenizer.save_pretrained(f"{args.output_dir}/{name}")


if __name__ == "__main__":
    main()
