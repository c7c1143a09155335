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

Run it again after a kill: it collects only what is missing. A message depends on its task, the model
and the seed, not on the batch size, the order, the number of ranks or a restart.

    1. the question      what the sender reads about a task
    2. the message       what it says: a plan, its own or a given one, or K latent steps; what is sent of it
    3. the collection    ask a batch, keep what it says, write a shard when it is time
    4. inspect           what is in the shards
"""
import glob
import os
import re
import time

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from common import (STOP_EXIT, Parser, UserError, catch_stop, check_output, fingerprint, json_object, load_object,
                    lock, one_line_errors, positive, progress, read_json, remove, seed_for, task_template,
                    this_rank, write_json)
from data import (ANSWER_FIELDS, ID_FIELDS, PLAN_PROMPT, PRESETS, encode_prompt, load_tasks, naming, read_plan,
                  stop_ids)
from games import open_split, sender_tasks
from hf import (DTYPES, context_length, decode, layer_states, left_pad, lm_logits,
                load_config, load_lm, load_tokenizer, next_tokens, uniform_numbers, word_embeddings)
from model import (HEADER_LIMIT, SHARD_FORMAT, LatentSender, LatentShards, free_name, header_bytes, make_record,
                   open_shards, write_shard)


def get_args(argv):
    parser = Parser(prog="collect.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (prompt, turn, task_field, response_field, question) in PRESETS.items():
        p = commands.add_parser(name, help=f"collect messages: prompt and fields of {name}")
        p.group("data")
        p.flag("--dataset_path", None, "records with an id and a task (.json, .jsonl, .parquet), MATH's "
               "directory, a hub id")
        p.flag("--env", None, "instead of --dataset_path: games, as in eval_alfworld.py")
        p.flag("--output_dir", ..., "where the shards go; an existing directory is continued")
        p.flag("--id_field", ID_FIELDS, "the task's id; default: unique_id, id, idx or a hash of its text")
        p.flag("--task_field", task_field, "the task's text; default: %(default)s, else conversations are read")
        p.flag("--task_turn --conversations_index", turn, "of conversations: the turn of the task", type=int)
        p.flag("--response_field", response_field, "the reference reply: also writes train.json for "
               "train_actor.py; '': none; default: %(default)s")
        p.flag("--answer_field", ANSWER_FIELDS if response_field else "", "the bare answer, boxed in train.json "
               "where it is the whole reply; '': none; default: %(default)s")
        p.flag("--plan_field", None, "the plan, where another has written it: the sender only reads it")
        p.flag("--question_template", question, "the actor's question in train.json", type=task_template)
        p.flag("--split", "train", "of a directory, a hub dataset or a game")
        p.flag("--subjects", None, "only these values of the field `type` or `subject`", nargs="+")
        p.flag("--max_samples", None, "only the first N tasks", type=positive)
        p.flag("--shard_size_mb", 512.0, "start a new shard beyond this size")
        p.group("sender")
        p.flag("--model_name_or_path", ..., "any Hugging Face causal LM, or a student directory")
        p.flag("--prompt_template", None, "what the sender is asked, with {task} in it; default: with "
               f"--latent_steps what a trained student was asked, else {prompt!r}", type=task_template)
        p.flag("--chat_template", "auto", "auto: the tokenizer's own; none: the bare prompt", choices=["auto", "none"])
        p.flag("--chat_template_kwargs", None, "JSON for the chat template; default: "
               """'{"enable_thinking": false}'""", type=json_object)
        p.flag("--send", "last", "last states, layer:N, expected embeddings, what module:function makes")
        p.flag("--torch_dtype", "bf16", "of the model, and of the stored states", choices=DTYPES)
        p.flag("--trust_remote_code", False, "run code that the model ships")
        p.flag("--self_check", True, "refuse a model whose states or logits would be wrong here")
        p.group("decoding")
        p.flag("--max_new_tokens", 512, "a longer plan is cut here")
        p.flag("--do_sample", False, "sample instead of taking the likeliest token")
        p.flag("--temperature", 1.0, "with --do_sample true")
        p.flag("--top_p", 1.0, "with --do_sample true: nucleus sampling")
        p.flag("--top_k", 0, "with --do_sample true: only the k likeliest; 0: all")
        p.flag("--seed", 0, "of the uniform number of each (task, step)")
        p.flag("--batch_size", 16, "prompts decoded together")
        p.flag("--c", None, "store only the first N states of each message", type=positive)
        p.flag("--latent_steps", None, "think K latent steps instead of writing a plan", type=positive)
    p = commands.add_parser("inspect", help="what is in the shards")
    p.add_argument("directory", help="--output_dir of a collection")
    p.flag("--id", None, "only this task")
    p.flag("--model_name_or_path", None, "the sender: what each state says through its output head")
    p.flag("--top_k", 5, "tokens per state")
    args = parser.parse_args(argv)
    if args.command != "inspect":
        if args.temperature <= 0 or args.top_k < 0 or not 0 < args.top_p <= 1:
            parser.error("--temperature must be above 0, --top_p above 0 and at most 1, --top_k not below 0; for "
                         "greedy decoding leave --do_sample false")
        if bool(args.dataset_path) == bool(args.env):
            parser.error("give either --dataset_path or --env")
        if args.env and (args.subjects or args.plan_field):
            parser.error("the games of --env have no --subjects and no --plan_field")
    return args


# ---- 1. The question -----------------------------------------------------------------------------
def read_bridge(model):
    """What compress.py notes about a student, who is asked as in its training. {} for any other model."""
    path = os.path.join(model, "latent_bridge.json")
    return read_json(path) if os.path.exists(path) else {}


def sender_prompt(tokenizer, template, task, chat_template="auto"):
    """What the sender reads about one task -> list of ids, the same in any batch."""
    text = template.replace("{task}", task["task"])
    if chat_template == "none":  # a control token that a task spells stays text, as in a template
        return tokenizer(text, split_special_tokens=True).input_ids
    part = encode_prompt(tokenizer, [{"role": "user", "content": text.strip()}], where=f"id {task['id']}")
    return part["before"] + part["after"]


def check_prompts(prompts, steps, context):
    """Raises UserError for a prompt {id: ids} that leaves no space for what the sender is to say."""
    for task_id, prompt in prompts.items():
        if len(prompt) + steps > context:
            raise UserError(f"id {task_id}: {len(prompt)} tokens to read + {steps} new ones exceed the sender's "
                            f"context of {context}: shorten the task or its plan, or lower --max_new_tokens or "
                            "--latent_steps")


# ---- 2. The message ------------------------------------------------------------------------------
# What is sent of n states that predict n tokens: (lm, hidden_states, logits) -> (n, d), each row of its own state:
# in a batch the others are of other plans. hidden_states: a tuple of (n, D), as in hf.layer_states, the last one
# after the final norm; logits (n, V).

def last_states(lm, hidden_states, logits):
    return hidden_states[-1]


def expected_embeddings(lm, hidden_states, logits):
    """The mean of all words' embeddings, each weighted by its probability of being next."""
    return logits.softmax(-1) @ word_embeddings(lm, most=logits.shape[1])


