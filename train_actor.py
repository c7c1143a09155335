"""
Stage 2: the actor learns to read messages: L = L_task + w_sep L_sep + w_align L_align (model.py, 3).

  python train_actor.py --model_name_or_path Qwen/Qwen2.5-0.5B --train_file alfworld_sft.json \\
      --task_turn 2 --hidden_data messages --output_dir actor
  torchrun --nproc_per_node 8 train_actor.py --model_name_or_path Qwen/Qwen2.5-7B --fsdp true \\
      --gradient_checkpointing true --train_file alfworld_sft.json --task_turn 2 \\
      --hidden_data messages --output_dir actor

The result is the same on any number of GPUs but for the adapter's dropout: --global_batch_size is what you
set. --message text and --message none train the paper's baselines, CoT (full) and No-CoT. A killed run,
started again with the same flags, continues from its last checkpoint as if nothing had happened.
"""
import contextlib
import functools
import math
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import (STOP_EXIT, Parser, Run, UserError, add_training_flags, all_reduce_sum, catch_stop,
                    check_finite, check_output, evaluate, json_object, lock, lr_scale, memory_gb,
                    one_line_errors, positive, progress, run_settings, seed_for, this_rank)
from data import PLAN_ANNOUNCEMENT, another_task, global_batch, show_sample, train_and_eval
from hf import (context_length, decoder_layers, embedding_rms, load_config, load_lm, load_tokenizer,
                word_embeddings)
from model import (ADAPTER_FORMAT, LatentActor, add_markers, collate, init_markers, make_adapter, nearness,
                   open_shards, procrustes, warmup_loss, word_targets)

INPUTS = ["train_file", "eval_file", "hidden_data"]  # a run is not continued with other contents of these
CLOSED_FORM = dict.fromkeys(("none", "procrustes"), "model:LinearMap")  # adapters that are not trained


def get_args(argv):
    parser = Parser(prog="train_actor.py", description=__doc__)
    flag = parser.flag
    parser.group("model")
    flag("--model_name_or_path", ..., "any causal LM with a chat template")
    flag("--message", "latent", "what stands between <bop> and <eop>; text and none are the baselines CoT (full) "
         "and No-CoT", choices=["latent", "text", "none"])
    flag("--hidden_data", None, "--output_dir of collect.py: messages and plans by id")
    flag("--plan_announcement", PLAN_ANNOUNCEMENT, "stands before <bop>; kept with the actor")
    flag("--adapter", "model:HiddenStateProcessor", "module:Class, kept with the actor; or one that is not "
         "trained: none (states as they are), procrustes (rotated and scaled towards their words)")
    flag("--num_heads", 8, "attention heads of the adapter")
    flag("--adapter_dropout", 0.1, "dropout in the adapter's attention")
    flag("--adapter_scale", 0.2, "start of the learned input scale s")
    flag("--adapter_output_scale", None, "start of the learned output scale g; default: RMS of the actor's word "
         "embeddings / s", type=float)
    flag("--adapter_learning_rate", None, "peak for the adapter; default: --learning_rate", type=float)
    flag("--chat_template_kwargs", None, """JSON for the chat template; default: {"enable_thinking": false}; """
         "kept with the actor", type=json_object)
    flag("--trust_remote_code", False, "run code that the model ships")
    flag("--self_check", True, "try at the start whether the model can be used")
    parser.group("loss")
    flag("--plan_similarity_weight", 0.2, "ceiling of w_align; 0 drops that pass")
    flag("--random_contrast_weight", 1.0, "ceiling of w_sep; 0 drops that pass")
    flag("--adaptive_weights", True, "a weight moves between a tenth of its ceiling and it, with its loss")
    flag("--curriculum", [r / 10 for r in range(11)], "the ratios that are drawn: the share of a message that is "
         "shown as words (paper: 0 0.1 ... 1; 0: pure latent messages)", type=float, nargs="+", metavar="R")
    flag("--adapter_warmup_steps", 0, "steps of 64 messages in which the adapter alone learns their words")
    flag("--adapter_warmup_learning_rate", 1e-3, "of these steps")
    flag("--infonce_probe_interval", 0, "every N steps, score K messages on K samples")
    flag("--infonce_probe_size", 8, "K")
    parser.group("length")
    flag("--num_train_epochs", 3.0, "passes over the data")
    flag("--max_steps", None, "optimizer steps, instead of epochs; a run may be continued with more: the "
         "schedule is then that of the new length; 0: only the adapter is fitted",
         type=lambda text: positive(text, least=0))
    add_training_flags(parser, learning_rate=1e-5)
    return parser.parse_args(argv)


