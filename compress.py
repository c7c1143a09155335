"""
Stage 3: a student sender learns to say the message in K latent steps, judged by a frozen actor.

  python compress.py --teacher_model_name_or_path actor \\
      --student_model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --train_file alfworld_sft.json \\
      --task_turn 2 --hidden_data messages --output_dir student --K 8
  torchrun --nproc_per_node 8 compress.py --teacher_model_name_or_path actor --fsdp true \\
      --student_model_name_or_path Qwen/Qwen2.5-7B-Instruct --train_file alfworld_sft.json \\
      --task_turn 2 --hidden_data messages --output_dir student --K 8
  python collect.py alfworld --model_name_or_path student --latent_steps 8 \\
      --dataset_path alfworld_sft.json --task_turn 2 --output_dir messages_k8

The last line writes the student's messages. The actor reads each sample three times: A with the
student's message, D with the full data message, B with none.

    L = CE(A) + T^2 sum_t w_t KL(D || A)_t / sum_t w_t + (1 - cos of mean-pooled messages)

w_t is large where the data message makes the actor surer: the student learns what the message is for.
A killed run, started again with the same flags, continues from its last checkpoint.
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
                    load_optimizer, memory_gb, one_line_errors, open_log, plot_curves, positive,
                    prepare_output, progress, prune_checkpoints, publish_model, read_state, save_checkpoint,
                    this_rank, write_json)
from data import PLAN_PROMPT, Conversations, encode_conversation, encode_prompt, global_batch, split_eval
from model import (LatentActor, LatentSender, build_sample, check_student, collate, context_length,
                   decoder_layers, head_loss, kl_divergence, left_pad, lm_logits, load_config,
                   load_tokenizer, open_shards, read_info)

TERMS = ["task", "kl", "align"]
COLUMNS = ["step", "epoch", "loss", *TERMS, "lr", "grad_norm", "eval_loss", "tokens_per_s", "memory_gb"]
# flags that may change between a run and its continuation: they move memory and files, not results
NOT_SETTINGS = ["output_dir", "resume", "per_device_train_batch_size", "per_device_eval_batch_size",
                "logging_steps", "save_steps", "save_total_limit", "gradient_checkpointing", "fsdp",
                "compile", "trust_remote_code", "self_check"]


def get_args(argv):
    parser = Parser(prog="compress.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    g = parser.add_argument_group("model")
    g.add_argument("--teacher_model_name_or_path", required=True,
                   help="an actor directory; it stays frozen")
    g.add_argument("--student_model_name_or_path", required=True,
                   help="the sender to start from: any causal LM")
    g.add_argument("--K", type=positive, default=128, help="latent steps")
    g.add_argument("--prompt_template",
                   help="what the student is asked; {task} is replaced; default: what the sender of "
                        "--hidden_data was")
    g.add_argument("--chat_template_kwargs", type=json_object,
                   help="JSON for the student's chat template; default: that of the sender of "
                        "--hidden_data; kept with the student")
    g.add_argument("--trust_remote_code", type=boolean, default=False,
                   help="run code that the models ship")
    g.add_argument("--self_check", type=boolean, default=True,
                   help="try at the start whether the models can be used")
    g = parser.add_argument_group("data")
    g.add_argument("--train_file", required=True, help="conversations, as in train_actor.py")
    g.add_argument("--hidden_data", required=True,
                   help="full messages of the sender that the actor was trained on")
    g.add_argument("--task_turn", type=int, default=0,
                   help="fold turns 0 and N into the first human turn (ETO: 2)")
    g.add_argument("--eval_file", help="held-out samples, same format")
    g.add_argument("--eval_ratio", type=float, default=0.0,
                   help="hold out this share of --train_file, chosen by id")
    g.add_argument("--model_max_length", type=int, default=4096, help="a longer sample is an error")
    g.add_argument("--prepended_length", type=int, default=2048, help="a longer data message is an error")
    g = parser.add_argument_group("loss")
    g.add_argument("--lambda_task", type=float, default=1.0,
                   help="weight of CE(A) (paper and released code: 1)")
    g.add_argument("--lambda_kl", type=float, default=1.0,
                   help="weight of the KL term (paper 1, released code 0.1)")
    g.add_argument("--lambda_align", type=float, default=1.0,
                   help="weight of alignment (paper 1, released code 0.1)")
    g.add_argument("--kl_temperature", type=float, default=4.0, help="T of the KL term")
    g = parser.add_argument_group("optimization")
    g.add_argument("--num_train_epochs", type=float, default=3, help="passes over the data")
    g.add_argument("--max_steps", type=positive, help="optimizer steps, instead of epochs")
    g.add_argument("--learning_rate", type=float, default=5e-5, help="peak, then cosine to 0")
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
                   help="the actor in bf16, and bf16 autocast over the student's fp32 parameters; "
                        "auto: on CUDA")
    g.add_argument("--gradient_checkpointing", type=boolean, default=False,
                   help="recompute the actor's activations: less memory")
    g.add_argument("--fsdp", type=boolean, default=False,
                   help="shard parameters, gradients and Adam over the ranks")
    g.add_argument("--compile", type=boolean, default=False,
                   help="torch.compile the actor's layers (the student's cache grows: compiled anew "
                        "each step)")
    g.add_argument("--seed", type=int, default=0, help="of the order")
    g = parser.add_argument_group("output")
    g.add_argument("--output_dir", required=True, help="the student directory")
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
    if "{task}" not in (args.prompt_template or "{task}"):
        raise UserError("--prompt_template must contain {task}")
    if args.global_batch_size % world:
        raise UserError(f"--global_batch_size {args.global_batch_size} must be a multiple of the {world} "
                        f"ranks")
    if args.fsdp and "RANK" not in os.environ:
        raise UserError("--fsdp shards over ranks: start with torchrun --nproc_per_node N")


def check_teacher(path, info, widths):
    """Raises UserError unless the teacher reads states of these widths, {what is this wide: width}."""
    if info.get("message") != "latent":
        raise UserError(f"{path} has no adapter: the teacher must be an actor that train_actor.py wrote "
                        f"with --message latent")
    expected = info["adapter"]["sender_dim"]
    for name, width in widths.items():
        if width != expected:
            raise UserError(f"the adapter of {path} reads states {expected} wide, {name} is {width}: give "
                            f"the sender (or its size) that the actor was trained on")


def check_finite(step, loss, grad_norm, ids):
    if not math.isfinite(loss + grad_norm):
        raise UserError(f"step {step}: the loss is {loss}, its gradient {grad_norm}; nothing was updated. "
                        f"Samples: {', '.join(ids)}. Lower --learning_rate, or look at their messages")


# ------------------------------------------------------------------------------------------------
# The loss

def entropy(lm, hidden_states, chunk_logits=2**22):
    """Entropy of the next token at each position, in nats. (N, D) -> (N,); no (N, V) is ever in
    memory."""
    n = max(1, chunk_logits // lm.get_input_embeddings().weight.shape[0])
    chunks = []
    for chunk in hidden_states.split(n):
        log_p = F.log_softmax(lm_logits(lm, chunk), dim=-1)  # (n, V)
        chunks.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(chunks)


def kl_weights(entropy_silent, entropy_data, owner):
    """How much surer the data message makes the actor at each position. (N,), (N,), owner (N,) -> (N,).

    w_t = max(Ent_B - Ent_D, 0), clipped at the 0.95 quantile of its sample, so that no position takes it
    all, and divided by its sample's sum, so that it does not matter which samples share a batch.
    owner: the sample of each position."""
    weights = (entropy_silent - entropy_data).clamp(min=0)
    for b in owner.unique():
        w = weights[owner == b]
        w = w.clamp(max=torch.quantile(w, 0.95))
        weights[owner == b] = w / w.sum().clamp(min=1e-12)  # 0 where the message helps nowhere
    return weights


def compression_loss(logits, targets, temperature):
    """CE and the weighted KL at n positions -> {name: (n,)}.

    logits: {"student": (n, V), "data": (n, V)} of the actor with the student's and with the full message;
    targets: {"labels": (n,), "weights": (n,)}. T^2 keeps the gradient's size whatever the temperature."""
    task = F.cross_entropy(logits["student"], targets["labels"], reduction="none")
    log_q = F.log_softmax(logits["data"] / temperature, dim=-1)  # (n, V)
    log_p = F.log_softmax(logits["student"] / temperature, dim=-1)
    return {"task": task, "kl": temperature**2 * targets["weights"] * kl_divergence(log_q, log_p)}


