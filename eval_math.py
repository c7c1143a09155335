"""
Stage 4b: the actor answers MATH problems under every communication variant.

  python eval_math.py --model_path actor --hidden_data messages_test --dataset MATH --split test \\
      --variants latent text no_comm cross_task randomrot --output_dir results_math
  torchrun --nproc_per_node 8 eval_math.py --model_path actor --sender student --latent_steps 64 8 \\
      --dataset MATH --samples_per_question 8 --temperature 0.7 --output_dir results_k
  python eval_math.py --model_path Qwen/Qwen2.5-0.5B-Instruct --dataset math500.jsonl \\
      --variants no_comm --output_dir results_plain

Run it again after a kill: answers that are on disk are not given again, those that failed are. An
answer depends on its problem, the variant and the seed, not on the batch size, the number of ranks or a
restart.

Output: detailed_results.jsonl (one line per answer: variant, id, sample, level, subject, question,
reference_answer, model_output, extracted_answer, correct, failed, error, cut, message_length, tokens,
sender_ms, actor_ms, timestamp), summary.json (what the table says, by level and by subject),
results.png.

    1. grader    MATH's rules of what is the same answer
    2. answers   the decode loop
    3. results   figures and the table
"""
import argparse
import contextlib
import datetime
import glob
import importlib
import json
import os
import re
import sys
import time
from fractions import Fraction

import torch
import torch.distributed as dist
import torch.nn.functional as F

from collect import uniform_numbers
from common import (Parser, UserError, boolean, fingerprint, json_object, one_line_errors, plot_bars,
                    positive, progress, seed_for, this_rank, wilson_interval, write_json, write_text)
from data import (ANSWER_FIELDS, ID_FIELDS, MATH_QUESTION, RESPONSE_FIELDS, TASK_FIELDS, final_reply,
                  load_tasks, stop_ids)
from model import (DTYPES, LatentActor, collate, context_length, decoder_states, lm_logits, new_cache,
                   next_tokens, open_shards)
from variants import (VARIANTS, actors_of_variants, check_settings, check_variants, collect_messages,
                      message_sample, table_rows)


