"""
Stage 4b: the actor answers MATH problems under every communication variant.

  python eval_math.py --model_path actor --hidden_data messages_test --dataset MATH --split test \\
      --variants none text no_comm cross_task randomrot --output_dir results_math
  torchrun --nproc_per_node 8 eval_math.py --model_path actor --sender student --latent_steps 64 8 --dataset MATH \\
      --samples_per_question 8 --temperature 0.7 --output_dir results_k
  python eval_math.py --model_path Qwen/Qwen2.5-0.5B-Instruct --dataset MATH --variants no_comm --output_dir results_b

Run it again after a kill: answers that are on disk are not given again. An answer depends on its problem, the variant
and the seed, not on the batch size, the number of ranks or a restart.
"""
import argparse
import contextlib
import datetime
import glob
import json
import os
import time

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import collect
from common import (Parser, UserError, atomic_path, boolean, fingerprint, positive, run, seed_for, this_rank,
                    wilson_interval, write_json, write_text)
from data import (VARIANTS, actor_of, check_settings, label_sources, load_tasks, message_row, open_messages,
                  variants_of)
from math_answers import extract_answer, is_equiv, load_grader
from lm import DTYPES, growing_cache, lm_logits, next_tokens
from model import LatentActor, collate, end_of_turn, open_shards

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def get_args(argv):
    parser = Parser(prog="eval_math.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    g = parser.add_argument_group("actor")
    g.add_argument("--model_path", required=True, help="an actor directory, or a plain causal LM (no_comm only)")
    g.add_argument("--baseline_path", nargs="*", default=[],
                   help="actors trained with --message text (for cot_full) and --message none (for no_cot)")
    g.add_argument("--torch_dtype", choices=DTYPES, default="bf16", help="of the actor's parameters")
    g.add_argument("--trust_remote_code", type=boolean, default=False, help="run code that the model ships")
    g = parser.add_argument_group("messages")
    g.add_argument("--hidden_data", help="--output_dir of collect.py for these problems")
    g.add_argument("--sender", help="a live sender: collect.py math runs first, on these problems, into --output_dir")
    g.add_argument("--cross_hidden_data",
                   help="for qwen2llama: messages of a sender of another family; the actor of --model_path or "
                        "--baseline_path that fits reads them; default: as none")
    g.add_argument("--latent_steps", type=positive, nargs="*", default=[], help="with --sender: a row per K of these")
    g.add_argument("--prompt_template", help="with --sender: what it is asked; default: as collect.py's")
    g.add_argument("--max_plan_tokens", type=positive, default=512, help="with --sender: longest plan")
    g.add_argument("--sender_batch_size", type=positive, default=16, help="with --sender: prompts decoded together")
    g.add_argument("--keep_ratio", type=float, nargs="*", default=[1.0], help="cut messages to this share of rows")
    g = parser.add_argument_group("problems")
    g.add_argument("--dataset", required=True, help="as collect.py reads: MATH's directory, a file, a hub id")
    g.add_argument("--split", default="test", help="of a directory or a hub dataset")
    g.add_argument("--subjects", nargs="+", help="only these subjects")
    g.add_argument("--num_samples", type=positive, help="only the first N problems")
    g.add_argument("--question_template", default=collect.MATH_QUESTION, help="what the actor is asked, as in training")
    g.add_argument("--variants", nargs="+", default=["none"], help=", ".join(VARIANTS) + " (latent: same as none)")
    g.add_argument("--grader", choices=["builtin", "math_verify"], default="builtin", help="MATH's rules or a library")
    g = parser.add_argument_group("decoding")
    g.add_argument("--samples_per_question", type=positive, default=1, help="answers drawn per problem")
    g.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    g.add_argument("--max_length", type=positive, default=2048, help="new tokens per answer")
    g.add_argument("--batch_size", type=positive, default=32, help="answers written together")
    g.add_argument("--seed", type=int, default=0, help="of sampling, cross_task and the perturbations")
    g = parser.add_argument_group("output")
    g.add_argument("--output_dir", required=True, help="detailed_results.jsonl, summary.json, results.png")
    return parser, parser.parse_args(argv)


SETTINGS = ["model_path", "baseline_path", "hidden_data", "cross_hidden_data", "sender", "prompt_template",
            "max_plan_tokens", "dataset", "split", "subjects", "num_samples", "question_template", "grader",
            "temperature", "max_length", "seed", "torch_dtype"]  # what an answer and its grade depend on


# ---------------------------------------------------------------------------------------------------------------------
# generation

@torch.inference_mode()
def generate(actor, rows, uniforms, args):
    """Answer a batch of rows of `message_row` -> [(token ids, milliseconds, error or None)].

    uniforms (B, max_length): one random number per token of each row, or None for greedy answers. Prompts are padded
    on the right; the holes stay in the cache, masked, and position ids skip them, so a row says what it would alone."""
    lm, device = actor.lm, actor.lm.device
    limit = getattr(lm.config.get_text_config(), "max_position_embeddings", 2**31)
    stop = {end_of_turn(actor.tokenizer)[-1], actor.tokenizer.eos_token_id} - {None}
    stop = torch.tensor(sorted(stop), device=device)
    ids, ms, errors = [[] for _ in rows], [0.0] * len(rows), [None] * len(rows)
    batch, cache = collate(rows, device), growing_cache()
    inputs_embeds, mask = actor.embed(batch), batch["attention_mask"]  # (b, T, D), (b, T)
    if mask.sum(1).max() >= limit:
        raise ValueError(f"a prompt of {mask.sum(1).max()} tokens fills the actor's context of {limit}")
    position_ids, last = (mask.cumsum(1) - 1).clamp(min=0), mask.sum(1) - 1
    live = torch.arange(len(rows), device=device)  # (b,) row of the batch -> row of the call
    for step in range(args.max_length):
        clock = time.perf_counter()
        out = lm.get_decoder()(inputs_embeds=inputs_embeds, attention_mask=mask, position_ids=position_ids, cache=cache,
                               use_cache=True)
        logits = lm_logits(lm, out.last_hidden_state[torch.arange(len(live), device=device), last])  # (b, V)
        finite = (logits < torch.inf).all(-1)
        next_ids = (next_tokens(logits) if uniforms is None
                    else next_tokens(logits / args.temperature, uniforms[live, step]))  # (b,)
        said = finite & ~torch.isin(next_ids, stop)
        rows_now, ids_now, finite_now, said_now = (x.tolist() for x in (live, next_ids, finite, said))
        for row, token, is_finite, is_said in zip(rows_now, ids_now, finite_now, said_now):
            ms[row] += 1000 * (time.perf_counter() - clock) / len(rows_now)
            ids[row] += [token] if is_said else []
            errors[row] = None if is_finite else "the logits are not finite"
        index = (said & (mask.sum(1) < limit)).nonzero().squeeze(1)
        if len(index) == 0:
            break
        if len(index) < len(live):  # finished rows leave the batch, so all work is on live ones
            cache.batch_select_indices(index)
            live, next_ids, mask = live[index], next_ids[index], mask[index]
        position_ids, last = mask.sum(1, keepdim=True), 0
        mask, inputs_embeds = F.pad(mask, (0, 1), value=1), lm.get_input_embeddings()(next_ids[:, None])
    return list(zip(ids, ms, errors))


def answer(actor, rows, uniforms, args):
    """`generate`, but an exception fails no more than the row that raised it: the halves are tried alone."""
    try:
        return generate(actor, rows, uniforms, args)
    except Exception as e:
        error = " ".join(f"{type(e).__name__}: {e}".split())
    if len(rows) == 1:
        return [([], 0.0, error)]
    half = len(rows) // 2
    parts = (slice(0, half), slice(half, None))
    return sum((answer(actor, rows[p], None if uniforms is None else uniforms[p], args) for p in parts), [])


def answer_jobs(actor, jobs, tasks, sources, correct, args):
    """Jobs [(label, variant, problem n, sample k)] -> their records."""
    questions = [args.question_template.replace("{task}", tasks[n]["task"]).strip() for _, _, n, _ in jobs]
    rows = [message_row(actor, [{"role": "user", "content": question}], n, variant, args.seed, sources[label], tasks)
            for question, (label, variant, n, _) in zip(questions, jobs)]
    uniforms, records = None, []
    if args.temperature > 0:  # one number per token, from the sample's own generator: no two samples are the same
        draws = [torch.Generator().manual_seed(seed_for("answer", args.seed, tasks[n]["id"], k)) for _, _, n, k in jobs]
        draws = [torch.rand(args.max_length, generator=generator, dtype=torch.float64) for generator in draws]
        uniforms = torch.stack(draws).to(actor.lm.device)  # (B, max_length)
    replies = answer(actor, rows, uniforms, args)
    for (label, _, n, k), question, row, (ids, ms, error) in zip(jobs, questions, rows, replies):
        task, text = tasks[n], actor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        extracted = extract_answer(text)
        sender_ms = sources[label][0].records[task["id"]]["sender_ms"] if row["message_rows"] else 0.0
        records.append({
            "variant": label, "id": task["id"], "sample": k, "level": task["level"], "subject": task["type"],
            "question": question, "reference_answer": task["answer"], "model_output": text,
            "extracted_answer": extracted, "correct": error is None and correct(extracted, task["answer"]),
            "failed": error is not None, "error": error, "message_rows": row["message_rows"], "tokens": len(ids),
            "sender_ms": sender_ms, "actor_ms": ms,
            "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")})
    return records


