"""
Stage 1: a sender writes plans; its last-layer hidden states become messages, in safetensors shards.

  python collect.py alfworld --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
      --dataset_path alfworld_sft.json --task_turn 2 --output_dir messages
  python collect.py alfworld --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
      --env alfworld --split valid_seen --output_dir messages_valid_seen
  torchrun --nproc_per_node 8 collect.py custom --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
      --dataset_path tasks.jsonl --output_dir messages
  python collect.py math --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
      --dataset_path MATH --subjects algebra --output_dir messages
  python collect.py inspect messages --id train-3 --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct
  python collect.py export messages --output_file messages.parquet
  python collect.py import messages.parquet --output_dir messages_again

Run it again after a kill: it collects only what is missing. A message depends on its task, the model
and the seed, not on the batch size, the order, the number of ranks or a restart.
"""
import argparse
import glob
import itertools
import json
import os
import re
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from common import (SIGTERM_EXIT, Parser, UserError, atomic_path, boolean, catch_sigterm, fingerprint,
                    json_object, one_line_errors, positive, progress, read_json, remove, seed_for, share,
                    this_rank, write_json)
from data import (ANSWER_FIELDS, ID_FIELDS, PRESETS, encode_prompt, load_saved, load_tasks, optional,
                  stop_ids)
from games import SENDER_KNOWS, sender_tasks
from model import (DTYPES, LatentSender, LatentShards, context_length, decoder_states, left_pad, lm_logits,
                   load_config, load_lm, load_tokenizer, new_cache, next_tokens, open_shards, write_shard)

SHARD_FORMAT = 1  # of the shards


