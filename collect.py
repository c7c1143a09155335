"""
Stage 1: a sender writes plans; its last-layer hidden states become messages, in safetensors shards.

  python collect.py alfworld --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_path alfworld_sft.json \\
      --task_turn 2 --output_dir messages
  python collect.py alfworld --model_name_or_path M --env alfworld --split valid_seen --output_dir messages_valid_seen
  torchrun --nproc_per_node 8 collect.py custom --model_name_or_path M --dataset_path tasks.jsonl --output_dir messages
  python collect.py math --model_name_or_path M --dataset_path MATH --subjects algebra --output_dir messages
  python collect.py inspect messages --id train-3 --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct
  python collect.py export messages --output_file messages.parquet
  python collect.py import messages.parquet --output_dir messages_again

Run it again after a kill: it collects only what is missing. A message depends on its task, the model and the seed, not
on the batch size, the order, the number of ranks or a restart.
"""
import argparse
import glob
import json
import os
import re
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from common import (SIGTERM_EXIT, Parser, UserError, atomic_path, boolean, catch_sigterm, fingerprint, positive,
                    read_json, remove, run, seed_for, share, this_rank, write_json)
from data import load_saved, load_tasks, optional
from games import sender_tasks
from lm import DTYPES, growing_cache, lm_logits, load_config, load_lm, load_tokenizer, next_tokens
from model import LatentSender, LatentShards, end_of_turn, open_shards, render_turn, write_shard

PLAN_PROMPT = "Please provide a general plan to solve this task.\nThe task is: {task}"
MATH_PROMPT = ("Another agent will solve the problem below, you only plan. Give a short plan: the ideas and the steps "
               "that lead to the solution, in order and in general terms. Do no calculation and do not state the "
               "answer.\nThe problem is: {task}")
MATH_QUESTION = "{task}\nPut the final answer in \\boxed{}."  # what the actor reads, in train.json and in eval_math.py
PRESETS = {  # name: (sender's prompt, conversation turn with the task, its field, field of the reply, actor's question)
    "alfworld": (PLAN_PROMPT, 2, "task", None, "{task}"),  # ETO's turns: instruction, OK, task
    "math": (MATH_PROMPT, 0, "problem", "solution", MATH_QUESTION),
    "custom": (PLAN_PROMPT, 0, "task", None, "{task}"),
}
FORMAT_VERSION = 1