# ---------------------------------------------------------------------------------------------------------------------
# results

def read_parts(directory):
    """{(variant, id, sample): record} of all ranks of all runs; a line that a kill tore is skipped."""
    records = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(directory), "parts", "*.jsonl"))):
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    records[record["variant"], record["id"], record["sample"]] = record
    return records


def figures(records):
    """Accuracy (pass@1, the mean over samples), pass@n and majority vote of a set of records of one variant."""
    questions = {}
    for record in records:
        questions.setdefault(record["id"], []).append(record)
    n, votes = len(questions), 0
    for samples in questions.values():
        groups = []  # the same answers, by the first of them; the first group wins a tie
        for s in samples:
            if s["extracted_answer"] is not None:
                group = next((g for g in groups if is_equiv(g[0]["extracted_answer"], s["extracted_answer"])), None)
                groups.append([s]) if group is None else group.append(s)
        votes += bool(groups) and max(groups, key=len)[0]["correct"]
    accuracy = sum(sum(s["correct"] for s in samples) / len(samples) for samples in questions.values()) / n
    return {"questions": n, "samples": len(records), "accuracy": accuracy,
            "interval": list(wilson_interval(accuracy * n, n)),  # n questions: samples of one are not independent
            "pass_at_n": sum(any(s["correct"] for s in samples) for samples in questions.values()) / n,
            "majority": votes / n, "failed": sum(r["failed"] for r in records),
            "no_answer": sum(r["extracted_answer"] is None for r in records)}