def load_send(name, n_layers=2**31):
    """--send -> (its function, whether that needs the states of all layers). Raises UserError."""
    if name == "last":
        return last_states, False
    if name == "expected":
        return expected_embeddings, False
    kind, _, number = name.partition(":")
    if kind != "layer" and number:
        return load_object(name, "--send"), True
    if kind != "layer" or not number.isdecimal() or int(number) > n_layers:
        raise UserError(f"--send {name}: give last, expected, layer:0 to layer:{n_layers}, or module:function")
    return lambda lm, hidden_states, logits: hidden_states[int(number)], True


def decode_plans(lm, prompts, seeds, eos_ids, *, max_new_tokens, do_sample=False, temperature=1.0,
                 top_p=1.0, top_k=0, send="last"):
    """Write a plan for each prompt, a list of ids -> [(plan_token_ids, states (L, d), milliseconds)],
    states on the CPU in the model's dtype: what `send` makes of them.

    State l is read where token l is predicted, the first one at the prompt's end, so L tokens give
    exactly L states and the end of the text gives none (the released ALFWorld collector is one off,
    and its batched messages run past the end). Prompt [a b c], plan [y1 y2]:

        read       a   b   c   y1  y2
        state              h1  h2
        predicts           y1  y2  end
    """
    input_ids, attention_mask = left_pad(prompts, lm.device)  # (B, T)
    uniforms = torch.stack([uniform_numbers(seed, max_new_tokens) for seed in seeds])  # (B, steps)
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])  # in the order of `generate`
    if top_k > 0:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))

    def choose(logits, active, step):
        if step == 0:
            logits = logits.clone()  # what is sent may be of all words
            logits[:, eos_ids] = -torch.inf  # a plan has at least one token
        if do_sample:
            return next_tokens(processors(None, logits), uniforms[active, step].to(lm.device))
        return next_tokens(logits)  # (b,)

    send, all_layers = load_send(send)
    embeds = lm.get_input_embeddings()(input_ids)
    limits = [max_new_tokens] * len(prompts)
    plans = decode(lm, embeds, attention_mask, limits, eos_ids, choose,
                   lambda hidden_states, logits: send(lm, hidden_states, logits), all_layers)
    return [(plan["ids"], torch.stack(plan["kept"]).to(lm.dtype), plan["ms"]) for plan in plans]


