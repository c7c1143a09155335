"""
Stage 3: a student sender learns to say the message in K latent steps, judged by a frozen actor.

  python compress.py --teacher_model_name_or_path actor \\
      --student_model_name_or_path Qwen/Qwen2.5-0.5B --train_file alfworld_sft.json \\
      --task_turn 2 --hidden_data messages --output_dir student --K 8
  torchrun --nproc_per_node 8 compress.py --teacher_model_name_or_path actor --fsdp true \\
      --student_model_name_or_path Qwen/Qwen2.5-7B --train_file alfworld_sft.json \\
      --task_turn 2 --hidden_data messages --output_dir student --K 8
  python collect.py alfworld --model_name_or_path student --latent_steps 8 \\
      --dataset_path alfworld_sft.json --task_turn 2 --output_dir messages_k8

The last line writes the student's messages. The actor reads each sample three times: A with the
student's message, D with the full data message, B with none.

    L = CE(A) + T^2 sum_t w_t KL(D || A)_t / sum_t w_t + (1 - cos of mean-pooled messages)

w_t is large where the data message makes the actor surer: the student learns what the message is for.
A killed run, started again with the same flags, continues from its last checkpoint. The loop is that of
train_actor.py: `diff train_actor.py compress.py` shows the method.
"""
import contextlib
import functools
import math
import os
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from collect import sender_prompt
from common import (STOP_EXIT, Parser, Run, UserError, add_training_flags, all_reduce_sum, catch_stop,
                    check_finite, check_output, evaluate, fingerprint, json_object, lock, lr_scale, memory_gb,
                    one_line_errors, positive, progress, run_settings, task_template, this_rank, write_json)
from data import PLAN_PROMPT, encode_conversation, global_batch, naming, show_sample, train_and_eval
from hf import context_length, decoder_layers, left_pad, load_config, load_tokenizer
from model import (LatentActor, LatentSender, build_sample, check_sender, collate, compression_terms, open_shards,
                   read_info)

INPUTS = ["train_file", "eval_file", "hidden_data", "teacher_model_name_or_path"]  # their contents are settings, too


def get_args(argv):
    parser = Parser(prog="compress.py", description=__doc__)
    flag = parser.flag
    parser.group("model")
    flag("--teacher_model_name_or_path", ..., "an actor directory; it stays frozen")
    flag("--student_model_name_or_path", ..., "the sender to start from: any causal LM")
    flag("--hidden_data", ..., "full messages of the sender that the actor was trained on")
    flag("--K", 128, "latent steps")
    flag("--prompt_template", None, "what the student is asked; {task} is replaced; default: what the sender of "
         "--hidden_data was", type=task_template)
    flag("--chat_template_kwargs", None, "JSON for the student's chat template; default: that of the sender of "
         "--hidden_data; kept with the student", type=json_object)
    flag("--trust_remote_code", False, "run code that the model ships")
    flag("--self_check", True, "try at the start whether the model can be used")
    parser.group("loss")
    flag("--lambda_task", 1.0, "weight of CE(A) (paper and released code: 1)")
    flag("--lambda_kl", 1.0, "weight of the KL term (paper 1, released code 0.1)")
    flag("--lambda_align", 1.0, "weight of alignment (paper 1, released code 0.1)")
    flag("--kl_temperature", 4.0, "T of the KL term")
    parser.group("length")
    flag("--num_train_epochs", 3.0, "passes over the data")
    flag("--max_steps", None, "optimizer steps, instead of epochs; a run may be continued with more: the schedule "
         "is then that of the new length", type=positive)
    add_training_flags(parser, learning_rate=5e-5)
    return parser.parse_args(argv)


def check_args(args, world):
    if args.global_batch_size % world:
        raise UserError(f"--global_batch_size {args.global_batch_size} is no multiple of the {world} ranks")
    if args.fsdp and "RANK" not in os.environ:
        raise UserError("--fsdp shards over ranks: start with torchrun --nproc_per_node N")


def check_teacher(path, info, widths):
    """Raises UserError unless the teacher reads states of these widths, {what is this wide: width}."""
    if info.get("kind") != "latent":
        raise UserError(f"{path} has no adapter: the teacher is an actor of train_actor.py --message latent")
    expected = info["adapter"]["arguments"]["sender_dim"]
    for name, width in widths.items():
        if width != expected:
            raise UserError(f"the adapter of {path} reads states {expected} wide, {name} is {width}: give the "
                            f"sender (or its size) that the actor was trained on")


