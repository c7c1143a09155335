"""Forks: a game, a loss, an adapter, a grader. Each recipe of the README is run here as it stands there."""
import ast
import csv
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from common import read_json, write_json
from demo import build_tokenizer, train_lm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

OLD_LINE = """
        terms["sep"] = math.log(2) - js_divergence(log_p, log_probs["other"])
"""
NEW_LINE = """
        terms["sep"] = hinge(log_p, log_probs["other"], targets["labels"])
"""
LOSS = """
def hinge(log_p, log_p_other, labels, margin=2.0):  # (n, V), (n, V), (n,) -> (n,)
    gain = (log_p - log_p_other).gather(1, labels[:, None]).squeeze(1)
    return F.relu(margin - gain)
"""
ADAPTER = """
class HiddenStateProcessor(nn.Module):
    def __init__(self, sender_dim, dim, scale=0.2, output_scale=0.1, **unused):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(sender_dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.LayerNorm(dim))
        nn.init.constant_(self.mlp[-1].weight, scale * output_scale)  # as loud as the actor's words

    def forward(self, hidden_states, mask):  # (B, L, d_s), (B, L) -> (B, L, d_a)
        return self.mlp(hidden_states)
"""
GRADER = """
def close(answer, reference):
    return answer is not None and abs(float(answer) / float(reference) - 1) < 0.01
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
    assert success["latent"] > 0.9 and success["text"] > 0.9, success
    assert success["no_comm"] < 0.05 and success["cross_task"] < 0.05, success
    assert "dial 0 0 1" in inspected


def test_a_loss_and_an_adapter(opened, tmp_path):
    """The recipes, typed into a copy of the code: the same commands train another loss and another adapter."""
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            shutil.copy(f"{ROOT}/{name}", tmp_path)
    shutil.copytree(f"{ROOT}/examples", tmp_path / "examples")
    model = (tmp_path / "model.py").read_text()
    assert model.count(OLD_LINE) == 1
    # of two classes of one name the later one counts
    (tmp_path / "model.py").write_text(model.replace(OLD_LINE, NEW_LINE) + LOSS + ADAPTER)
    for name in ("sender", "base", "messages"):
        shutil.copytree(opened[0] / "safe" / name, tmp_path / "safe" / name)
    shutil.copy(opened[0] / "safe" / "train.json", tmp_path / "safe")

    python([*TRAIN, "--max_steps", "120"], tmp_path)
    python(EVALUATE, tmp_path)
    success = results(tmp_path)
    assert success["latent"] > 0.9 and success["no_comm"] < 0.05 and success["cross_task"] < 0.05, success
    with open(tmp_path / "safe" / "actor" / "loss_log.csv") as file:
        sep = [float(row["sep"]) for row in csv.DictReader(file)]
    assert sep[0] > 1.5 > sep[-1]  # the hinge starts at its margin of 2; L_sep is never above ln 2
    weights = load_file(tmp_path / "safe" / "actor" / "latent_adapter.safetensors")
    assert set(weights) == {f"mlp.{n}.{name}" for n in (0, 2, 3) for name in ("weight", "bias")}


def test_a_grader(tmp_path, forked):
    """A model that always answers 99.5: right for 100 to one percent, wrong for 90; never equal to either."""
    problem, reply = "how many ?", r"\boxed{ 99.5 }"
    sample = [(f"<user> {problem} <eos> <assistant>", False), (f"{reply} <eos>", True)]
    tokenizer = build_tokenizer([problem, reply])
    train_lm(tokenizer, "guesser", lambda rng: [sample], seed=0, steps=30).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    references = [{"id": str(n), "problem": problem, "solution": rf"\boxed{{{n}}}"} for n in (100, 90)]
    write_json(str(tmp_path / "problems.json"), references)
    (tmp_path / "my_graders.py").write_text(GRADER)
    for grader, accuracy in (("my_graders:close", 0.5), ("hendrycks", 0.0)):
        done = forked("eval_math", [
            "--model_path", "model", "--dataset", "problems.json", "--question_template", "{task}", "--variants",
            "no_comm", "--grader", grader, "--max_length", 8, "--torch_dtype", "fp32", "--output_dir", grader[:3],
        ], cwd=str(tmp_path))
        assert done["codes"] == [0], done
        summary = read_json(str(tmp_path / grader[:3] / "summary.json"))
        assert summary["variants"]["no_comm"]["accuracy"] == accuracy


def test_the_readme_shows_these_recipes():
    """Blank lines aside."""
    def lines(text):
        return re.sub(r"\n+", "\n", text).strip()

    with open(f"{ROOT}/README.md", encoding="utf-8") as file:
        chapter = lines(file.read().split("## Fork it: a game, a loss, an adapter, a grader")[1])
    with open(f"{ROOT}/examples/safe.py") as file:
        game = re.search(r"^class Safe:.*?(?=\n\n\n)", file.read(), re.S | re.M)[0]
    for recipe in (game, LOSS, NEW_LINE, ADAPTER, GRADER):
        assert lines(recipe) in chapter
