"""
Stage 2: the actor learns to read messages: L = L_task + w_sep L_sep + w_align L_align (model.py, section 4).

  python train_actor.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --train_file alfworld_sft.json --task_turn 2 \\
      --hidden_data messages --output_dir actor
  torchrun --nproc_per_node 8 train_actor.py (the same flags): the same result, --global_batch_size is what you set

--message text and --message none train the paper's baselines, CoT (full) and No-CoT. A killed run, started again with
the same flags, continues from its last checkpoint as if nothing had happened, on any number of GPUs.
"""
import argparse
import math
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from common import SIGTERM_EXIT, Parser, UserError, boolean, catch_sigterm, memory_gb, positive, run, seed_for
from data import Conversations, another_task, global_batch, split_eval
from lm import load_config, load_lm, load_tokenizer
from model import (PLAN_ANNOUNCEMENT, HiddenStateProcessor, LatentActor, adaptive_weight, add_markers, collate,
                   embedding_rms, init_markers, open_shards)
from training import (accumulate, all_reduce, autocast, clean, clip_gradients, compile_layers, distribute, find_start,
                      is_finished, load_optimizer, lr_scale, open_log, plot, prune, publish, ranks, save_run)

LOSS_TERMS = ["task", "align", "kl", "cosine", "sep"]
COLUMNS = ["step", "epoch", "loss", *LOSS_TERMS, "w_align", "w_sep", "lr", "grad_norm", "eval_loss", "infonce",
           "infonce_bound", "tokens_per_s", "memory_gb"]