def pooled_message(actor, batch):
    """Mean of the vectors that the adapter makes of each message: (B, D), fp32."""
    dtype = next(actor.adapter.parameters()).dtype  # bf16 on CUDA
    latents = batch["latents"].to(dtype)  # (B, L, d_s)
    vectors = actor.adapter(latents, batch["latents_mask"]).float()  # (B, L, D)
    mask = batch["latents_mask"].unsqueeze(-1)
    return (vectors * mask).sum(1) / mask.sum(1)


def compression_terms(actor, batch, data_batch, silent_batch, temperature):
    """The three terms of the loss -> {"task": summed over labels, "kl" and "align": summed over samples}.

    The batches of `read_three_ways`; batch["latents"] carry the gradient, the actor is frozen."""
    # labels [[-100 -100 7 8] [-100 9 -100 -100]] -> owner [0 0 1], the sample of each position
    owner = (batch["labels"][:, 1:] != -100).nonzero()[:, 0]  # (N,)
    with torch.no_grad():
        data_states, _ = actor.hidden_states(data_batch)  # (N, D)
        silent_states, _ = actor.hidden_states(silent_batch)
        weights = kl_weights(entropy(actor.lm, silent_states), entropy(actor.lm, data_states), owner)
        pooled_data = pooled_message(actor, data_batch)  # (B, D)
    hidden_states, labels = actor.hidden_states(batch)
    loss_fn = functools.partial(compression_loss, temperature=temperature)
    terms = head_loss(actor.lm, {"student": hidden_states, "data": data_states}, loss_fn,
                      {"labels": labels, "weights": weights})
    cosine = F.cosine_similarity(pooled_message(actor, batch), pooled_data, dim=-1)  # (B,)
    return {**terms, "align": (1 - cosine).sum()}