def get_args(argv):
    parser = Parser(prog="eval_math.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    g = parser.add_argument_group("actor")
    g.add_argument("--model_path", required=True,
                   help="an actor directory, or any causal LM (no_comm only)")
    g.add_argument("--baseline_path", nargs="*", default=[],
                   help="actors of --message text (for cot_full) and of --message none (for no_cot)")
    g.add_argument("--torch_dtype", choices=DTYPES, default="bf16", help="of the actor's parameters")
    g.add_argument("--trust_remote_code", type=boolean, default=False,
                   help="run code that the model ships")
    g.add_argument("--chat_template_kwargs", type=json_object,
                   help="JSON for the chat template; default: as the actor was trained")
    g.add_argument("--self_check", type=boolean, default=True,
                   help="try at loading if the model can be used")
    g = parser.add_argument_group("messages")
    g.add_argument("--hidden_data", help="--output_dir of collect.py for these problems")
    g.add_argument("--sender", help="who is asked now: collect.py math runs first, on these problems")
    g.add_argument("--latent_steps", type=positive, nargs="*", default=[],
                   help="with --sender: a row per K")
    g.add_argument("--prompt_template", help="with --sender: what it is asked; default: as collect.py's")
    g.add_argument("--max_plan_tokens", type=positive, default=512, help="with --sender: longest plan")
    g.add_argument("--sender_batch_size", type=positive, default=16,
                   help="with --sender: prompts at a time")
    g.add_argument("--cross_hidden_data",
                   help="for qwen2llama: messages of a sender of another family, read by the actor of "
                        "--model_path or --baseline_path that fits; default: as latent")
    g.add_argument("--keep_ratio", type=float, nargs="*", default=[1.0],
                   help="a row per share: messages are cut to this share of their states")
    g = parser.add_argument_group("problems")
    g.add_argument("--dataset", required=True,
                   help="MATH's directory; a .json, .jsonl or .parquet (MATH-500, GSM8K, AIME); a hub id")
    g.add_argument("--split", default="test", help="of a directory or a hub dataset")
    g.add_argument("--subjects", nargs="+", help="only these values of the field `type` or `subject`")
    g.add_argument("--num_samples", type=positive, help="only the first N problems")
    g.add_argument("--id_field", default=ID_FIELDS,
                   help="default: the first there is of unique_id, id, idx; else the position")
    g.add_argument("--task_field", default=TASK_FIELDS, help="default: problem, else question")
    g.add_argument("--answer_field", default=ANSWER_FIELDS,
                   help="field of the reference answer; default: answer, or else the solution's box")
    g.add_argument("--response_field", default=RESPONSE_FIELDS,
                   help="field of the solution; default: solution, else answer")
    g.add_argument("--question_template", default=MATH_QUESTION,
                   help="what the actor is asked, as in training")
    g.add_argument("--variants", nargs="+", default=["latent"], help=", ".join(VARIANTS))
    g = parser.add_argument_group("decoding")
    g.add_argument("--samples_per_question", type=positive, default=1, help="answers drawn per problem")
    g.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    g.add_argument("--max_length", type=positive, default=2048, help="new tokens per answer")
    g.add_argument("--batch_size", type=positive, default=32, help="answers written together")
    g.add_argument("--seed", type=int, default=0, help="of sampling, cross_task and the perturbations")
    g = parser.add_argument_group("grading")
    g.add_argument("--grader", default="hendrycks",
                   help="hendrycks: MATH's rules; math_verify: a library; or module:function, which gets an "
                        "answer (None if there is none) and the reference")
    g.add_argument("--answer_phrase", type=boolean, default=False,
                   help="where a reply has no box, take what follows 'the final answer is'")
    g = parser.add_argument_group("output")
    g.add_argument("--output_dir", required=True, help="a directory; one that exists is continued")
    args = parser.parse_args(argv)
    if args.temperature < 0 or args.temperature == 0 and args.samples_per_question > 1:
        parser.error(f"--samples_per_question {args.samples_per_question} at --temperature "
                     f"{args.temperature:g}: only above 0 do samples differ")
    if "{task}" not in args.question_template:
        parser.error("--question_template must contain {task}")
    return args


# what an answer and its grade depend on
SETTINGS = ["model_path", "baseline_path", "torch_dtype", "chat_template_kwargs", "hidden_data",
            "cross_hidden_data", "sender", "prompt_template", "max_plan_tokens", "dataset", "split", "subjects",
            "num_samples", "id_field", "task_field", "answer_field", "response_field", "question_template",
            "temperature", "max_length", "seed", "grader", "answer_phrase"]


# ------------------------------------------------------------------------------------------------------
# 1. MATH's rules of what is the same answer: spelling is forgiven, and order where MATH means a set;
# arithmetic is not.
#
# extract_answer finds the box. tokenize gives one spelling to what has many, by tables. expression, with
# what it calls, does so for sums, products and fractions. elements reads lists; is_equiv compares them.

# MATH's longest test answer has 81 characters, its deepest 3 levels of brackets, its richest 7 commands
MAX_LENGTH, MAX_DEPTH, MAX_COMMANDS = 500, 20, 100

UNICODE = {"−": "-", "–": "-", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ",
           "≠": r"\ne ", "∪": r"\cup ", "×": r"\times ", "·": r"\times ", "√": r"\sqrt ",
           "²": "^2", "³": "^3", "°": "", "“": "", "”": "", '"': "", "~": " "}

TEXT = r"\\(?:text(?:rm|normal|up|sf|tt)?|math(?:rm|sf|tt)|[mh]box|operatorname)\s*\{"
UNIT = ("(?:degree|radian|dollar|cent|yard|mile|second|minute|hour|day|week|month|year|pound|ounce|"
        "gallon|unit|point|grade|way|(?:kilo|centi|milli)?(?:met(?:er|re)|gram|lit(?:er|re)))s?|"
        "inch(?:es)?|foot|feet|ft|in|[ckm]m|kg|lbs?|mph|percent|people")
RATE = rf"(?:{UNIT}|k?m|[ghs]|mi|hr|min|sec)"  # m and s are units only beside a / or a per
NO_UNIT = (r"[^{}]*(?:illion|thousand|hundred|dozen|(?<!\^)\d|"
           r"\b(?:or|and|if|is|more|less|mod|[ie]|[ap]\.?\s?m)\b)")
POWER = r"(?:\s*\^\s*\{?\d\}?)?\s*\.?\s*"

SPELLINGS = [
    # a matrix, whichever brackets it has: [\matrix;1&2;3&4]; determinants and cases keep their names
    (r"\\\\\s*(?:\[\s*-?[\d.]+\s*[a-z]+\s*\])?", ";"),
    (r"\\begin\s*\{(?:[pbB]?matrix|smallmatrix|array)\}(?:\s*\{[lcr|\s]*\})?", r"[\\matrix;"),
    (r"\\begin\s*\{(\w+)\}", r"[\\\1;"),
    (r"[;\s]*\\end\s*\{\w+\}", "]"),
    # what is only for the eye: sizes, 10,\!000 and 10{,}000, quotes, dollars, spaces, bold, degrees
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-z])\.?", ""),
    (r",\s*\\!\s*(?=\d{3})|\{,\}(?=\d{3})|\\!", ""),
    (r"``(.*?)''", r"\1"),
    (r"\\?[$%]|\\[()\[\]]|\\$", ""),
    (r"\\[,;: ]|\\q?quad(?![a-z])|\s+", " "),
    (r"\\(?:displaystyle|boldsymbol|bm|emph|(?:math|text)(?:bf|it))(?![a-z])"
     r"\s*(?:\{([^{}]*)\})?", r" \1 "),
    (r"\^?\s*\\degree(?![a-z])|\^\s*(?:\\circ(?![a-z])|\{\s*\\circ\s*\})", ""),
    # sqrt(3) and pi without a backslash; 2\cdot\sqrt3 and 2*pi
    (r"(?<![\\a-z])(sqrt|pi|infty)(?![a-z])", r"\\\1 "),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<=\d)\s*(?:\\cdot|\\times|\*)\s*(?=\\sqrt|\\pi|[a-z(])", ""),
    # words: 2 and 3, 12th, units behind a value; words that are no unit are the answer
    (rf"(?:,\s*)?(?:{TEXT}\s*(?:and|or)\s*\}}|\s(?:and|or)\s)", ", "),
    (rf"(?<=\d)\s*\^?\s*(\{{\s*)?({TEXT}\s*)?(?:st|nd|rd|th)\b\s*(?(2)\}})\s*(?(1)\}})", ""),
    (r"(?:(?<=[\d})\]])|(?<=\\pi)|(?<=\d[a-z]))"
     rf"(?:(?:\s|/|\\cdot)*{TEXT}(?!{NO_UNIT})[^{{}}]*\}}{POWER})+$", ""),
    (rf"{TEXT}([^{{}}]*)\}}", r" \1 "),
    (r"(?:(?<=[\d})])\s*|(?:(?<=\d[a-z])|(?<=\\pi))\s+)(?:(?:square|cubic|sq\.?|cu\.?)\s+)?"
     rf"(?:{RATE}\s*(?:/|\bper\b)\s*{RATE}|{UNIT}){POWER}$", ""),
    # 6 p.m., the full stop, the choice (A), Even, 10 000
    (r"(?<=\d)\s*([ap])\.?\s?m\b\.?", lambda match: f" {match[1]}m".lower()),
    (r"(?<!\.)\.\s*$", ""),
    (r"^\s*\(\s*([a-z])\s*\)\s*$", r"\1"),
    (r"(?<![\\a-z])(?-i:No|[A-Z][a-z]{2,})(?![a-z])", lambda match: match[0].lower()),
    (r"(?<![\d.])(?<!\d )\d{1,3}(?: \d{3})+(?! ?\d)", lambda match: match[0].replace(" ", "")),
]
SPELLINGS = [(re.compile(pattern, re.I), spelling) for pattern, spelling in SPELLINGS]
THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!,?\d)")
DECIMAL = re.compile(r"(?<![\d.])\d*\.\d+(?![\d.]|\s*\\(?:overline|bar|dot|ldots|cdots))")

TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d+|[<>]=|\*\*|\S")
SYNONYMS = {
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac",
    r"\dbinom": r"\binom", r"\tbinom": r"\binom", r"\varnothing": r"\emptyset",
    r"\leq": r"\le", r"\leqslant": r"\le", "<=": r"\le", r"\lt": "<", r"\neq": r"\ne",
    r"\geq": r"\ge", r"\geqslant": r"\ge", ">=": r"\ge", r"\gt": ">",
    r"\cdot": r"\times", r"\ast": r"\times", "*": r"\times", "**": "^"}
OPEN, CLOSE = set(r"( [ { \{".split()), set(r") ] } \}".split())
RELATIONS = set(r"= < > \le \ge \ne \in \to : ; & | \mid \cap".split())
ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1, "^": 1, "_": 1}
NAME = re.compile(r"\\?[A-Za-z]+(_\w+)?'?(\([a-zA-Z\d]\))?|\([a-z](,[a-z])+\)")  # x, a_1, f(x), (x,y)


def decimal(match):
    r"""A decimal as the fraction it is: .5 -> \frac{1}{2}, 5.00 -> 5."""
    top, bottom = Fraction(match[0]).as_integer_ratio()
    return str(top) if bottom == 1 else rf"\frac{{{top}}}{{{bottom}}}"


def tokenize(answer, thousands):
    """An answer as a list of tokens. thousands: whether 100,200 is one number, not two."""
    while r"\\" in answer and (r"\begin" not in answer or r"\\begin" in answer):
        answer = answer.replace(r"\\", "\\")  # \\frac, of a model that was trained on JSON
    for sign, spelling in UNICODE.items():
        answer = answer.replace(sign, spelling)
    for pattern, spelling in SPELLINGS:
        answer = pattern.sub(spelling, answer)
    if thousands and not re.search(r"[(\[]|\\\{", answer):  # (1,234) is a pair
        answer = THOUSANDS.sub(lambda match: match[0].replace(",", ""), answer)
    answer = DECIMAL.sub(decimal, answer)
    return [SYNONYMS.get(token, token) for token in TOKEN.findall(answer)]


