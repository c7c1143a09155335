"""The README does what it says: its commands parse and run, its links lead somewhere, and no flag is without a word."""
import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest

from common import read_json

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ("collect", "train_actor", "compress", "eval_alfworld", "eval_math")
with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
    README = f.read()


def blocks(language=""):
    """[(whether it is marked as tested, text)] of the fenced blocks of a language."""
    fenced = re.findall(r"(<!-- tested -->\n)?^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    return [(bool(mark), text) for mark, name, text in fenced if name == language]


def commands(text):
    """The shell commands of a block, one list of words each, comments and line ends in quotes aside."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(python|torchrun|pip) ", line)]


def all_commands():
    inline = re.findall(r"`(python [a-z_]+\.py [^`…]*)`", README)
    return [c for _, text in blocks() for c in commands(text)] + [shlex.split(text) for text in inline]


def flags(script):
    """{flag: its action} of a script and its subcommands."""
    parsers, found, real = [], {}, argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = lambda self, argv=None, namespace=None: parsers.append(self)
    try:
        importlib.import_module(script).get_args([])
    finally:
        argparse.ArgumentParser.parse_args = real
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            found |= {option: action for option in action.option_strings if option.startswith("--")}
    return found


@pytest.mark.parametrize("words", all_commands(), ids=lambda words: " ".join(words)[:60])
def test_commands_parse(words):
    """Every flag that the README types exists, and every required one is there."""
    names = [n for n, word in enumerate(words) if word.endswith(".py")]
    if not names or words[names[0]].removesuffix(".py") not in SCRIPTS:
        return
    importlib.import_module(words[names[0]].removesuffix(".py")).get_args(words[names[0] + 1:])


def test_tested_commands_run(tmp_path, forked):
    """The fork example, typed as it stands, in a folder beside the scripts: it shows what it says."""
    example, = [text for _, text in blocks("python")]
    assert len(example.splitlines()) < 60
    (tmp_path / "safe.py").write_text(example)
    tested = [c for mark, text in blocks() if mark for c in commands(text)]
    assert len(tested) == 5
    for _, script, *argv in tested:
        if script.removesuffix(".py") in SCRIPTS:
            done = forked(script.removesuffix(".py"), argv, cwd=str(tmp_path))
            assert done["codes"] == [0], done
        else:
            subprocess.run([sys.executable, script, *argv], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": ROOT})
    assert {"summary.json", "results.csv", "results.png", "episodes"} <= set(os.listdir(tmp_path / "safe_results"))
    success = {name: figures["success"] for name, figures in read_json(
        str(tmp_path / "safe_results" / "summary.json"))["variants"].items()}
    assert success["none"] > 0.9 and success["text"] > 0.9, success
    assert success["no_comm"] < 0.05 and success["cross_task"] < 0.05, success
    assert "dial 0 0 1" in done["out"][0]  # what inspect printed last


def test_links_and_names_lead_somewhere():
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert os.path.exists(os.path.join(ROOT, target)), target
        if text.startswith("`") and target.endswith(".py"):  # a link to a function or a class
            with open(os.path.join(ROOT, target)) as f:
                assert re.search(rf"^(def|class) {text.strip('`')}\b", f.read(), re.M), (text, target)
    for name in re.findall(r"`((?:tests/)?[a-z_]+\.py)`", README.split("The original repository's commands")[0]):
        assert name == "safe.py" or os.path.exists(os.path.join(ROOT, name)), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help_and_a_test(script):
    texts = ""
    for name in os.listdir(os.path.join(ROOT, "tests")):
        if name.startswith("test_") and name != "test_readme.py":
            with open(os.path.join(ROOT, "tests", name)) as f:
                texts += f.read()
    found = flags(script)
    assert len(found) > 10 and all(action.help for action in found.values())
    # as a flag, or as a keyword from which a test makes one
    untested = [flag for flag in found if flag != "--help" and not re.search(rf"(--|\b){flag[2:]}\b", texts)]
    assert not untested, f"no test uses {untested}"


def test_every_mentioned_flag_exists():
    known = {flag for script in SCRIPTS for flag in flags(script)} | {"--task", "--nnodes", "--node_rank", "--master_addr",
                                                                      "--nproc_per_node", "--seed", "--fast", "--json", "--kills"}
    ours = README.split("The original repository's commands")[0] + README.split("## It survives")[1]
    assert {flag for flag in re.findall(r"--[a-z_]{2,}", ours)} <= known