def get_args(argv):
    parser = Parser(prog="collect.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (template, turn, task_field, response_field, question) in PRESETS.items():
        p = commands.add_parser(name, help=f"collect messages, {name} prompt and fields", allow_abbrev=False)
        g = p.add_argument_group("data")
        g.add_argument("--dataset_path",
                       help=".json, .jsonl, .parquet: records with an id and a task; MATH's own directory; or a hub id")
        g.add_argument("--env", help="instead of --dataset_path: games, as in eval_alfworld.py")
        g.add_argument("--output_dir", required=True, help="where the shards go; an existing directory is continued")
        g.add_argument("--id_field", default="id", help="field of the task's id")
        g.add_argument("--task_field", default=task_field, help="field of the task's text; '' reads conversations")
        g.add_argument("--conversations_index", "--task_turn", type=int, default=turn,
                       help="without a task field: the turn of `conversations` that holds the task")
        g.add_argument("--response_field", default=response_field,
                       help="field of the reference reply: also writes train.json for train_actor.py")
        g.add_argument("--question_template", default=question, help="the actor's question in train.json")
        g.add_argument("--split", default="train", help="of a directory, a hub dataset or a game")
        g.add_argument("--subjects", nargs="+", help="only these values of the field `type` (or `subject`)")
        g.add_argument("--max_samples", type=positive, help="only the first N tasks")
        g.add_argument("--shard_size_mb", type=float, default=512, help="start a new shard beyond this size")
        g = p.add_argument_group("sender")
        g.add_argument("--model_name_or_path", required=True, help="any Hugging Face causal LM, or a student directory")
        g.add_argument("--prompt_template",
                       help=f"what the sender is asked; {{task}} is replaced; default: with --latent_steps what a "
                            f"trained student was asked, else {template!r}")
        g.add_argument("--chat_template", choices=["auto", "none"], default="auto",
                       help="auto: the tokenizer's own chat template; none: the bare prompt")
        g.add_argument("--torch_dtype", choices=DTYPES, default="bf16", help="of the model, and of the stored states")
        g.add_argument("--trust_remote_code", type=boolean, default=False, help="run code that the model ships")
        g = p.add_argument_group("decoding")
        g.add_argument("--max_new_tokens", type=positive, default=512, help="a longer plan is cut here")
        g.add_argument("--do_sample", type=boolean, default=False, help="sample instead of taking the likeliest token")
        g.add_argument("--temperature", type=float, default=1.0, help="with --do_sample true")
        g.add_argument("--top_p", type=share, default=1.0, help="with --do_sample true: nucleus sampling")
        g.add_argument("--top_k", type=int, default=0, help="with --do_sample true: only the k likeliest; 0: all")
        g.add_argument("--seed", type=int, default=0, help="of the uniform number of each (task, step)")
        g.add_argument("--batch_size", type=positive, default=16, help="prompts decoded together")
        g.add_argument("--c", type=positive, help="store only the first N states of each message")
        g.add_argument("--latent_steps", type=positive, help="think K latent steps instead of writing a plan")
    p = commands.add_parser("inspect", help="what is in the shards", allow_abbrev=False)
    p.add_argument("directory", help="--output_dir of a collection")
    p.add_argument("--id", help="only this task")
    p.add_argument("--model_name_or_path", help="the sender: prints what each latent says through its output head")
    p.add_argument("--top_k", type=int, default=5, help="tokens per latent")
    p = commands.add_parser("import", help="other tools' Parquet or save_to_disk folder -> shards", allow_abbrev=False)
    p.add_argument("source", help="columns task_id or id, plan, hidden_state (a list of rows), task if there is one")
    p.add_argument("--output_dir", required=True, help="a new directory for the shards")
    p.add_argument("--model_name_or_path", default="unknown", help="the sender's name, kept in the shards")
    p.add_argument("--split", default="train", help="of a save_to_disk folder with splits")
    p = commands.add_parser("export", help="shards -> one Parquet file; import gives the same bits", allow_abbrev=False)
    p.add_argument("directory", help="--output_dir of a collection")
    p.add_argument("--output_file", required=True, help="the .parquet to write")
    return parser, parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# prompts

def encode_prompts(tasks, tokenizer, args, max_length):
    """Adds "ids" to each task: the sender's prompt. The same text whatever the batch."""
    if "{task}" not in args.prompt_template:
        raise UserError("--prompt_template must contain {task}")
    for task in tasks:
        prompt = args.prompt_template.replace("{task}", task["task"])
        if args.chat_template == "auto":
            task["ids"] = sum(render_turn(tokenizer, [{"role": "user", "content": prompt}], where=task["id"]), [])
        else:
            task["ids"] = tokenizer(prompt, split_special_tokens=True).input_ids
        steps = args.latent_steps or args.max_new_tokens
        if len(task["ids"]) + steps > max_length:
            raise UserError(f"{args.dataset_path or args.env}: id {task['id']}: prompt of {len(task['ids'])} tokens + "
                            f"{steps} new ones exceed the sender's context of {max_length}: shorten the task or lower "
                            f"{'--latent_steps' if args.latent_steps else '--max_new_tokens'}")


# ---------------------------------------------------------------------------------------------------------------------
# the sender's decode loop

def left_pad(prompts, device):
    """Lists of ids -> input_ids, attention_mask (B, T), padding on the left, so that all rows end together."""
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


@torch.inference_mode()
def decode_plans(lm, prompts, seeds, eos_ids, args):
    """Decode a batch -> [(plan_token_ids, states (L, D), milliseconds)].

    State l is read at the position that predicts token l (the first at the prompt's end), so L tokens give exactly L
    rows and the end-of-text token gives none (the released ALFWorld collector is one row off, and its batched rows run
    past the end). Only the last layer's post-norm state of the last position is ever kept."""
    device = lm.device
    input_ids, attention_mask = left_pad(prompts, device)  # (b, T)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    # one uniform number per (task, step), from the task's own generator: neighbours in the batch change nothing
    uniforms = torch.stack([torch.rand(args.max_new_tokens, generator=torch.Generator().manual_seed(seed),
                                       dtype=torch.float64) for seed in seeds]).to(device)  # (B, max_new_tokens)
    warpers = LogitsProcessorList()
    if args.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(args.temperature))
    if args.top_k:
        warpers.append(TopKLogitsWarper(args.top_k))
    if args.top_p < 1.0:
        warpers.append(TopPLogitsWarper(args.top_p))
    eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
    tokens, states, ms = [[] for _ in prompts], [[] for _ in prompts], [0.0] * len(prompts)
    live = torch.arange(len(prompts), device=device)  # (b,) row of the batch -> prompt
    cache = growing_cache()
    for step in range(args.max_new_tokens):
        start = time.perf_counter()
        out = lm.get_decoder()(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                               cache=cache, use_cache=True)
        hidden = out.last_hidden_state[:, -1]  # (b, D)
        logits = lm_logits(lm, hidden)  # (b, V)
        if step == 0:
            logits[:, eos] = -torch.inf  # a plan has at least one token
        next_ids = (next_tokens(warpers(None, logits), uniforms[live, step]) if args.do_sample
                    else next_tokens(logits))  # (b,)
        keep = ~torch.isin(next_ids, eos)
        hidden, rows, next_list, alive = hidden.cpu(), live.tolist(), next_ids.tolist(), keep.tolist()
        elapsed = 1000 * (time.perf_counter() - start)
        for n, row in enumerate(rows):
            ms[row] += elapsed / len(rows)
            if alive[n]:
                tokens[row].append(next_list[n])
                states[row].append(hidden[n])
        if not all(alive):  # finished rows leave the batch, so all work is on live ones
            index = keep.nonzero().squeeze(1)
            if len(index) == 0:
                break
            cache.batch_select_indices(index)
            live, next_ids, attention_mask, position_ids = (x[index] for x in (live, next_ids, attention_mask,
                                                                               position_ids))
        input_ids, position_ids = next_ids[:, None], position_ids[:, -1:] + 1
        attention_mask = F.pad(attention_mask, (0, 1), value=1)  # as long as the cache, or the prompt is not seen
    return [(t, torch.stack(s), m) for t, s, m in zip(tokens, states, ms)]