def depths(tokens):
    """How many brackets are open after each token."""
    result, depth = [], 0
    for token in tokens:
        depth = max(0, depth + (token in OPEN) - (token in CLOSE))
        result.append(depth)
    return result


def split(tokens, separators):
    """Split where a separator stands outside all brackets -> [(the separator before or "", tokens)]."""
    parts = [("", [])]
    for token, depth in zip(tokens, depths(tokens)):
        if depth == 0 and token in separators:
            parts.append((token, []))
        else:
            parts[-1][1].append(token)
    return parts


def group(tokens):
    """The inside, in one spelling, of the bracket that opens `tokens`; the tokens from its end on."""
    still_open = depths(tokens)
    end = still_open.index(0) if 0 in still_open else len(tokens)
    parts = [expression(part) for _, part in split(tokens[1:end], ",")]
    if tokens[0] == r"\{":  # a set
        parts.sort()
    return ",".join(parts), tokens[end:]


def argument(tokens):
    """A command's argument in one spelling, and the tokens after it: a group, a command or one digit."""
    if not tokens:
        return "", []
    if tokens[0] == "{":
        text, rest = group(tokens)
        return text, rest[1:]
    first, others = tokens[0][:1], tokens[0][1:]
    if first.isdigit() and others:
        return first, [others] + tokens[1:]
    return factor(tokens)


def fraction(top, bottom):
    r"""Its sign stands in front of it: -1, 2 -> -\frac{1}{2}. Brackets around a whole part go."""
    parts, negative = [], False
    for part in (top, bottom):
        part = re.sub(r"^\(([^(),]*)\)$", r"\1", part)
        if re.fullmatch("-[^-+]+", part):
            part, negative = part[1:], not negative
        parts.append(part)
    return "-" * negative + r"\frac{%s}{%s}" % tuple(parts)


def factor(tokens):
    r"""The first factor of a product and the tokens after it: \frac1{72}x -> r"\frac{1}{72}", ["x"]."""
    text, rest = tokens[0], tokens[1:]
    if text in OPEN:
        inside, rest = group(tokens)
        if text == "{" and " " not in inside or inside.startswith(r"[\matrix"):
            return inside, rest[1:]
        return text + inside + "".join(rest[:1]), rest[1:]
    if text == r"\sqrt" and rest[:1] == ["["]:  # the 3 of a cube root
        index, rest = factor(rest)
        text += index
    arguments = []
    for _ in range(ARGUMENTS.get(tokens[0], 0)):
        inside, rest = argument(rest)
        arguments.append(inside)
    if text == r"\frac":
        return fraction(*arguments), rest
    return text + "".join("{%s}" % inside for inside in arguments), rest


def product(tokens):
    r"""A term: 3\sqrt2/4 -> \frac{3 \sqrt{2}}{4}. 1/2x and 1/2/3 have two readings: they stay."""
    factors = []
    while tokens:
        text, tokens = factor(tokens)
        if text.startswith(("^", "_")) and factors:
            text = factors.pop() + text
        factors.append(text)
    slash = len(factors) - 2
    if factors.count("/") == 1 and factors.index("/") == slash > 0:
        mixed = slash == 2 and (factors[0] + factors[1]).isdigit()  # 1 1/2 is not 11/2
        top = " ".join(factors[mixed:slash])
        factors[mixed:] = [fraction(top, factors[-1])]
    return " ".join(factors)


def total(tokens):
    """A sum, its terms in alphabetical order: 2 - -x -> 2 + x."""
    terms, negative = [], False
    for sign, part in split(tokens, "+-"):
        negative ^= sign == "-"
        if part:
            term = product(part)
            negative ^= term.startswith("-")
            terms.append("-" * negative + term.removeprefix("-"))
            negative = False
    if not part:
        terms.append(sign)  # of a limit from one side
    return " + ".join(sorted(terms))


def expression(tokens):
    """An element of a list; the parts of a union are in alphabetical order."""
    if tokens[:1] == ["{"]:
        inside, rest = group(tokens)
        if len(rest) == 1:  # braces around the whole of it
            return inside
    parts = []
    for _, part in split(tokens, {r"\cup"}):
        sides = [relation + total(side) for relation, side in split(part, RELATIONS)]
        parts.append("".join(sides))
    return r"\cup".join(sorted(parts))