def get_args(argv):
    parser = Parser(prog="train_actor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    g = parser.add_argument_group("model")
    g.add_argument("--model_name_or_path", required=True, help="any causal LM with a chat template")
    g.add_argument("--message", choices=["latent", "text", "none"], default="latent",
                   help="what stands between <bop> and <eop>; text and none are the baselines CoT (full) and No-CoT")
    g.add_argument("--plan_announcement", default=PLAN_ANNOUNCEMENT, help="stands before <bop>; kept with the actor")
    g.add_argument("--num_heads", type=positive, default=8, help="attention heads of the adapter")
    g.add_argument("--adapter_dropout", type=float, default=0.1, help="dropout in the adapter's attention")
    g.add_argument("--adapter_scale", type=float, default=0.2, help="start of the learned input scale s")
    g.add_argument("--adapter_output_scale", type=float,
                   help="start of the learned output scale g; default: RMS of the actor's token embeddings / s")
    g.add_argument("--trust_remote_code", type=boolean, default=False, help="run code that the model ships")
    g = parser.add_argument_group("data")
    g.add_argument("--train_file", required=True, help=".json or .jsonl with id and conversations (and plan, "
                   "hidden_state or hidden_state_path, if not from --hidden_data)")
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
    g.add_argument("--adam_beta2", type=float, default=0.999, help="AdamW's memory of squares; short runs: 0.95")
    g.add_argument("--weight_decay", type=float, default=0.0, help="AdamW, on matrices only")
    g.add_argument("--max_grad_norm", type=float, default=1.0, help="clip the gradient's norm")
    g.add_argument("--global_batch_size", type=positive, default=16, help="samples per optimizer step, over all ranks")
    g.add_argument("--per_device_train_batch_size", type=positive, default=4, help="samples per pass: memory only")
    g.add_argument("--per_device_eval_batch_size", type=positive, default=8, help="samples per evaluation pass")
    g.add_argument("--gradient_checkpointing", type=boolean, default=False, help="recompute activations: less memory")
    g.add_argument("--fsdp", type=boolean, default=False, help="shard parameters, gradients and Adam over the ranks")
    g.add_argument("--compile", type=boolean, default=False, help="torch.compile the LM's layers")
    g.add_argument("--seed", type=int, default=0, help="of order, curriculum, negatives, adapter and dropout")
    g = parser.add_argument_group("output")
    g.add_argument("--output_dir", required=True, help="the actor directory")
    g.add_argument("--logging_steps", type=positive, default=1, help="a log line every N steps (the csv has them all)")
    g.add_argument("--eval_steps", type=positive, default=500, help="evaluate every N steps, and at the end")
    g.add_argument("--save_steps", type=positive, default=500, help="checkpoint every N steps, and at the end")
    g.add_argument("--save_total_limit", type=positive, default=2, help="checkpoints to keep, besides the best")
    g.add_argument("--early_stopping_patience", type=int, default=0, help="stop after N evaluations without a new best")
    g.add_argument("--resume", default="auto", help="auto: from the last checkpoint; never; or a checkpoint's path")
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
# evaluation; every rank makes the same number of passes, because under --fsdp each pass needs all ranks

@torch.no_grad()
def evaluate(actor, data, positions, args, device, rank, world):
    """Mean CE over the supervised tokens of held-out rows, always with the whole latent message (r = 0)."""
    actor.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # summed CE, tokens
    order = sorted(positions, key=lambda n: data.lengths[n])
    for i in range(0, len(order[::world]), args.per_device_eval_batch_size):
        part = order[rank::world][i:i + args.per_device_eval_batch_size]
        with autocast(device):
            loss, _ = actor(collate([data.row(n, args.message) for n in part or order[:1]], device))
        totals += torch.tensor([loss.item() if part else 0, sum(data.n_labels[n] for n in part)], device=device)
    actor.train()
    loss, tokens = all_reduce(totals).tolist()
    return loss / tokens


@torch.no_grad()
def infonce_probe(actor, data, positions, args, device, rank, world):
    """Does a message say which sample it belongs to? Scores K messages on K samples by -CE -> (InfoNCE loss, bound
    log K - loss in nats): a lower bound on the mutual information of message and behaviour."""
    actor.eval()
    chosen = positions[:args.infonce_probe_size]
    K = len(chosen)
    scores = torch.zeros(K, K, device=device)
    for pair in range(rank, math.ceil(K * K / world) * world, world):
        i, j = divmod(pair % (K * K), K)  # sample i reads the message of sample j
        with autocast(device):
            loss, _ = actor(collate([data.row(chosen[i], args.message, source=chosen[j])], device))
        if pair < K * K:
            scores[i, j] = -loss / data.n_labels[chosen[i]]
    actor.train()
    loss = F.cross_entropy(all_reduce(scores), torch.arange(K, device=device)).item()
    return loss, math.log(K) - loss


# ---------------------------------------------------------------------------------------------------------------------
# loop

def train(args):
    rank, world, device = ranks(args)
    settings, state, checkpoint, best_source = find_start(args)

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
        raise UserError(f"{args.train_file}: L_sep needs a message of another task, but all tasks are the same: add "
                        f"rows or set --random_contrast_weight 0")
    max_steps = args.max_steps or math.ceil(args.num_train_epochs * len(train_rows) / args.global_batch_size)
    if is_finished(args, state):
        if rank == 0:
            print(f"{args.output_dir} is finished ({state['step']} steps); --resume never trains it again")
        return

    # model: fp32 parameters; the adapter starts as loud as the actor's words
    torch.manual_seed(args.seed)
    if checkpoint:
        actor = LatentActor.load(checkpoint, "fp32", "cpu", args.trust_remote_code)
    else:
        lm, adapter = load_lm(args.model_name_or_path, "fp32", args.trust_remote_code), None
        init_markers(lm, new_ids)
        info = {"message": args.message, "plan_announcement": args.plan_announcement, "format_version": 1}
        if latent:
            rms = embedding_rms(lm)
            g = rms / args.adapter_scale if args.adapter_output_scale is None else args.adapter_output_scale
            adapter = HiddenStateProcessor(data.width, config.hidden_size, args.num_heads, args.adapter_dropout,
                                           args.adapter_scale, g)
            info |= {"sender_hidden_size": data.width, "num_heads": args.num_heads,
                     "sender": shards and shards.sender["model"]}
            if rank == 0:
                print(f"adapter {data.width} -> {config.hidden_size}: s = {args.adapter_scale}, g = {g:.3f} (the "
                      f"actor's token embeddings have RMS {rms:.3f})")
        actor = LatentActor(lm, tokenizer, adapter, info)
    if latent:
        actor.adapter.attention.dropout = args.adapter_dropout
    if args.gradient_checkpointing:
        actor.lm.activation_checkpointing_enable()
    if args.compile:
        compile_layers(actor.lm)
    actor.train()
    model = distribute(actor, args, world, device)

    matrices, vectors = ([p for p in actor.lm.parameters() if (p.dim() > 1) == m] for m in (True, False))
    adapter_lr = args.adapter_learning_rate or args.learning_rate
    groups = [{"params": matrices, "lr": args.learning_rate, "weight_decay": args.weight_decay},
              {"params": vectors, "lr": args.learning_rate, "weight_decay": 0.0}]
    if latent:
        groups.append({"params": list(actor.adapter.parameters()), "lr": adapter_lr, "weight_decay": 0.0})
    peaks = [group["lr"] for group in groups]
    fused = device.startswith("cuda") or None  # one kernel, without temporaries as large as the parameters
    optimizer = torch.optim.AdamW(groups, betas=(0.9, args.adam_beta2), fused=fused)
    if checkpoint:
        load_optimizer(actor, optimizer, checkpoint)

    # files
    csv_path = os.path.join(args.output_dir, "loss_log.csv")
    if rank == 0:
        clean(args, checkpoint, best_source, state["best_step"])
        log, writer = open_log(csv_path, COLUMNS, state["step"])
        print(f"{len(train_rows)} training rows, {len(eval_rows)} held out, {max_steps} steps of "
              f"{args.global_batch_size} on {world} x {device.split(':')[0]}"
              + (f", continuing at step {state['step']}" if checkpoint else ""))
        if not checkpoint:
            print("first row: " + describe_row(tokenizer, data.row(train_rows[0], args.message)))

    def save(name, resumable):
        save_run(os.path.join(args.output_dir, name), rank, actor, actor.save, optimizer if resumable else None,
                 {**state, "settings": settings})

    warmup = max(1, round(args.warmup_ratio * max_steps))
    bar = tqdm(total=max_steps, initial=state["step"], desc="train", unit="step", disable=rank > 0 or None)
    clock, seen_tokens, sigterm = time.perf_counter(), 0, catch_sigterm()
    for step in range(state["step"], state["step"] if state["stopped"] else max_steps):
        # this rank's share of the global batch: every world-th sample by length, so that the ranks' work is equal
        samples = global_batch(step, len(train_rows), args.global_batch_size, args.seed)  # [(draw, position)]
        n_labels = sum(data.n_labels[train_rows[p]] for _, p in samples)  # over all ranks and accumulation steps
        mine = sorted(samples, key=lambda sample: data.lengths[train_rows[sample[1]]])[rank::world]
        size = args.per_device_train_batch_size
        micro = [mine[i:i + size] for i in range(0, len(mine), size)]
        # the weights follow the last step's losses: known before the pass, the same for any split of the batch
        w_align, w_sep = args.plan_similarity_weight, args.random_contrast_weight
        if args.adaptive_weights and state["last"]:
            w_align = adaptive_weight(w_align, state["last"]["align"], 1.0)
            w_sep = adaptive_weight(w_sep, state["last"]["sep"], math.log(2))
        torch.manual_seed(seed_for("dropout", args.seed, step, rank))  # a restart needs no saved RNG state
        sums = torch.zeros(2 + len(LOSS_TERMS), dtype=torch.float64, device=device)
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
            with accumulate(model, last=m + 1 == len(micro)):
                with autocast(device):
                    loss, terms = model(batch, plan_batch, other_batch, w_align, w_sep)
                (loss * world / n_labels).backward()  # ranks are averaged: the mean over the global batch's labels
            sums[1:] += torch.cat([loss.detach()[None], terms]) / n_labels
        sums[0] = len(sigterm)
        preempted, loss, *terms = all_reduce(sums).tolist()
        grad_norm = clip_gradients(actor.parameters(), args.max_grad_norm)
        if not math.isfinite(loss + grad_norm):
            raise UserError(f"step {step + 1}: the loss is {loss}, its gradient {grad_norm}; nothing was updated. "
                            f"Samples: {', '.join(data.ids[train_rows[p]] for _, p in samples)}. "
                            f"Lower --learning_rate, or look at their messages")
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * lr_scale(step, max_steps, warmup)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state |= {"step": step + 1, "last": dict(zip(LOSS_TERMS, terms))}

        # evaluate, log, save
        epoch = (step + 1) * args.global_batch_size / len(train_rows)
        record = {"step": step + 1, "epoch": round(epoch, 3), "loss": loss, **state["last"], "w_align": w_align,
                  "w_sep": w_sep, "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm}
        last = step + 1 == max_steps
        if latent and args.infonce_probe_interval and (step + 1) % args.infonce_probe_interval == 0:
            probe_data, probe_rows = (eval_data, eval_rows) if len(eval_rows) > 1 else (data, train_rows)
            record["infonce"], record["infonce_bound"] = infonce_probe(actor, probe_data, probe_rows, args, device,
                                                                       rank, world)
        if eval_rows and ((step + 1) % args.eval_steps == 0 or last):
            record["eval_loss"] = evaluate(actor, eval_data, eval_rows, args, device, rank, world)
            best = record["eval_loss"] < state["best_eval_loss"]
            state["bad_evals"] = 0 if best else state["bad_evals"] + 1
            if best:
                state |= {"best_step": step + 1, "best_eval_loss": record["eval_loss"]}
                save(f"best-{step + 1}", resumable=False)
            last = last or 0 < args.early_stopping_patience <= state["bad_evals"]
        state["stopped"] = last
        elapsed = time.perf_counter() - clock
        if rank == 0:
            record |= {"tokens_per_s": round(seen_tokens * world / elapsed), "memory_gb": round(memory_gb(device), 2)}
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in record.items()})
            log.flush()
            if (step + 1) % args.logging_steps == 0 or "eval_loss" in record or "infonce" in record:
                bar.write(f"step {step + 1}/{max_steps} " + " ".join(
                    f"{k} {v:.4g}" for k, v in record.items() if k not in ("step", "kl", "cosine", "epoch")))
        if (step + 1) % args.save_steps == 0 or last or preempted:
            save(f"checkpoint-{step + 1}", resumable=True)
            if rank == 0:
                prune(args.output_dir, args.save_total_limit, state["best_step"])
        clock, seen_tokens = time.perf_counter(), 0
        bar.update()
        if last:
            break
        if preempted:
            if rank == 0:
                bar.write(f"SIGTERM: wrote {args.output_dir}/checkpoint-{step + 1}; the same command continues from it")
            raise SystemExit(SIGTERM_EXIT)
    bar.close()

    # the output directory itself is the best model, or the last where nothing was held out
    if rank == 0:
        log.close()
        plot(csv_path, os.path.join(args.output_dir, "loss_curve.png"), ["loss", "task", "align", "sep", "eval_loss"],
             "nats per supervised token")
        print(f"wrote the actor of {publish(args, state, settings)} to {args.output_dir}, with loss_log.csv and "
              f"loss_curve.png; next: python eval_alfworld.py --model_path {args.output_dir} …")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def main(argv=None):
    parser, args = get_args(argv)
    run(parser, train, args)


if __name__ == "__main__":
    main()
