"""
Stage 4b: the actor answers MATH problems under every communication variant.

  python eval_math.py --model_path actor --hidden_data messages_test --dataset MATH --split test \\
      --variants latent text no_comm cross_task randomrot --output_dir results_math
  torchrun --nproc_per_node 8 eval_math.py --model_path actor --sender student --latent_steps 64 8 \\
      --dataset MATH --samples_per_question 8 --temperature 0.7 --output_dir results_k
  python eval_math.py --model_path Qwen/Qwen2.5-0.5B-Instruct --dataset math500.jsonl \\
      --variants no_comm --grader math_verify --output_dir results_plain

Run it again after a kill, or with a smaller --batch_size where memory ran out: it answers what is missing.
An answer depends on its problem, the variant and the seed, not on the batch size, the ranks or a restart.

Output: detailed_results.jsonl (a line per answer; `sample`: which of the answers drawn for its problem),
summary.json (what the table says, by level and by subject; differences between variants), results.png. The variant
`self`, of a sender that is asked only what the actor is told, is left out: here both read the same problem.

    1. answers   problems -> answers
    2. results   figures and the table
    3. graders   the answer in a reply, and whether it is right
"""
import contextlib
import datetime
import glob
import importlib
import inspect
import json
import logging
import os
import re

import torch
import torch.distributed as dist

from common import (Parser, UserError, load_object, lock, one_line_errors, positive, progress, seed_for,
                    task_template, this_rank, wilson_interval, write_json, write_text)
from data import (ANSWER_FIELDS, ID_FIELDS, MATH_PROMPT, MATH_QUESTION, RESPONSE_FIELDS, TASK_FIELDS,
                  final_reply, load_tasks, stop_ids)
from hf import context_length, decode, next_tokens, uniform_numbers
from model import LatentActor, collate, open_shards
from variants import (SENDER_FLAGS, Job, actors_of_variants, add_flags, check_args, check_settings,
                      collect_messages, mean_by_id, mean_of, message_sample, named_messages, split_by, table_rows,
                      write_results)


def get_args(argv):
    parser = Parser(prog="eval_math.py", description=__doc__)
    flag = parser.flag
    add_flags(parser)
    parser.group("problems")
    flag("--dataset", ..., "MATH's directory; a .json, .jsonl or .parquet (MATH-500, GSM8K, AIME); a hub id")
    flag("--split", "test", "of a directory or a hub dataset")
    flag("--subjects", None, "only these values of the field `type` or `subject`; default: all", nargs="+")
    flag("--num_samples", None, "only the first N problems; default: all", type=positive)
    flag("--id_field", ID_FIELDS, "default: the first of unique_id, id, idx; else a hash of the problem")
    flag("--task_field", TASK_FIELDS, "default: problem, else question")
    flag("--answer_field", ANSWER_FIELDS, "of the reference; default: answer, or else the solution's box")
    flag("--response_field", RESPONSE_FIELDS, "of the solution; default: solution, else answer")
    flag("--question_template", MATH_QUESTION, "what the actor is asked, as in training", type=task_template)
    parser.group("decoding")
    flag("--samples_per_question", 1, "answers drawn per problem")
    flag("--temperature", 0.0, "0: greedy")
    flag("--max_length", 2048, "new tokens per answer")
    flag("--batch_size", 32, "answers written together")
    flag("--seed", 0, "of sampling, cross_task and the perturbations")
    parser.group("grading and output")
    flag("--grader", "hendrycks", "hendrycks: MATH's published rules; math_verify: a library that forgives more; "
         "module:function: yours, it gets the answer or None, the reference and, with a third argument, the reply")
    flag("--output_dir", ..., "a directory; one that exists is continued")
    args = parser.parse_args(argv)
    if args.temperature < 0 or args.temperature == 0 and args.samples_per_question > 1:
        parser.error(f"--samples_per_question {args.samples_per_question} at --temperature "
                     f"{args.temperature:g}: only above 0 do the answers differ")
    return args


