"""
Stage 4a: the actor plays household games under every communication variant, all episodes in one batch.

  python eval_alfworld.py --model_path actor --hidden_data messages_valid_seen --env alfworld --split valid_seen \\
      --variants none text no_comm cross_task randomrot --output_path results
  python eval_alfworld.py --model_path actor --sender student --latent_steps 64 32 16 8 --env alfworld \\
      --split valid_seen --output_path results_k
  python eval_alfworld.py --model_path actor --hidden_data messages --env my_game:MyGame --split test \\
      --output_path results

A game is any class with tasks(split) -> [{"id", "task", ...}], reset(task) -> first human turn, and step(action) ->
(observation, reward, done, info); success is info["won"], never done. Run it again after a kill: episodes that are on
disk are not played again.
"""
import argparse
import csv
import datetime
import functools
import math
import os
import time
from urllib.parse import quote

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import collect
from common import (Parser, UserError, atomic_path, boolean, fingerprint, memory_gb, positive, read_json, run,
                    seed_for, this_rank, wilson_interval, write_json)
from data import VARIANTS, actor_of, check_settings, label_sources, message_row, open_messages, variants_of
from games import Crash, GameWorkers, open_split
from lm import DTYPES, growing_cache, lm_logits, next_tokens
from model import LatentActor, assemble, collate, end_of_turn, open_shards, render_turn, to_messages

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def get_args(argv):
    parser = Parser(prog="eval_alfworld.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    g = parser.add_argument_group("actor")
    g.add_argument("--model_path", required=True, help="an actor directory, or a plain causal LM (no_comm only)")
    g.add_argument("--baseline_path", nargs="*", default=[],
                   help="actors trained with --message text (for cot_full) and --message none (for no_cot)")
    g.add_argument("--torch_dtype", choices=DTYPES, default="bf16", help="of the actor's parameters")
    g.add_argument("--trust_remote_code", type=boolean, default=False, help="run code that the model ships")
    g = parser.add_argument_group("messages")
    g.add_argument("--hidden_data", help="--output_dir of collect.py for these games")
    g.add_argument("--sender", help="a live sender: collect.py runs first, on these games, into --output_path")
    g.add_argument("--cross_hidden_data",
                   help="for qwen2llama: messages of a sender of another family; the actor of --model_path or "
                        "--baseline_path that fits reads them; default: as none")
    g.add_argument("--latent_steps", type=positive, nargs="*", default=[], help="with --sender: a row per K of these")
    g.add_argument("--prompt_template", help="with --sender: what it is asked; default: as collect.py's")
    g.add_argument("--max_plan_tokens", type=positive, default=512, help="with --sender: longest plan")
    g.add_argument("--sender_batch_size", type=positive, default=16, help="with --sender: prompts decoded together")
    g.add_argument("--keep_ratio", type=float, nargs="*", default=[1.0], help="cut messages to this share of rows")
    g = parser.add_argument_group("games")
    g.add_argument("--env", default="alfworld", help="alfworld, or module:Class")
    g.add_argument("--split", default="valid_seen", help="alfworld: valid_seen or valid_unseen; other games: their own")
    g.add_argument("--instruction_file", help="alfworld: text that opens each game, as in training; of a training file "
                                              "(.json, .jsonl), turn 0 of its first conversation")
    g.add_argument("--variants", nargs="+", default=["none"], help=", ".join(VARIANTS) + " (latent: same as none)")
    g.add_argument("--max_steps", type=positive, default=20, help="replies per episode (paper 20, released code 50)")
    g.add_argument("--num_episodes", type=positive, help="only the first N games of the split")
    g.add_argument("--runs", type=positive, default=1, help="repetitions with other seeds (paper: 3)")
    g.add_argument("--env_workers", type=int, help="processes with games; default: one per core for alfworld, else 0")
    g.add_argument("--env_timeout", type=positive, default=120, help="seconds after which a silent game has crashed")
    g = parser.add_argument_group("decoding")
    g.add_argument("--batch_size", type=positive, default=32, help="episodes played together")
    g.add_argument("--max_new_tokens", type=positive, default=256, help="per reply")
    g.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    g.add_argument("--seed", type=int, default=0, help="of sampling, cross_task and the perturbations")
    g = parser.add_argument_group("output")
    g.add_argument("--output_path", required=True, help="episodes/, results.csv, summary.json, results.png")
    g.add_argument("--enable_timing", type=boolean, nargs="?", const=True, default=True,
                   help="write performance_metrics.csv")
    return parser, parser.parse_args(argv)


SETTINGS = ["model_path", "baseline_path", "hidden_data", "cross_hidden_data", "sender", "prompt_template",
            "max_plan_tokens", "env", "split", "instruction_file", "max_steps", "max_new_tokens", "temperature", "seed",
            "torch_dtype"]  # what an episode's result depends on


def read_instruction(path):
    """The text of a file; of a training file (.json, .jsonl), turn 0 of its first conversation, where ETO's has it."""
    try:
        if path.endswith((".json", ".jsonl")):
            return to_messages(read_json(path)[0]["conversations"], where=path)[0]["content"]
        with open(path, encoding="utf-8") as f:
            return f.read().strip()
    except (OSError, LookupError, TypeError, ValueError) as e:
        raise UserError(f"--instruction_file {path} is neither a text nor a file of conversations: {e!r}") from None


# ---------------------------------------------------------------------------------------------------------------------
# many conversations, one growing cache

class CachedChat:
    """B conversations over one KV cache that only grows: each turn reads its new tokens, never the history again.

    A row's cache may have holes, where it waited for the others; the mask hides them and position ids skip them, so
    each reply is what the row would have said alone."""

    def __init__(self, actor):
        self.lm, self.cache, self.mask = actor.lm, growing_cache(), None  # mask (B, T), T the cache's length

    def read(self, inputs_embeds, mask):
        """Append a right-padded block (B, T, D), mask (B, T) -> logits after each row's last real token (B, V)."""
        seen = 0 if self.mask is None else self.mask.sum(1, keepdim=True)
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        position_ids = (seen + mask.cumsum(1) - 1).clamp(min=0)
        out = self.lm.get_decoder()(inputs_embeds=inputs_embeds, attention_mask=self.mask, position_ids=position_ids,
                                    cache=self.cache, use_cache=True)
        last = (mask.sum(1) - 1).clamp(min=0)
        return lm_logits(self.lm, out.last_hidden_state[torch.arange(len(last), device=last.device), last])

    def reply(self, logits, stop_ids, max_new_tokens, temperature, generators):
        """Decode all rows until each has said a stop token -> lists of ids, without it. A reply's last id is in the
        cache only if the reply ended by itself; one that was cut is completed by the next read (see `play`)."""
        B, device = len(logits), logits.device
        replies, open_rows = [[] for _ in range(B)], list(range(B))
        for step in range(max_new_tokens):
            uniforms = None
            if temperature > 0:  # one uniform number per token, from the episode's own generator
                logits, uniforms = logits / temperature, torch.zeros(B, dtype=torch.float64)
                for b in open_rows:
                    uniforms[b] = torch.rand((), generator=generators[b], dtype=torch.float64)
                uniforms = uniforms.to(device)
            next_ids = next_tokens(logits, uniforms)  # (B,)
            said = next_ids.tolist()
            open_rows = [b for b in open_rows if said[b] not in stop_ids]
            for b in open_rows:
                replies[b].append(said[b])
            if not open_rows or step + 1 == max_new_tokens:
                break
            mask = torch.zeros(B, 1, dtype=torch.long, device=device)
            mask[open_rows] = 1
            logits = self.read(self.lm.get_input_embeddings()(next_ids[:, None]), mask)
        return replies, open_rows

    def keep(self, rows):
        """Drop all rows but these; columns that no row needs any more are left in place."""
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]