@torch.inference_mode()
def think(sender, prompts, steps):
    """K latent steps for a batch -> [([], states (K, D), milliseconds)]: a message without any text."""
    start = time.perf_counter()
    latents = sender(*left_pad(prompts, sender.lm.device), steps).cpu()  # (B, K, D)
    ms = 1000 * (time.perf_counter() - start) / len(prompts)
    return [([], row.clone(), ms) for row in latents]


def collect(args):
    rank, world, device = this_rank()
    if args.temperature <= 0 or args.top_k < 0:
        raise UserError(f"--temperature must be above 0, --top_k not below, got {args.temperature} and {args.top_k}: "
                        f"for greedy decoding leave --do_sample false")
    if args.prompt_template is None:
        path = os.path.join(args.model_name_or_path, "latent_bridge.json")
        own = read_json(path) if args.latent_steps and os.path.exists(path) else {}
        args.prompt_template = own.get("prompt_template", PRESETS[args.command][0])
    if "{task}" not in args.question_template:
        raise UserError("--question_template must contain {task}")
    if bool(args.dataset_path) == bool(args.env) or args.env and (args.response_field or args.subjects):
        raise UserError("give --dataset_path, or --env, whose games have no --response_field and no --subjects")
    done = LatentShards(args.output_dir) if os.path.isdir(args.output_dir) else {}
    if args.env:
        tasks = sender_tasks(args.env, args.split, args.max_samples, done.records if done else {})
    else:
        tasks = load_tasks(args.dataset_path, args.id_field, args.task_field, args.response_field,
                           args.conversations_index, args.split, args.subjects, args.max_samples)
    tokenizer = load_tokenizer(args.model_name_or_path, args.trust_remote_code)
    if args.chat_template == "auto" and not tokenizer.chat_template:
        args.chat_template = "none"
    config = load_config(args.model_name_or_path, args.trust_remote_code)
    encode_prompts(tasks, tokenizer, args, getattr(config, "max_position_embeddings", 2**31))

    # what was collected before must come from the same sender with the same settings
    sender = {"model": args.model_name_or_path, "hidden_size": config.hidden_size, "dtype": args.torch_dtype,
              **{k: getattr(args, k) for k in ("prompt_template", "chat_template", "max_new_tokens", "do_sample",
                                               "temperature", "top_p", "top_k", "c", "seed", "latent_steps")},
              "format_version": FORMAT_VERSION, "fingerprint": fingerprint(args.model_name_or_path)}
    differ = [k for k in sender if len(done) and done.sender.get(k) != sender[k]]
    if differ:
        raise UserError(f"{args.output_dir} holds messages of another sender or other settings (different: "
                        f"{', '.join(differ)}): give a new --output_dir")
    # ranks share the whole list, not what is pending: a rank that starts late must not see another's first shards
    mine = [t for t in sorted(tasks, key=lambda t: len(t["ids"]))[rank::world] if t["id"] not in done]
    if rank == 0 and args.response_field:
        write_json(os.path.join(args.output_dir, "train.json"), [
            {"id": t["id"], "conversations": [
                {"from": "human", "value": args.question_template.replace("{task}", t["task"])},
                {"from": "gpt", "value": t["reply"]}]} for t in tasks])
    if rank == 0:
        print(f"{len(tasks)} tasks, {sum(t['id'] in done for t in tasks)} already in {args.output_dir}")

    if mine:
        if args.latent_steps:
            model = LatentSender.load(args.model_name_or_path, args.torch_dtype, device, args.trust_remote_code)
            lm = model.lm
        else:
            lm = load_lm(args.model_name_or_path, args.torch_dtype, args.trust_remote_code).to(device)
        eos_ids = {tokenizer.eos_token_id, *(end_of_turn(tokenizer)[-1:] if args.chat_template == "auto" else [])}
        generation_eos = lm.generation_config.eos_token_id
        eos_ids |= set(generation_eos if isinstance(generation_eos, list) else [generation_eos])
        eos_ids.discard(None)

    latents, records, size, number, flushed = {}, {}, 0, 0, time.time()
    shard = os.path.join(args.output_dir, f"latents-rank{rank:05d}-" + "{:05d}.safetensors")
    for path in glob.glob(glob.escape(os.path.join(args.output_dir, "latents-rank")) + "*.tmp*"):
        if int(re.search(r"latents-rank(\d+)", path)[1]) % world == rank:  # of a killed run; no rank writes it now
            remove(path)
    sigterm = catch_sigterm()
    bar = tqdm(total=len(mine), desc="collect", unit="task", disable=rank > 0 or not mine)
    for i in range(0, len(mine), args.batch_size):
        batch = mine[i:i + args.batch_size]
        prompts = [t["ids"] for t in batch]
        if args.latent_steps:
            messages = think(model, prompts, args.latent_steps)
        else:
            messages = decode_plans(lm, prompts, [seed_for(args.seed, t["id"]) for t in batch], eos_ids, args)
        for task, (token_ids, states, ms) in zip(batch, messages):
            if not torch.isfinite(states).all():
                raise UserError(f"id {task['id']}: the sender's states are not finite in {args.torch_dtype}: use "
                                f"--torch_dtype bf16 or fp32")
            latents[task["id"]] = states[:args.c].to(DTYPES[args.torch_dtype])
            records[task["id"]] = {"task": task["task"], "plan": tokenizer.decode(token_ids, skip_special_tokens=True),
                                   "plan_token_ids": token_ids, **{k: task[k] for k in ("type", "level") if k in task},
                                   "sender_ms": round(ms, 3)}
            size += latents[task["id"]].nbytes
        bar.update(len(batch))
        # by size, and every five minutes: a kill never costs more; SIGTERM costs nothing
        if (size >= args.shard_size_mb * 2**20 or i + args.batch_size >= len(mine) or time.time() - flushed > 300
                or sigterm):
            while os.path.exists(shard.format(number)):
                number += 1
            write_shard(shard.format(number), latents, records, sender)
            latents, records, size, flushed = {}, {}, 0, time.time()
        if sigterm:
            print(f"SIGTERM: what was collected is in {args.output_dir}; the same command continues from it")
            raise SystemExit(SIGTERM_EXIT)
    bar.close()
    if rank == 0:
        ready = "its part of the messages" if world > 1 else f"{len(tasks)} messages"
        print(f"wrote {ready} to {args.output_dir}; look: python collect.py inspect {args.output_dir}; next: "
              f"train_actor.py, compress.py or an evaluation with --hidden_data {args.output_dir}")