# ---- 1. Answers ----------------------------------------------------------------------------------
def read_problems(path, split="test", subjects=None, max_samples=None, **fields):
    """What `load_tasks` gives, with what an evaluation needs -> [{"id", "task", "reference", "level",
    "subject", ...}]. Raises UserError for a problem without an answer."""
    tasks = load_tasks(path, split=split, subjects=subjects, max_samples=max_samples, **fields)
    for task in tasks:
        # an answer may itself be a text with a box, as GSM8K's is
        task["reference"] = extract_answer(task["answer"]) or task["answer"] or extract_answer(task["reply"])
        if not task["reference"]:
            raise UserError(f"{path}: id {task['id']}: its solution has no \\boxed{{}} with an answer, see "
                            f"--response_field and --answer_field")
        task["level"] = str(task.get("level", "")).removeprefix("Level ")
        task["subject"] = str(task.get("type", ""))
    return tasks


def chooser(jobs, tasks, temperature, seed, max_length):
    """What `decode` calls to choose next tokens. Raises UserError if logits are not finite."""
    # each answer has numbers of its own: no two are drawn alike, and each is the same in any batch
    seeds = [seed_for("answer", seed, tasks[job.n]["id"], job.run) for job in jobs]
    uniforms = torch.stack([uniform_numbers(number, max_length) for number in seeds])  # (B, max_length)

    def choose(logits, active, step):  # (b, V)
        finite = (logits < torch.inf).all(-1).tolist()  # NaN is not; -inf may mask spare tokens
        if not all(finite):
            job = jobs[active[finite.index(False)]]
            raise UserError(f"id {tasks[job.n]['id']} ({job.label}): the model's logits are not finite: try "
                            f"--torch_dtype bf16 or fp32, with another --output_dir")
        if temperature == 0:
            return next_tokens(logits)
        return next_tokens(logits / temperature, uniforms[active, step].to(logits.device))

    return choose


@torch.inference_mode()
def answer_jobs(actor, jobs, tasks, rows, grader, *, question_template=MATH_QUESTION, max_length=2048,
                temperature=0.0, seed=0):
    """Answer a batch of jobs -> [{"variant", "id", "sample", ...}], lines of detailed_results.jsonl.

    tasks: what `read_problems` gives; rows: what `table_rows` gives. An answer that reaches max_length or the end
    of the actor's context is `cut`. Raises UserError for a prompt that fills the context."""
    lm, tokenizer = actor.lm, actor.tokenizer
    context = context_length(lm.config.get_text_config())
    samples, limits, answers = [], [], []
    for job in jobs:
        task = tasks[job.n]
        question = question_template.replace("{task}", task["task"]).strip()
        turns = [{"role": "user", "content": question}]
        sample, told = message_sample(actor, turns, job.n, tasks, seed, **rows[job.label])
        length = len(sample["input_ids"])
        if length >= context:
            raise UserError(f"id {task['id']} ({job.label}): a prompt of {length} tokens fills the actor's "
                            f"context of {context}: remove the problem, or shorten its message")
        samples.append(sample)
        limits.append(min(max_length, context - length))
        answers.append({
            "variant": job.label, "id": task["id"], "sample": job.run, "level": task["level"],
            "subject": task["subject"], "question": question, "reference_answer": task["reference"], **told})
    batch = collate(samples, lm.device, padding_side="left")
    replies = decode(lm, actor.embed(batch), batch["attention_mask"], limits, stop_ids(tokenizer, lm),
                     chooser(jobs, tasks, temperature, seed, max_length))
    for answer, reply in zip(answers, replies):
        answer["model_output"] = final_reply(tokenizer, reply["ids"])
        answer["extracted_answer"] = extract_answer(answer["model_output"])
        answer["correct"] = grade(grader, answer)
        answer["cut"], answer["tokens"], answer["actor_ms"] = reply["cut"], len(reply["ids"]), reply["ms"]
        answer["timestamp"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return answers


# ---- 2. Results ----------------------------------------------------------------------------------
def read_parts(directory):
    """{(variant, id, draw): answer} of all ranks of all runs; a line that a kill tore is skipped."""
    answers = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(directory), "*.jsonl"))):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    answer = json.loads(line)
                    answers[answer["variant"], answer["id"], answer["sample"]] = answer
    return answers