# ------------------------------------------------------------------------------------------------
# Data: the actor's samples are those of train_actor.py; the student reads the task in its own words

def student_prompts(data, tokenizer, template, steps, max_length, max_actor_length):
    """Ids of the student's prompt for every sample: the text that the data's sender was asked, by the
    student's own tokenizer and chat template. Raises UserError where K latents do not fit."""
    prompts = []
    for sample_id, task, (before, after, _) in zip(data.ids, data.tasks, data.encoded):
        where = f"{data.path}: id {sample_id}"
        turn = {"role": "user", "content": template.replace("{task}", task)}
        start, end = encode_prompt(tokenizer, [turn], where=where)  # no message stands between them
        prompts.append(start + end)
        # the data message was checked by Conversations, but K may be larger
        if len(before) + steps + len(after) > max_actor_length:
            raise UserError(f"{where}: {len(before) + len(after)} tokens + K = {steps} exceed the actor's "
                            f"context of {max_actor_length}: lower --K or shorten the sample")
        if len(prompts[-1]) + steps > max_length:
            raise UserError(f"{where}: a prompt of {len(prompts[-1])} tokens + K = {steps} exceeds the "
                            f"student's context of {max_length}: lower --K or shorten the task")
    return prompts


def with_latents(data, chosen, latents):
    """Samples with the student's latents (B, K, d_s) as their messages -> a batch."""
    gap = torch.zeros(latents.shape[1:])  # (K, d_s): collate makes the places, the latents take them
    samples = [build_sample(*data.encoded[n], latents=gap) for n in chosen]
    return {**collate(samples, latents.device), "latents": latents}


def read_three_ways(data, silent, chosen, latents):
    """What the actor reads -> batches A with the student's latents, D with the full message (the
    released code cuts it to its first K states), B with none.

    silent: the samples (before, after, labels) without announcement and markers."""
    device = latents.device
    return (with_latents(data, chosen, latents),
            collate([data.sample(n, "latent") for n in chosen], device),
            collate([build_sample(*silent[n]) for n in chosen], device))


# ------------------------------------------------------------------------------------------------
# Models

