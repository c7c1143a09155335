"""Forks: a game, a loss, an adapter, a grader. Each recipe of the README is run here as it stands there."""
import ast
import csv
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from common import read_json, write_json
from examples.scratch import build_tokenizer, one_turn, train_lm
from model import LatentShards

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# in model.py's `actor_loss`: after the line that computes terms["sep"]
TERM = """
        terms["hinge"] = F.relu(2 - (log_p - log_probs["other"]).gather(1, targets["labels"][:, None])[:, 0])
"""
# in train_actor.py's `loss_weights`: in place of its first line
WEIGHTS = """
    weights = {"task": 1.0, "align": align, "sep": sep, "hinge": 0.1}
"""
ADAPTER = """
from torch import nn

class Linear(nn.Module):
    def __init__(self, sender_dim, dim, scale=0.2, output_scale=0.1, **unused):
        super().__init__()
        self.linear, self.norm = nn.Linear(sender_dim, dim), nn.LayerNorm(dim)
        nn.init.constant_(self.norm.weight, scale * output_scale)  # as loud as the actor's words

    def forward(self, hidden_states, mask):  # (B, L, d_s), (B, L) -> (B, L, d_a)
        return self.norm(self.linear(hidden_states))
"""
SEND = """
import torch

def two_layers(lm, hidden_states, logits):  # a tuple of (n, D), 0 the embeddings; (n, V) -> (n, d)
    return torch.cat([hidden_states[1], hidden_states[-1]], dim=1)
"""
GRADER = """
import math

def close(answer, reference):  # answer None: the reply has none
    try:
        return math.isclose(float(answer), float(reference), rel_tol=0.01)
    except (TypeError, ValueError):  # not a number
        return False
"""


def docstring_commands(path):
    """The commands of a script's docstring, as lists of words without `python`."""
    with open(path) as file:
        docstring = ast.get_docstring(ast.parse(file.read()))
    lines = docstring.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("  python ")]


SAFE, COLLECT, TRAIN, EVALUATE, INSPECT = docstring_commands(f"{ROOT}/examples/safe.py")


def results(folder):
    """{variant: success} of an evaluation of the safe."""
    summary = read_json(str(folder / "safe" / "results" / "summary.json"))["variants"]
    return {name: figures["success"] for name, figures in summary.items()}


def python(words, folder):
    subprocess.run([sys.executable, *words], cwd=folder, check=True, timeout=300)


def module(path, source):
    """The module that a user wrote."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def opened(tmp_path_factory, forked):
    """The commands of examples/safe.py, as they stand there -> (folder, what the last one printed)."""
    folder = tmp_path_factory.mktemp("opened")
    python([f"{ROOT}/{SAFE[0]}"], folder)
    for script, *argv in (COLLECT, TRAIN, EVALUATE, INSPECT):
        done = forked(script.removesuffix(".py"), argv, cwd=str(folder))
        assert done["codes"] == [0], done
    return folder, done["out"][0]


def test_a_game(opened):
    """The actor opens safes whose codes it was never trained on, and cannot without the message."""
    folder, inspected = opened
    success = results(folder)
    assert success["latent"] > 0.97, success
    assert success["text"] > 0.97, success
    assert success["no_comm"] < 0.05 and success["cross_task"] < 0.05, success
    assert "dial 0 0 1" in inspected


def type_recipe(path, start, recipe, instead=False):
    """Type a recipe after the only line of a file that starts so, or instead of it."""
    lines = path.read_text().splitlines()
    n, = [n for n, line in enumerate(lines) if line.strip().startswith(start)]
    before = lines[:n] if instead else lines[:n + 1]
    path.write_text("\n".join(before + recipe.splitlines() + lines[n + 1:]) + "\n")


@pytest.fixture
def three_steps(opened, tmp_path):
    """A folder with the safe's models and messages, and the command that trains an actor for three steps."""
    for name in ("sender", "base", "messages", "train.json"):
        os.makedirs(tmp_path / "safe", exist_ok=True)
        os.symlink(opened[0] / "safe" / name, tmp_path / "safe" / name)
    return tmp_path, [*TRAIN, "--max_steps", "3"]