@torch.inference_mode()
def read_plans(lm, texts, lengths, send="last"):
    """The same of plans that are given: the last `lengths` ids of what is read, in one pass."""
    start = time.perf_counter()
    send, all_layers = load_send(send)
    input_ids, attention_mask = left_pad(texts, lm.device)  # (B, T)
    embeds = lm.get_input_embeddings()(input_ids)
    layers = layer_states(lm, embeds, attention_mask, None, all_layers)  # of (B, T, D)
    sent = []
    for n, L in enumerate(lengths):
        hidden_states = tuple(states[n, -L - 1:-1] for states in layers)  # of (L, D); the last token predicts none
        logits = lm_logits(lm, hidden_states[-1])  # (L, V)
        sent.append(send(lm, hidden_states, logits).to("cpu", lm.dtype, copy=True))  # no view of the batch
    ms = 1000 * (time.perf_counter() - start) / len(texts)
    return [(text[-L:], states, ms) for text, L, states in zip(texts, lengths, sent)]


@torch.inference_mode()
def think(sender, prompts, steps):
    """K latent steps for each prompt, no text -> [([], states (K, D), milliseconds)]."""
    start = time.perf_counter()
    input_ids, attention_mask = left_pad(prompts, sender.lm.device)  # (B, T)
    latents = sender(input_ids, attention_mask, steps).cpu()  # (B, K, D)
    ms = 1000 * (time.perf_counter() - start) / len(prompts)
    return [([], states.clone(), ms) for states in latents]