def same_answer(a, b, grader):
    """Whether two answers to one question are the same by its grader: all right ones are."""
    if a["correct"] or b["correct"] or a["extracted_answer"] == b["extracted_answer"]:
        return a["correct"] == b["correct"]
    try:
        return bool(grader(a["extracted_answer"], b["extracted_answer"]))
    except Exception:  # a grader of your own need not read a wrong answer as a reference
        return False


def majority(answers, grader):
    """Whether the answer that most answers to a question give is right; of a tie, the first. None where the grader
    reads replies, because then nobody can say which answers are the same."""
    if takes_reply(grader):
        return None
    groups = []  # of same answers
    for answer in answers:
        if answer["extracted_answer"] is not None:
            group = next((group for group in groups if same_answer(group[0], answer, grader)), [])
            group.append(answer)
            if len(group) == 1:
                groups.append(group)
    return bool(groups) and max(groups, key=len)[0]["correct"]


def figures(answers, votes):
    """Accuracy, pass@n, majority vote, ... of some answers. votes: {id: what `majority` says of it}."""
    questions = split_by(answers, "id")
    n = len(questions)
    accuracy = sum(mean_by_id(answers, "correct").values()) / n
    votes = [votes[question] for question in questions]
    return {
        "questions": n, "samples": len(answers), "accuracy": accuracy,
        "interval": list(wilson_interval(accuracy * n, n)),  # answers to one question are not independent
        "pass_at_n": sum(any(answer["correct"] for answer in group) for group in questions.values()) / n,
        "majority": None if None in votes else sum(votes) / n,
        "no_answer": sum(answer["extracted_answer"] is None for answer in answers),
        "cut": sum(answer["cut"] for answer in answers),
        "message_length": mean_of(answers, "message_length"), "tokens": mean_of(answers, "tokens"),
    }


def summarize(answers, grader):
    """{label: figures} from the lines of detailed_results.jsonl; all of table and picture is from here."""
    summary = {}
    for label, group in split_by(answers, "variant").items():
        votes = {question: majority(some, grader) for question, some in split_by(group, "id").items()}
        summary[label] = figures(group, votes)
        for key in ("level", "subject"):
            parts = sorted(split_by(group, key).items())
            summary[label][f"by_{key}"] = {value: figures(part, votes) for value, part in parts}
    return summary


TABLE = {  # heading: figure and format
    "accuracy": "accuracy .3f", "95% from": "low .3f", "to": "high .3f", "pass@n": "pass_at_n .3f",
    "majority": "majority .3f", "no answer": "no_answer d", "cut": "cut d", "states": "message_length .1f",
    "tokens": "tokens .0f",
}


# ---- 3. Graders: correct(answer or None, reference) -> bool --------------------------------------
# MATH's published rules (math_equivalence.py of hendrycks/math): two answers are the same if these steps, in this
# order, spell them the same. No arithmetic, no order, no 1,000 for 1000. Quirks are theirs: \sqrt 3 is not \sqrt3.
RULES = [
    (r"\n|\\!", ""),
    (r"\\\\", r"\\"),  # \\frac, of a model that was trained on JSON
    ("[td]frac", "frac"),
    (r"\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$", ""),
    (r"\\?%", ""),
    (r"(^|[ {])\.", r"\g<1>0."),  # .5
    (r"^[^=]{0,2}=([^=]*)$", r"\1"),  # x = 5
    (r"\\sqrt([^{])", r"\\sqrt{\1}"),
    (" ", ""),
    (r"\\frac([^{])([^{])", r"\\frac{\1}{\2}"),  # \frac12
    (r"\\frac([^{])\{", r"\\frac{\1}{"),  # \frac1{72}, but not \frac{1}2
    (r"^0\.5$", r"\\frac{1}{2}"),  # this decimal and no other
    (r"^(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)$", r"\\frac{\1}{\2}"),
]