# ---------------------------------------------------------------------------------------------------------------------
# inspect

def inspect(args):
    shards = open_shards(args.directory)
    ids = [args.id] if args.id else list(shards.records)
    shards[ids[0]]  # an unknown --id is an error here
    rows = sorted(shards.lengths.values())
    print(f"{args.directory}: {len(shards)} messages in {len(set(shards.shard_of.values()))} shards, {rows[0]} to "
          f"{rows[-1]} rows (median {rows[len(rows) // 2]}), width {shards.hidden_size}")
    for key, value in shards.sender.items():
        print(f"  {key}: {value!r}")
    if args.model_name_or_path:
        config = load_config(args.model_name_or_path)
        if config.hidden_size != shards.hidden_size:
            raise UserError(f"{args.model_name_or_path} is {config.hidden_size} wide, the messages are "
                            f"{shards.hidden_size}: give the sender, {shards.sender['model']}")
        lm, tokenizer = load_lm(args.model_name_or_path), load_tokenizer(args.model_name_or_path)
    for task_id in ids[:1 if args.model_name_or_path else 10]:
        record = shards.records[task_id]
        print(f"\n{task_id}: {shards.lengths[task_id]} rows, {record['sender_ms']:.1f} ms\n"
              f"  task: {record['task'][:300]}\n  plan: {record['plan'][:300]}")
        if args.model_name_or_path:
            with torch.inference_mode():
                probs = lm_logits(lm, shards[task_id].float()).softmax(-1)  # (L, V)
            for n, (p, top) in enumerate(zip(*(x.tolist() for x in probs.topk(args.top_k)))):
                written = record["plan_token_ids"][n] if n < len(record["plan_token_ids"]) else None
                print(f"  {n:4d}  {'' if written is None else tokenizer.decode([written])!r:16s}  "
                      + "  ".join(f"{tokenizer.decode([t])!r} {q:.2f}" for t, q in zip(top, p)))


