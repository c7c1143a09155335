"""
Stage 2: the actor learns to read messages: L = L_task + w_sep L_sep + w_align L_align (model.py, section 4).

  python train_actor.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --train_file alfworld_sft.json --task_turn 2 \\
      --hidden_data messages --output_dir actor
  torchrun --nproc_per_node 8 train_actor.py (the same flags): the same result, --global_batch_size is what you set

--message text and --message none train the paper's baselines, CoT (full) and No-CoT. A killed run, started again with
the same flags, continues from its last checkpoint as if nothing had happened, on any number of GPUs.
"""
import argparse
import contextlib
import csv
import math
import os
import re
import resource
import shutil
import time

import matplotlib
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from common import Parser, UserError, atomic_path, boolean, positive, read_json, remove, run, seed_for, write_json
from data import Conversations, global_batch, split_eval
from model import (PLAN_ANNOUNCEMENT, HiddenStateProcessor, LatentActor, adaptive_weight, add_markers, another_task,
                   collate, embedding_rms, head_loss, init_markers, load_config, load_lm, load_tokenizer, open_shards)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LOSS_TERMS = ["task", "align", "kl", "cosine", "sep"]
COLUMNS = ["step", "epoch", "loss", *LOSS_TERMS, "w_align", "w_sep", "lr", "grad_norm", "eval_loss", "infonce",
           "infonce_bound", "tokens_per_s", "memory_gb"]
# flags that may change between a run and its continuation: they move memory and files, not results
NOT_SETTINGS = ["output_dir", "resume", "per_device_train_batch_size", "per_device_eval_batch_size", "logging_steps",
                "save_steps", "save_total_limit", "gradient_checkpointing", "trust_remote_code"]