# ---- 3. The collection ---------------------------------------------------------------------------
def collect(tasks, output_dir, *, model_name_or_path, prompt_template=None, default_template=PLAN_PROMPT,
            chat_template="auto", chat_template_kwargs=None, torch_dtype="bf16", latent_steps=None, c=None, seed=0,
            batch_size=16, shard_size_mb=512, trust_remote_code=False, self_check=True, max_new_tokens=512,
            do_sample=False, temperature=1.0, top_p=1.0, top_k=0, send="last", plan_field=None, env=None, split=None,
            stop_signals=()):
    """Have the sender say something about each task that has no message in output_dir yet.

    tasks: those of this rank, [{"id", "task", "type"?, "level"?}], with plan_field also "plan"; the rest as the
    flags of the same name; stop_signals: a list that a signal fills (`catch_stop`).
    Raises UserError where output_dir holds messages of another sender or other settings."""
    if latent_steps and (send != "last" or plan_field):
        raise UserError("--latent_steps sends the states of its steps: leave out --send and --plan_field")
    rank, world, device = this_rank()
    # each rank has a lock: else rank 1 of a second run, whose rank 0 is refused, would write what it has
    lock(output_dir if rank == 0 else os.path.join(output_dir, f".rank{rank}"))
    done = LatentShards(output_dir)

    # ---- prompts: what the flag says, else what a student was asked in training, else the preset
    bridge = read_bridge(model_name_or_path) if latent_steps else {}
    template = prompt_template or bridge.get("prompt_template", default_template)
    if chat_template_kwargs is None:
        chat_template_kwargs = bridge.get("chat_template_kwargs")
    tokenizer = load_tokenizer(model_name_or_path, trust_remote_code, chat_template_kwargs)
    if not tokenizer.chat_template:
        chat_template = "none"  # a base model has none: it continues the bare prompt
    prompts = {task["id"]: sender_prompt(tokenizer, template, task, chat_template) for task in tasks}
    plans = {}  # that are given and so are read like prompts
    for task in tasks if plan_field else []:
        with naming(f"id {task['id']}"):
            plans[task["id"]] = read_plan(task, {}, tokenizer)
        prompts[task["id"]] += plans[task["id"]]
    config = load_config(model_name_or_path, trust_remote_code)
    load_send(send, config.num_hidden_layers)  # an unknown one is an error now
    steps = 0 if plan_field else latent_steps or max_new_tokens
    check_prompts(prompts, steps, context_length(config))

    # ---- settings: a directory holds the messages of one sender, all made with the same ones
    decoding = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "temperature": temperature,
                "top_p": top_p, "top_k": top_k, "send": send}
    some_prompt = sender_prompt(tokenizer, template, {"id": "", "task": "task"}, chat_template)
    sender = {
        "model": model_name_or_path,
        "fingerprint": fingerprint(model_name_or_path),
        "dtype": torch_dtype,
        "prompt_template": template,
        "chat_template": chat_template,
        "chat_template_kwargs": tokenizer.chat_template_kwargs,
        "prompt_fingerprint": f"{seed_for(*some_prompt):016x}",  # an edited template or tokenizer has another
        "latent_steps": latent_steps,
        "plan_field": plan_field,
        "games": env and [env, split],  # others may have the same ids
        "teacher": bridge.get("teacher"),  # the fingerprint of the actor over which a student was trained
        "seed": seed,
        "c": c,
        **decoding,
        "format_version": SHARD_FORMAT,
    }
    for task in tasks:
        kept = done.records.get(task["id"], task)
        same = kept["task"] == task["task"]
        if plan_field and task["id"] in done:
            same &= kept["plan_token_ids"] == plans[task["id"]]
        if not same:
            raise UserError(f"{output_dir} has a message of id {task['id']} for another text: give a new --output_dir")
    differ = [key for key in sender if len(done) and done.sender.get(key) != sender[key]]
    if differ:
        raise UserError(f"{output_dir} holds messages of another sender or other settings (different: "
                        f"{', '.join(differ)}): give a new --output_dir")

    # ---- what is left to do. Half-written shards of a killed run are one rank's to remove
    for path in glob.glob(os.path.join(glob.escape(output_dir), "latents-rank*.tmp*")):
        if int(re.search(r"latents-rank(\d+)", path)[1]) % world == rank:
            remove(path)
    pending = [task for task in tasks if task["id"] not in done]
    pending.sort(key=lambda task: len(prompts[task["id"]]))  # similar lengths share a batch: less padding
    if rank == 0:
        whose = " of rank 0" if world > 1 else ""
        print(f"{len(tasks)} tasks{whose}, {len(pending)} of them not yet in {output_dir}")
    if not pending:
        return
    loading = (model_name_or_path, torch_dtype, device, trust_remote_code, self_check)
    model = LatentSender.load(*loading) if latent_steps else load_lm(*loading)
    eos_ids = stop_ids(tokenizer, None if latent_steps else model)

    # ---- ask a batch, keep what it says, write a shard when it is time
    latents, records, size, header, written = {}, {}, 0, 0, time.time()  # since the last shard
    bar = progress(total=len(pending), desc="collect", unit="task", rank=rank)
    for start in range(0, len(pending), batch_size):
        batch = pending[start:start + batch_size]
        batch_prompts = [prompts[task["id"]] for task in batch]
        if latent_steps:
            said = think(model, batch_prompts, latent_steps)
        elif plan_field:
            said = read_plans(model, batch_prompts, [len(plans[task["id"]]) for task in batch], send)
        else:
            seeds = [seed_for(seed, task["id"]) for task in batch]
            said = decode_plans(model, batch_prompts, seeds, eos_ids, **decoding)
        for task, (plan_token_ids, states, ms) in zip(batch, said):
            task_id = task["id"]
            if not torch.isfinite(states).all():
                raise UserError(f"id {task_id}: the sender's states are not finite in {torch_dtype}: use "
                                f"--torch_dtype bf16 or fp32")
            plan = tokenizer.decode(plan_token_ids, skip_special_tokens=True)
            latents[task_id] = states[:c]  # (L, D), all of them where --c is not given
            ends = []  # where in the plan each token ends
            for n in range(1, len(plan_token_ids) + 1):
                ends.append(len(tokenizer.decode(plan_token_ids[:n], skip_special_tokens=True)))
            records[task_id] = make_record(task, plan, plan_token_ids, ms, ends)
            size += latents[task_id].nbytes
            header += header_bytes(task_id, records[task_id])
        bar.update(len(batch))
        full = size + header >= shard_size_mb * 2**20 or header >= HEADER_LIMIT
        last = start + batch_size >= len(pending)
        # and every five minutes: a kill never costs more; SIGTERM and Ctrl-C cost nothing
        if full or last or stop_signals or time.time() - written > 300:
            sender["hidden_size"] = states.shape[1]  # configs have several names for it
            write_shard(free_name(output_dir, rank), latents, records, sender)
            latents, records, size, header, written = {}, {}, 0, 0, time.time()
        if stop_signals:
            bar.write(f"stopped: what was collected is in {output_dir}; the same command continues from it")
            raise SystemExit(STOP_EXIT)
    bar.close()