# ---- Data: the actor's samples are those of train_actor.py; the student reads the task in its own words ----
def student_prompts(data, tokenizer, template, steps, max_length, max_actor_length):
    """Ids of the student's prompt for every sample: the text that the data's sender was asked, by the
    student's own tokenizer and chat template. Raises UserError where K latents do not fit."""
    prompts = []
    for sample_id, task, (before, after, _) in zip(data.ids, data.tasks, data.encoded):
        with naming(data.path):
            prompts.append(sender_prompt(tokenizer, template, {"id": sample_id, "task": task}))
        where = f"{data.path}: id {sample_id}"  # the data message was checked by Conversations, but K may be larger
        for whose, length, context in (("actor", len(before + after), max_actor_length),
                                       ("student", len(prompts[-1]), max_length)):
            if length + steps > context:
                raise UserError(f"{where}: {length} tokens + K = {steps} exceed the {whose}'s context of {context}: "
                                f"lower --K or shorten the sample")
    return prompts


def student_batch(data, chosen, latents):
    """The samples with the student's latents (B, K, d_s), and their gradient, as their messages."""
    samples = [build_sample(*data.encoded[n], latents=states) for n, states in zip(chosen, latents)]
    return collate(samples, latents.device)


def read_three_ways(data, silent, chosen, latents):
    """What the actor reads -> batches A with the student's latents, D with the full message (the
    released code cuts it to its first K states), B with none.

    silent: {index: (before, after, labels)} without announcement and markers."""
    device = latents.device
    return (student_batch(data, chosen, latents),
            collate([data.sample(n, "latent") for n in chosen], device),
            collate([build_sample(*silent[n]) for n in chosen], device))


# ---- Models --------------------------------------------------------------------------------------
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