def spelling(answer):
    r"""An answer in the one spelling that is compared: r"x = \frac12\text{ cm}" -> r"\frac{1}{2}"."""
    value, *units = re.split(r"\\+text\{ ", answer)  # \text{Sunday} is an answer, \text{ cm} is a unit
    if len(units) > 1:
        return answer
    for pattern, replacement in RULES:
        value = re.sub(pattern, replacement, value)
    return value


def is_equiv(a, b):
    """Whether two answers (str or None) are the same by MATH's published rules. None equals nothing."""
    return a is not None and b is not None and spelling(a) == spelling(b)


def by_math_verify(answer, reference):
    """As `is_equiv`, by the library math_verify, which knows arithmetic, sets and intervals."""
    from math_verify import parse, verify
    if answer is None:
        return False
    try:  # both give up after 5 seconds, with towers of powers and nested braces too
        return verify(parse(rf"\boxed{{{reference}}}"), parse(rf"\boxed{{{answer}}}"))
    except Exception:  # what it cannot read is wrong
        return False


def load_grader(name):
    """--grader -> correct(answer or None, reference[, reply]) -> bool. Raises UserError if there is none."""
    if name == "hendrycks":
        return is_equiv
    if name == "math_verify":
        try:
            importlib.import_module("math_verify")
        except ImportError:
            raise UserError("--grader math_verify: pip install math-verify[antlr4_13_2]") from None
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs all that it cannot read
        return by_math_verify
    return load_object(name, "--grader")


def takes_reply(grader):
    """Whether a grader reads the whole reply as well: it takes three arguments."""
    parameters = inspect.signature(grader).parameters.values()
    return sum(parameter.default is parameter.empty for parameter in parameters) == 3


def grade(grader, answer):
    """Whether an answer is right. Raises UserError if the grader raises anything."""
    arguments = [answer["extracted_answer"], answer["reference_answer"], answer["model_output"]]
    try:
        return bool(grader(*arguments[:3 if takes_reply(grader) else 2]))
    except Exception as error:
        raise UserError(f"the grader {getattr(grader, '__qualname__', grader)} failed on id {answer['id']}: "
                        f"{type(error).__name__}: {error}") from error


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


def extract_answer(text):
    r"""The answer in a reply: the last \boxed{} or \fbox{}, or what follows the last "####" (GSM8K). None if
    there is none, an empty one, or one that never closes."""
    text = text or ""
    boxes = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text)]
    lines = re.findall(r"####[ \t]*(.+)", text)
    answer = box(text[boxes[-1]:]) if boxes else lines[-1] if lines else ""
    return answer.strip() or None