def elements(answer, thousands):
    r"""An answer as a list of (name or base, value): "x=2.0, 12_8" -> [("x", "2"), ("8", "12")]."""
    tokens, name, result = tokenize(answer, thousands), "", []
    commands = sum(token in ARGUMENTS for token in tokens)
    if commands > MAX_COMMANDS or max(depths(tokens), default=0) > MAX_DEPTH:
        return [("", answer)]
    for _, part in split(tokens, ","):
        sides = split(part, {"=", r"\in"})
        left = re.sub("[{}]", "", "".join(sides[0][1]))
        if len(sides) == 2 and NAME.fullmatch(left):
            name, part = left, sides[1][1]
        both = part.count(r"\pm") == 1  # 1 \pm 2 stands for 1 + 2 and 1 - 2
        for plus, minus in [("+", "-"), ("-", "+")] if both else [(r"\pm", r"\mp")]:
            signs = {r"\pm": plus, r"\mp": minus}
            value = expression([signs.get(token, token) for token in part])
            number = re.fullmatch(r"(-?\d+)_\{(.*)\}", value)
            if value:
                result.append((number[2], number[1]) if number else (name, value))
    return result


def same(x, y):
    """Whether two lists of elements are the same: x=5 is 5, and 52_8 is 52, but not y=5 or 52_9."""
    names = [{name for name, _ in side} for side in (x, y)]
    if {""} not in names:
        return sorted(x) == sorted(y)
    x, y = ([value for _, value in side] for side in (x, y))
    if max(map(len, names)) > 1:  # 1, 2 can only mean a=1, b=2
        return x == y
    return sorted(x) == sorted(y)


def is_equiv(a, b):
    """Whether two answers (str or None) are the same by MATH's conventions. None equals nothing."""
    if not a or not b or max(len(a), len(b)) > MAX_LENGTH:
        return bool(a) and a == b
    for thousands in (True, False):  # 100,200 is one number, or the list 100, 200
        x, y = elements(a, thousands), elements(b, thousands)
        if x and same(x, y):
            return True
    return False


def box(text):
    r"""The content of a box, from the text behind \boxed: {...}, or one word; "" if it never closes."""
    if not text.startswith("{"):
        return re.match(r"[^\s$]*", text)[0].rstrip(".,;")  # \boxed 5.
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text, re.S):  # \\. first: \{ opens a set, not a group
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[1:brace.start()]
    return ""


def extract_answer(text, phrase=False):
    r"""The answer in a reply: the last \boxed{} or \fbox{}, or what follows the last "####" (GSM8K). None
    if there is none, an empty one, or one that never closes. phrase: without these, take what "the final
    answer is"."""
    text = text or ""
    boxes = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text)]
    lines = re.findall(r"####[ \t]*(.+)", text)
    if phrase and not lines:
        lines = re.findall(r"(?i)the final answer is:?\s*(.+?)(?:\.\s|\.?\s*$)", text, re.M)
    answer = box(text[boxes[-1]:]) if boxes else lines[-1] if lines else ""
    return answer.strip() or None


def load_grader(name):
    """--grader -> correct(answer or None, reference) -> bool. Raises UserError if it cannot be loaded."""
    if name == "hendrycks":
        return is_equiv
    if name == "math_verify":
        try:
            return math_verify_grader(importlib.import_module("math_verify"))
        except ImportError:
            raise UserError("--grader math_verify: pip install math-verify[antlr4_13_2]") from None
    module, _, function = name.partition(":")
    sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a user's module raises when it is imported
        raise UserError(f"--grader takes hendrycks, math_verify or module:function; {name} cannot be "
                        f"loaded: {error}") from error


def math_verify_grader(math_verify):
    def correct(answer, reference):
        if answer is None:
            return False
        parsed = [math_verify.parse(rf"\boxed{{{text}}}") for text in (reference, answer)]
        return math_verify.verify(*parsed)
    return correct


# ------------------------------------------------------------------------------------------------------
# 2. Answers