def get_args(argv):
    parser = Parser(prog="train_actor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    g = parser.add_argument_group("model")
    g.add_argument("--model_name_or_path", required=True, help="the actor to start from: any causal LM with a chat template")
    g.add_argument("--message", choices=["latent", "text", "none"], default="latent",
                   help="what stands between <bop> and <eop>; text and none are the baselines CoT (full) and No-CoT")
    g.add_argument("--plan_announcement", default=PLAN_ANNOUNCEMENT, help="sentence before <bop>; stored with the actor")
    g.add_argument("--num_heads", type=positive, default=8, help="attention heads of the adapter")
    g.add_argument("--adapter_dropout", type=float, default=0.1, help="dropout in the adapter's attention")
    g.add_argument("--adapter_scale", type=float, default=0.2, help="start of the learned input scale s")
    g.add_argument("--adapter_output_scale", type=float, help="start of the learned output scale g; default: RMS of the "
                                                              "actor's token embeddings / s")
    g.add_argument("--trust_remote_code", type=boolean, default=False, help="run code that the model ships")
    g = parser.add_argument_group("data")
    g.add_argument("--train_file", required=True, help=".json or .jsonl with id and conversations (and plan, hidden_state "
                                                       "or hidden_state_path, if not from --hidden_data)")
    g.add_argument("--hidden_data", help="--output_dir of collect.py: messages and plans by id")
    g.add_argument("--task_turn", type=int, default=0, help="fold turns 0 and N into the first human turn (ETO: 2)")
    g.add_argument("--eval_file", help="held-out rows, same format")
    g.add_argument("--eval_ratio", type=float, default=0.0, help="hold out this share of --train_file, chosen by id")
    g.add_argument("--model_max_length", type=int, default=4096, help="a longer row is an error")
    g.add_argument("--prepended_length", type=int, default=2048, help="a longer message is an error")
    g = parser.add_argument_group("loss")
    g.add_argument("--plan_similarity_weight", type=float, default=0.2, help="ceiling of w_align; 0 drops that pass")
    g.add_argument("--random_contrast_weight", type=float, default=1.0, help="ceiling of w_sep; 0 drops that pass")
    g.add_argument("--adaptive_weights", type=boolean, default=True,
                   help="each weight moves between a tenth of its ceiling and the ceiling with its own loss")
    g.add_argument("--infonce_probe_interval", type=int, default=0, help="every N steps, score K messages on K samples")
    g.add_argument("--infonce_probe_size", type=positive, default=8, help="K")
    g = parser.add_argument_group("optimization")
    g.add_argument("--num_train_epochs", type=float, default=3, help="passes over the data")
    g.add_argument("--max_steps", type=positive, help="optimizer steps, instead of epochs")
    g.add_argument("--learning_rate", type=float, default=1e-5, help="peak, then cosine to 0")
    g.add_argument("--adapter_learning_rate", type=float, help="peak for the adapter; default: --learning_rate")
    g.add_argument("--warmup_ratio", type=float, default=0.03, help="share of the steps that warm up linearly")
    g.add_argument("--adam_beta2", type=float, default=0.999, help="AdamW's memory of squared gradients; short runs: 0.95")
    g.add_argument("--weight_decay", type=float, default=0.0, help="AdamW, on matrices only")
    g.add_argument("--max_grad_norm", type=float, default=1.0, help="clip the gradient's norm")
    g.add_argument("--global_batch_size", type=positive, default=16, help="samples per optimizer step, over all ranks")
    g.add_argument("--per_device_train_batch_size", type=positive, default=4, help="samples per pass: memory, not results")
    g.add_argument("--per_device_eval_batch_size", type=positive, default=8, help="samples per evaluation pass")
    g.add_argument("--gradient_checkpointing", type=boolean, default=False, help="recompute activations: less memory")
    g.add_argument("--seed", type=int, default=0, help="of order, curriculum, negatives, adapter and dropout")
    g = parser.add_argument_group("output")
    g.add_argument("--output_dir", required=True, help="the actor directory")
    g.add_argument("--logging_steps", type=positive, default=1, help="a log line every N steps (the csv has them all)")
    g.add_argument("--eval_steps", type=positive, default=500, help="evaluate every N steps, and at the end")
    g.add_argument("--save_steps", type=positive, default=500, help="checkpoint every N steps, and at the end")
    g.add_argument("--save_total_limit", type=positive, default=2, help="checkpoints to keep; the best model is kept besides")
    g.add_argument("--early_stopping_patience", type=int, default=0, help="stop after N evaluations without a new best")
    g.add_argument("--resume", default="auto", help="auto: from the last checkpoint if any; never; or a checkpoint's path")
    return parser, parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# data

def describe_row(tokenizer, row):
    """The first training row, decoded: supervised tokens between » and «, latents counted in their place."""
    text, inside, n = "", False, 0
    span = 0 if row["latents"] is None else len(row["latents"]) - row["skip"]
    while n < len(row["input_ids"]):
        if (row["labels"][n] != -100) != inside:
            inside = not inside
            text += "»" if inside else "«"
        if n == row["start"] and span:
            text += f"[{span} latents]"
            n += span
            continue
        text += tokenizer.decode([row["input_ids"][n]]) + ("" if tokenizer.is_fast and tokenizer.decoder else " ")
        n += 1
    return text + ("«" if inside else "")


# ---------------------------------------------------------------------------------------------------------------------
# evaluation

def all_reduce(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def evaluate(actor, data, positions, args, device, rank, world):
    """Mean CE over the supervised tokens of held-out rows, always with the whole latent message (r = 0)."""
    actor.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # summed CE, tokens
    mine = sorted(positions, key=lambda n: data.lengths[n])[rank::world]
    for i in range(0, len(mine), args.per_device_eval_batch_size):
        part = mine[i:i + args.per_device_eval_batch_size]
        with autocast(device):
            loss, _ = actor(collate([data.row(n, args.message) for n in part], device))
        totals += torch.tensor([loss.item(), sum(data.n_labels[n] for n in part)], device=device)
    actor.train()
    loss, tokens = all_reduce(totals).tolist()
    return loss / tokens


@torch.no_grad()
def infonce_probe(actor, data, positions, args, device, rank, world):
    """Does a message say which sample it belongs to? Scores K messages on K samples by -CE -> (InfoNCE loss, bound
    log K - loss in nats): a lower bound on the mutual information of message and behaviour."""
    actor.eval()
    K = min(args.infonce_probe_size, len(positions))
    chosen = positions[:K]
    scores = torch.zeros(K, K, device=device)
    for i in range(rank, K, world):
        batch = collate([data.row(chosen[i], args.message, source=j) for j in chosen], device)
        with autocast(device):
            hidden_states, labels = actor.states(batch)
            owner = (batch["labels"][:, 1:] != -100).nonzero()[:, 0]  # (N,) which message a position read

            def loss_fn(logits, part):
                ce = F.cross_entropy(logits, labels[part], reduction="none")
                return ce.sum(), torch.zeros(K, device=device).index_add(0, owner[part], ce)

            _, ce = head_loss(actor.lm, hidden_states, loss_fn)
        scores[i] = -ce / data.n_labels[chosen[i]]
    actor.train()
    loss = F.cross_entropy(all_reduce(scores), torch.arange(K, device=device)).item()
    return loss, math.log(K) - loss


# ---------------------------------------------------------------------------------------------------------------------
# loop

def autocast(device):
    """bf16 products over fp32 parameters on CUDA: a step of 1e-5 is lost in bf16 parameters. Nothing on CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else contextlib.nullcontext()


def lr_scale(step, max_steps, warmup):
    """Linear warm-up, then cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, max_steps - warmup)))


