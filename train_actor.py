"""
Stage 2: the actor learns to read messages: L = L_task + w_sep L_sep + w_align L_align (model.py, 3).

  python train_actor.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --train_file alfworld_sft.json \\
      --task_turn 2 --hidden_data messages --output_dir actor
  torchrun --nproc_per_node 8 train_actor.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct --fsdp true \\
      --gradient_checkpointing true --train_file alfworld_sft.json --task_turn 2 \\
      --hidden_data messages --output_dir actor

The result is the same on any number of GPUs: --global_batch_size is what you set. --message text and
--message none train the paper's baselines, CoT (full) and No-CoT. A killed run, started again with the
same flags, continues from its last checkpoint as if nothing had happened.
"""
import argparse
import contextlib
import functools
import math
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import (SIGTERM_EXIT, Parser, UserError, boolean, catch_sigterm, json_object, latest_checkpoint,
                    load_optimizer, memory_gb, one_line_errors, open_log, plot_curves, positive, prepare_output, progress,
                    prune_checkpoints, publish_model, read_state, save_checkpoint, seed_for, this_rank)
from data import PLAN_ANNOUNCEMENT, Conversations, another_task, global_batch, split_eval
from model import (ADAPTER_FORMAT, HiddenStateProcessor, LatentActor, adaptive_weight, add_markers, collate,
                   context_length, decoder_layers, embedding_rms, init_markers, load_config, load_lm, load_tokenizer,
                   open_shards)

NOT_SHOWN = ("step", "epoch", "kl", "cosine_distance")  # columns of loss_log.csv that the log line leaves out
TERMS = ["task", "align", "kl", "cosine_distance", "sep"]
COLUMNS = ["step", "epoch", "loss", *TERMS, "w_align", "w_sep", "lr", "grad_norm", "eval_loss", "infonce",
           "infonce_bound", "tokens_per_s", "memory_gb"]
# flags that may change between a run and its continuation: they move memory and files, not results
NOT_SETTINGS = ["output_dir", "resume", "per_device_train_batch_size", "per_device_eval_batch_size", "logging_steps",
                "save_steps", "save_total_limit", "gradient_checkpointing", "fsdp", "compile", "trust_remote_code",
                "self_check"]