@torch.inference_mode()
def generate(actor, samples, max_length, temperature=0.0, uniforms=None):
    """Answer the prompts of a batch -> [{"ids", "ms", "cut", "error"}], an answer per sample.

    samples: those of `message_sample`; uniforms (B, max_length): a number in [0, 1) for each token, where
    the temperature is above 0. Prompts are padded on the left, so that all end together; finished answers
    leave the batch. An answer is the same in any company. One that reaches max_length or the end of the
    actor's context is `cut`. Raises ValueError for a prompt that fills the context."""
    lm, device = actor.lm, actor.lm.device
    limit = context_length(lm.config.get_text_config())
    stops = stop_ids(actor.tokenizer, lm)
    replies = [{"ids": [], "ms": 0.0, "cut": True, "error": None} for _ in samples]
    active = list(range(len(samples)))  # which samples the batch holds: those whose answers go on
    batch, cache = collate(samples, device, padding_side="left"), new_cache(lm)
    inputs_embeds, attention_mask = actor.embed(batch), batch["attention_mask"]  # (b, T, D), (b, T)
    longest = int(attention_mask.sum(1).max())
    if longest >= limit:
        raise ValueError(f"a prompt of {longest} tokens fills the actor's context of {limit}")
    for step in range(max_length):
        start = time.perf_counter()
        states = decoder_states(lm, inputs_embeds, attention_mask, cache)  # (b, T, D), then (b, 1, D)
        logits = lm_logits(lm, states[:, -1])  # (b, V)
        if temperature > 0:
            next_ids = next_tokens(logits / temperature, uniforms[active, step].to(device))
        else:
            next_ids = next_tokens(logits)  # (b,)
        finite = (logits < torch.inf).all(-1).tolist()  # NaN is not; -inf may mask spare tokens
        written, lengths, keep = next_ids.tolist(), attention_mask.sum(1).tolist(), []
        ms = 1000 * (time.perf_counter() - start) / len(active)
        for b, n in enumerate(active):
            reply = replies[n]
            reply["ms"] += ms
            if not finite[b]:
                reply |= {"error": "the logits are not finite", "cut": False}
            elif written[b] in stops:
                reply["cut"] = False
            else:
                reply["ids"].append(written[b])
                if lengths[b] < limit:
                    keep.append(b)
        if not keep:
            break
        if len(keep) < len(active):  # active [0, 2, 5] and keep [0, 2] give [0, 5]
            active = [active[b] for b in keep]
            keep = torch.tensor(keep, device=device)
            cache.reorder_cache(keep)
            next_ids, attention_mask = next_ids[keep], attention_mask[keep]
        inputs_embeds = lm.get_input_embeddings()(next_ids[:, None])  # (b, 1, D)
        attention_mask = F.pad(attention_mask, (0, 1), value=1)  # as long as the cache
    return replies


def answer(actor, samples, max_length, temperature=0.0, uniforms=None):
    """`generate`, but an exception (out of memory, ...) fails only the sample that raises it: the halves
    of the batch are tried alone."""
    try:
        return generate(actor, samples, max_length, temperature, uniforms)
    except Exception as error:
        if len(samples) == 1:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            return [{"ids": [], "ms": 0.0, "cut": False, "error": text}]
    half, replies = len(samples) // 2, []
    for part in (slice(0, half), slice(half, None)):
        numbers = None if uniforms is None else uniforms[part]
        replies += answer(actor, samples[part], max_length, temperature, numbers)
    return replies


def answer_jobs(actor, jobs, tasks, rows, *, correct=is_equiv, question_template=MATH_QUESTION,
                max_length=2048, temperature=0.0, seed=0, answer_phrase=False):
    """Jobs [(label, task n, sample k)] -> their records, the lines of detailed_results.jsonl.

    tasks: what `read_problems` gives, rows: what `table_rows` gives, correct: what `load_grader` gives."""
    questions, samples, uniforms = [], [], []
    for label, n, k in jobs:
        questions.append(question_template.replace("{task}", tasks[n]["task"]).strip())
        messages = [{"role": "user", "content": questions[-1]}]
        samples.append(message_sample(actor, messages, n, tasks, seed, **rows[label]))
        # a sample's own numbers: no two samples are the same, and each is the same in any batch
        uniforms.append(uniform_numbers(seed_for("answer", seed, tasks[n]["id"], k), max_length))
    replies = answer(actor, samples, max_length, temperature, torch.stack(uniforms))
    records = []
    for (label, n, k), question, sample, reply in zip(jobs, questions, samples, replies):
        task, length = tasks[n], sample["message_length"]
        text = final_reply(actor.tokenizer.decode(reply["ids"], skip_special_tokens=True))
        extracted = extract_answer(text, answer_phrase)
        records.append({
            "variant": label,
            "id": task["id"],
            "sample": k,
            "level": task["level"],
            "subject": task["subject"],
            "question": question,
            "reference_answer": task["reference"],
            "model_output": text,
            "extracted_answer": extracted,
            "correct": reply["error"] is None and bool(correct(extracted, task["reference"])),
            "failed": reply["error"] is not None,
            "error": reply["error"],
            "cut": reply["cut"],
            "message_length": length,
            "tokens": len(reply["ids"]),
            "sender_ms": rows[label]["shards"].records[task["id"]]["sender_ms"] if length else 0.0,
            "actor_ms": reply["ms"],
            "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        })
    return records


def read_problems(path, split="test", subjects=None, max_samples=None, **fields):
    """What `load_tasks` gives, with what an evaluation needs -> [{"id", "task", "reference", "level",
    "subject", ...}]. Raises UserError for a problem without an answer."""
    tasks = load_tasks(path, split=split, subjects=subjects, max_samples=max_samples, **fields)
    for task in tasks:
        # an answer may itself be a text with a box, as GSM8K's is
        boxes = extract_answer(task["answer"]), task["answer"], extract_answer(task["reply"])
        task["reference"] = next(filter(None, boxes), None)
        if task["reference"] is None:
            raise UserError(f"{path}: id {task['id']}: its solution has no \\boxed{{}} with an answer, see "
                            f"--response_field and --answer_field")
        task["level"] = str(task.get("level", "")).removeprefix("Level ")
        task["subject"] = str(task.get("type", ""))
    return tasks


# ------------------------------------------------------------------------------------------------------
# 3. Results

def read_parts(directory):
    """{(variant, id, sample): record} of all ranks of all runs; a line that a kill tore is skipped."""
    records = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(directory), "*.jsonl"))):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    records[record["variant"], record["id"], record["sample"]] = record
    return records