# ---------------------------------------------------------------------------------------------------------------------
# import, export: hidden_state is list<list<float32>>, what other tools write; float32 holds bf16 and fp16 exactly

def export_messages(args):
    pa, parquet, shards = optional("pyarrow"), optional("pyarrow.parquet"), open_shards(args.directory)
    schema = pa.schema([*((name, pa.string()) for name in ("task_id", "task", "plan", "dtype", "record")),
                        ("hidden_state", pa.list_(pa.list_(pa.float32())))], {"sender": json.dumps(shards.sender)})
    ids, names = list(shards.records), {dtype: name for name, dtype in DTYPES.items()}
    with atomic_path(args.output_file) as path, parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for i in range(0, len(ids), 64):
            some = ids[i:i + 64]
            latents, records = [shards[k] for k in some], [shards.records[k] for k in some]
            flat = torch.cat([H.float() for H in latents]).numpy()  # (rows of all, d)
            ends = np.arange(len(flat) + 1, dtype=np.int32) * shards.hidden_size
            rows = pa.ListArray.from_arrays(ends, flat.ravel())
            starts = np.cumsum([0, *map(len, latents)], dtype=np.int32)
            writer.write_table(pa.table([some, [r["task"] for r in records], [r["plan"] for r in records],
                                         [names[H.dtype] for H in latents], [json.dumps(r) for r in records],
                                         pa.ListArray.from_arrays(starts, rows)], schema=schema))
    print(f"wrote {len(ids)} messages to {args.output_file}")


