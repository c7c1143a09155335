"""The rules of the code that no fork has to keep: no crowded lines, one meaning per word, args stay in main."""
import ast
import glob
import io
import sys
import tokenize

CODE = sorted(glob.glob("*.py") + glob.glob("examples/*.py"))
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


def problems(path):
    with open(path, encoding="utf-8") as file:
        source = file.read()
    lines = source.splitlines()
    long = 100 * sum(len(line) >= 110 for line in lines) / len(lines)
    if density(source) > 6.2 or long > 5:
        yield f"{density(source):.2f} expressions per line, {long:.1f} % of lines of 110 columns or more"
    for node in ast.walk(ast.parse(source)):
        name = getattr(node, "id", getattr(node, "arg", getattr(node, "name", None)))
        if name in BANNED:
            yield f"line {node.lineno}: {name}"
        if isinstance(node, ast.FunctionDef) and node.name != "check_args":
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            if "args" in [argument.arg for argument in arguments]:
                yield f"{node.name} takes args"
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if getattr(node.value, "id", None) == "args":
                yield f"line {node.lineno}: args.{node.attr} ="


if __name__ == "__main__":
    failures = [f"{path}: {problem}" for path in CODE for problem in problems(path)]
    print("\n".join(failures) or "style: nothing to say")
    sys.exit(bool(failures))