def check_args(args, world):
    if args.global_batch_size % world:
        raise UserError(f"--global_batch_size {args.global_batch_size} is no multiple of the {world} ranks")
    if args.fsdp and "RANK" not in os.environ:
        raise UserError("--fsdp shards over ranks: start with torchrun --nproc_per_node N")
    if not all(0 <= ratio <= 1 for ratio in args.curriculum):
        raise UserError(f"--curriculum takes ratios between 0 and 1, found {args.curriculum}")
    if args.adapter_warmup_steps and (args.message != "latent" or args.adapter in CLOSED_FORM):
        raise UserError("--adapter_warmup_steps needs --message latent and an adapter that can learn")


# ---- Data ----------------------------------------------------------------------------------------
def make_batches(data, drawn, negatives, *, kind, curriculum, with_plan, with_other, seed, device):
    """drawn [(draw, n)] -> the batches of the three passes; None for a pass that is not needed.

    negatives: the indices whose messages may be another task's."""
    samples, plan_samples, other_samples = [], [], []
    for draw, n in drawn:
        ratio = curriculum[seed_for("curriculum", seed, draw) % len(curriculum)]
        samples.append(data.sample(n, kind, ratio))
        if with_plan:
            plan_samples.append(data.sample(n, "text"))
        if with_other:  # another task's whole message, at the same ratio (released code: at another one)
            other = another_task(n, data.tasks, negatives, seed, draw)
            other_samples.append(data.sample(n, "latent", ratio, source=other))
    return [collate(part, device) if part else None for part in (samples, plan_samples, other_samples)]


# ---- Weights, and the probe ----------------------------------------------------------------------
def loss_weights(align, sep, adaptive=False, last_terms=None):
    """The weight of each term in the total loss; a term without one is only logged. A term of your own is
    one more line here.

    align and sep are ceilings. Adaptive: the ceiling times the term's value of the last step over that of the
    start, at least a tenth of it. That value is detached, and the same for any split of the batch."""
    weights = {"task": 1.0, "align": align, "sep": sep}
    if adaptive and last_terms:
        for name, start in (("align", 1.0), ("sep", math.log(2))):
            weights[name] *= min(max(last_terms.get(name, 0.0) / start, 0.1), 1.0)
    return weights