def majority(samples):
    """Whether the answer that most samples of a question give is right; of a tie, the first."""
    groups = []  # of equal answers
    for sample in samples:
        same_answer = [group for group in groups
                       if is_equiv(group[0]["extracted_answer"], sample["extracted_answer"])]
        if same_answer:
            same_answer[0].append(sample)
        elif sample["extracted_answer"] is not None:
            groups.append([sample])
    return bool(groups) and max(groups, key=len)[0]["correct"]


def figures(records):
    """Accuracy (the mean over samples), pass@n and majority vote of the records of one variant."""
    questions = {}
    for record in records:
        questions.setdefault(record["id"], []).append(record)
    n, right = len(questions), [[s["correct"] for s in samples] for samples in questions.values()]
    accuracy = sum(sum(samples) / len(samples) for samples in right) / n
    return {
        "questions": n,
        "samples": len(records),
        "accuracy": accuracy,
        "interval": list(wilson_interval(accuracy * n, n)),  # samples of one question are not independent
        "pass_at_n": sum(map(any, right)) / n,
        "majority": sum(map(majority, questions.values())) / n,
        "failed": sum(record["failed"] for record in records),
        "no_answer": sum(record["extracted_answer"] is None for record in records),
        "cut": sum(record["cut"] for record in records),
        "message_length": sum(record["message_length"] for record in records) / len(records),
        "tokens": sum(record["tokens"] for record in records) / len(records),
    }


def summarize(records):
    """{label: figures} from the lines of detailed_results.jsonl; all of table and picture is from here."""
    summary = {}
    for label in dict.fromkeys(record["variant"] for record in records):
        group = [record for record in records if record["variant"] == label]
        summary[label] = figures(group)
        for key in ("level", "subject"):
            summary[label][f"by_{key}"] = {}
            for value in sorted({record[key] for record in group}):
                part = [record for record in group if record[key] == value]
                summary[label][f"by_{key}"][value] = figures(part)
    return summary


TABLE = {  # heading: (figure, its format)
    "accuracy": ("accuracy", ".3f"),
    "95% from": ("low", ".3f"),
    "to": ("high", ".3f"),
    "pass@n": ("pass_at_n", ".3f"),
    "majority": ("majority", ".3f"),
    "failed": ("failed", "d"),
    "no answer": ("no_answer", "d"),
    "cut": ("cut", "d"),
    "states": ("message_length", ".1f"),
    "tokens": ("tokens", ".0f"),
}


def print_table(summary):
    print(f"\n{'variant':24s}" + "".join(f"{heading:>10s}" for heading in TABLE))
    for label, s in summary.items():
        low, high = s["interval"]
        values = s | {"low": low, "high": high}
        texts = [format(values[name], form) for name, form in TABLE.values()]
        print(f"{label:24s}" + "".join(f"{text:>10s}" for text in texts))
    print("interval: Wilson, over questions; cut: answers that reached --max_length")
    for key in ("level", "subject"):
        parts = {label: s[f"by_{key}"] for label, s in summary.items()}
        print(f"\n{'by ' + key:24s}{'n':>6s}" + "".join(f"  {label:>10s}" for label in parts))
        for value, first in next(iter(parts.values())).items():
            line = f"{value or '-':24s}{first['questions']:6d}"
            for label, part in parts.items():
                line += f"  {part[value]['accuracy']:{max(10, len(label))}.3f}"
            print(line)


def check_any_answered(records):
    """Says how many answers failed. Raises UserError if all of them did."""
    failed = [record for record in records if record["failed"]]
    if not failed:
        return
    first = f"the first, {failed[0]['variant']} {failed[0]['id']}: {failed[0]['error']}"
    if len(failed) == len(records):
        raise UserError(f"all {len(records)} answers failed, {first}")
    print(f"\n{len(failed)} answers failed and count as wrong; the same command tries them again; {first}")