@torch.inference_mode()
def play(actor, jobs, tasks, sources, workers, parse_action, args):
    """Play jobs [(label, variant, run, game n)] together -> their records, yielded as the episodes end."""
    tokenizer, device = actor.tokenizer, actor.lm.device
    limit = getattr(actor.lm.config.get_text_config(), "max_position_embeddings", 2**31)
    stop_ids, start = {end_of_turn(tokenizer)[-1], tokenizer.eos_token_id}, time.perf_counter()
    records, messages, generators, blocks, live = [], {}, [], [], []
    first = workers.reset({slot: tasks[n] for slot, (_, _, _, n) in enumerate(jobs)})
    for slot, (label, variant, r, n) in enumerate(jobs):
        task, shards = tasks[n], sources[label][0]
        record = {"variant": label, "split": args.split, "id": task["id"], "type": task.get("type", ""), "run": r,
                  "seed": args.seed + r, "success": False, "steps": 0, "invalid": 0, "crash": None, "sender_ms": 0.0,
                  "actor_ms": 0.0, "env_ms": workers.ms[slot], "wall_ms": 0.0, "tokens": 0, "message_rows": 0,
                  "task": task["task"], "first_turn": str(first[slot]), "turns": []}
        records.append(record)
        generators.append(torch.Generator().manual_seed(seed_for("reply", args.seed + r, label, task["id"])))
        if isinstance(first[slot], Crash):
            yield record | {"crash": str(first[slot])}
            continue
        messages[slot] = [{"role": "user", "content": first[slot].strip()}]
        blocks.append(message_row(actor, messages[slot], n, variant, args.seed + r, sources[label], tasks))
        record["message_rows"] = blocks[-1]["message_rows"]
        if record["message_rows"]:
            record["sender_ms"] = shards.records[task["id"]]["sender_ms"]
        live.append(slot)

    chat = CachedChat(actor)
    while live:
        batch = collate(blocks, device)
        longest = batch["attention_mask"].sum(1) + (0 if chat.mask is None else chat.mask.sum(1)) + args.max_new_tokens
        if longest.max() > limit:
            slot = live[longest.argmax()]
            raise UserError(f"id {records[slot]['id']}: after {records[slot]['steps']} steps the episode needs "
                            f"{longest.max()} positions, the actor's context has {limit}: lower --max_steps or "
                            f"--max_new_tokens, or use an actor with a longer context (finished episodes are kept)")
        clock = time.perf_counter()
        logits = chat.read(actor.embed(batch), batch["attention_mask"])
        replies, cut = chat.reply(logits, stop_ids, args.max_new_tokens, args.temperature,
                                  [generators[slot] for slot in live])
        actor_ms = 1000 * (time.perf_counter() - clock) / len(live)
        texts = [tokenizer.decode(reply, skip_special_tokens=True).strip() for reply in replies]
        answers = workers.step({slot: parse_action(text) for slot, text in zip(live, texts)})
        blocks, rows = [], []
        for b, slot in enumerate(live):
            record, answer = records[slot], answers[slot]
            record["steps"] += 1
            record["actor_ms"] += actor_ms
            record["env_ms"] += workers.ms[slot]
            record["tokens"] += len(replies[b])
            if isinstance(answer, Crash):
                record["crash"], done, observation = str(answer), True, ""
            else:
                observation, _, done, info = answer
                record["success"] = bool(info["won"])  # the released code counts `done`: the step limit as a win
                record["invalid"] += bool(info.get("invalid"))
            record["turns"].append({"reply": texts[b], "action": parse_action(texts[b]), "observation": observation})
            if done or record["success"] or record["steps"] == args.max_steps:
                yield record | {"wall_ms": 1000 * (time.perf_counter() - start)}
                continue
            messages[slot] += [{"role": "assistant", "content": texts[b]},
                               {"role": "user", "content": observation.strip()}]
            _, after = render_turn(tokenizer, messages[slot], where=record["id"])
            pending = replies[b][-1:] if b in cut else []  # the last id of a reply that was cut is not in the cache yet
            blocks.append(assemble([], pending + after, [-100] * len(pending + after)))
            rows.append(b)
        if rows and len(rows) < len(live):
            chat.keep(rows)
        live = [live[b] for b in rows]


