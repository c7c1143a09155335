"""
A fork example: a game of one's own. The sender knows the code of a safe, the actor stands in front of it.

Type this at the top of the repository; half a minute in all on a CPU:

  python examples/safe.py                        # writes safe/train.json and two tiny language models
  python collect.py custom --env examples.safe:Safe --split train --model_name_or_path safe/sender \\
      --prompt_template '{task}' --max_new_tokens 12 --batch_size 100 --torch_dtype fp32 --output_dir safe/messages
  python train_actor.py --model_name_or_path safe/base --train_file safe/train.json --hidden_data safe/messages \\
      --plan_announcement 'plan :' --max_steps 200 --global_batch_size 32 --per_device_train_batch_size 32 \\
      --learning_rate 1e-3 --adapter_learning_rate 3e-3 --logging_steps 50 --output_dir safe/actor
  python eval_alfworld.py --env examples.safe:Safe --split test --model_path safe/actor --sender safe/sender \\
      --prompt_template '{task}' --max_plan_tokens 12 --variants latent text no_comm cross_task \\
      --torch_dtype fp32 --batch_size 200 --max_new_tokens 8 --output_path safe/results
  python collect.py inspect safe/messages --id train-001 --model_name_or_path safe/sender

The actor then dials codes that it was never trained on and that only the states of `dial 1 2 3` can tell it: latent and
text near 1, no_comm and cross_task near 0. With real models, their names replace safe/sender and safe/base, the flags
from --plan_announcement to --adapter_learning_rate go, and of this file only `Safe` and `main` stay.
"""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts are one folder up

from demo import build_tokenizer, train_lm  # noqa: E402

FRONT = "you stand in front of a safe with three dials ."
ANNOUNCEMENT = "plan :"


class Safe:
    """A game is any class with these three methods."""

    def tasks(self, split):
        """The episodes of a split; a fifth of the codes is held out. `task` is what the sender reads."""
        tasks = []
        for number in range(1000):
            code = " ".join(f"{number:03d}")  # 7 -> 0 0 7
            if (sum(map(int, code.split())) % 5 == 0) == (split == "test"):
                task = f"the code is {code} . pass it on ."
                tasks.append({"id": f"{split}-{number:03d}", "task": task, "code": code})
        return tasks

    def reset(self, task):
        """Start an episode -> what the actor reads first: all but the code."""
        self.code, self.tries = task["code"], 3
        return FRONT

    def step(self, action):
        """The actor's reply -> (what it sees next, reward, whether the episode is over, {"won"})."""
        self.tries -= 1
        won = action.strip() == self.code
        observation = "it opens ." if won else "nothing moves ."
        return observation, float(won), won or self.tries == 0, {"won": won}


# ---- two tiny language models, made from scratch: [(text, whether it is supervised), ...] is a training sample

def sender_samples(rng):
    """A training step of the sender: it passes the code on."""
    samples = []
    for task in rng.choices(Safe().tasks("train"), k=16):
        samples.append([(f"<user> {task['task']} <eos> <assistant>", False), (f"dial {task['code']} <eos>", True)])
    return samples


def actor_samples(rng):
    """A training step of the actor: it dials what a plan in words says, and guesses where there is none."""
    samples = []
    for i, task in enumerate(rng.choices(Safe().tasks("train"), k=16)):
        plan = f"{ANNOUNCEMENT} <bop> dial {task['code']} <eop>" if i % 2 else ""
        samples.append([(f"<user> {FRONT} {plan} <eos> <assistant>", False), (f"{task['code']} <eos>", True)])
    return samples


def main(directory="safe", steps=250):
    # --- what train_actor.py reads: the first turn and what the expert says to it
    os.makedirs(directory, exist_ok=True)
    demonstrations = []
    for task in Safe().tasks("train"):
        turns = [{"from": "human", "value": Safe().reset(task)}, {"from": "gpt", "value": task["code"]}]
        demonstrations.append({"id": task["id"], "conversations": turns})
    with open(f"{directory}/train.json", "w") as f:
        json.dump(demonstrations, f)

    # --- two models that share no parameter
    words = "the code is pass it on dial opens nothing moves 0 1 2 3 4 5 6 7 8 9"
    tokenizer = build_tokenizer([FRONT, ANNOUNCEMENT, words])
    for name, draw in (("sender", sender_samples), ("base", actor_samples)):
        lm = train_lm(tokenizer, name, draw, seed=0, steps=steps)
        lm.save_pretrained(f"{directory}/{name}")
        tokenizer.save_pretrained(f"{directory}/{name}")


if __name__ == "__main__":
    main()