def get_args(argv):
    parser = Parser(prog="train_actor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    g = parser.add_argument_group("model")
    g.add_argument("--model_name_or_path", required=True, help="any causal LM with a chat template")
    g.add_argument("--message", choices=["latent", "text", "none"], default="latent",
                   help="what stands between <bop> and <eop>; text and none are the baselines CoT (full) and No-CoT")
    g.add_argument("--plan_announcement", default=PLAN_ANNOUNCEMENT,
                   help="stands before <bop>; kept with the actor")
    g.add_argument("--num_heads", type=positive, default=8, help="attention heads of the adapter")
    g.add_argument("--adapter_dropout", type=float, default=0.1, help="dropout in the adapter's attention")
    g.add_argument("--adapter_scale", type=float, default=0.2, help="start of the learned input scale s")
    g.add_argument("--adapter_output_scale", type=float,
                   help="start of the learned output scale g; default: RMS of the actor's word embeddings / s")
    g.add_argument("--chat_template_kwargs", type=json_object, help='JSON for the chat template; default: '
                   '{"enable_thinking": false}; kept with the actor')
    g.add_argument("--trust_remote_code", type=boolean, default=False,
                   help="run code that the model ships")
    g.add_argument("--self_check", type=boolean, default=True,
                   help="try at the start whether the model can be used")
    g = parser.add_argument_group("data")
    g.add_argument("--train_file", required=True,
                   help=".json or .jsonl with id and conversations (and plan, "
                   "hidden_state or hidden_state_path, if not from --hidden_data)")
    g.add_argument("--hidden_data", help="--output_dir of collect.py: messages and plans by id")
    g.add_argument("--task_turn", type=int, default=0,
                   help="fold turns 0 and N into the first human turn (ETO: 2)")
    g.add_argument("--eval_file", help="held-out samples, same format")
    g.add_argument("--eval_ratio", type=float, default=0.0,
                   help="hold out this share of --train_file, chosen by id")
    g.add_argument("--model_max_length", type=int, default=4096, help="a longer sample is an error")
    g.add_argument("--prepended_length", type=int, default=2048, help="a longer message is an error")
    g = parser.add_argument_group("loss")
    g.add_argument("--plan_similarity_weight", type=float, default=0.2,
                   help="ceiling of w_align; 0 drops that pass")
    g.add_argument("--random_contrast_weight", type=float, default=1.0,
                   help="ceiling of w_sep; 0 drops that pass")
    g.add_argument("--adaptive_weights", type=boolean, default=True,
                   help="each weight moves between a tenth of its ceiling and the ceiling with its own loss")
    g.add_argument("--curriculum", type=float, nargs="+", default=[r / 10 for r in range(11)], metavar="R",
                   help="the ratios that are drawn: the share of a message that is shown as words (paper: 0 0.1 ... 1; "
                   "0: pure latent messages)")
    g.add_argument("--infonce_probe_interval", type=int, default=0,
                   help="every N steps, score K messages on K samples")
    g.add_argument("--infonce_probe_size", type=positive, default=8, help="K")
    g = parser.add_argument_group("optimization")
    g.add_argument("--num_train_epochs", type=float, default=3, help="passes over the data")
    g.add_argument("--max_steps", type=positive, help="optimizer steps, instead of epochs")
    g.add_argument("--learning_rate", type=float, default=1e-5, help="peak, then cosine to 0")
    g.add_argument("--adapter_learning_rate", type=float,
                   help="peak for the adapter; default: --learning_rate")
    g.add_argument("--warmup_ratio", type=float, default=0.03,
                   help="share of the steps that warm up linearly")
    g.add_argument("--adam_beta2", type=float, default=0.999,
                   help="AdamW's memory of squares; short runs: 0.95")
    g.add_argument("--weight_decay", type=float, default=0.0, help="AdamW, on matrices only")
    g.add_argument("--max_grad_norm", type=float, default=1.0, help="clip the gradient's norm")
    g.add_argument("--global_batch_size", type=positive, default=16,
                   help="samples per optimizer step, over all ranks")
    g.add_argument("--per_device_train_batch_size", type=positive, default=4,
                   help="samples per pass: memory only")
    g.add_argument("--per_device_eval_batch_size", type=positive, default=8,
                   help="samples per evaluation pass")
    g.add_argument("--bf16", choices=["auto", "true", "false"], default="auto",
                   help="bf16 autocast over fp32 parameters; auto: on CUDA")
    g.add_argument("--gradient_checkpointing", type=boolean, default=False,
                   help="recompute activations: less memory")
    g.add_argument("--fsdp", type=boolean, default=False,
                   help="shard parameters, gradients and Adam over the ranks")
    g.add_argument("--compile", type=boolean, default=False, help="torch.compile the LM's layers")
    g.add_argument("--seed", type=int, default=0,
                   help="of order, curriculum, negatives, adapter and dropout")
    g = parser.add_argument_group("output")
    g.add_argument("--output_dir", required=True, help="the actor directory")
    g.add_argument("--logging_steps", type=positive, default=1,
                   help="a log line every N steps (the csv has them all)")
    g.add_argument("--eval_steps", type=positive, default=500,
                   help="evaluate every N steps, and at the end")
    g.add_argument("--save_steps", type=positive, default=500,
                   help="checkpoint every N steps, and at the end")
    g.add_argument("--save_total_limit", type=positive, default=2,
                   help="checkpoints to keep, besides the best")
    g.add_argument("--early_stopping_patience", type=int, default=0,
                   help="stop after N evaluations without a new best")
    g.add_argument("--resume", default="auto",
                   help="auto: from the last checkpoint; never; or a checkpoint's path")
    return parser.parse_args(argv)


def check_args(args, world):
    if args.global_batch_size % world:
        raise UserError(f"--global_batch_size {args.global_batch_size} must be a multiple of the {world} ranks")
    if args.fsdp and "RANK" not in os.environ:
        raise UserError("--fsdp shards over ranks: start with torchrun --nproc_per_node N")
    if not all(0 <= ratio <= 1 for ratio in args.curriculum):
        raise UserError(f"--curriculum takes ratios between 0 and 1, found {args.curriculum}")


def check_num_heads(num_heads, width):
    if width % num_heads:
        raise UserError(f"--num_heads {num_heads} does not divide the actor's width of {width}")


def check_samples(data, train_samples, contrast):
    if not train_samples:
        raise UserError(f"{data.path} has no training samples: lower --eval_ratio, or add some")
    if contrast and len({data.tasks[n] for n in train_samples}) < 2:
        raise UserError(f"{data.path}: L_sep needs a message of another task, but all tasks are the same: add samples "
                        f"or set --random_contrast_weight 0")


# ------------------------------------------------------------------------------------------------
# Data

def show_sample(tokenizer, sample):
    """A training sample, decoded: supervised tokens between » and «, latents counted in their place."""
    text, inside, n = "", False, 0
    n_latents = 0 if sample["latents"] is None else len(sample["latents"]) - sample["n_replaced"]
    separator = "" if tokenizer.is_fast and tokenizer.decoder else " "
    while n < len(sample["input_ids"]):
        if (sample["labels"][n] != -100) != inside:
            inside = not inside
            text += "»" if inside else "«"
        if n == sample["latents_start"] and n_latents:
            text += f"[{n_latents} latents]"
            n += n_latents
            continue
        text += tokenizer.decode([sample["input_ids"][n]]) + separator
        n += 1
    return text + ("«" if inside else "")


def make_batches(data, drawn, negatives, *, message, curriculum, with_plan, with_other, seed, device):
    """drawn [(draw, sample)] -> the batches of the three passes; None for a pass that is not needed.

    negatives: the samples whose messages may be another task's."""
    samples, plan_samples, other_samples = [], [], []
    for draw, n in drawn:
        ratio = curriculum[seed_for("curriculum", seed, draw) % len(curriculum)]
        samples.append(data.sample(n, message, ratio))
        if with_plan:
            plan_samples.append(data.sample(n, "text"))
        if with_other:  # the whole message of another task, at the same ratio (released code: at another one)
            other = another_task(n, data.tasks, negatives, seed, draw)
            other_samples.append(data.sample(n, "latent", ratio, source=other))
    return [collate(part, device) if part else None for part in (samples, plan_samples, other_samples)]


def check_finite(step, loss, grad_norm, ids):
    if not math.isfinite(loss + grad_norm):
        raise UserError(f"step {step}: the loss is {loss}, its gradient {grad_norm}; nothing was updated. Samples: "
                        f"{', '.join(ids)}. Lower --learning_rate, or look at their messages")


def lr_scale(step, max_steps, warmup):
    """Linear warm-up, then cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, max_steps - warmup)))


# ------------------------------------------------------------------------------------------------
# Evaluation; every rank makes the same number of passes, because FSDP2 needs all ranks in each

@torch.no_grad()
def evaluate(actor, data, samples, message, batch_size, autocast, device, rank, world):
    """Mean CE over the supervised tokens of held-out samples, always with the whole latent message
    (ratio 0)."""
    actor.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # summed CE, tokens
    order = sorted(samples, key=lambda n: data.lengths[n])
    for i in range(0, len(order), batch_size * world):
        part = order[i + rank:i + batch_size * world:world]
        batch = collate([data.sample(n, message) for n in part or order[:1]], device)
        with autocast():
            loss = actor(batch)["task"]
        if part:
            totals[0] += loss
            totals[1] += sum(data.n_labels[n] for n in part)
    actor.train()
    if world > 1:
        dist.all_reduce(totals)
    return (totals[0] / totals[1]).item()


@torch.no_grad()
def infonce_probe(actor, data, chosen, autocast, device, rank, world):
    """Does a message say which sample it belongs to? Scores K messages on K samples by -CE ->
    {"infonce": loss, "infonce_bound": log K - loss}, in nats: a lower bound on the mutual information
    of message and behaviour."""
    actor.eval()
    K = len(chosen)
    scores = torch.zeros(K, K, device=device)
    for pair in range(rank, math.ceil(K * K / world) * world, world):
        i, j = divmod(pair % (K * K), K)  # sample i reads the message of sample j
        batch = collate([data.sample(chosen[i], "latent", source=chosen[j])], device)
        with autocast():
            loss = actor(batch)["task"]
        if pair < K * K:
            scores[i, j] = -loss / data.n_labels[chosen[i]]
    actor.train()
    if world > 1:
        dist.all_reduce(scores)
    loss = F.cross_entropy(scores, torch.arange(K, device=device)).item()
    return {"infonce": loss, "infonce_bound": math.log(K) - loss}


@one_line_errors("train_actor.py")
def main(argv=None):
    args = get_args(argv)
    rank, world, device = this_rank()
    check_args(args, world)
    latent = args.message == "latent"
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    state = {"step": 0, "last_terms": None, "stopped": False, "settings": settings,
             "best_step": None, "best_eval_loss": math.inf, "bad_evals": 0}
    checkpoint = latest_checkpoint(args.output_dir, args.resume)
    if checkpoint:
        state = read_state(checkpoint, settings, args.output_dir)

    # --------------------------------------------------------------------------------------------
    # data, all checked before a model is loaded
    source = checkpoint or args.model_name_or_path
    config = load_config(source, args.trust_remote_code)
    if latent:
        check_num_heads(args.num_heads, config.hidden_size)
    tokenizer = load_tokenizer(source, args.trust_remote_code, args.chat_template_kwargs)
    new_ids = add_markers(tokenizer)
    shards = None
    if args.hidden_data and args.message != "none":
        shards = open_shards(args.hidden_data)
    reading = {"shards": shards,
               "message": args.message,
               "announcement": args.plan_announcement,
               "task_turn": args.task_turn,
               "max_message": args.prepended_length,
               "max_length": min(args.model_max_length, context_length(config))}
    data = Conversations(args.train_file, tokenizer, **reading)
    train_samples, eval_samples = split_eval(data, args.eval_ratio, args.seed)
    eval_data = data
    if args.eval_file:
        eval_data = Conversations(args.eval_file, tokenizer, sender_dim=data.sender_dim, **reading)
        train_samples = list(range(len(data)))
        eval_samples = list(range(len(eval_data)))
    check_samples(data, train_samples, contrast=latent and args.random_contrast_weight > 0)
    steps_per_epoch = len(train_samples) / args.global_batch_size
    max_steps = args.max_steps or math.ceil(args.num_train_epochs * steps_per_epoch)
    if state["stopped"] and os.path.exists(os.path.join(args.output_dir, "trainer_state.json")):
        if rank == 0:
            print(f"{args.output_dir} is finished ({state['step']} steps); --resume never trains it again")
        return

    # --------------------------------------------------------------------------------------------
    # model: fp32 parameters, because a step of 1e-5 is lost in bf16 ones
    torch.manual_seed(args.seed)
    if checkpoint:
        actor = LatentActor.load(checkpoint, "fp32", "cpu", args.trust_remote_code,
                                 args.chat_template_kwargs, check=False)
    else:
        lm = load_lm(source, "fp32", "cpu", args.trust_remote_code, args.self_check)
        init_markers(lm, new_ids)
        adapter = None
        info = {"message": args.message,
                "plan_announcement": args.plan_announcement,
                "instruction": data.instruction,
                "chat_template_kwargs": tokenizer.chat_template_kwargs,
                "format_version": ADAPTER_FORMAT}
        if latent:
            rms = embedding_rms(lm)
            output_scale = args.adapter_output_scale or rms / args.adapter_scale
            info["sender"] = shards.sender["model"] if shards else None
            info["adapter"] = {"sender_dim": data.sender_dim,
                               "dim": config.hidden_size,
                               "num_heads": args.num_heads,
                               "dropout": args.adapter_dropout,
                               "scale": args.adapter_scale,
                               "output_scale": output_scale}
            adapter = HiddenStateProcessor(**info["adapter"])
            if rank == 0:
                print(f"adapter {data.sender_dim} -> {config.hidden_size}: s = {args.adapter_scale}, "
                      f"g = {output_scale:.3f} (the actor's word embeddings have RMS {rms:.3f})")
        actor = LatentActor(lm, tokenizer, adapter, info)
    if args.gradient_checkpointing:
        actor.lm.activation_checkpointing_enable()
    if args.compile:  # layer by layer: equal layers are compiled once, and FSDP2 can gather between them
        for layer in decoder_layers(actor.lm):
            layer.compile(dynamic=True)
    actor.train()

    # ranks: DDP holds everything on every rank; FSDP2 holds 1/world of the parameters, gradients and
    # Adam's moments, and gathers one decoder layer at a time; embeddings, head and adapter form one
    # more unit
    device_type = device.split(":")[0]
    cuda = device_type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 or args.fsdp:
        dist.init_process_group("nccl" if cuda else "gloo")
    if args.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh(device_type, (world,))
        for layer in decoder_layers(actor.lm):
            fully_shard(layer, mesh=mesh)
        model = fully_shard(actor, mesh=mesh)
    else:
        model = actor.to(device)
        if world > 1:  # buckets are the gradients themselves: a copy would cost 4 more bytes per parameter
            model = DistributedDataParallel(actor, gradient_as_bucket_view=True)
    bf16 = cuda if args.bf16 == "auto" else args.bf16 == "true"
    autocast = functools.partial(torch.autocast, device_type, torch.bfloat16, enabled=bf16)

    # optimizer: no weight decay on vectors; the adapter, which starts from nothing, may take larger steps
    parameters = list(actor.lm.parameters())
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() == 1]
    adapter_lr = args.adapter_learning_rate or args.learning_rate
    groups = [{"params": matrices, "peak": args.learning_rate, "weight_decay": args.weight_decay},
              {"params": vectors, "peak": args.learning_rate, "weight_decay": 0.0}]
    if latent:
        groups.append({"params": list(actor.adapter.parameters()), "peak": adapter_lr, "weight_decay": 0.0})
    # fused: one kernel, without temporaries as large as the parameters
    optimizer = torch.optim.AdamW(groups, betas=(0.9, args.adam_beta2), fused=cuda or None)
    if checkpoint:
        load_optimizer(actor, optimizer, checkpoint)

    # --------------------------------------------------------------------------------------------
    # files
    csv_path = os.path.join(args.output_dir, "loss_log.csv")
    if rank == 0:
        prepare_output(args.output_dir, checkpoint)
        log, writer = open_log(csv_path, COLUMNS, state["step"])
        print(f"{len(train_samples)} training samples, {len(eval_samples)} held out, "
              f"{max_steps} steps of {args.global_batch_size} on {world} x {device_type}")
        if checkpoint:
            print(f"continuing at step {state['step']}")
        else:
            first = data.sample(train_samples[0], args.message)
            print("first sample: " + show_sample(tokenizer, first))

    # --------------------------------------------------------------------------------------------
    # loop
    warmup = max(1, round(args.warmup_ratio * max_steps))
    bar = progress(total=max_steps, initial=state["step"], desc="train", unit="step", rank=rank)
    sigterm = catch_sigterm()
    for step in range(state["step"], max_steps):
        if state["stopped"]:  # killed between its last checkpoint and the files of the end
            break
        clock, seen_tokens = time.perf_counter(), 0
        lr = args.learning_rate * lr_scale(step, max_steps, warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_scale(step, max_steps, warmup)
        # the weights follow the last step's losses: known before the pass, the same for any split of
        # the batch
        w_align, w_sep = 0.0, 0.0
        if latent:
            w_align, w_sep = args.plan_similarity_weight, args.random_contrast_weight
        if args.adaptive_weights and state["last_terms"]:
            w_align = adaptive_weight(w_align, state["last_terms"]["align"], 1.0)  # align starts near 1
            w_sep = adaptive_weight(w_sep, state["last_terms"]["sep"], math.log(2))  # its largest value
        # this rank's share of the global batch: every world-th sample by length, so that ranks have
        # equal work
        drawn = global_batch(step, train_samples, args.global_batch_size, args.seed)  # [(draw, sample)]
        n_labels = sum(data.n_labels[n] for _, n in drawn)  # over ranks and micro-batches
        share = sorted(drawn, key=lambda pair: data.lengths[pair[1]])[rank::world]
        size = args.per_device_train_batch_size
        micro_batches = [share[i:i + size] for i in range(0, len(share), size)]
        torch.manual_seed(seed_for("dropout", args.seed, step, rank))  # a restart needs no saved RNG state
        sums = dict.fromkeys(TERMS, 0.0)

        # ---- the step --------------------------------------------------------------------------
        for m, chosen in enumerate(micro_batches):
            batch, plan_batch, other_batch = make_batches(
                data, chosen, train_samples, message=args.message, curriculum=args.curriculum,
                with_plan=w_align > 0, with_other=w_sep > 0,
                seed=args.seed, device=device)
            # DDP sums gradients over ranks once a step, in the last pass; FSDP2 in every pass, because
            # gradients that are not summed yet are whole, and whole gradients do not fit
            wait = isinstance(model, DistributedDataParallel) and m + 1 < len(micro_batches)
            with model.no_sync() if wait else contextlib.nullcontext():
                with autocast():
                    terms = model(batch, plan_batch, other_batch)  # three passes, two of them without gradient
                    loss = terms["task"]
                    loss = loss + w_align * terms.get("align", 0) + w_sep * terms.get("sep", 0)
                (loss * world / n_labels).backward()  # ranks are averaged: the mean over all labels
            for name, term in terms.items():
                sums[name] += term.item() / n_labels
            seen_tokens += int(batch["attention_mask"].sum())
        grad_norm = torch.nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm)
        grad_norm = (grad_norm.full_tensor() if args.fsdp else grad_norm).item()
        totals = torch.tensor([*sums.values(), len(sigterm)], dtype=torch.float64, device=device)
        if world > 1:
            dist.all_reduce(totals)
        *values, preempted = totals.tolist()
        means = dict(zip(TERMS, values))
        loss = means["task"] + w_align * means["align"] + w_sep * means["sep"]
        check_finite(step + 1, loss, grad_norm, [data.ids[n] for _, n in drawn])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # ----------------------------------------------------------------------------------------

        # evaluate
        state |= {"step": step + 1, "last_terms": means, "stopped": step + 1 == max_steps}
        record = {"step": step + 1, "epoch": round((step + 1) / steps_per_epoch, 3),
                  "loss": loss, **means, "w_align": w_align, "w_sep": w_sep, "lr": lr, "grad_norm": grad_norm}
        is_best = False
        where_it_runs = {"autocast": autocast, "device": device, "rank": rank, "world": world}
        if latent and args.infonce_probe_interval and (step + 1) % args.infonce_probe_interval == 0:
            held_out = len(eval_samples) > 1
            probed = (eval_samples if held_out else train_samples)[:args.infonce_probe_size]
            record |= infonce_probe(actor, eval_data if held_out else data, probed, **where_it_runs)
        if eval_samples and ((step + 1) % args.eval_steps == 0 or state["stopped"]):
            record["eval_loss"] = evaluate(actor, eval_data, eval_samples, message=args.message,
                                           batch_size=args.per_device_eval_batch_size, **where_it_runs)
            is_best = record["eval_loss"] < state["best_eval_loss"]
            state["bad_evals"] = 0 if is_best else state["bad_evals"] + 1
            if is_best:
                state |= {"best_step": step + 1, "best_eval_loss": record["eval_loss"]}
            state["stopped"] |= 0 < args.early_stopping_patience <= state["bad_evals"]

        # log
        if rank == 0:
            record["tokens_per_s"] = round(seen_tokens * world / (time.perf_counter() - clock))
            record["memory_gb"] = round(memory_gb(device), 2)
            writer.writerow(record)
            log.flush()
            if (step + 1) % args.logging_steps == 0 or "eval_loss" in record or "infonce" in record:
                shown = [f"{name} {value:.4g}" for name, value in record.items() if name not in NOT_SHOWN]
                bar.write(f"step {step + 1}/{max_steps} " + " ".join(shown))
        bar.update()

        # save
        if (step + 1) % args.save_steps == 0 or is_best or state["stopped"] or preempted:
            directory = os.path.join(args.output_dir, f"checkpoint-{step + 1}")
            save_checkpoint(directory, rank, actor, actor.save, optimizer, state)
            if rank == 0:
                prune_checkpoints(args.output_dir, args.save_total_limit, state["best_step"])
            if preempted and not state["stopped"]:
                if rank == 0:
                    bar.write(f"SIGTERM: wrote {directory}; the same command continues from it")
                raise SystemExit(SIGTERM_EXIT)
    bar.close()

    # --------------------------------------------------------------------------------------------
    # the output directory itself becomes the best model, or the last where nothing was held out
    if rank == 0:
        log.close()
        plot_curves(csv_path, os.path.join(args.output_dir, "loss_curve.png"),
                    ["loss", "task", "align", "sep", "eval_loss"], "nats per supervised token")
        best = publish_model(args.output_dir, state)
        sender = f"--sender {actor.info['sender']}" if latent else "--variants no_comm"
        print(f"wrote the actor of {best} to {args.output_dir}, with loss_log.csv and loss_curve.png; next: "
              f"python eval_alfworld.py --model_path {args.output_dir} {sender} --output_path results")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