def load_teacher(path, dtype="fp32", device="cpu", trust_remote_code=False, check=True,
                 gradient_checkpointing=False):
    """The actor, frozen and in eval mode (the released code trains with the teacher's dropout on)."""
    actor = LatentActor.load(path, dtype, device, trust_remote_code, check=check)
    actor.requires_grad_(False)
    if gradient_checkpointing:
        actor.lm.activation_checkpointing_enable()
        for module in actor.lm.modules():  # a block recomputes only "in training"; its parts stay in eval
            if hasattr(module, "gradient_checkpointing"):
                module.training = True
    return actor


@torch.no_grad()
def evaluate(actor, student, data, prompts, samples, steps, batch_size, autocast, device, rank, world):
    """Mean CE of the frozen actor over held-out samples, reading the student's messages. Every rank makes
    the same number of passes, because FSDP2 needs all ranks in each."""
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # summed CE, tokens
    order = sorted(samples, key=lambda n: data.lengths[n])
    for i in range(0, len(order), batch_size * world):
        part = order[i + rank:i + batch_size * world:world]
        chosen = part or order[:1]
        with autocast():
            latents = student(*left_pad([prompts[n] for n in chosen], device), steps)  # (B, K, d_s)
            loss = actor(with_latents(data, chosen, latents))["task"]
        if part:
            totals[0] += loss
            totals[1] += sum(data.n_labels[n] for n in part)
    if world > 1:
        dist.all_reduce(totals)
    return (totals[0] / totals[1]).item()