def read_tables(path, split):
    """Arrow tables of 256 messages each, from a Parquet file or a save_to_disk folder."""
    if os.path.isdir(path):
        yield from load_saved(path, split).with_format("arrow").iter(batch_size=256)
        return
    parquet = optional("pyarrow.parquet")
    try:
        yield from parquet.ParquetFile(path).iter_batches(batch_size=256)
    except FileNotFoundError:
        raise UserError(f"no file or directory {path}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is not a Parquet file: {str(e).splitlines()[0]}") from None


def import_messages(args):
    if os.path.isdir(args.output_dir) and len(LatentShards(args.output_dir)):
        raise UserError(f"{args.output_dir} already holds messages: give a new --output_dir")
    sender, ids = None, set()
    for number, table in enumerate(read_tables(args.source, args.split)):  # one shard per table: little is in memory
        columns, latents, records = table.schema.names, {}, {}
        if not {"plan", "hidden_state"} <= {*columns} or not {"task_id", "id"} & {*columns}:
            raise UserError(f"{args.source} needs columns task_id (or id), plan and hidden_state, found "
                            f"{', '.join(columns)}")
        rows = table.select([name for name in columns if name != "hidden_state"]).to_pylist()
        for row, cell in zip(rows, table.column("hidden_state")):
            task_id = str(row["task_id"] if "task_id" in row else row["id"])
            where = f"{args.source}: id {task_id}"
            if task_id in ids or task_id == "__metadata__":
                raise UserError(f"{where} occurs twice (or is reserved): ids must be unique")
            ids.add(task_id)
            try:
                H = torch.from_numpy(np.stack(cell.values.to_numpy(zero_copy_only=False)))  # (L, d)
                if H.dim() != 2 or not H.is_floating_point() or not torch.isfinite(H).all():
                    raise ValueError(f"found shape {tuple(H.shape)}, {H.dtype}, or NaN")
            except (AttributeError, TypeError, ValueError) as e:  # null, no rows, or rows of different widths
                raise UserError(f"{where}: hidden_state must be L rows of d finite numbers: {e}") from None
            dtype = row.get("dtype") or ("fp16" if H.dtype == torch.float16 else "fp32")
            if sender is None:
                own = json.loads((table.schema.metadata or {}).get(b"sender", b"{}"))
                sender = own or {"model": args.model_name_or_path, "hidden_size": H.shape[1], "dtype": dtype,
                                 "format_version": FORMAT_VERSION}
            if H.shape[1] != sender["hidden_size"] or dtype not in DTYPES:
                raise UserError(f"{where}: a {dtype} message {H.shape[1]} wide, expected {sender['hidden_size']}")
            latents[task_id] = H.to(DTYPES[dtype])
            records[task_id] = json.loads(row.get("record") or "null") or {
                "task": row.get("task") or "", "plan": row["plan"] or "", "plan_token_ids": [], "sender_ms": 0.0}
        shard = os.path.join(args.output_dir, f"latents-rank00000-{number:05d}.safetensors")
        write_shard(shard, latents, records, sender)
    if not ids:
        raise UserError(f"{args.source} holds no messages")
    print(f"wrote {len(ids)} messages, {sender['hidden_size']} wide, to {args.output_dir}")


def main(argv=None):
    parser, args = get_args(argv)
    functions = {"inspect": inspect, "import": import_messages, "export": export_messages}
    run(parser, functions.get(args.command, collect), args)


if __name__ == "__main__":
    main()