@one_line_errors("compress.py")
def main(argv=None):
    args = get_args(argv)
    rank, world, device = this_rank()
    check_args(args, world)
    inputs = [args.student_model_name_or_path, *(getattr(args, name) for name in INPUTS)]
    check_output("--output_dir", args.output_dir, inputs)
    run = Run(args.output_dir, run_settings(vars(args), INPUTS), args.resume, rank)
    state, source = run.state, run.checkpoint or args.student_model_name_or_path

    # ---- data, all checked before a model is loaded ----------------------------------------------
    config = load_config(source, args.trust_remote_code)
    teacher_path, shards = args.teacher_model_name_or_path, open_shards(args.hidden_data)
    info, teacher_config = read_info(teacher_path), load_config(teacher_path, args.trust_remote_code)
    check_teacher(teacher_path, info, {"--student_model_name_or_path": config.hidden_size,
                                       "--hidden_data": shards.hidden_size})
    check_sender(shards.sender, teacher_path)
    # the actor reads what it read in its own training: same announcement, same template
    teacher_tokenizer = load_tokenizer(teacher_path, args.trust_remote_code, info.get("chat_template_kwargs"))
    actor_context = min(args.model_max_length, context_length(teacher_config))
    data, train_indices, eval_data, eval_indices = train_and_eval(
        args.train_file, args.eval_file, args.eval_ratio, args.seed, teacher_tokenizer,
        shards=shards, announcement=info["plan_announcement"], task_turn=args.task_turn,
        max_message=args.prepended_length, max_length=actor_context)
    # what B reads has no announcement and no markers: nobody has said anything
    silent = {n: encode_conversation(teacher_tokenizer, data.turns[n]) for n in train_indices}
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
    steps_per_epoch = len(train_indices) / args.global_batch_size
    max_steps = args.max_steps or math.ceil(args.num_train_epochs * steps_per_epoch)
    if run.is_over(max_steps, args.early_stopping_patience):
        return
    if rank == 0:
        lock(args.output_dir)

    # ---- model: what learns has fp32 parameters, because a step of 1e-5 is lost in bf16 ones -----
    device_type = device.split(":")[0]
    cuda = device_type == "cuda"
    bf16 = cuda if args.bf16 == "auto" else args.bf16 == "true"
    autocast = functools.partial(torch.autocast, device_type, torch.bfloat16, enabled=bf16)
    student = LatentSender.load(source, "fp32", "cpu", args.trust_remote_code, check=args.self_check)
    head = student.lm.get_output_embeddings()
    if head.weight is not student.lm.get_input_embeddings().weight:
        head.requires_grad_(False)  # a student that never writes has no use for its head
    for module in (student.norm, student.bridge):
        module.requires_grad_(args.K > 1)  # with one step no thought is read again
    actor = load_teacher(teacher_path, "bf16" if bf16 else "fp32", device, args.trust_remote_code,
                         args.self_check, args.gradient_checkpointing)
    if args.compile:  # layer by layer: equal layers are compiled once, and FSDP2 can gather between them
        for layer in decoder_layers(actor.lm):
            layer.compile(dynamic=True)
    learner, layers = student, decoder_layers(student.lm) if args.fsdp else []

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

    parameters = [p for p in student.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() == 1]
    groups = [{"params": matrices, "peak": args.learning_rate, "weight_decay": args.weight_decay},
              {"params": vectors, "peak": args.learning_rate, "weight_decay": 0.0}]
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
            print(f"first prompt of the student: {tokenizer.decode(prompts[train_indices[0]])}")
            print("first sample: " + show_sample(teacher_tokenizer, data.sample(train_indices[0], "latent")))

    def eval_loss(chosen):
        """Summed CE of held-out samples, with the student's K latents as message."""
        with autocast():
            latents = student(*left_pad([eval_prompts[n] for n in chosen], device), args.K)  # (B, K, d_s)
            return actor(student_batch(eval_data, chosen, latents))["task"]

    held_out_loss = functools.partial(evaluate, learner, eval_loss, eval_data, eval_indices,
                                      args.per_device_eval_batch_size, device, rank, world)

    def write_model(directory, state_dict):
        student.save(directory, state_dict)
        tokenizer.save_pretrained(directory)
        write_json(os.path.join(directory, "latent_bridge.json"), bridge)

    bridge = {"K": args.K, "prompt_template": template, "chat_template_kwargs": tokenizer.chat_template_kwargs,
              "teacher": fingerprint(teacher_path)}
    weights = {"task": args.lambda_task, "kl": args.lambda_kl, "align": args.lambda_align}
    warmup = max(1, round(args.warmup_ratio * max_steps))
    bar = progress(total=max_steps, initial=state["step"], desc="train", unit="step", rank=rank)
    stop_signals = catch_stop()
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
        counts = {"task": sum(data.n_labels[n] for _, n in drawn), "kl": len(drawn), "align": len(drawn)}
        sums = {}  # of the terms, over micro-batches and then over ranks

        # ---- the step --------------------------------------------------------------------------
        for m, chosen in enumerate(micro_batches):
            # DDP sums gradients over ranks once a step, in the last pass; FSDP2 in every pass, because
            # between passes a rank has room for its share of the summed gradients only
            wait = isinstance(model, DistributedDataParallel) and m + 1 < len(micro_batches)
            with model.no_sync() if wait else contextlib.nullcontext():
                with autocast():
                    chosen = [n for _, n in chosen]
                    latents = model(*left_pad([prompts[n] for n in chosen], device), args.K)  # (B, K, d_s)
                    batches = read_three_ways(data, silent, chosen, latents)
                    terms = compression_terms(actor, *batches, temperature=args.kl_temperature)
                    means = {name: term / counts[name] for name, term in terms.items()}
                    loss = sum(weights[name] * means[name] for name in weights if name in means)
                (loss * world).backward()  # DDP and FSDP2 average over ranks, here they shall add
            for name, mean in means.items():
                sums[name] = sums.get(name, 0.0) + mean.item()
            seen_tokens += sum(len(prompts[n]) + args.K for n in chosen)
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
        best = run.publish(["loss", *weights, "eval_loss"], "loss")
        print(f"wrote {best} to {args.output_dir}")
        if data.instruction:  # conversations of ETO's kind are ALFWorld's
            print(f"next: python eval_alfworld.py --model_path {teacher_path} --sender {args.output_dir} "
                  f"--output_path {args.output_dir}_results")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