def summarize(records):
    """{label: figures} from the lines of detailed_results.jsonl; every number in table and picture is from here."""
    summary = {}
    for label in dict.fromkeys(r["variant"] for r in records):
        rows = [r for r in records if r["variant"] == label]
        summary[label] = figures(rows)
        for key in ("message_rows", "tokens"):
            summary[label][key] = sum(r[key] for r in rows) / len(rows)
        for key in ("level", "subject"):
            values = sorted({r[key] for r in rows})
            summary[label][f"by_{key}"] = {value: figures([r for r in rows if r[key] == value]) for value in values}
    return summary


def print_table(summary):
    print(f"\n{'variant':18s} {'accuracy':>8s}  {'95 % interval':14s} {'pass@n':>6s} {'majority':>8s} {'failed':>6s} "
          f"{'no answer':>9s} {'rows':>6s} {'tokens':>6s}")
    for label, s in summary.items():
        low, high = s["interval"]
        print(f"{label:18s} {s['accuracy']:8.3f}  [{low:.3f}, {high:.3f}] {s['pass_at_n']:6.3f} {s['majority']:8.3f} "
              f"{s['failed']:6d} {s['no_answer']:9d} {s['message_rows']:6.1f} {s['tokens']:6.0f}")
    first = next(iter(summary.values()))
    for key in ("level", "subject"):
        print(f"\n{'by ' + key:24s} {'n':>5s} " + " ".join(f"{label:>11s}" for label in summary))
        for value, f in first[f"by_{key}"].items():
            print(f"{value or '-':24s} {f['questions']:5d} " + " ".join(
                f"{s[f'by_{key}'][value]['accuracy']:{max(11, len(label))}.3f}" for label, s in summary.items()))


def plot(summary, path):
    """Accuracy by level, one line per variant, with its intervals."""
    levels = list(next(iter(summary.values()))["by_level"])
    figure, axis = plt.subplots(figsize=(7, 4))
    for n, (label, s) in enumerate(summary.items()):
        cells = [s["by_level"][level] for level in levels]
        y, (low, high) = np.array([c["accuracy"] for c in cells]), np.array([c["interval"] for c in cells]).T
        x = np.arange(len(levels)) + 0.03 * (n - len(summary) / 2)  # side by side, so that all bars are seen
        axis.errorbar(x, y, yerr=[np.maximum(y - low, 0), np.maximum(high - y, 0)], marker="o", capsize=3,
                      label=f"{label} ({s['accuracy']:.2f})")
    axis.set_xticks(range(len(levels)), [level or "all" for level in levels])
    axis.set(ylim=(0, 1), xlabel="level", ylabel="accuracy (95 % Wilson interval)")
    axis.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------