@torch.no_grad()
def infonce_probe(actor, data, chosen, autocast, device, rank, world):
    """Does a message say which sample it belongs to? Scores K messages on K samples by -CE -> {"infonce": loss,
    "infonce_bound": log K - loss}, in nats: a lower bound on the mutual information of message and behaviour."""
    actor.eval()
    K = len(chosen)
    scores = torch.zeros(K, K, device=device)
    # pair (i, j) has number i * K + j. The ranks take turns; past the last pair one begins again at the
    # first, because all ranks must make each pass, and does not count it
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
    inputs = [args.model_name_or_path, *(getattr(args, name) for name in INPUTS)]
    check_output("--output_dir", args.output_dir, inputs)
    run = Run(args.output_dir, run_settings(vars(args), INPUTS), args.resume, rank)
    state = run.state
    source = run.checkpoint or args.model_name_or_path

    # ---- data, all checked before a model is loaded ----------------------------------------------
    config = load_config(source, args.trust_remote_code)
    if latent and config.hidden_size % args.num_heads:
        raise UserError(f"--num_heads {args.num_heads} does not divide the actor's width, {config.hidden_size}")
    tokenizer = load_tokenizer(source, args.trust_remote_code, args.chat_template_kwargs)
    new_ids = add_markers(tokenizer)
    shards = open_shards(args.hidden_data) if args.hidden_data and args.message != "none" else None
    max_length = min(args.model_max_length, context_length(config))
    data, train_indices, eval_data, eval_indices = train_and_eval(
        args.train_file, args.eval_file, args.eval_ratio, args.seed, tokenizer,
        shards=shards, kind=args.message, announcement=args.plan_announcement, task_turn=args.task_turn,
        max_message=args.prepended_length, max_length=max_length)
    if latent and args.random_contrast_weight:  # L_sep reads each sample with another task's message
        if len({data.tasks[n] for n in train_indices}) < 2:
            raise UserError(f"{args.train_file}: all tasks are the same (collected without --task_turn?): add "
                            "others or set --random_contrast_weight 0")
        frame = max(len(data.encoded[n][0] + data.encoded[n][1]) for n in train_indices)
        longest = max(shards.lengths[data.ids[n]] for n in train_indices)
        if frame + longest > max_length:
            raise UserError(f"{args.train_file}: {frame} tokens and another sample's message of {longest} states "
                            f"exceed the context of {max_length}: shorten them or set --random_contrast_weight 0")
    if latent and args.adapter == "none" and data.sender_dim != config.hidden_size:
        raise UserError(f"--adapter none: the messages are {data.sender_dim} wide, the actor {config.hidden_size}")
    fits_words = latent and (args.adapter_warmup_steps > 0 or args.adapter == "procrustes")
    if fits_words:
        data.words(train_indices[0])  # raises UserError where states have no words
    steps_per_epoch = len(train_indices) / args.global_batch_size
    max_steps = math.ceil(args.num_train_epochs * steps_per_epoch) if args.max_steps is None else args.max_steps
    if run.is_over(max_steps, args.early_stopping_patience):
        return
    if rank == 0:
        lock(args.output_dir)

    # ---- model: what learns has fp32 parameters, because a step of 1e-5 is lost in bf16 ones -----
    device_type = device.split(":")[0]
    cuda = device_type == "cuda"
    bf16 = cuda if args.bf16 == "auto" else args.bf16 == "true"
    autocast = functools.partial(torch.autocast, device_type, torch.bfloat16, enabled=bf16)
    torch.manual_seed(args.seed)
    if run.checkpoint:
        actor = LatentActor.load(source, "fp32", "cpu", args.trust_remote_code, check=False)
    else:
        lm = load_lm(source, "fp32", "cpu", args.trust_remote_code, args.self_check)
        adapter = None
        init_markers(lm, new_ids)
        info = {"kind": args.message,
                "plan_announcement": args.plan_announcement,
                "instruction": data.instruction,
                "chat_template_kwargs": tokenizer.chat_template_kwargs,
                "sender": shards.sender if shards else None,
                "format_version": ADAPTER_FORMAT}
        if latent:
            rms, output_scale = embedding_rms(lm), args.adapter_output_scale
            if output_scale is None:
                output_scale = rms / args.adapter_scale
            arguments = {"sender_dim": data.sender_dim,
                         "dim": config.hidden_size,
                         "num_heads": args.num_heads,
                         "dropout": args.adapter_dropout,
                         "scale": args.adapter_scale,
                         "output_scale": output_scale}
            info["adapter"] = {"class": CLOSED_FORM.get(args.adapter, args.adapter), "arguments": arguments}
            adapter = make_adapter(info["adapter"])
            if rank == 0:
                print(f"adapter {data.sender_dim} -> {config.hidden_size}: s = {args.adapter_scale}, "
                      f"g = {arguments['output_scale']:.3f} (the actor's word embeddings have RMS {rms:.3f})")
        actor = LatentActor(lm, tokenizer, adapter, info)

    # ---- adapter alone, on messages without the LM (ours, not the paper's). Every rank does all of it, so
    # it is the same on any number of them; a kill before the first checkpoint starts it again
    if fits_words and not run.checkpoint:
        adapter.eval().to(device)
        table = word_embeddings(lm, most=2**31).to(device)  # (V, D)

        def read(data, chosen):
            """All states of some messages, what the adapter makes of them, the ids that each stands for."""
            batch = collate([data.sample(n, "latent") for n in chosen], device)
            states, mask = batch["latents"], batch["latents_mask"]
            words = [ids for n in chosen for ids in data.words(n)]
            return states[mask], adapter(states, mask)[mask], words  # (N, d_s), (N, D), N lists

        def report(when):
            tried = eval_indices or train_indices
            with torch.no_grad():
                _, vectors, words = read(eval_data, tried[:16])
            right, cosine = nearness(vectors, words, table)
            if rank == 0:
                print(f"adapter {when}: nearest word right {right:.3f}, cosine {cosine:.3f}")

        if args.adapter == "procrustes":
            states, _, words = read(data, train_indices[:512])
            adapter.weight.copy_(procrustes(states, word_targets(table, words)))
        report("at the start")
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=args.adapter_warmup_learning_rate)
        for step in progress(range(args.adapter_warmup_steps), rank, desc="warm up", unit="step"):
            drawn = global_batch(step, train_indices, 64, f"warm-up {args.seed}")
            _, vectors, words = read(data, [n for _, n in drawn])
            warmup_loss(vectors, word_targets(table, words)).backward()
            optimizer.step()
            optimizer.zero_grad()
        report(f"after {args.adapter_warmup_steps} steps alone")
        adapter.cpu()
        del table

    if args.gradient_checkpointing:
        actor.lm.activation_checkpointing_enable()
    if args.compile:  # layer by layer: equal layers are compiled once, and FSDP2 can gather between them
        for layer in decoder_layers(actor.lm):
            layer.compile(dynamic=True)
    learner, write_model = actor.train(), actor.save
    layers = decoder_layers(actor.lm) if args.fsdp else []

    # ---- ranks: DDP holds everything on every rank; FSDP2 holds 1/world of the learner's parameters,
    # gradients and Adam's moments, and gathers one decoder layer at a time; all else forms one more unit
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 or args.fsdp:
        dist.init_process_group("nccl" if cuda else "gloo")
    if args.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh(device_type, (world,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        model = fully_shard(learner, mesh=mesh)
    else:
        model = learner.to(device)
        if world > 1:  # buckets are the gradients themselves: a copy would cost 4 more bytes per parameter
            model = DistributedDataParallel(learner, gradient_as_bucket_view=True)

    # optimizer: no weight decay on vectors; the adapter, which starts from nothing, may take larger steps
    parameters = [p for p in actor.lm.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() == 1]
    groups = [{"params": matrices, "peak": args.learning_rate, "weight_decay": args.weight_decay},
              {"params": vectors, "peak": args.learning_rate, "weight_decay": 0.0}]
    if latent:
        adapter_lr = args.adapter_learning_rate
        if adapter_lr is None:
            adapter_lr = args.learning_rate
        parameters = [p for p in actor.adapter.parameters() if p.requires_grad]
        groups.append({"params": parameters, "peak": adapter_lr, "weight_decay": 0.0})
    # fused: one kernel, without temporaries as large as the parameters
    optimizer = torch.optim.AdamW(groups, betas=(0.9, args.adam_beta2), fused=cuda or None)
    if state["step"]:
        run.load_optimizer(learner, optimizer)

    # ---- loop ------------------------------------------------------------------------------------
    run.clear()
    if rank == 0:
        print(f"{len(train_indices)} training samples, {len(eval_indices)} held out, "
              f"{max_steps} steps of {args.global_batch_size} on {world} x {device_type}")
        if run.checkpoint:
            print(f"continuing at step {state['step']}")
        else:
            print("first sample: " + show_sample(tokenizer, data.sample(train_indices[0], args.message)))

    def eval_loss(chosen):
        """Summed CE of held-out samples, always with the whole message as latents."""
        with autocast():
            return actor(collate([eval_data.sample(n, args.message) for n in chosen], device))["task"]

    held_out_loss = functools.partial(evaluate, learner, eval_loss, eval_data, eval_indices,
                                      args.per_device_eval_batch_size, device, rank, world)
    warmup = max(1, round(args.warmup_ratio * max_steps))
    bar = progress(total=max_steps, initial=state["step"], desc="train", unit="step", rank=rank)
    stop_signals = catch_stop()
    if max_steps == 0:  # the LM stays as it is
        if eval_indices:
            run.note_eval(held_out_loss(), patience=0)
            bar.write(f"eval_loss {state['best_eval_loss']:.4g}")
        run.save(learner, write_model, optimizer, args.save_total_limit)
    for step in range(state["step"], max_steps):
        if state["stopped"]:  # killed between its last checkpoint and the files of the end
            break
        clock, seen_tokens, done = time.perf_counter(), 0, step + 1
        scale = lr_scale(step, max_steps, warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        # this rank's share of the global batch: every world-th sample by length, for equal work
        drawn = global_batch(step, train_indices, args.global_batch_size, args.seed)  # [(draw, n)]
        share = sorted(drawn, key=lambda pair: data.lengths[pair[1]])[rank::world]
        size = args.per_device_train_batch_size
        micro_batches = [share[i:i + size] for i in range(0, len(share), size)]
        # each term is the mean over all labels or samples of the step, whatever the ranks and micro-batches
        n_labels = sum(data.n_labels[n] for _, n in drawn)
        weights = {"task": 1.0}
        if latent:
            weights = loss_weights(args.plan_similarity_weight, args.random_contrast_weight,
                                   args.adaptive_weights, state.get("last_terms"))
        torch.manual_seed(seed_for("dropout", args.seed, step, rank))  # a restart needs no saved RNG state
        sums = {}  # of the terms, over micro-batches and then over ranks

        # ---- the step --------------------------------------------------------------------------
        for m, chosen in enumerate(micro_batches):
            # DDP sums gradients over ranks once a step, in the last pass; FSDP2 in every pass, because
            # between passes a rank has room for its share of the summed gradients only
            wait = isinstance(model, DistributedDataParallel) and m + 1 < len(micro_batches)
            with model.no_sync() if wait else contextlib.nullcontext():
                with autocast():
                    batches = make_batches(data, chosen, train_indices, kind=args.message,
                                           curriculum=args.curriculum, with_plan=weights.get("align", 0) > 0,
                                           with_other=weights.get("sep", 0) > 0, seed=args.seed, device=device)
                    terms = model(*batches)  # three passes, two of them without gradient
                    means = {name: term / n_labels for name, term in terms.items()}
                    loss = sum(weights[name] * means[name] for name in weights if name in means)
                (loss * world).backward()  # DDP and FSDP2 average over ranks, here they shall add
            for name, mean in means.items():
                sums[name] = sums.get(name, 0.0) + mean.item()
            seen_tokens += int(batches[0]["attention_mask"].sum())
        grad_norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), args.max_grad_norm)
        grad_norm = (grad_norm.full_tensor() if args.fsdp else grad_norm).item()
        # one sum over ranks for all: if a signal to stop came to one of them, all stop after this step
        sums = all_reduce_sum(sums | {"stop": len(stop_signals)}, device)
        preempted = sums.pop("stop") > 0
        loss = sum(weights[name] * sums[name] for name in weights if name in sums)
        check_finite(done, loss, grad_norm, [data.ids[n] for _, n in drawn])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - clock
        # ----------------------------------------------------------------------------------------

        # evaluate
        state |= {"step": done, "last_terms": sums, "stopped": done == max_steps}
        record = {"step": done, "epoch": round(done / steps_per_epoch, 3), "loss": loss, **sums,
                  **{f"w_{name}": weights[name] for name in weights if name != "task"},
                  "lr": args.learning_rate * scale, "grad_norm": grad_norm, "eval_loss": None}
        is_best = False
        if eval_indices and (done % args.eval_steps == 0 or state["stopped"]):
            record["eval_loss"] = held_out_loss()
            is_best = run.note_eval(record["eval_loss"], args.early_stopping_patience)
        if latent and args.infonce_probe_interval:
            record |= {"infonce": None, "infonce_bound": None}
            if done % args.infonce_probe_interval == 0:
                probed, among = (eval_data, eval_indices) if len(eval_indices) > 1 else (data, train_indices)
                chosen = among[:args.infonce_probe_size]
                record |= infonce_probe(actor, probed, chosen, autocast, device, rank, world)

        # log
        record["tokens_per_s"] = round(seen_tokens * world / seconds)
        record["memory_gb"] = round(memory_gb(device), 2)
        if rank == 0:
            line = run.log(record)
            if done % args.logging_steps == 0 or record["eval_loss"] is not None:
                bar.write(f"step {done}/{max_steps} {line}")
        bar.update()

        # save
        if done % args.save_steps == 0 or is_best or state["stopped"] or preempted:
            directory = run.save(learner, write_model, optimizer, args.save_total_limit)
            if preempted and not state["stopped"]:
                if rank == 0:
                    bar.write(f"stopped: wrote {directory}; --resume auto continues from it")
                raise SystemExit(STOP_EXIT)
    bar.close()

    # ---- files: the output directory becomes the best model, or the last where nothing was held out ------
    if rank == 0:
        best = run.publish(["loss", *state.get("last_terms", []), "eval_loss"], "nats per supervised token")
        print(f"wrote {best} to {args.output_dir}")
        if data.instruction and latent:  # conversations of ETO's kind are ALFWorld's
            print(f"next: python eval_alfworld.py --model_path {args.output_dir} --sender {shards.sender['model']} "
                  f"--output_path {args.output_dir}_results")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
