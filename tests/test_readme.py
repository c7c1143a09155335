"""The README does what it says: blocks run, commands parse, links lead somewhere, every flag is tested.
And the code keeps to the rules that make it readable: no line is crowded."""
import argparse
import ast
import glob
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import tokenize

import pytest

import demo
from common import read_json
from model import open_shards

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ("collect", "train_actor", "compress", "eval_alfworld", "eval_math")


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


README = read("README.md")
OURS = README.split("The original repository's commands")[0]  # what follows there are other people's names
CODE = sorted(os.path.relpath(path, ROOT) for folder in (ROOT, f"{ROOT}/examples")
              for path in glob.glob(f"{folder}/*.py"))
FENCED = r"(<!-- tested -->\s+)?^```(\w*)\n(.*?)^```$"  # the mark, the language, the block


def blocks(*languages):
    """[(whether it is marked as tested, text)] of the fenced blocks of some languages; "" is a shell's."""
    return [(bool(mark), text) for mark, language, text in re.findall(FENCED, README, re.M | re.S)
            if language in languages]


def commands(text):
    """The shell commands of a text, as lists of words: what follows python or torchrun, comments aside."""
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(command, comments=True) for line in lines for command in line.split(" && ")
             if re.match(r" *(python|torchrun) ", command)]
    return [line for line in words if any(word.endswith(".py") for word in line)]


SHELL = blocks("", "sh", "bash")


def all_commands():
    """Those of the README, in blocks and in the text, and those that a script's docstring offers."""
    inline = re.findall(r"`((?:python|torchrun) [^`…]*)`", re.sub(FENCED, "", README, flags=re.M | re.S))
    texts = [text for _, text in SHELL] + [" ".join(text.split()) for text in inline]
    for path in [*CODE, "tests/bench.py"]:
        texts.append(ast.get_docstring(ast.parse(read(path))))
    return [words for text in texts for words in commands(text)]