def write_train_file(path, tasks, question_template):
    """train.json for train_actor.py: each problem and its reference reply."""
    records = []
    for task in tasks:
        question = question_template.replace("{task}", task["task"])
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": task["reply"]}]
        records.append({"id": task["id"], "conversations": turns})
    write_json(path, records)


# ---- 4. Inspect ----------------------------------------------------------------------------------
def inspect(directory, task_id=None, model=None, top_k=5):
    """Print what a directory of messages holds; with the sender's path, what each state says."""
    shards = open_shards(directory)
    ids = [task_id] if task_id else list(shards.records)[:10]
    shards[ids[0]]  # read it: an unknown --id is an error here
    lengths = sorted(shards.lengths.values())
    print(f"{directory}: {len(shards)} messages of {lengths[0]} to {lengths[-1]} states")
    for key, value in shards.sender.items():
        print(f"  {key}: {value!r}")
    if model and shards.sender.get("send", "last") != "last":
        raise UserError(f"{directory} has no states of the last layer, which the output head would read, but --send "
                        f"{shards.sender['send']}: leave out --model_name_or_path")
    if model:
        width = load_config(model).hidden_size
        if width != shards.hidden_size:
            raise UserError(f"{model} is {width} wide, the messages are {shards.hidden_size}: give the sender, "
                            f"{shards.sender['model']}")
        lm, tokenizer = load_lm(model), load_tokenizer(model)
        ids = ids[:1]
    for task_id in ids:
        record = shards.records[task_id]
        print(f"\n{task_id}: {shards.lengths[task_id]} states, {record.get('sender_ms', 0):.1f} ms")
        print("  task:", record["task"][:300])
        print("  plan:", record["plan"][:300])
        if model:
            print_words(lm, tokenizer, shards[task_id], record["plan_token_ids"], top_k)


@torch.inference_mode()
def print_words(lm, tokenizer, states, plan_token_ids, top_k):
    """A line per state (L, D): the token that was written, then the likeliest ones with their share."""
    probs = lm_logits(lm, states.float()).softmax(-1)  # (L, V)
    for n in range(len(states)):
        written = repr(tokenizer.decode(plan_token_ids[n])) if n < len(plan_token_ids) else ""
        line = f"  {n:4d}  {written:16s}"
        top = probs[n].topk(min(top_k, probs.shape[1]))
        for prob, token_id in zip(top.values, top.indices):
            line += f"  {tokenizer.decode(token_id)!r} {prob:.2f}"
        print(line)


@one_line_errors("collect.py")
def main(argv=None):
    args = get_args(argv)
    if args.command == "inspect":
        return inspect(args.directory, args.id, args.model_name_or_path, args.top_k)
    rank, world, _ = this_rank()
    check_output("--output_dir", args.output_dir, [args.model_name_or_path, args.dataset_path])

    # ---- tasks: this rank's part, which does not depend on what is done, so that a rank may start late
    asked_path = os.path.join(args.output_dir, f"asked-rank{rank:05d}.json")
    if args.env:
        game, tasks = open_split(args.env, args.split)
        known = LatentShards(args.output_dir).records
        tasks = sender_tasks(game, tasks[:args.max_samples][rank::world], known, asked_path, rank)
    else:
        every_task = load_tasks(
            args.dataset_path, args.id_field, args.task_field, args.response_field, task_turn=args.task_turn,
            split=args.split, subjects=args.subjects, max_samples=args.max_samples, answer_field=args.answer_field,
            plan_field=args.plan_field)
        tasks = every_task[rank::world]

    # ---- messages
    flags = {name: value for name, value in vars(args).items() if name in collect.__kwdefaults__}
    collect(tasks, args.output_dir, model_name_or_path=args.model_name_or_path,
            default_template=PRESETS[args.command][0], stop_signals=catch_stop(), **flags)
    remove(asked_path)  # the shards hold what was in it
    if rank == 0:
        if args.dataset_path and every_task[0]["reply"] is not None:
            write_train_file(f"{args.output_dir}/train.json", every_task, args.question_template)
        ready = "its part of the messages" if world > 1 else f"{len(tasks)} messages"
        print(f"wrote {ready} to {args.output_dir}; next: python collect.py inspect {args.output_dir}")


if __name__ == "__main__":
    main()