def test_a_loss(three_steps):
    """A term that is added: one line where it is computed, one where it is weighted, typed into a copy of the code."""
    folder, command = three_steps
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            shutil.copy(f"{ROOT}/{name}", folder)
    type_recipe(folder / "model.py", 'terms["sep"] = ', TERM)
    type_recipe(folder / "train_actor.py", 'weights = {"task": 1.0, "align"', WEIGHTS, instead=True)
    python(command, folder)
    with open(folder / "safe" / "actor" / "loss_log.csv") as file:
        steps = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert len(steps) == 3
    for row in steps:  # it is there by itself, and learned from
        assert 0 < row["hinge"] < 4 and row["w_hinge"] == 0.1
        others = row["w_align"] * row["align"] + row["w_sep"] * row["sep"]
        assert row["loss"] == pytest.approx(row["task"] + others + 0.1 * row["hinge"], rel=1e-5)


def test_an_adapter(three_steps, forked):
    """An adapter by flag: it learns, its name is kept with the actor, and an evaluation finds it."""
    folder, command = three_steps
    adapter = module(folder / "my_adapters.py", ADAPTER).Linear(4, 4, 0.2, 0.5)
    message = adapter(torch.randn(2, 9, 4), torch.ones(2, 9, dtype=torch.bool)).detach()
    assert message.square().mean().sqrt().item() == pytest.approx(0.1, rel=0.01)
    done = forked("train_actor", [*command[1:], "--adapter", "my_adapters:Linear"], cwd=str(folder))
    assert done["codes"] == [0], done
    weights = load_file(folder / "safe" / "actor" / "latent_adapter.safetensors")
    assert set(weights) == {f"{part}.{name}" for part in ("linear", "norm") for name in ("weight", "bias")}
    assert read_json(f"{folder}/safe/actor/latent_adapter.json")["adapter"]["class"] == "my_adapters:Linear"
    done = forked("eval_alfworld", [*EVALUATE[1:], "--num_episodes", "4"], cwd=str(folder))
    assert done["codes"] == [0] and len(results(folder)) == 4, done


def test_what_is_sent(three_steps, forked):
    """A function by flag: the actor learns what it makes of the states, and is sent the same by a live sender."""
    folder, command = three_steps
    (folder / "my_states.py").write_text(SEND)
    name = "my_states:two_layers"
    for script, *argv in ([*COLLECT, "--send", name, "--output_dir", "wide"], [*command, "--hidden_data", "wide"],
                          [*EVALUATE, "--num_episodes", "4"]):
        done = forked(script.removesuffix(".py"), argv, cwd=str(folder))
        assert done["codes"] == [0], done
    for directory in ("wide", "safe/results/messages"):
        sender = LatentShards(f"{folder}/{directory}").sender
        assert (sender["send"], sender["hidden_size"]) == (name, 128)
    assert read_json(f"{folder}/safe/actor/latent_adapter.json")["sender"]["send"] == name


def test_a_grader(tmp_path, forked):
    """A model that always answers 99.5: right for 100 to one percent, wrong for 90 and 0; equal to none of them."""
    close = module(tmp_path / "my_graders.py", GRADER).close
    assert close("0", "0") and close("1.005", "1") and not close("1", "0") and not close(None, "1")
    assert not close("x", "1") and not close("1", r"\frac12") and not close("nan", "nan")

    problem, reply = "how many ?", r"\boxed{ 99.5 }"
    tokenizer = build_tokenizer([problem, reply])
    lm = train_lm(tokenizer, "guesser", lambda rng: [one_turn(problem, reply)], seed=0, steps=30)
    lm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    references = [{"id": str(n), "problem": problem, "solution": rf"\boxed{{{n}}}"} for n in (100, 90, 0, "x")]
    write_json(str(tmp_path / "problems.json"), references)
    for grader, accuracy in (("my_graders:close", 0.25), ("hendrycks", 0.0)):
        done = forked("eval_math", [
            "--model_path", "model", "--dataset", "problems.json", "--question_template", "{task}", "--variants",
            "no_comm", "--grader", grader, "--max_length", 8, "--torch_dtype", "fp32", "--output_dir", grader[:3],
        ], cwd=str(tmp_path))
        assert done["codes"] == [0], done
        summary = read_json(str(tmp_path / grader[:3] / "summary.json"))
        assert summary["variants"]["no_comm"]["accuracy"] == accuracy