# ------------------------------------------------------------------------------------------------------

@one_line_errors("eval_math.py")
def main(argv=None):
    args = get_args(argv)
    rank, world, device = this_rank()

    # ---- what is compared, on which problems, and who answers: checked before a model is loaded
    variants = check_variants(args.variants, args.hidden_data, args.sender, args.latent_steps,
                              args.cross_hidden_data, args.keep_ratio)
    correct = load_grader(args.grader)
    tasks = read_problems(args.dataset, args.split, args.subjects, args.num_samples, id_field=args.id_field,
                          task_field=args.task_field, answer_field=args.answer_field,
                          response_field=args.response_field)
    cross = open_shards(args.cross_hidden_data) if args.cross_hidden_data else None
    actors = actors_of_variants(variants, args.model_path, args.baseline_path, cross,
                                args.trust_remote_code)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["weights"] = {path: fingerprint(path) for path in [args.model_path, *args.baseline_path]}
    settings = json.loads(json.dumps(settings))  # as they will be read again
    check_settings(args.output_dir, settings, "--output_dir")

    # ---- messages: those of --hidden_data, and those of a sender that is asked now
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        dist.barrier()
    messages = {"": open_shards(args.hidden_data)} if args.hidden_data else {}
    if args.sender:
        messages |= collect_messages(
            "math", args.sender, args.output_dir, args.latent_steps, dataset_path=args.dataset,
            split=args.split, subjects=args.subjects, max_samples=args.num_samples, id_field=args.id_field,
            task_field=args.task_field, response_field="", answer_field="",
            prompt_template=args.prompt_template, max_new_tokens=args.max_plan_tokens,
            batch_size=args.sender_batch_size, torch_dtype=args.torch_dtype, seed=args.seed,
            trust_remote_code=args.trust_remote_code, chat_template_kwargs=args.chat_template_kwargs,
            self_check=args.self_check)
    rows = table_rows(variants, actors, tasks, messages, cross, args.keep_ratio)
    parts = os.path.join(args.output_dir, "parts")
    os.makedirs(parts, exist_ok=True)
    if rank == 0:
        write_json(os.path.join(args.output_dir, "settings.json"), settings)

    # ---- what is left to answer. Ranks share the whole list, so that any number of ranks can go on
    order = sorted(range(len(tasks)), key=lambda n: len(tasks[n]["task"]))  # little padding in a batch
    samples = range(args.samples_per_question)
    every_job = [(label, n, k) for label in rows for n in order for k in samples]
    done = {key for key, record in read_parts(parts).items() if not record["failed"]}
    jobs = [(label, n, k) for label, n, k in every_job[rank::world]
            if (label, tasks[n]["id"], k) not in done]

    # ---- answer
    bar = progress(total=len(jobs), desc="answer", unit="answer", rank=rank)
    with open(os.path.join(parts, f"rank{rank:05d}.jsonl"), "a", encoding="utf-8") as part:
        part.write("\n")  # ends a line that a kill tore
        for path in dict.fromkeys(actors.values()):
            actor_jobs = [job for job in jobs if actors[rows[job[0]]["variant"]] == path]
            if not actor_jobs:
                continue
            actor = LatentActor.load(path, args.torch_dtype, device, args.trust_remote_code,
                                     args.chat_template_kwargs, args.self_check)
            for start in range(0, len(actor_jobs), args.batch_size):
                batch = actor_jobs[start:start + args.batch_size]
                records = answer_jobs(
                    actor, batch, tasks, rows, correct=correct, question_template=args.question_template,
                    max_length=args.max_length, temperature=args.temperature, seed=args.seed,
                    answer_phrase=args.answer_phrase)
                part.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
                part.flush()
                os.fsync(part.fileno())
                bar.update(len(batch))
            del actor
    bar.close()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank > 0:
        return None

    # ---- the files and the table, from the answers on disk
    on_disk = read_parts(parts)
    records = [on_disk[label, task["id"], k] for label in rows for task in tasks for k in samples]
    write_text(os.path.join(args.output_dir, "detailed_results.jsonl"),
               "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    summary = summarize(records)
    write_json(os.path.join(args.output_dir, "summary.json"), {
        "settings": settings,
        "actors": actors,
        "samples_per_question": args.samples_per_question,
        "variants": summary,
    })
    plot_bars(os.path.join(args.output_dir, "results.png"), list(summary),
              [s["accuracy"] for s in summary.values()], [s["interval"] for s in summary.values()],
              "accuracy (95 % Wilson interval)", f"{len(tasks)} problems")
    print_table(summary)
    check_any_answered(records)
    print(f"\nwrote summary.json, results.png and detailed_results.jsonl to {args.output_dir}: "
          f"{len(records)} answers")
    return summary


if __name__ == "__main__":
    main()