def evaluate(args):
    rank, world, device = this_rank()
    variants = variants_of(args)
    if args.temperature < 0 or args.temperature == 0 and args.samples_per_question > 1:
        raise UserError(f"--temperature {args.temperature:g} with --samples_per_question {args.samples_per_question}: "
                        f"samples need a temperature above 0, or they are all the same")
    if "{task}" not in args.question_template:
        raise UserError("--question_template must contain {task}")
    correct = load_grader(args.grader)
    tasks = load_tasks(args.dataset, split=args.split, subjects=args.subjects, max_samples=args.num_samples)
    for task in tasks:
        task["answer"] = extract_answer(task["reply"])
        if task["answer"] is None:
            raise UserError(f"{args.dataset}: id {task['id']}: its solution has no \\boxed{{}} with an answer")
        task["level"] = str(task.get("level", "")).removeprefix("Level ")
        task["type"] = str(task.get("type", ""))
    cross = open_shards(args.cross_hidden_data) if args.cross_hidden_data else None
    paths, infos = actor_of(variants, args.model_path, args.baseline_path, cross, args.trust_remote_code)
    settings = {k: v for k, v in vars(args).items() if k in SETTINGS} | {
        "weights": {path: fingerprint(path) for path in infos}}
    check_settings(args.output_dir, settings, "--output_dir")

    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        dist.barrier()
    shards = open_messages(args, args.output_dir, collect.main, [
        "math", "--dataset_path", args.dataset, "--split", args.split, "--response_field", "",
        *(["--subjects", *args.subjects] if args.subjects else []),
        *(["--max_samples", str(args.num_samples)] if args.num_samples else [])])
    sources, variant_of = label_sources(variants, shards, cross, args.keep_ratio, paths, infos, tasks)
    if rank == 0:
        write_json(os.path.join(args.output_dir, "settings.json"), settings)

    # answer; the ranks share the whole list, not what is pending, so that any number of ranks can go on
    order = sorted(range(len(tasks)), key=lambda n: len(tasks[n]["task"]))  # equal lengths together: little padding
    samples, done = range(args.samples_per_question), read_parts(args.output_dir)
    jobs = [(label, variant, n, k) for label, variant in variant_of.items() for n in order for k in samples]
    jobs = [job for job in jobs[rank::world] if (job[0], tasks[job[2]]["id"], job[3]) not in done]
    bar = tqdm(total=len(jobs), desc="answer", unit="answer", disable=rank > 0 or None)
    os.makedirs(os.path.join(args.output_dir, "parts"), exist_ok=True)
    with open(os.path.join(args.output_dir, "parts", f"rank{rank:05d}.jsonl"), "a", encoding="utf-8") as part:
        part.write("\n")  # ends a line that a kill tore
        for path in dict.fromkeys(paths.values()):
            pending = [job for job in jobs if paths[job[1]] == path]
            actor = LatentActor.load(path, args.torch_dtype, device, args.trust_remote_code) if pending else None
            for i in range(0, len(pending), args.batch_size):
                batch = pending[i:i + args.batch_size]
                for record in answer_jobs(actor, batch, tasks, sources, correct, args):
                    part.write(json.dumps(record, ensure_ascii=False) + "\n")
                part.flush()
                os.fsync(part.fileno())
                bar.update(len(batch))
            del actor
    bar.close()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank > 0:
        return

    # the files and the table, from the answers on disk
    done = read_parts(args.output_dir)
    records = [done[label, task["id"], k] for label in variant_of for task in tasks for k in samples]
    write_text(os.path.join(args.output_dir, "detailed_results.jsonl"),
               "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    summary = summarize(records)
    write_json(os.path.join(args.output_dir, "summary.json"), {
        "settings": settings, "actors": paths, "samples_per_question": args.samples_per_question, "variants": summary})
    plot(summary, os.path.join(args.output_dir, "results.png"))
    print_table(summary)
    errors = [f"{record['variant']} {record['id']}: {record['error']}" for record in records if record["failed"]]
    if errors:
        print(f"\n{len(errors)} answers failed and count as wrong; the first, {errors[0]}")
    print(f"\nwrote summary.json, results.png and detailed_results.jsonl ({len(records)} answers) to {args.output_dir}")
    return summary


def main(argv=None):
    parser, args = get_args(argv)
    return run(parser, evaluate, args)


if __name__ == "__main__":
    main()