def flags(script):
    """{flag: its action} of a script and its subcommands."""
    def caught(parser, argv=None):
        raise LookupError(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(LookupError) as error:
        patch.setattr(argparse.ArgumentParser, "parse_args", caught)
        importlib.import_module(script).get_args([])
    actions, parsers = {}, list(error.value.args)
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            actions |= {option: action for option in action.option_strings if option.startswith("--")}
    return actions


# ---- the README's blocks and commands

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the demo_out of a demo that hardly trains."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sizes = {"base": 2, "sender": 2, "train": 8, "test": 2, "actor": 1, "student": 1}
        patch.setitem(demo.SIZES, ("household", True), sizes)
        demo.main(["--fast"])
    return folder


def test_a_message_by_hand_is_what_the_scripts_send(folder, monkeypatch, capsys):
    """The first Python block prints the task, stage 1's plan of it, and the reply that stage 4 wrote."""
    monkeypatch.chdir(folder)
    marked = [text for mark, text in blocks("python") if mark]
    exec(compile(marked[0], "README.md", "exec"), {"__name__": "by_hand"})
    episode = read_json("demo_out/eval/episodes/latent/run0/test-0000.json")
    plan = open_shards("demo_out/messages_test").records["test-0000"]["plan"]
    expected = [episode["task"], plan, episode["turns"][0]["reply"]]
    assert capsys.readouterr().out.splitlines()[-3:] == expected
    for text in marked[1:]:
        exec(compile(text, "README.md", "exec"), {"__name__": "readme"})


def test_every_python_block_is_tested():
    """One without a mark is a recipe: test_forks.py types it, or a file of examples/ holds it."""
    nodes = ast.walk(ast.parse(read("tests/test_forks.py")))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    texts += [read(path) for path in CODE if path.startswith("examples")]
    typed = " ".join(" ".join(texts).split())
    for mark, text in blocks("python"):
        for part in text.split("\n\n"):
            part = re.sub(r"^#.*\n", "", part)  # its heading
            assert mark or " ".join(part.split()) in typed, part


def test_marked_commands_run(folder, request):
    for words in [words for mark, text in SHELL if mark for words in commands(text)]:
        if words[0] == "python" and words[1].removesuffix(".py") in SCRIPTS:
            done = request.getfixturevalue("forked")(words[1].removesuffix(".py"), words[2:], cwd=str(folder))
            assert done["codes"] == [0], done
        else:
            subprocess.run([sys.executable, os.path.join(ROOT, words[1]), *words[2:]], cwd=folder, check=True)


@pytest.mark.parametrize("words", all_commands(), ids=lambda words: " ".join(words)[:60])
def test_commands_parse(words):
    """Every flag that the README or a docstring types exists, and every required one is there."""
    n = next(n for n, word in enumerate(words) if word.endswith(".py"))
    source = read(words[n])
    if "\ndef get_args(" in source:
        importlib.import_module(words[n].removesuffix(".py").replace("/", ".")).get_args(words[n + 1:])
    for word in words[n + 1:]:
        assert not word.startswith("--") or "add_argument" in source, words


def test_every_flag_in_the_text_exists():
    known = {"--nnodes", "--node_rank", "--master_addr", "--nproc_per_node", "--kills"}  # torchrun, pytest
    known = known.union(*(flags(script) for script in (*SCRIPTS, "demo", "bench")))
    known |= set(re.findall(r'"(--\w+)"', read("examples/unsure.py")))
    assert set(re.findall(r"--[a-z_][a-z0-9_]+", OURS)) <= known


# ---- its links and its length

def names_of(path):
    """The functions, classes and methods (Class.method) of a file."""
    names = set()
    for node in ast.parse(read(path)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


def test_links_and_names_lead_somewhere():
    titles = re.findall(r"^#+ (.*)$", re.sub(FENCED, "", README, flags=re.M | re.S), re.M)
    # as GitHub makes them
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", README):
        path, _, anchor = target.partition("#")
        if target.startswith("http"):
            continue
        assert os.path.exists(os.path.join(ROOT, path)), target
        assert not anchor or path or anchor in anchors, target
        if re.fullmatch(r"`[\w.]+`", text) and path.endswith(".py") and not text.endswith(".py`"):
            assert text.strip("`") in names_of(path), (text, target)
    for name in re.findall(r"`((?:tests/|examples/)?[a-z_]+\.py)`", OURS):
        assert os.path.exists(os.path.join(ROOT, name)), name


def test_it_is_short_and_finished():
    assert len(README.splitlines()) <= 360
    assert "@@" not in README


# ---- flags

def passes(text, flag):
    """Whether a test gives a flag to a script: "--c", "--c 3", or in argv_of: {"c": 3}, c=3."""
    if re.search(rf"""{flag}["' ]""", text):
        return True
    return "argv_of" in text and bool(re.search(rf'\b{flag[2:]}=[^=]|"{flag[2:]}":', text))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help_and_a_test(script):
    names = [name for name in os.listdir(f"{ROOT}/tests") if name.startswith("test_")]
    texts = [read(f"tests/{name}") for name in names if name != "test_readme.py"]
    actions = flags(script)
    assert len(actions) > 10 and all(action.help for action in actions.values())
    untested = [flag for flag in actions if not any(passes(text, flag) for text in texts)]
    assert set(untested) <= {"--help"}, f"no test uses {untested}"


def test_a_variable_of_that_name_is_no_test_of_a_flag():
    assert passes('main(["--c", "3"])', "--c") and passes("argv_of({'seed': 0}); train(out, c=3)", "--c")
    assert not passes("c = 3\nfor c in range(c): print(c, abc=c)  # argv_of, --code, --c", "--c")


# ---- the rules of the code

LIMITS = {"expressions per line": 6.2, "% of lines of 110 columns or more": 5}
BANNED = {"tenths", "cells", "found", "mine", "own", "room", "live"}  # each said several things
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def density(source):
    """Expressions per line of code; docstrings, comments and empty lines are none."""
    lines, tree = set(), ast.parse(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(isinstance(node, ast.expr) for node in ast.walk(tree)) / len(lines)


@pytest.mark.parametrize("path", CODE)
def test_lines_are_not_crowded(path):
    source = read(path)
    lines = source.splitlines()
    long = 100 * sum(len(line) >= 110 for line in lines) / len(lines)
    for name, value in zip(LIMITS, (density(source), long)):
        assert value <= LIMITS[name], f"{path}: {value:.2f} {name}"


@pytest.mark.parametrize("path", CODE)
def test_args_stay_in_main_and_words_have_one_meaning(path):
    """A notebook, a test and a fork can call every function below main. Nobody changes args."""
    for node in ast.walk(ast.parse(read(path))):
        name = getattr(node, "id", getattr(node, "arg", getattr(node, "name", None)))
        assert name not in BANNED, f"{path}:{node.lineno}: {name}"
        if isinstance(node, ast.FunctionDef) and node.name != "check_args":
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            assert "args" not in [argument.arg for argument in arguments], f"{path}: {node.name}"
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            assert getattr(node.value, "id", None) != "args", f"{path}:{node.lineno}: args.{node.attr} ="


def test_no_path_of_somebodys_machine():
    folders = ("", ".ci", "assets", "examples", "tests")
    paths = [path for folder in folders for path in glob.glob(f"{ROOT}/{folder}/*")]
    for path in [*paths, f"{ROOT}/.gitignore"]:
        if os.path.isfile(path):
            with open(path, "rb") as file:
                content = file.read()
            for name in ("work", "root"):
                assert f"/{name}/".encode() not in content, path
            assert b"." + b"library" not in content, path