# ---------------------------------------------------------------------------------------------------------------------
# results

RESULTS = ["variant", "run", "id", "type", "success", "steps", "invalid", "crash"]
METRICS = ["variant", "split", "id", "type", "run", "seed", "success", "steps", "invalid", "crash", "sender_ms",
           "actor_ms", "env_ms", "wall_ms", "tokens", "tokens_per_s", "message_rows", "peak_memory_gb", "device",
           "dtype"]


def mcnemar(a, b):
    """Exact two-sided p of a paired test: a, b {episode: success} over the same episodes."""
    pairs = [(a[k], b[k]) for k in a if k in b]
    wins, losses = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    tail = sum(math.comb(wins + losses, i) for i in range(min(wins, losses) + 1)) / 2 ** (wins + losses)
    return min(1.0, 2 * tail)


def summarize(records, labels):
    """{label: figures} over episode records; every number in the table and the pictures comes from here."""
    def mean(key, rows):
        return float(np.mean([r[key] for r in rows])) if rows else None

    summary, by_label = {}, {label: [r for r in records if r["variant"] == label] for label in labels}
    won = {label: {(r["run"], r["id"]): r["success"] for r in rows} for label, rows in by_label.items()}
    for label, rows in by_label.items():
        if not rows:
            continue
        wins = [r for r in rows if r["success"]]
        runs = [mean("success", [r for r in rows if r["run"] == k]) for k in sorted({r["run"] for r in rows})]
        types = sorted({r["type"] for r in rows})
        means = {k: mean(k, rows) for k in ("steps", "invalid", "message_rows", "sender_ms", "actor_ms", "env_ms")}
        summary[label] = {
            "episodes": len(rows), "success": mean("success", rows), "interval": wilson_interval(len(wins), len(rows)),
            "runs": runs, "std": float(np.std(runs, ddof=1)) if len(runs) > 1 else None, **means,
            "steps_success": mean("steps", wins), "crashed": sum(r["crash"] is not None for r in rows),
            "tokens_per_s": 1000 * mean("tokens", rows) / max(means["actor_ms"], 1e-9),
            "peak_memory_gb": max(r["peak_memory_gb"] for r in rows),
            "p_against_none": mcnemar(won[label], won["none"]) if won.get("none") else None,
            "by_type": {t: mean("success", [r for r in rows if r["type"] == t]) for t in types}}
    return summary