def lr_scale(step, max_steps, warmup):
    """Linear warm-up, then cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, max_steps - warmup)))


@one_line_errors("compress.py")
def main(argv=None):
    args = get_args(argv)
    rank, world, device = this_rank()
    check_args(args, world)
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    state = {"step": 0, "stopped": False, "settings": settings,
             "best_step": None, "best_eval_loss": math.inf, "bad_evals": 0}
    checkpoint = latest_checkpoint(args.output_dir, args.resume)
    if checkpoint:
        state = read_state(checkpoint, settings, args.output_dir)

    # --------------------------------------------------------------------------------------------
    # teacher and data, all checked before a model is loaded
    teacher_path = args.teacher_model_name_or_path
    teacher_config = load_config(teacher_path, args.trust_remote_code)
    info = read_info(teacher_path)
    source = checkpoint or args.student_model_name_or_path
    config = load_config(source, args.trust_remote_code)
    shards = open_shards(args.hidden_data)
    check_teacher(teacher_path, info, {args.student_model_name_or_path: config.hidden_size,
                                       args.hidden_data: shards.hidden_size})
    # the actor reads what it read in its own training: same announcement, same template
    teacher_tokenizer = load_tokenizer(teacher_path, args.trust_remote_code,
                                       info.get("chat_template_kwargs"))
    actor_context = min(args.model_max_length, context_length(teacher_config))
    reading = {"shards": shards,
               "announcement": info["plan_announcement"],
               "task_turn": args.task_turn,
               "max_message": args.prepended_length,
               "max_length": actor_context,
               "sender_dim": info["adapter"]["sender_dim"]}
    data = Conversations(args.train_file, teacher_tokenizer, **reading)
    train_samples, eval_samples = split_eval(data, args.eval_ratio, args.seed)
    eval_data = data
    if args.eval_file:
        eval_data = Conversations(args.eval_file, teacher_tokenizer, **reading)
        train_samples = list(range(len(data)))
        eval_samples = list(range(len(eval_data)))
    if not train_samples:
        raise UserError(f"{args.train_file} has no training samples: lower --eval_ratio, or add some")
    # what B reads has no announcement and no markers: nobody has said anything
    silent = [encode_conversation(teacher_tokenizer, messages) for messages in data.messages]

    # the student is asked what the sender of the full messages was
    template_kwargs = args.chat_template_kwargs
    if template_kwargs is None:
        template_kwargs = shards.sender.get("chat_template_kwargs")
    tokenizer = load_tokenizer(source, args.trust_remote_code, template_kwargs)
    template = args.prompt_template or shards.sender.get("prompt_template", PLAN_PROMPT)
    asking = {"tokenizer": tokenizer, "template": template, "steps": args.K,
              "max_length": context_length(config), "max_actor_length": actor_context}
    prompts = student_prompts(data, **asking)
    eval_prompts = student_prompts(eval_data, **asking) if args.eval_file else prompts
    steps_per_epoch = len(train_samples) / args.global_batch_size
    max_steps = args.max_steps or math.ceil(args.num_train_epochs * steps_per_epoch)
    if state["stopped"] and os.path.exists(os.path.join(args.output_dir, "trainer_state.json")):
        if rank == 0:
            print(f"{args.output_dir} is finished ({state['step']} steps); --resume never trains it again")
        return

    # --------------------------------------------------------------------------------------------
    # models: the student in fp32, because a step of 5e-5 is lost in bf16 parameters; the actor frozen
    device_type = device.split(":")[0]
    cuda = device_type == "cuda"
    bf16 = cuda if args.bf16 == "auto" else args.bf16 == "true"
    autocast = functools.partial(torch.autocast, device_type, torch.bfloat16, enabled=bf16)
    student = LatentSender.load(source, "fp32", "cpu", args.trust_remote_code,
                                check=args.self_check and not checkpoint)
    if args.self_check and not checkpoint:
        check_student(student)
    head = student.lm.get_output_embeddings()
    if head.weight is not student.lm.get_input_embeddings().weight:
        head.requires_grad_(False)  # a student that never writes has no use for its head
    actor = load_teacher(teacher_path, "bf16" if bf16 else "fp32", device, args.trust_remote_code,
                         args.self_check, args.gradient_checkpointing)
    if args.compile:  # layer by layer: equal layers are compiled once
        for layer in decoder_layers(actor.lm):
            layer.compile(dynamic=True)

    # ranks: DDP holds everything on every rank; FSDP2 holds 1/world of the student's parameters,
    # gradients and Adam's moments, and gathers one decoder layer at a time; embeddings, head and bridge
    # form one more unit. Every rank has the whole actor
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 or args.fsdp:
        dist.init_process_group("nccl" if cuda else "gloo")
    if args.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh(device_type, (world,))
        for layer in decoder_layers(student.lm):
            fully_shard(layer, mesh=mesh)
        model = fully_shard(student, mesh=mesh)
    else:
        model = student.to(device)
        if world > 1:  # buckets are the gradients themselves: a copy would cost 4 more bytes per parameter
            model = DistributedDataParallel(student, gradient_as_bucket_view=True)

    # optimizer: no weight decay on vectors
    parameters = [p for p in student.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    # fused: one kernel, without temporaries as large as the parameters
    optimizer = torch.optim.AdamW(groups, betas=(0.9, args.adam_beta2), fused=cuda or None)
    if checkpoint:
        load_optimizer(student, optimizer, checkpoint)

    # --------------------------------------------------------------------------------------------
    # files
    csv_path = os.path.join(args.output_dir, "loss_log.csv")
    bridge = {"K": args.K, "prompt_template": template,
              "chat_template_kwargs": tokenizer.chat_template_kwargs}

    def write_student(directory, state_dict):
        student.save(directory, state_dict)
        tokenizer.save_pretrained(directory)
        write_json(os.path.join(directory, "latent_bridge.json"), bridge)

    if rank == 0:
        prepare_output(args.output_dir, checkpoint)
        log, writer = open_log(csv_path, COLUMNS, state["step"])
        mean_length = sum(data.message_lengths[n] for n in train_samples) / len(train_samples)
        print(f"{len(train_samples)} training samples, {len(eval_samples)} held out, "
              f"{max_steps} steps of {args.global_batch_size} on {world} x {device_type}; "
              f"messages of {mean_length:.1f} states become {args.K}")
        if checkpoint:
            print(f"continuing at step {state['step']}")
        else:
            print(f"first prompt of the student: {tokenizer.decode(prompts[train_samples[0]])}")

    # --------------------------------------------------------------------------------------------
    # loop
    lambdas = {"task": args.lambda_task, "kl": args.lambda_kl, "align": args.lambda_align}
    warmup = max(1, round(args.warmup_ratio * max_steps))
    bar = progress(total=max_steps, initial=state["step"], desc="compress", unit="step", rank=rank)
    sigterm = catch_sigterm()
    for step in range(state["step"], max_steps):
        if state["stopped"]:  # killed between its last checkpoint and the files of the end
            break
        clock, seen_tokens = time.perf_counter(), 0
        lr = args.learning_rate * lr_scale(step, max_steps, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # this rank's share of the global batch: every world-th sample by length, so that ranks have
        # equal work
        drawn = [n for _, n in global_batch(step, train_samples, args.global_batch_size, args.seed)]
        # each term is the mean over all labels or samples of the step, whatever the ranks and
        # micro-batches
        counts = {"task": sum(data.n_labels[n] for n in drawn), "kl": len(drawn), "align": len(drawn)}
        share = sorted(drawn, key=lambda n: data.lengths[n])[rank::world]
        size = args.per_device_train_batch_size
        micro_batches = [share[i:i + size] for i in range(0, len(share), size)]
        sums = dict.fromkeys(TERMS, 0.0)

        # ---- the step --------------------------------------------------------------------------
        for m, chosen in enumerate(micro_batches):
            # DDP sums gradients over ranks once a step, in the last pass; FSDP2 in every pass, because
            # gradients that are not summed yet are whole, and whole gradients do not fit
            wait = isinstance(model, DistributedDataParallel) and m + 1 < len(micro_batches)
            with model.no_sync() if wait else contextlib.nullcontext():
                with autocast():
                    latents = model(*left_pad([prompts[n] for n in chosen], device), args.K)  # (B, K, d_s)
                    batches = read_three_ways(data, silent, chosen, latents)
                    terms = compression_terms(actor, *batches, temperature=args.kl_temperature)
                    means = {name: terms[name] / counts[name] for name in TERMS}
                    loss = sum(lambdas[name] * means[name] for name in TERMS)
                (loss * world).backward()  # DDP and FSDP2 average over ranks, here they shall add
            for name, mean in means.items():
                sums[name] += mean.item()
            seen_tokens += sum(len(prompts[n]) + args.K for n in chosen)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        grad_norm = (grad_norm.full_tensor() if args.fsdp else grad_norm).item()
        totals = torch.tensor([*sums.values(), len(sigterm)], dtype=torch.float64, device=device)
        if world > 1:
            dist.all_reduce(totals)
        *values, preempted = totals.tolist()
        means = dict(zip(TERMS, values))
        loss = sum(lambdas[name] * means[name] for name in TERMS)
        check_finite(step + 1, loss, grad_norm, [data.ids[n] for n in drawn])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # ----------------------------------------------------------------------------------------

        # evaluate
        state |= {"step": step + 1, "stopped": step + 1 == max_steps}
        record = {"step": step + 1, "epoch": round((step + 1) / steps_per_epoch, 3), "loss": loss,
                  **means, "lr": lr, "grad_norm": grad_norm}
        is_best = False
        if eval_samples and ((step + 1) % args.eval_steps == 0 or state["stopped"]):
            record["eval_loss"] = evaluate(
                actor, student, eval_data, eval_prompts, eval_samples, steps=args.K,
                batch_size=args.per_device_eval_batch_size, autocast=autocast, device=device, rank=rank,
                world=world)
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
            if (step + 1) % args.logging_steps == 0 or "eval_loss" in record:
                shown = [f"{name} {value:.4g}" for name, value in record.items() if name in COLUMNS[2:]]
                bar.write(f"step {step + 1}/{max_steps} " + " ".join(shown))
        bar.update()

        # save
        if (step + 1) % args.save_steps == 0 or is_best or state["stopped"] or preempted:
            directory = os.path.join(args.output_dir, f"checkpoint-{step + 1}")
            save_checkpoint(directory, rank, student, write_student, optimizer, state)
            if rank == 0:
                prune_checkpoints(args.output_dir, args.save_total_limit, state["best_step"])
            if preempted and not state["stopped"]:
                if rank == 0:
                    bar.write(f"SIGTERM: wrote {directory}; the same command continues from it")
                raise SystemExit(SIGTERM_EXIT)
    bar.close()

    # --------------------------------------------------------------------------------------------
    # the output directory itself becomes the best student, or the last where nothing was held out
    if rank == 0:
        log.close()
        plot_curves(csv_path, os.path.join(args.output_dir, "loss_curve.png"),
                    ["loss", *TERMS, "eval_loss"], "loss")
        best = publish_model(args.output_dir, state)
        print(f"wrote the student of {best} to {args.output_dir}, with loss_log.csv and loss_curve.png; "
              f"next: python eval_alfworld.py --model_path {teacher_path} --sender {args.output_dir} "
              f"--latent_steps {args.K} --output_path results")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
