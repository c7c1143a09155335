"""The README does what it says: blocks run, commands parse, links lead somewhere, every flag has help and a test."""
import argparse
import ast
import glob
import importlib
import os
import re
import shlex

import pytest

from common import read_json

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ("collect", "train_actor", "compress", "eval_alfworld", "eval_math")


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


README = read("README.md")
EXAMPLES = sorted(os.path.relpath(path, ROOT) for path in glob.glob(f"{ROOT}/examples/*"))
FENCED = r"(<!-- tested -->\s+)?^```(\w*)\n(.*?)^```$"  # the mark, the language, the block
BLOCKS = [(bool(mark), language, text) for mark, language, text in re.findall(FENCED, README, re.M | re.S)]
PROSE = re.sub(FENCED, "", README, flags=re.M | re.S)


def commands(text):
    """The shell commands of a text, as lists of words: what follows python or torchrun, comments aside."""
    words = {name: value.strip('"') for name, value in re.findall(r"^([A-Z]+)=(.*)$", text, re.M)}
    lines = re.sub(r"\$([A-Z]+)", lambda match: words.get(match[1], match[0]), text).replace("\\\n", " ").splitlines()
    found_words = [shlex.split(command, comments=True) for line in lines for command in line.split(" && ")
                   if re.match(r" *(python|torchrun) ", command)]
    return [line for line in found_words if any(word.endswith(".py") for word in line)]


def all_commands():
    """Those of the README, in blocks and in the text, of the recipes, and of each script's docstring."""
    inline = re.findall(r"`((?:python|torchrun) [^`…]*)`", PROSE)
    texts = [text for _, language, text in BLOCKS if language in ("", "sh", "bash")]
    texts += [" ".join(text.split()) for text in inline]
    texts += [read(path) for path in EXAMPLES if path.endswith(".sh")]
    paths = [*(f"{script}.py" for script in SCRIPTS), *(path for path in EXAMPLES if path.endswith(".py"))]
    texts += [ast.get_docstring(ast.parse(read(path))) for path in paths]
    return [words for text in texts for words in commands(text)]