@one_line_errors("eval_math.py")
def main(argv=None):
    args = get_args(argv)
    rank, world, device = this_rank()

    # ---- what is to be compared, on which problems, and who answers: checked before a model is loaded
    check_args(args)
    grader = load_grader(args.grader)
    tasks = read_problems(args.dataset, args.split, args.subjects, args.num_samples, id_field=args.id_field,
                          task_field=args.task_field, answer_field=args.answer_field,
                          response_field=args.response_field)
    others = named_messages(args.messages)
    messages = {"": open_shards(args.hidden_data)} if args.hidden_data else {}
    actors = actors_of_variants(args.variants, args.model_path, args.baseline_path, args.trust_remote_code)
    settings = check_settings("output_dir", vars(args), but=["samples_per_question"])

    # ---- messages of a sender that is asked now
    if "self" in args.variants and rank == 0:
        print("self is left out: the sender reads the problem, as the actor does")
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    if args.sender:
        options = {name: getattr(args, name) for name in SENDER_FLAGS}
        messages |= collect_messages(tasks[rank::world], args.model_path, args.output_dir,
                                     default_template=MATH_PROMPT, **options)
    rows = table_rows(args.variants, actors, tasks, messages, others, args.keep_ratio)
    said = messages[""].records if args.hidden_data else {}
    n = sum(said.get(task["id"], task)["task"] != task["task"] for task in tasks)
    if n and rank == 0:
        print(f"{n} of {len(tasks)} messages in {args.hidden_data} are about other texts of the same ids")
    parts = os.path.join(args.output_dir, "parts")
    os.makedirs(parts, exist_ok=True)
    if rank == 0:
        lock(args.output_dir)
        write_json(os.path.join(args.output_dir, "settings.json"), settings)

    # ---- what is left to answer. Ranks share the whole list, so that any number of ranks can go on.
    # Problems of one length fill a batch; the longest come first: what does not fit is known at once
    order = sorted(range(len(tasks)), key=lambda n: -len(tasks[n]["task"]))
    runs = range(args.samples_per_question)
    every_job = [Job(label, run, n) for label in rows for n in order for run in runs]
    done = read_parts(parts)
    jobs = [job for job in every_job[rank::world] if (job.label, tasks[job.n]["id"], job.run) not in done]

    # ---- answer
    name = os.path.join(parts, f"rank{rank:05d}.jsonl")
    with open(name, "a", encoding="utf-8") as part, progress(rank=rank, total=len(jobs), unit="answer") as bar:
        part.write("\n")  # ends a line that a kill tore
        for actor_path in dict.fromkeys(rows[job.label]["actor"] for job in jobs):
            actor_jobs = [job for job in jobs if rows[job.label]["actor"] == actor_path]
            actor = LatentActor.load(actor_path, args.torch_dtype, device, args.trust_remote_code,
                                     args.chat_template_kwargs, args.self_check)
            for start in range(0, len(actor_jobs), args.batch_size):
                batch = actor_jobs[start:start + args.batch_size]
                try:
                    answers = answer_jobs(
                        actor, batch, tasks, rows, grader, question_template=args.question_template,
                        max_length=args.max_length, temperature=args.temperature, seed=args.seed)
                except (RuntimeError, MemoryError) as error:
                    if not re.search("MemoryError|out of memory|alloc", repr(error), re.I):
                        raise
                    raise UserError(f"out of memory with {len(batch)} answers at a time: lower --batch_size; "
                                    f"what is finished is kept, the same command goes on") from error
                part.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
                part.flush()
                os.fsync(part.fileno())
                bar.update(len(batch))
            del actor
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank > 0:
        return None

    # ---- the files and the table, from the answers on disk
    done = read_parts(parts)
    answers = [done[label, task["id"], run] for label in rows for task in tasks for run in runs]
    lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
    write_text(os.path.join(args.output_dir, "detailed_results.jsonl"), "".join(lines))
    summary = summarize(answers, grader)
    write_results(args.output_dir, settings, rows, summary, answers, "correct", TABLE, "accuracy",
                  "accuracy (95 % Wilson interval)", f"{len(tasks)} problems")
    print("interval: Wilson, over questions; of differences: paired bootstrap; cut: answers that reached --max_length")
    for key in ("by_level", "by_subject"):
        print(f"\n{key:24s}{'n':>6s}" + "".join(f"  {label:>10s}" for label in summary))
        for value, first in next(iter(summary.values()))[key].items():
            line = f"{value or '-':24s}{first['questions']:6d}"
            for label, row in summary.items():
                line += f"  {row[key][value]['accuracy']:{max(10, len(label))}.3f}"
            print(line)
    print(f"\nwrote summary.json, results.png, {len(answers)} lines of detailed_results.jsonl to {args.output_dir}")
    return summary


if __name__ == "__main__":
    main()