def get_args(argv):
    parser = Parser(prog="collect.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (template, turn, task_field, response_field, question) in PRESETS.items():
        p = commands.add_parser(name, help=f"collect messages: prompt and fields of {name}", allow_abbrev=False)
        g = p.add_argument_group("data")
        g.add_argument("--dataset_path",
                       help="records with an id and a task (.json, .jsonl, .parquet), MATH's directory, a hub id")
        g.add_argument("--env", help="instead of --dataset_path: games, as in eval_alfworld.py")
        g.add_argument("--sender_knows", choices=SENDER_KNOWS, default="nothing",
                       help="with --env alfworld: place tells the sender where the goal's objects are")
        g.add_argument("--output_dir", required=True,
                       help="where the shards go; an existing directory is continued")
        # a tuple of names: the first that a file has
        g.add_argument("--id_field", default=ID_FIELDS,
                       help="field of the task's id; default: unique_id, id or idx, else the position in the file")
        g.add_argument("--task_field", default=task_field,
                       help="field of the task's text; without one conversations are read")
        g.add_argument("--conversations_index", "--task_turn", type=int, default=turn,
                       help="without a task field: the turn of `conversations` that holds the task")
        g.add_argument("--response_field", default=response_field,
                       help="field of the reference reply: also writes train.json for train_actor.py; '': none")
        g.add_argument("--answer_field", default=ANSWER_FIELDS if response_field else "",
                       help="field of the bare answer, boxed in train.json where the reply has no box; '': none")
        g.add_argument("--question_template", default=question, help="the actor's question in train.json")
        g.add_argument("--split", default="train", help="of a directory, a hub dataset or a game")
        g.add_argument("--subjects", nargs="+", help="only these values of the field `type` or `subject`")
        g.add_argument("--max_samples", type=positive, help="only the first N tasks")
        g.add_argument("--shard_size_mb", type=float, default=512,
                       help="start a new shard beyond this size")
        g = p.add_argument_group("sender")
        g.add_argument("--model_name_or_path", required=True,
                       help="any Hugging Face causal LM, or a student directory")
        g.add_argument("--prompt_template",
                       help="what the sender is asked, with {task} in it; default: with --latent_steps what a "
                            f"trained student was asked, else {template!r}")
        g.add_argument("--chat_template", choices=["auto", "none"], default="auto",
                       help="auto: the tokenizer's own chat template; none: the bare prompt")
        g.add_argument("--chat_template_kwargs", type=json_object,
                       help="""JSON for the chat template; default: '{"enable_thinking": false}'""")
        g.add_argument("--torch_dtype", choices=DTYPES, default="bf16",
                       help="of the model, and of the stored states")
        g.add_argument("--trust_remote_code", type=boolean, default=False,
                       help="run code that the model ships")
        g.add_argument("--self_check", type=boolean, default=True,
                       help="refuse a model whose states or logits would be wrong here")
        g = p.add_argument_group("decoding")
        g.add_argument("--max_new_tokens", type=positive, default=512, help="a longer plan is cut here")
        g.add_argument("--do_sample", type=boolean, default=False,
                       help="sample instead of taking the likeliest token")
        g.add_argument("--temperature", type=float, default=1.0, help="with --do_sample true")
        g.add_argument("--top_p", type=share, default=1.0, help="with --do_sample true: nucleus sampling")
        g.add_argument("--top_k", type=int, default=0,
                       help="with --do_sample true: only the k likeliest; 0: all")
        g.add_argument("--seed", type=int, default=0, help="of the uniform number of each (task, step)")
        g.add_argument("--batch_size", type=positive, default=16, help="prompts decoded together")
        g.add_argument("--c", type=positive, help="store only the first N states of each message")
        g.add_argument("--latent_steps", type=positive,
                       help="think K latent steps instead of writing a plan")
    p = commands.add_parser("inspect", help="what is in the shards", allow_abbrev=False)
    p.add_argument("directory", help="--output_dir of a collection")
    p.add_argument("--id", help="only this task")
    p.add_argument("--model_name_or_path", help="the sender: what each state says through its output head")
    p.add_argument("--top_k", type=positive, default=5, help="tokens per state")
    p = commands.add_parser("import", help="Parquet or save_to_disk folder -> shards", allow_abbrev=False)
    p.add_argument("source", help="columns task_id or id, plan, hidden_state (a list of lists), task if there")
    p.add_argument("--output_dir", required=True, help="a new directory for the shards")
    p.add_argument("--model_name_or_path", default="unknown", help="the sender's name, kept in the shards")
    p.add_argument("--split", default="train", help="of a save_to_disk folder with splits")
    p = commands.add_parser("export", help="shards -> Parquet; import gives the same bits", allow_abbrev=False)
    p.add_argument("directory", help="--output_dir of a collection")
    p.add_argument("--output_file", required=True, help="the .parquet to write")
    args = parser.parse_args(argv)
    if args.command in PRESETS:
        if args.temperature <= 0 or args.top_k < 0:
            parser.error("--temperature must be above 0 and --top_k not below, for greedy decoding leave "
                         f"--do_sample false, found {args.temperature} and {args.top_k}")
        if "{task}" not in args.question_template or "{task}" not in (args.prompt_template or "{task}"):
            parser.error("--prompt_template and --question_template must contain {task}")
        if bool(args.dataset_path) == bool(args.env):
            parser.error("give either --dataset_path or --env")
        if args.env and (args.subjects or isinstance(args.response_field, str) and args.response_field):
            parser.error("the games of --env have no --response_field and no --subjects")
        if args.sender_knows != "nothing" and args.env != "alfworld":
            parser.error(f"--sender_knows {args.sender_knows} is for --env alfworld")
    return args


# ------------------------------------------------------------------------------------------------
# What the sender is asked

def read_bridge(model):
    """What compress.py notes about a student, who is asked as in its training. {} for any other model."""
    path = os.path.join(model, "latent_bridge.json")
    return read_json(path) if os.path.exists(path) else {}


def sender_prompt(tokenizer, template, task, chat_template):
    """What the sender reads about one task -> list of ids, the same in any batch."""
    text = template.replace("{task}", task["task"])
    if chat_template == "none":  # a control token that a task spells stays text, as in a template
        return tokenizer(text, split_special_tokens=True).input_ids
    messages = [{"role": "user", "content": text}]
    before, after = encode_prompt(tokenizer, messages, where=f"id {task['id']}")
    return before + after


def check_prompts(tasks, prompts, steps, context, flag):
    """Raises UserError for a prompt that leaves no space for what the sender is to say."""
    for task in tasks:
        length = len(prompts[task["id"]])
        if length + steps > context:
            raise UserError(f"id {task['id']}: prompt of {length} tokens + {steps} new ones exceed the "
                            f"sender's context of {context}: shorten the task or lower {flag}")


def check_sender(shards, sender, directory):
    """Raises UserError where what was collected before is another sender's, or of other settings."""
    differ = [key for key in sender if shards.sender.get(key) != sender[key]]
    if differ:
        raise UserError(f"{directory} holds messages of another sender or other settings (different: "
                        f"{', '.join(differ)}): give a new --output_dir")


# ------------------------------------------------------------------------------------------------
# What it says

def uniform_numbers(seed, steps):
    """A number in [0, 1) per step, from the task's own generator: its neighbours change nothing."""
    return torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits_processors(temperature, top_p, top_k):
    """Transformers' own, in the order in which `generate` applies them."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k > 0:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return processors


@torch.inference_mode()
def decode_plans(lm, prompts, seeds, eos_ids, *, max_new_tokens, do_sample=False, temperature=1.0,
                 top_p=1.0, top_k=0):
    """Write a plan for each prompt, a list of ids -> [(plan_token_ids, states (L, D), milliseconds)],
    states on the CPU in the model's dtype, after the final norm.

    State l is read where token l is predicted, the first one at the prompt's end, so L tokens give
    exactly L states and the end of the text gives none (the released ALFWorld collector is one off,
    and its batched messages run past the end). Prompt [a b c], plan [y1 y2]:

        read       a   b   c   y1  y2
        state              h1  h2
        predicts           y1  y2  end
    """
    input_ids, attention_mask = left_pad(prompts, lm.device)  # (b, T)
    uniforms = torch.stack([uniform_numbers(seed, max_new_tokens) for seed in seeds])  # (B, steps)
    processors = logits_processors(temperature, top_p, top_k)
    # B prompts; b of them are in the batch, which gets smaller
    plans, states, ms = [[] for _ in prompts], [[] for _ in prompts], [0.0] * len(prompts)
    active = list(range(len(prompts)))  # the prompts in the batch
    cache = new_cache(lm)
    for step in range(max_new_tokens):
        start = time.perf_counter()
        embeds = lm.get_input_embeddings()(input_ids)  # (b, T, D), after the first step (b, 1, D)
        hidden_states = decoder_states(lm, embeds, attention_mask, cache)[:, -1]  # (b, D)
        logits = lm_logits(lm, hidden_states)  # (b, V)
        if step == 0:
            logits[:, eos_ids] = -torch.inf  # a plan has at least one token
        if do_sample:
            next_ids = next_tokens(processors(None, logits), uniforms[active, step].to(lm.device))
        else:
            next_ids = next_tokens(logits)  # (b,)
        hidden_states, written = hidden_states.cpu(), next_ids.tolist()  # now the GPU is done
        elapsed = 1000 * (time.perf_counter() - start)
        keep = []  # places in the batch whose plan goes on
        for n, prompt in enumerate(active):
            ms[prompt] += elapsed / len(active)
            if written[n] not in eos_ids:
                plans[prompt].append(written[n])
                states[prompt].append(hidden_states[n])
                keep.append(n)
        if not keep:
            break
        if len(keep) < len(active):  # active [0, 2, 5] and keep [0, 2] -> [0, 5]
            active = [active[n] for n in keep]
            index = torch.tensor(keep, device=lm.device)
            cache.reorder_cache(index)  # drops the others' keys and values, and recurrent states
            next_ids, attention_mask = next_ids[index], attention_mask[index]
        input_ids = next_ids[:, None]  # (b, 1)
        attention_mask = F.pad(attention_mask, (0, 1), value=1)  # as long as the cache: (b, T + step + 1)
    return [(plans[n], torch.stack(states[n]), ms[n]) for n in range(len(prompts))]


@torch.inference_mode()
def think(sender, prompts, steps):
    """K latent steps for each prompt, no text -> [([], states (K, D), milliseconds)]."""
    start = time.perf_counter()
    input_ids, attention_mask = left_pad(prompts, sender.lm.device)  # (B, T)
    latents = sender(input_ids, attention_mask, steps).cpu()  # (B, K, D)
    ms = 1000 * (time.perf_counter() - start) / len(prompts)
    return [([], states.clone(), ms) for states in latents]


def make_record(task, plan="", plan_token_ids=(), ms=0.0):
    """What a shard keeps of a message beside its states."""
    record = {
        "task": task["task"],
        "plan": plan,
        "plan_token_ids": list(plan_token_ids),
        "sender_ms": round(ms, 3),
    }
    return record | {label: task[label] for label in ("type", "level") if label in task}


# ------------------------------------------------------------------------------------------------
# Files of a collection

def free_name(directory, rank=0):
    """The first shard name that a rank has not used: latents-rank00000-00000.safetensors, ..."""
    for number in itertools.count():
        path = os.path.join(directory, f"latents-rank{rank:05d}-{number:05d}.safetensors")
        if not os.path.exists(path):
            return path


def remove_leftovers(directory, rank, world):
    """Half-written shards of a killed run. Each is one rank's to remove, whatever wrote them."""
    for path in glob.glob(os.path.join(glob.escape(directory), "latents-rank*.tmp*")):
        writer = int(re.search(r"latents-rank(\d+)", path)[1])
        if writer % world == rank:
            remove(path)


def write_train_file(path, tasks, question_template):
    """train.json for train_actor.py: each problem and its reference reply."""
    records = []
    for task in tasks:
        question = question_template.replace("{task}", task["task"])
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": task["reply"]}]
        records.append({"id": task["id"], "conversations": turns})
    write_json(path, records)


# ------------------------------------------------------------------------------------------------
# Inspect

def inspect(directory, task_id=None, model=None, top_k=5):
    """Print what a directory of messages holds; with the sender's path, what each state says."""
    shards = open_shards(directory)
    ids = [task_id] if task_id else list(shards.records)[:10]
    shards[ids[0]]  # read it: an unknown --id is an error here
    shortest, longest = min(shards.lengths.values()), max(shards.lengths.values())
    print(f"{directory}: {len(shards)} messages of {shortest} to {longest} states")
    for key, value in shards.sender.items():
        print(f"  {key}: {value!r}")
    if model:
        check_width(model, shards)
        lm, tokenizer = load_lm(model), load_tokenizer(model)
        ids = ids[:1]
    for task_id in ids:
        record = shards.records[task_id]
        print(f"\n{task_id}: {shards.lengths[task_id]} states, {record.get('sender_ms', 0):.1f} ms")
        print("  task:", record["task"][:300])
        print("  plan:", record["plan"][:300])
        if model:
            print_words(lm, tokenizer, shards[task_id], record["plan_token_ids"], top_k)


def check_width(model, shards):
    """Raises UserError for a model that is surely not the sender, before it is loaded."""
    width = load_config(model).hidden_size
    if width != shards.hidden_size:
        raise UserError(f"{model} is {width} wide, the messages are {shards.hidden_size}: give the "
                        f"sender, {shards.sender['model']}")


@torch.inference_mode()
def print_words(lm, tokenizer, states, plan_token_ids, top_k):
    """A line per state (L, D): the token that was written, then the likeliest ones with their share."""
    probs = lm_logits(lm, states.float()).softmax(-1)  # (L, V)
    for n in range(len(states)):
        written = repr(tokenizer.decode(plan_token_ids[n])) if n < len(plan_token_ids) else ""
        line = f"  {n:4d}  {written:16s}"
        top = probs[n].topk(top_k)
        for prob, token_id in zip(top.values, top.indices):
            line += f"  {tokenizer.decode(token_id)!r} {prob:.2f}"
        print(line)


# ------------------------------------------------------------------------------------------------
# Export and import: hidden_state is a list of lists of float32, which holds bf16 and fp16 exactly

def message_rows(directory):
    """What `export_messages` writes of each message."""
    shards = LatentShards(directory)
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    for task_id, record in shards.records.items():
        states = shards[task_id]  # (L, d)
        yield {
            "task_id": task_id,
            "task": record["task"],
            "plan": record["plan"],
            "hidden_state": states.float().numpy(),
            "dtype": dtype_names[states.dtype],
            "record": json.dumps(record),
            "sender": json.dumps(shards.sender),
        }


def export_messages(directory, output_file):
    """Messages -> one Parquet file, 16 at a time; meanwhile the disk holds them all as fp32."""
    datasets, count = optional("datasets"), len(open_shards(directory))
    datasets.disable_progress_bars()
    names = ["task_id", "task", "plan", "dtype", "record", "sender"]
    columns = dict.fromkeys(names, datasets.Value("string"))
    columns["hidden_state"] = [[datasets.Value("float32")]]  # `dtype` says what it was
    beside = os.path.dirname(os.path.abspath(output_file))
    with atomic_path(output_file) as path, tempfile.TemporaryDirectory(dir=beside) as folder:
        data = datasets.Dataset.from_generator(
            message_rows, features=datasets.Features(columns), cache_dir=folder,
            gen_kwargs={"directory": directory}, writer_batch_size=16)
        data.to_parquet(path, batch_size=16)
    print(f"wrote {count} messages to {output_file}")


def read_rows(source, split):
    """A Parquet file or a save_to_disk folder -> its rows, one at a time, arrays in float32."""
    datasets = optional("datasets")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our error says it in one line
    if os.path.isdir(source):
        data = load_saved(source, split)  # a memory map
    else:
        try:  # streaming: without it the file would be copied into a cache first
            data = datasets.load_dataset("parquet", data_files=glob.escape(source), split="train",
                                         streaming=True)
        except FileNotFoundError:
            raise UserError(f"no file or directory {source}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{source} is not a Parquet file: {error}") from None
    names = data.column_names
    if "plan" not in names or "hidden_state" not in names or not {"task_id", "id"} & set(names):
        raise UserError(f"{source} needs columns task_id (or id), plan and hidden_state, found "
                        f"{', '.join(names)}")
    return data.with_format("numpy")


def check_states(where, array, dtype, width):
    """Raises UserError unless a row holds (L, width) finite numbers, of a dtype that shards have."""
    shape, kind = getattr(array, "shape", ()), getattr(array, "dtype", None)
    # lists of different lengths come as an array of objects
    if len(shape) != 2 or kind != np.float32 or not np.isfinite(array).all():
        raise UserError(f"{where}: hidden_state must be L lists of d finite numbers, found {kind} of "
                        f"shape {shape}, or NaN")
    if dtype not in DTYPES or width not in (None, shape[1]):
        raise UserError(f"{where}: a {dtype} message {shape[1]} wide, expected bf16, fp16 or fp32 and "
                        f"a width of {width}")


def import_messages(source, output_dir, model="unknown", split="train", shard_size_mb=512):
    """Rows of other tools, or of `export_messages` -> shards, of which one is in memory at a time."""
    if os.path.isdir(output_dir) and len(LatentShards(output_dir)):
        raise UserError(f"{output_dir} already holds messages: give a new --output_dir")
    sender, ids = None, set()
    latents, records, size = {}, {}, 0
    for row in read_rows(source, split):
        task_id = str(row["task_id"] if "task_id" in row else row["id"])
        where = f"{source}: id {task_id}"
        if task_id in ids or task_id == "__metadata__":
            raise UserError(f"{where} occurs twice (or is reserved): ids must be unique")
        ids.add(task_id)
        states, dtype = row["hidden_state"], row.get("dtype") or "fp32"
        check_states(where, states, dtype, sender and sender["hidden_size"])
        if sender is None and row.get("sender"):
            sender = json.loads(row["sender"])
        elif sender is None:  # another tool's file
            sender = {"model": model, "dtype": dtype, "format_version": SHARD_FORMAT,
                      "hidden_size": states.shape[1]}
        latents[task_id] = torch.from_numpy(states).to(DTYPES[dtype])  # (L, d)
        if row.get("record"):
            records[task_id] = json.loads(row["record"])
        else:
            records[task_id] = make_record({"task": str(row.get("task") or "")}, str(row["plan"] or ""))
        size += latents[task_id].nbytes
        if size >= shard_size_mb * 2**20:
            write_shard(free_name(output_dir), latents, records, sender)
            latents, records, size = {}, {}, 0
    if not ids:
        raise UserError(f"{source} holds no messages")
    if latents:
        write_shard(free_name(output_dir), latents, records, sender)
    print(f"wrote {len(ids)} messages, {sender['hidden_size']} wide, to {output_dir}")


# ------------------------------------------------------------------------------------------------
# Collect

@one_line_errors("collect.py")
def main(argv=None):
    args = get_args(argv)
    if args.command == "inspect":
        return inspect(args.directory, args.id, args.model_name_or_path, args.top_k)
    if args.command == "export":
        return export_messages(args.directory, args.output_file)
    if args.command == "import":
        return import_messages(args.source, args.output_dir, args.model_name_or_path, args.split)
    rank, world, device = this_rank()
    model_path, output_dir = args.model_name_or_path, args.output_dir

    # ---- tasks: this rank's part, which does not depend on what is done, so that a rank may start late
    done = LatentShards(output_dir)  # empty where there is no directory
    houses_path = os.path.join(output_dir, f"houses-rank{rank:05d}.json")
    if args.env:  # to open a game takes time: what was read of them is kept where a run is killed
        tasks = sender_tasks(args.env, args.split, args.max_samples, done.records, args.sender_knows,
                             houses_path, rank, world)
    else:
        every_task = load_tasks(
            args.dataset_path, args.id_field, args.task_field, args.response_field,
            conversations_index=args.conversations_index, split=args.split, subjects=args.subjects,
            max_samples=args.max_samples, answer_field=args.answer_field)
        tasks = every_task[rank::world]

    # ---- prompts: what the sender reads about each
    # the flag, else what a student was asked in training, else the preset
    bridge = read_bridge(model_path) if args.latent_steps else {}
    prompt_template = args.prompt_template or bridge.get("prompt_template", PRESETS[args.command][0])
    template_kwargs = args.chat_template_kwargs
    if template_kwargs is None:
        template_kwargs = bridge.get("chat_template_kwargs")
    tokenizer = load_tokenizer(model_path, args.trust_remote_code, template_kwargs)
    # a base model has no template: it continues the bare prompt
    chat_template = args.chat_template if tokenizer.chat_template else "none"
    prompts = {}  # id -> list of ids
    for task in tasks:
        prompts[task["id"]] = sender_prompt(tokenizer, prompt_template, task, chat_template)
    context = context_length(load_config(model_path, args.trust_remote_code))
    if args.latent_steps:
        check_prompts(tasks, prompts, args.latent_steps, context, "--latent_steps")
    else:
        check_prompts(tasks, prompts, args.max_new_tokens, context, "--max_new_tokens")

    # ---- settings: a directory holds the messages of one sender, all made with the same ones
    decoding = {
        "max_new_tokens": args.max_new_tokens,
        "do_sample": args.do_sample,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
    }
    sender = {
        "model": model_path,
        "fingerprint": fingerprint(model_path),
        "dtype": args.torch_dtype,
        "prompt_template": prompt_template,
        "chat_template": chat_template,
        "chat_template_kwargs": tokenizer.chat_template_kwargs,
        "sender_knows": args.sender_knows,
        "latent_steps": args.latent_steps,
        "seed": args.seed,
        "c": args.c,
        **decoding,
        "format_version": SHARD_FORMAT,
    }
    if len(done):
        check_sender(done, sender, output_dir)

    # ---- what is left to do
    remove_leftovers(output_dir, rank, world)
    pending = [task for task in tasks if task["id"] not in done]
    pending.sort(key=lambda task: len(prompts[task["id"]]))  # similar lengths share a batch: less padding
    if rank == 0:
        whose = " of rank 0" if world > 1 else ""
        print(f"{len(tasks)} tasks{whose}, {len(pending)} of them not yet in {output_dir}")
        if args.dataset_path and every_task[0]["reply"] is not None:
            write_train_file(f"{output_dir}/train.json", every_task, args.question_template)

    # ---- the sender, where something is left for it to do
    loading = (model_path, args.torch_dtype, device, args.trust_remote_code, args.self_check)
    if pending and args.latent_steps:
        model = LatentSender.load(*loading)
    elif pending:
        model = load_lm(*loading)
        eos_ids = stop_ids(tokenizer, model)

    # ---- the loop: ask a batch, keep what it says, write a shard when it is time
    sigterm = catch_sigterm()
    latents, records, size, written = {}, {}, 0, time.time()  # since the last shard
    bar = progress(total=len(pending), desc="collect", unit="task", rank=rank)
    for start in range(0, len(pending), args.batch_size):
        batch = pending[start:start + args.batch_size]
        batch_prompts = [prompts[task["id"]] for task in batch]
        if args.latent_steps:
            messages = think(model, batch_prompts, args.latent_steps)
        else:
            seeds = [seed_for(args.seed, task["id"]) for task in batch]
            messages = decode_plans(model, batch_prompts, seeds, eos_ids, **decoding)
        for task, (plan_token_ids, states, ms) in zip(batch, messages):
            if not torch.isfinite(states).all():
                raise UserError(f"id {task['id']}: the sender's states are not finite in "
                                f"{args.torch_dtype}: use --torch_dtype bf16 or fp32")
            plan = tokenizer.decode(plan_token_ids, skip_special_tokens=True)
            latents[task["id"]] = states[:args.c]  # (L, D), all of them where --c is not given
            records[task["id"]] = make_record(task, plan, plan_token_ids, ms)
            size += latents[task["id"]].nbytes
        bar.update(len(batch))
        full, last = size >= args.shard_size_mb * 2**20, start + args.batch_size >= len(pending)
        # and every five minutes: a kill never costs more; SIGTERM costs nothing
        if full or last or sigterm or time.time() - written > 300:
            sender["hidden_size"] = states.shape[1]  # configs have several names for it
            write_shard(free_name(output_dir, rank), latents, records, sender)
            latents, records, size, written = {}, {}, 0, time.time()
        if sigterm:
            print(f"SIGTERM: what was collected is in {output_dir}; the same command continues from it")
            raise SystemExit(SIGTERM_EXIT)
    bar.close()
    remove(houses_path)  # the shards hold what was in it
    if rank == 0:
        ready = "its part of the messages" if world > 1 else f"{len(tasks)} messages"
        print(f"wrote {ready} to {output_dir}; look: python collect.py inspect {output_dir}; next: "
              f"train_actor.py, compress.py or an evaluation with --hidden_data {output_dir}")


if __name__ == "__main__":
    main()