def parsers_of(module):
    """The argparse parsers of a script and its subcommands."""
    def caught(parser, argv=None):
        raise LookupError(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(LookupError) as error:
        patch.setattr(argparse.ArgumentParser, "parse_args", caught)
        importlib.import_module(module).get_args([])
    parsers = list(error.value.args)
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return parsers


def flags(module):
    """{flag: its action} of a script and its subcommands."""
    return {option: action for parser in parsers_of(module) for action in parser._actions
            for option in action.option_strings if option.startswith("--")}


def test_a_message_by_hand(monkeypatch, capsys):
    """The first Python block, with the models of the box: the actor goes where its message says, and only then."""
    monkeypatch.chdir(ROOT)
    block, = [text for mark, language, text in BLOCKS if mark and language == "python"]
    exec(compile(block, "README.md", "exec"), {"__name__": "by_hand"})
    says, this, nothing, others = capsys.readouterr().out.splitlines()[-4:]
    assert "mug 2 from shelf 1" in says and "pencil" not in says
    assert this.endswith("go to shelf 1") and others.endswith("go to desk 2") and not nothing.endswith("shelf 1")


def test_every_python_block_is_tested():
    """One without a mark is a recipe: test_forks.py types it, or a file of examples/ holds it."""
    nodes = ast.walk(ast.parse(read("tests/test_forks.py")))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    texts += [read(path) for path in EXAMPLES if path.endswith(".py")]
    typed = " ".join(" ".join(texts).split())
    for mark, language, text in BLOCKS:
        for part in text.split("\n\n") if language == "python" and not mark else []:
            part = re.sub(r"^#.*\n", "", part)  # its heading
            assert " ".join(part.split()) in typed, part


@pytest.mark.parametrize("words", all_commands(), ids=lambda words: " ".join(words)[:60])
def test_commands_parse(words):
    """Every flag that the README, a recipe or a docstring types exists, and every required one is there."""
    script = next(n for n, word in enumerate(words) if word.endswith(".py"))
    path = words[script]
    assert os.path.exists(os.path.join(ROOT, path)), path
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    if path.split("/")[0] != "tests" and hasattr(module, "get_args"):
        module.get_args(words[script + 1:])


def test_recipes_are_shell_scripts():
    """That bash can read, and that stop at the first error."""
    for path in EXAMPLES:
        if path.endswith(".sh"):
            assert "\nset -e\n" in read(path) and os.system(f"bash -n {os.path.join(ROOT, path)}") == 0


def test_flags_that_are_named_exist():
    known = {"--nproc_per_node"}.union(*map(flags, SCRIPTS))
    assert set(re.findall(r"--[a-z_][a-z0-9_]+", PROSE)) <= known


# ---- links
def names_of(path):
    """The functions and classes of a file."""
    return {node.name for node in ast.parse(read(path)).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_links_and_names_lead_somewhere():
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s#]+)[^)\s]*\)", PROSE):
        if target.startswith("http"):
            continue
        assert os.path.exists(os.path.join(ROOT, target)), target
        if re.fullmatch(r"`\w+`", text) and target.endswith(".py"):
            assert text.strip("`") in names_of(target), (text, target)
    for name in re.findall(r"`((?:tests/|examples/)?[a-z_]+\.(?:py|sh))`", PROSE):
        assert os.path.exists(os.path.join(ROOT, name)), name


# ---- figures
def short(value):
    """.88, 1.00"""
    return f"{value:.2f}".removeprefix("0")


def test_figures_are_those_of_the_files():
    """The table of the first screen, and what the text says of a file of assets/, figure by figure."""
    house, games, smollm2, unsure, alignments = (
        read_json(f"{ROOT}/assets/{name}.json") for name in "household alfworld smollm2 unsure alignments".split())
    text, expected = " ".join(README.split()), []
    for row in ("latent", "text", "no_comm", "cross_task", "k8"):
        cells = []
        for table in (house["results"], games["tables"]["seen"], games["tables"]["unseen"]):
            low, high = table[row]["interval"]
            cells.append(f"{short(table[row]['success'])} [{short(low)}, {short(high)}]")
        expected.append(" | ".join(cells) + " |")
        assert any(line.startswith(f"| `{row}` |") and line.endswith(expected[-1]) for line in README.splitlines())
    pairings = [short(result["pairing"][0]) for result in (house["differences"], games["differences"]["seen"])]
    expected.append("{} in the household, {} on ALFWorld's seen games".format(*pairings))
    counts = [count for of_seed in games["obeyed"].values() for count in of_seed.values()]
    expected.append("in {} of {} games it first goes where that message says".format(*map(sum, zip(*counts))))
    seen, unseen = smollm2["valid_seen"], smollm2["valid_unseen"]
    expected.append("SmolLM2 wins {} of {} seen games by latents, {} by text, and {} and {} of {} unseen".format(
        *seen["latent"], seen["text"][0], unseen["latent"][0], *unseen["text"]))
    latent, words = (unsure["table"][row]["wrong"][0] for row in ("latent", "text"))
    expected.append(f"wins {latent:.3f}".replace("0.", ".") + " of the tasks, one trained on the texts "
                    + f"{words:.3f}".replace("0.", "."))
    for names in ("text", "trained", "warm_up", "procrustes none", "expected likeliest", "random no_comm"):
        cells = []
        for reader in ("text", "latent", "SmolLM2"):
            rows = [alignments[reader][name] for name in names.split() if name in alignments[reader]]
            cells.append("; ".join(short(row["success"]) + (f" ({short(row['cross_task'])})" if "cross_task" in row
                                                            else "") for row in rows) or "–")
        expected.append(f"| {' | '.join(cells)} |")
    parts = alignments["unsure"].values()
    right, wrong = ([short(part[row]["success"]) for row in ("warm_up", "text")] for part in parts)
    expected.append("wins {} by fitted states, {} by words; where the plan is right, {} and {}".format(*wrong, *right))
    for figure in expected:
        assert figure in text, figure


def passes(text, flag):
    """Whether a test gives a flag to a script: "--c", "--c 3", or in argv_of: {"c": 3}, c=3."""
    if re.search(rf"""{flag}["' ]""", text):
        return True
    return "argv_of" in text and bool(re.search(rf'\b{flag[2:]}=[^=]|"{flag[2:]}":', text))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help_and_a_test(script):
    texts = [read(f"tests/{name}") for name in os.listdir(f"{ROOT}/tests") if name.startswith("test_")]
    actions = flags(script)
    assert len(actions) > 10 and all(action.help for action in actions.values())
    for parser in parsers_of(script):
        defaults = [action for action in parser._actions if action.option_strings and action.default not in
                    (None, "", argparse.SUPPRESS)]
        assert all("default: " in action.help for action in defaults)
    untested = [flag for flag in actions if not any(passes(text, flag) for text in texts)]
    assert set(untested) <= {"--help"}, f"no test uses {untested}"