def print_table(summary):
    print(f"\n{'variant':18s} {'success':>7s}  {'95 % interval':14s} {'± runs':>6s} {'steps won/all':>13s} "
          f"{'crash':>5s} {'rows':>6s} {'sender ms':>9s} {'actor ms':>8s} {'tok/s':>6s} {'GB':>5s} {'p vs none':>9s}")
    for label, s in summary.items():
        std, won = (f"{s['std']:.3f}" if s["std"] is not None else "-"), s["steps_success"]
        p = "-" if s["p_against_none"] is None or label == "none" else f"{s['p_against_none']:.1e}"
        print(f"{label:18s} {s['success']:7.3f}  [{s['interval'][0]:.3f}, {s['interval'][1]:.3f}] {std:>6s} "
              f"{'-' if won is None else f'{won:.1f}':>8s}/{s['steps']:<4.1f} {s['crashed']:5d} "
              f"{s['message_rows']:6.1f} {s['sender_ms']:9.1f} {s['actor_ms']:8.1f} {s['tokens_per_s']:6.0f} "
              f"{s['peak_memory_gb']:5.2f} {p:>9s}")


def plot(summary, path):
    """Success by variant with its intervals, and by task type."""
    labels, types = list(summary), sorted({t for s in summary.values() for t in s["by_type"]})
    figure, (left, right) = plt.subplots(1, 2, figsize=(6 + 0.9 * len(types), 1.2 + 0.4 * len(labels)), sharey=True,
                                         width_ratios=[2, max(1, 0.45 * len(types))])
    success = np.array([summary[label]["success"] for label in labels])
    low, high = np.array([summary[label]["interval"] for label in labels]).T
    left.barh(labels, success, xerr=[success - low, high - success], color="tab:blue", capsize=3)
    left.set(xlim=(0, 1), xlabel="success (95 % Wilson interval)")
    left.invert_yaxis()
    grid = np.array([[summary[label]["by_type"].get(t, np.nan) for t in types] for label in labels])
    right.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, x in np.ndindex(grid.shape):
        right.text(x, y, f"{grid[y, x]:.2f}", ha="center", va="center", color="white" if grid[y, x] > 0.6 else "black")
    right.set_xticks(range(len(types)), [t or "all" for t in types], rotation=30, ha="right")
    right.set_title("by task type", fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def write_csv(path, columns, rows):
    with atomic_path(path) as temporary:
        with open(temporary, "w", newline="") as f:
            writer = csv.DictWriter(f, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


# ---------------------------------------------------------------------------------------------------------------------

def evaluate(args):
    rank, world, device = this_rank()
    variants = variants_of(args)
    game, all_tasks = open_split(args.env, args.split)  # cross_task draws from the whole split, whatever --num_episodes
    tasks = all_tasks[:args.num_episodes]
    ids, parse_action = [task["id"] for task in all_tasks], getattr(game, "parse_action", str.strip)
    if args.instruction_file:
        if args.env != "alfworld":
            raise UserError("--instruction_file is for --env alfworld; another game writes its own first turn")
        game = functools.partial(game, read_instruction(args.instruction_file))
    cross = open_shards(args.cross_hidden_data) if args.cross_hidden_data else None
    paths, infos = actor_of(variants, args.model_path, args.baseline_path, cross, args.trust_remote_code)
    settings = {k: v for k, v in vars(args).items() if k in SETTINGS} | {
        "weights": {path: fingerprint(path) for path in infos}}
    check_settings(args.output_path, settings, "--output_path")

    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        dist.barrier()
    shards = open_messages(args, args.output_path, collect.main, [
        "alfworld" if args.env == "alfworld" else "custom", "--env", args.env, "--split", args.split,
        *(["--max_samples", str(args.num_episodes)] if args.num_episodes else [])])
    sources, variant_of = label_sources(variants, shards, cross, args.keep_ratio, paths, infos, tasks)
    if rank == 0:
        write_json(os.path.join(args.output_path, "settings.json"), settings)

    # play
    if args.env_workers is None:
        args.env_workers = min(os.cpu_count(), args.batch_size) if args.env == "alfworld" else 0
    workers = GameWorkers(game, args.env_workers, args.env_timeout)  # forked before a model is in memory

    def episode_path(label, r, task_id):
        return os.path.join(args.output_path, "episodes", label, f"run{r}", quote(task_id, safe="") + ".json")

    jobs = [(label, variant, r, n) for label, variant in variant_of.items() for r in range(args.runs)
            for n in range(len(tasks))]
    jobs = [job for job in jobs[rank::world] if not os.path.exists(episode_path(job[0], job[2], ids[job[3]]))]
    bar = tqdm(total=len(jobs), desc="play", unit="episode", disable=rank > 0 or None)
    for path in dict.fromkeys(paths.values()):
        pending = [job for job in jobs if paths[job[1]] == path]
        if not pending:
            continue
        actor = LatentActor.load(path, args.torch_dtype, device, args.trust_remote_code)
        for i in range(0, len(pending), args.batch_size):
            for record in play(actor, pending[i:i + args.batch_size], all_tasks, sources, workers, parse_action, args):
                write_json(episode_path(record["variant"], record["run"], record["id"]), record | {
                    "tokens_per_s": 1000 * record["tokens"] / max(record["actor_ms"], 1e-9),
                    "peak_memory_gb": memory_gb(device), "device": device.split(":")[0], "dtype": args.torch_dtype})
                bar.update()
        del actor
    bar.close()
    workers.close()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank > 0:
        return

    # the files and the table, from the episodes on disk
    records = [read_json(episode_path(label, r, task["id"])) for label in variant_of for r in range(args.runs)
               for task in tasks]
    summary = summarize(records, variant_of)
    write_json(os.path.join(args.output_path, "summary.json"),
               {"settings": settings, "actors": paths, "variants": summary})
    write_csv(os.path.join(args.output_path, "results.csv"), RESULTS, records)
    if args.enable_timing:
        write_csv(os.path.join(args.output_path, "performance_metrics.csv"), METRICS, records)
    plot(summary, os.path.join(args.output_path, "results.png"))
    print_table(summary)
    print(f"\nwrote summary.json, results.csv, performance_metrics.csv, results.png and {len(records)} episodes to "
          f"{args.output_path}")
    return summary


def main(argv=None):
    parser, args = get_args(argv)
    return run(parser, evaluate, args)


if __name__ == "__main__":
    main()