def last_checkpoint(directory):
    found = [int(m[1]) for m in map(re.compile(r"checkpoint-(\d+)").fullmatch, os.listdir(directory)) if m]
    return os.path.join(directory, f"checkpoint-{max(found)}") if found else None


def plot(csv_path, png_path):
    with open(csv_path) as f:
        rows = list(csv.DictReader(f))
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in ["loss", "task", "align", "sep", "eval_loss"]:
        points = [(int(r["step"]), float(r[name])) for r in rows if r[name]]
        if any(y for _, y in points):
            axes.plot(*zip(*points), label=name, marker="o" if name == "eval_loss" else None, markersize=4)
    axes.set(xlabel="step", ylabel="nats per supervised token", ylim=(0, None))
    axes.legend()
    with atomic_path(png_path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def train(args):
    # ranks, from torchrun; without it, one process
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    if args.global_batch_size % world:
        raise UserError(f"--global_batch_size {args.global_batch_size} must be a multiple of the {world} ranks")

    # where to start: nothing, or a checkpoint of the same run
    checkpoint = None if args.resume in ("auto", "never") else args.resume
    if args.resume == "auto" and os.path.isdir(args.output_dir):
        checkpoint = last_checkpoint(args.output_dir)
    state = {"step": 0, "best_step": None, "best_eval_loss": math.inf, "bad_evals": 0, "stopped": False, "last": {}}
    settings = {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS}
    if checkpoint:
        state = read_json(os.path.join(checkpoint, "trainer_state.json"))
        changed = [k for k in settings if settings[k] != state["settings"].get(k)]
        if changed:
            raise UserError(f"{checkpoint} was trained with another {', '.join('--' + k for k in changed)}: give the same "
                            f"flags, another --output_dir, or --resume never")

    # --resume PATH into a new directory: the best model so far comes along, or is forgotten if it is gone
    best_dir, best_source = os.path.join(args.output_dir, f"best-{state['best_step']}"), None
    if state["best_step"] and not os.path.isdir(best_dir):
        best_source = os.path.join(os.path.dirname(os.path.abspath(checkpoint)), os.path.basename(best_dir))
        if not os.path.isdir(best_source):
            best_source = checkpoint if state["best_step"] == state["step"] else None
        if best_source is None:
            state |= {"best_step": None, "best_eval_loss": math.inf, "bad_evals": 0}

    # data, all checked before a model is loaded
    source = checkpoint or args.model_name_or_path
    tokenizer, config = load_tokenizer(source, args.trust_remote_code), load_config(source, args.trust_remote_code)
    if config.hidden_size % args.num_heads:
        raise UserError(f"--num_heads {args.num_heads} does not divide the actor's width of {config.hidden_size}")
    new_ids = add_markers(tokenizer)
    shards = open_shards(args.hidden_data) if args.hidden_data and args.message != "none" else None
    max_length = min(args.model_max_length, getattr(config, "max_position_embeddings", 2**31))
    data = Conversations(args.train_file, args, tokenizer, shards, max_length)
    train_rows, eval_rows = split_eval(data, args.eval_ratio, args.seed)
    eval_data = data
    if args.eval_file:
        eval_data = Conversations(args.eval_file, args, tokenizer, shards, max_length, data.width)
        train_rows, eval_rows = list(range(len(data))), list(range(len(eval_data)))
    if not train_rows:
        raise UserError(f"{args.train_file} has no training rows (--eval_ratio {args.eval_ratio})")
    train_tasks = [data.tasks[n] for n in train_rows]
    latent = args.message == "latent"
    if latent and args.random_contrast_weight and len(set(train_tasks)) < 2:
        raise UserError(f"{args.train_file}: L_sep needs a message of another task, but all tasks are the same: add rows "
                        f"or set --random_contrast_weight 0")
    max_steps = args.max_steps or math.ceil(args.num_train_epochs * len(train_rows) / args.global_batch_size)
    if state["stopped"] and os.path.exists(os.path.join(args.output_dir, "trainer_state.json")):  # written last of all
        if rank == 0:
            print(f"{args.output_dir} is finished ({state['step']} steps); --resume never trains it again")
        return

    # model: fp32 parameters; the adapter starts as loud as the actor's words
    torch.manual_seed(args.seed)
    if checkpoint:
        actor = LatentActor.load(checkpoint, "fp32", device, args.trust_remote_code)
    else:
        lm, adapter = load_lm(args.model_name_or_path, "fp32", args.trust_remote_code), None
        init_markers(lm, new_ids)
        info = {"message": args.message, "plan_announcement": args.plan_announcement, "format_version": 1}
        if latent:
            rms = embedding_rms(lm)
            g = rms / args.adapter_scale if args.adapter_output_scale is None else args.adapter_output_scale
            adapter = HiddenStateProcessor(data.width, config.hidden_size, args.num_heads, args.adapter_dropout,
                                           args.adapter_scale, g)
            info |= {"sender_hidden_size": data.width, "num_heads": args.num_heads, "sender": shards and shards.sender["model"]}
            if rank == 0:
                print(f"adapter {data.width} -> {config.hidden_size}: s = {args.adapter_scale}, g = {g:.3f} (the actor's token "
                      f"embeddings have RMS {rms:.3f})")
        actor = LatentActor(lm, tokenizer, adapter, info).to(device)
    if latent:
        actor.adapter.attention.dropout = args.adapter_dropout
    if args.gradient_checkpointing:
        actor.lm.activation_checkpointing_enable()
    actor.train()
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
    model = DDP(actor, device_ids=[local] if device.startswith("cuda") else None) if world > 1 else actor

    matrices, vectors = ([p for p in actor.lm.parameters() if (p.dim() > 1) == m] for m in (True, False))
    adapter_lr = args.adapter_learning_rate or args.learning_rate
    groups = [{"params": matrices, "lr": args.learning_rate, "weight_decay": args.weight_decay},
              {"params": vectors, "lr": args.learning_rate, "weight_decay": 0.0}]
    if latent:
        groups.append({"params": list(actor.adapter.parameters()), "lr": adapter_lr, "weight_decay": 0.0})
    peaks = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, args.adam_beta2))
    if checkpoint:
        optimizer.load_state_dict(torch.load(os.path.join(checkpoint, "optimizer.pt"), weights_only=True,
                                             map_location=device))

    # files
    csv_path = os.path.join(args.output_dir, "loss_log.csv")
    if rank == 0:
        os.makedirs(args.output_dir, exist_ok=True)
        for name in os.listdir(args.output_dir):  # half-written files of a killed run, all of an old run with `never`
            if ".tmp" in name or (not checkpoint and re.fullmatch(r"(checkpoint|best)-\d+|trainer_state.json", name)):
                remove(os.path.join(args.output_dir, name))
        if best_source:
            with atomic_path(best_dir) as temporary:
                shutil.copytree(best_source, temporary, ignore=shutil.ignore_patterns("optimizer.pt", "trainer_state.json"))
        kept = []
        if checkpoint and os.path.exists(csv_path):  # steps after the checkpoint are run, and logged, again
            with open(csv_path) as f:
                kept = [r for r in csv.DictReader(f) if int(r["step"]) <= state["step"]]
        with atomic_path(csv_path) as temporary, open(temporary, "w", newline="") as f:
            csv.DictWriter(f, COLUMNS).writeheader()
            csv.DictWriter(f, COLUMNS).writerows(kept)
        log = open(csv_path, "a", newline="")
        writer = csv.DictWriter(log, COLUMNS)
        print(f"{len(train_rows)} training rows, {len(eval_rows)} held out, {max_steps} steps of {args.global_batch_size} "
              f"on {world} x {device.split(':')[0]}" + (f", continuing at step {state['step']}" if checkpoint else ""))
        if not checkpoint:
            print("first row: " + describe_row(tokenizer, data.row(train_rows[0], args.message)))

    def save(directory, resumable):
        with atomic_path(directory) as temporary:
            actor.save(temporary)
            if resumable:
                torch.save(optimizer.state_dict(), os.path.join(temporary, "optimizer.pt"))
                write_json(os.path.join(temporary, "trainer_state.json"), {**state, "settings": settings})

    warmup = max(1, round(args.warmup_ratio * max_steps))
    bar = tqdm(total=max_steps, initial=state["step"], desc="train", unit="step", disable=rank > 0 or None)
    clock, seen_tokens = time.perf_counter(), 0
    for step in range(state["step"], state["step"] if state["stopped"] else max_steps):
        # this rank's share of the global batch: every world-th sample by length, so that the ranks' work is equal
        samples = global_batch(step, len(train_rows), args.global_batch_size, args.seed)  # [(draw, position)]
        n_labels = sum(data.n_labels[train_rows[p]] for _, p in samples)  # over all ranks and accumulation steps
        mine = sorted(samples, key=lambda sample: data.lengths[train_rows[sample[1]]])[rank::world]
        micro = [mine[i:i + args.per_device_train_batch_size] for i in range(0, len(mine), args.per_device_train_batch_size)]
        # the weights follow the last step's losses: known before the pass, the same for any split of the batch
        w_align, w_sep = args.plan_similarity_weight, args.random_contrast_weight
        if args.adaptive_weights and state["last"]:
            w_align = adaptive_weight(w_align, state["last"]["align"], 1.0)
            w_sep = adaptive_weight(w_sep, state["last"]["sep"], math.log(2))
        torch.manual_seed(seed_for("dropout", args.seed, step, rank))  # a restart needs no saved RNG state
        sums = torch.zeros(1 + len(LOSS_TERMS), dtype=torch.float64, device=device)
        for m, part in enumerate(micro):
            rows, plan_rows, other_rows = [], [], []
            for k, position in part:
                n = train_rows[position]
                tenths = seed_for("curriculum", args.seed, k) % 11 if latent else 0
                rows.append(data.row(n, args.message, tenths))
                if latent and w_align:
                    plan_rows.append(data.row(n, "text"))
                if latent and w_sep:  # the whole message of another task, at the same ratio
                    other = train_rows[another_task(position, train_tasks, args.seed, k)]
                    other_rows.append(data.row(n, "latent", tenths, source=other))
            batch, plan_batch, other_batch = (collate(r, device) if r else None for r in (rows, plan_rows, other_rows))
            seen_tokens += int(batch["attention_mask"].sum())
            # gradients are summed over ranks once, in the last backward pass of the step
            with model.no_sync() if world > 1 and m < len(micro) - 1 else contextlib.nullcontext():
                with autocast(device):
                    loss, terms = model(batch, plan_batch, other_batch, w_align, w_sep)
                (loss * world / n_labels).backward()  # DDP averages over ranks: the mean over the global batch's labels
            sums += torch.cat([loss.detach()[None], terms]) / n_labels
        loss, *terms = all_reduce(sums).tolist()
        grad_norm = torch.nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm).item()
        if not math.isfinite(loss + grad_norm):
            raise UserError(f"step {step + 1}: the loss is {loss}, its gradient {grad_norm}; nothing was updated. Samples: "
                            f"{', '.join(data.ids[train_rows[p]] for _, p in samples)}. Lower --learning_rate, or look at their messages")
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * lr_scale(step, max_steps, warmup)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state |= {"step": step + 1, "last": dict(zip(LOSS_TERMS, terms))}

        # evaluate, log, save
        record = {"step": step + 1, "epoch": round((step + 1) * args.global_batch_size / len(train_rows), 3), "loss": loss,
                  **state["last"], "w_align": w_align, "w_sep": w_sep, "lr": optimizer.param_groups[0]["lr"],
                  "grad_norm": grad_norm}
        last = step + 1 == max_steps
        if latent and args.infonce_probe_interval and (step + 1) % args.infonce_probe_interval == 0:
            probe_data, probe_rows = (eval_data, eval_rows) if len(eval_rows) > 1 else (data, train_rows)
            record["infonce"], record["infonce_bound"] = infonce_probe(actor, probe_data, probe_rows, args, device, rank,
                                                                       world)
        if eval_rows and ((step + 1) % args.eval_steps == 0 or last):
            record["eval_loss"] = evaluate(actor, eval_data, eval_rows, args, device, rank, world)
            best = record["eval_loss"] < state["best_eval_loss"]
            state["bad_evals"] = 0 if best else state["bad_evals"] + 1
            if best:
                state |= {"best_step": step + 1, "best_eval_loss": record["eval_loss"]}
                if rank == 0:
                    remove(os.path.join(args.output_dir, f"best-{step + 1}"))
                    save(os.path.join(args.output_dir, f"best-{step + 1}"), resumable=False)
            last = last or 0 < args.early_stopping_patience <= state["bad_evals"]
        state["stopped"] = last
        elapsed = time.perf_counter() - clock
        if rank == 0:
            memory = (torch.cuda.max_memory_allocated(device) if device.startswith("cuda")
                      else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9
            record |= {"tokens_per_s": round(seen_tokens * world / elapsed), "memory_gb": round(memory, 2)}
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in record.items()})
            log.flush()
            if (step + 1) % args.logging_steps == 0 or "eval_loss" in record or "infonce" in record:
                bar.write(f"step {step + 1}/{max_steps} " + " ".join(
                    f"{k} {v:.4g}" for k, v in record.items() if k not in ("step", "kl", "cosine", "epoch")))
        if (step + 1) % args.save_steps == 0 or last:
            if rank == 0:
                save(os.path.join(args.output_dir, f"checkpoint-{step + 1}"), resumable=True)
                prune(args.output_dir, args.save_total_limit, state["best_step"])
            if world > 1:
                dist.barrier()
        clock, seen_tokens = time.perf_counter(), 0
        bar.update()
        if last:
            break
    bar.close()

    # the output directory itself is the best model, or the last where nothing was held out
    if rank == 0:
        log.close()
        plot(csv_path, os.path.join(args.output_dir, "loss_curve.png"))
        final = os.path.join(args.output_dir, f"{'best' if state['best_step'] else 'checkpoint'}-"
                                              f"{state['best_step'] or state['step']}")
        for name in sorted(os.listdir(final)):
            if name not in ("optimizer.pt", "trainer_state.json"):
                with atomic_path(os.path.join(args.output_dir, name)) as temporary:
                    shutil.copy(os.path.join(final, name), temporary)
        write_json(os.path.join(args.output_dir, "trainer_state.json"), {**state, "settings": settings})
        best = f", best eval loss {state['best_eval_loss']:.4f} at step {state['best_step']}" if state["best_step"] else ""
        print(f"wrote the actor of {os.path.basename(final)} to {args.output_dir}{best}, with loss_log.csv and "
              f"loss_curve.png; next: python eval_alfworld.py --model_path {args.output_dir} …")
    if world > 1:
        dist.destroy_process_group()


def prune(directory, limit, best_step):
    """Keep the newest `limit` checkpoints and the best model. Only after a new checkpoint is on disk."""
    steps = sorted(int(m[1]) for m in map(re.compile(r"checkpoint-(\d+)").fullmatch, os.listdir(directory)) if m)
    for old in steps[:-limit]:
        remove(os.path.join(directory, f"checkpoint-{old}"))
    for name in os.listdir(directory):
        if re.fullmatch(r"best-\d+", name) and name != f"best-{best_step}":
            remove(os.path.join(directory, name))


def main(argv=None):
    parser, args = get_args(argv)
    run(parser, train, args)


if __name__ == "__main__":
    main()
