"""
Stage 3: a student sender learns to say the message in K latent steps, judged by a frozen actor.

  python compress.py --teacher_model_name_or_path actor --student_model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
      --train_file alfworld_sft.json --task_turn 2 --hidden_data messages --output_dir student --K 8
  torchrun --nproc_per_node 8 compress.py (the same flags): the same result
  python collect.py alfworld --model_name_or_path student --latent_steps 8 ...      then writes its messages

The actor reads each sample three times: A with the student's message, D with the full data message, B with none.
L = CE(A) + T^2 sum_t w_t KL(D || A)_t / sum_t w_t + (1 - cos of mean-pooled messages): w_t is large where the data
message makes the actor surer, so the student learns what the message is for.
"""
import argparse
import math
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from collect import PRESETS, left_pad
from common import (SIGTERM_EXIT, Parser, UserError, boolean, catch_sigterm, memory_gb, positive, run, seed_for,
                    write_json)
from data import Conversations, global_batch, split_eval
from lm import lm_logits, load_config, load_tokenizer
from model import (LatentActor, LatentSender, assemble, collate, cross_entropy, encode_conversation, head_rows,
                   head_loss, kl_divergence, open_shards, read_info, render_turn)
from training import (accumulate, all_reduce, autocast, clean, clip_gradients, compile_layers, distribute, find_start,
                      is_finished, load_optimizer, lr_scale, open_log, plot, prune, publish, ranks, save_run)

LOSS_TERMS = ["task", "kl", "align"]
COLUMNS = ["step", "epoch", "loss", *LOSS_TERMS, "lr", "grad_norm", "eval_loss", "tokens_per_s", "memory_gb"]


def get_args(argv):
    parser = Parser(prog="compress.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    g = parser.add_argument_group("model")
    g.add_argument("--teacher_model_name_or_path", required=True, help="an actor directory; it stays frozen")
    g.add_argument("--student_model_name_or_path", required=True, help="the sender to start from: any causal LM")
    g.add_argument("--K", type=positive, default=128, help="latent steps")
    g.add_argument("--prompt_template",
                   help="what the student is asked; {task} is replaced; default: what the sender of --hidden_data was")
    g.add_argument("--trust_remote_code", type=boolean, default=False, help="run code that the models ship")
    g = parser.add_argument_group("data")
    g.add_argument("--train_file", required=True, help="conversations, as in train_actor.py")
    g.add_argument("--hidden_data", required=True, help="full messages of the sender the actor was trained on")
    g.add_argument("--task_turn", type=int, default=0, help="fold turns 0 and N into the first human turn (ETO: 2)")
    g.add_argument("--eval_file", help="held-out rows, same format")
    g.add_argument("--eval_ratio", type=float, default=0.0, help="hold out this share of --train_file, chosen by id")
    g.add_argument("--model_max_length", type=int, default=4096, help="a longer row is an error")
    g.add_argument("--prepended_length", type=int, default=2048, help="a longer data message is an error")
    g = parser.add_argument_group("loss")
    g.add_argument("--lambda_task", type=float, default=1.0, help="weight of CE(A) (paper and released code: 1)")
    g.add_argument("--lambda_kl", type=float, default=1.0, help="weight of the KL term (paper 1, released code 0.1)")
    g.add_argument("--lambda_align", type=float, default=1.0, help="weight of alignment (paper 1, released code 0.1)")
    g.add_argument("--kl_temperature", type=float, default=4.0, help="T of the KL term")
    g = parser.add_argument_group("optimization")
    g.add_argument("--num_train_epochs", type=float, default=3, help="passes over the data")
    g.add_argument("--max_steps", type=positive, help="optimizer steps, instead of epochs")
    g.add_argument("--learning_rate", type=float, default=5e-5, help="peak, then cosine to 0")
    g.add_argument("--warmup_ratio", type=float, default=0.03, help="share of the steps that warm up linearly")
    g.add_argument("--adam_beta2", type=float, default=0.999, help="AdamW's memory of squares; short runs: 0.95")
    g.add_argument("--weight_decay", type=float, default=0.0, help="AdamW, on matrices only")
    g.add_argument("--max_grad_norm", type=float, default=1.0, help="clip the gradient's norm")
    g.add_argument("--global_batch_size", type=positive, default=16, help="samples per optimizer step, over all ranks")
    g.add_argument("--per_device_train_batch_size", type=positive, default=4, help="samples per pass: memory only")
    g.add_argument("--per_device_eval_batch_size", type=positive, default=8, help="samples per evaluation pass")
    g.add_argument("--gradient_checkpointing", type=boolean, default=False, help="recompute the actor's activations")
    g.add_argument("--fsdp", type=boolean, default=False, help="shard parameters, gradients and Adam over the ranks")
    g.add_argument("--compile", type=boolean, default=False,
                   help="torch.compile the actor's layers (the student's cache grows: compiled anew each step)")
    g.add_argument("--seed", type=int, default=0, help="of the order")
    g = parser.add_argument_group("output")
    g.add_argument("--output_dir", required=True, help="the student directory")
    g.add_argument("--logging_steps", type=positive, default=1, help="a log line every N steps (the csv has them all)")
    g.add_argument("--eval_steps", type=positive, default=500, help="evaluate every N steps, and at the end")
    g.add_argument("--save_steps", type=positive, default=500, help="checkpoint every N steps, and at the end")
    g.add_argument("--save_total_limit", type=positive, default=2, help="checkpoints to keep, besides the best")
    g.add_argument("--early_stopping_patience", type=int, default=0, help="stop after N evaluations without a new best")
    g.add_argument("--resume", default="auto", help="auto: from the last checkpoint; never; or a checkpoint's path")
    return parser, parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# data: the actor's rows are those of train_actor.py; the student reads the task with its own tokenizer and template

def student_prompts(data, tokenizer, args, max_length, actor_length):
    """Ids of the student's prompt for every row: the text that the data's sender was asked, rendered anew."""
    prompts = []
    for row_id, task, (before, after, _) in zip(data.ids, data.tasks, data.encoded):
        if len(before) + args.K + len(after) > actor_length:
            raise UserError(f"{data.path}: id {row_id}: {len(before) + len(after)} tokens + K = {args.K} exceed the "
                            f"actor's context of {actor_length}: lower --K or shorten the row")
        text = args.prompt_template.replace("{task}", task)
        before, after = render_turn(tokenizer, [{"role": "user", "content": text}], where=row_id)
        prompts.append(before + after)
        if len(prompts[-1]) + args.K > max_length:
            raise UserError(f"{data.path}: id {row_id}: prompt of {len(prompts[-1])} tokens + K = {args.K} exceed the "
                            f"student's context of {max_length}: lower --K or shorten the task")
    return prompts


# ---------------------------------------------------------------------------------------------------------------------
# the loss

def entropy(lm, hidden_states):
    """Entropy of the next token per position, in nats, without (N, V). hidden_states (N, D) -> (N,)."""
    parts = []
    for h in hidden_states.split(head_rows(lm, 24)):  # (n, D)
        log_probs = F.log_softmax(lm_logits(lm, h), dim=-1)  # (n, V)
        parts.append(-(log_probs.exp() * log_probs).sum(-1))
    return torch.cat(parts)


def kl_weights(entropy_none, entropy_data, owner):
    """w_t = max(Ent_B - Ent_D, 0), clipped at the 0.95 quantile of its sample and divided by the sample's sum, so that
    they do not depend on how samples are batched. (N,), (N,), owner (N,) sample of each position -> (N,)."""
    weights = (entropy_none - entropy_data).clamp(min=0)
    for b in owner.unique():
        w = weights[owner == b]
        w = w.clamp(max=torch.quantile(w, 0.95))
        weights[owner == b] = w / w.sum().clamp(min=1e-12)
    return weights


def compression_loss(actor, latents, rows, data_rows, none_rows, n_labels, n_samples, args):
    """Loss of a micro-batch as its share of the global batch's, and its parts (3,). latents (B, K, d_s) carry the
    gradient; rows hold as many placeholders; data_rows the full data messages, none_rows none. The actor is frozen."""
    device = latents.device
    batch = collate(rows, device) | {"latents": latents}
    data_batch, none_batch = collate(data_rows, device), collate(none_rows, device)
    with torch.no_grad():
        data_states, none_states = actor.states(data_batch)[0], actor.states(none_batch)[0]  # (N, D) each
        owner = (batch["labels"][:, 1:] != -100).nonzero()[:, 0]  # (N,) position -> sample
        weights = kl_weights(entropy(actor.lm, none_states), entropy(actor.lm, data_states), owner)
        data_message = actor.adapter(data_batch["latents"], data_batch["latents_mask"])  # (B, L, D)
        mask = data_batch["latents_mask"].unsqueeze(-1)
        data_mean = (data_message * mask).sum(1) / mask.sum(1)  # (B, D)
    mean = actor.adapter(latents, batch["latents_mask"]).mean(1)  # (B, D)
    align = (1 - F.cosine_similarity(mean.float(), data_mean.float(), dim=-1)).sum() / n_samples
    hidden_states, labels = actor.states(batch)
    T = args.kl_temperature

    def loss_fn(logits, part, data_logits):
        task, grad = cross_entropy(F.log_softmax(logits, dim=-1), labels[part])
        kl, grad_kl = kl_divergence(F.log_softmax(data_logits / T, dim=-1), F.log_softmax(logits / T, dim=-1))
        w = T * T / n_samples * weights[part]  # (n,)
        grad.mul_(args.lambda_task / n_labels).addcmul_(grad_kl, (args.lambda_kl / T * w)[:, None])
        terms = torch.stack([task.sum() / n_labels, (w * kl).sum()])
        return args.lambda_task * terms[0] + args.lambda_kl * terms[1], terms, grad

    loss, terms = head_loss(actor.lm, hidden_states, loss_fn, {"data_logits": data_states})
    return loss + args.lambda_align * align, torch.cat([terms, align.detach()[None]])


def load_teacher(path, device, trust_remote_code, gradient_checkpointing=False):
    """The actor, frozen and in eval mode (the released code trains with the teacher's dropout on)."""
    actor = LatentActor.load(path, "bf16" if device.startswith("cuda") else "fp32", device, trust_remote_code)
    actor.requires_grad_(False)
    if gradient_checkpointing:
        actor.lm.activation_checkpointing_enable()
        for module in actor.lm.modules():  # a block recomputes only "in training"; what it holds stays in eval mode
            if hasattr(module, "gradient_checkpointing"):
                module.training = True
    return actor


@torch.no_grad()
def evaluate(actor, student, data, prompts, positions, args, device, rank, world):
    """Mean CE of the frozen actor over held-out rows, reading the student's messages. Every rank makes the same number
    of passes, because under --fsdp each pass needs all ranks."""
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # summed CE, tokens
    order = sorted(positions, key=lambda n: data.lengths[n])
    for i in range(0, len(order[::world]), args.per_device_eval_batch_size):
        part = order[rank::world][i:i + args.per_device_eval_batch_size]
        with autocast(device):
            latents = student(*left_pad([prompts[n] for n in part or order[:1]], device), args.K)
            if part:
                loss, _ = actor(collate([placeholder(data, n, latents) for n in part], device) | {"latents": latents})
                totals += torch.tensor([loss.item(), sum(data.n_labels[n] for n in part)], device=device)
    loss, tokens = all_reduce(totals).tolist()
    return loss / tokens


def placeholder(data, n, latents):
    """Row n with room for K latents, which `collate` leaves to the caller to fill."""
    return assemble(*data.encoded[n], latents=torch.zeros(latents.shape[1:]))


# ---------------------------------------------------------------------------------------------------------------------
# loop

def train(args):
    rank, world, device = ranks(args)
    if "{task}" not in (args.prompt_template or "{task}"):
        raise UserError("--prompt_template must contain {task}")
    settings, state, checkpoint, best_source = find_start(args)

    # teacher and data, all checked before a model is loaded
    teacher_config = load_config(args.teacher_model_name_or_path, args.trust_remote_code)
    info = read_info(args.teacher_model_name_or_path)
    if info.get("message") != "latent":
        raise UserError(f"{args.teacher_model_name_or_path} has no adapter: the teacher must be an actor that "
                        f"train_actor.py wrote with --message latent")
    source = checkpoint or args.student_model_name_or_path
    tokenizer, config = load_tokenizer(source, args.trust_remote_code), load_config(source, args.trust_remote_code)
    shards = open_shards(args.hidden_data)
    args.prompt_template = args.prompt_template or shards.sender.get("prompt_template", PRESETS["alfworld"][0])
    for name, width in ((args.student_model_name_or_path, config.hidden_size), (args.hidden_data, shards.hidden_size)):
        if width != info["sender_hidden_size"]:
            raise UserError(f"the adapter of {args.teacher_model_name_or_path} reads states "
                            f"{info['sender_hidden_size']} wide, {name} is {width}: give the sender (or "
                            f"its size) that the actor was trained on")
    teacher_tokenizer = load_tokenizer(args.teacher_model_name_or_path, args.trust_remote_code)
    args.message, args.plan_announcement = "latent", info["plan_announcement"]
    max_length = min(args.model_max_length, getattr(teacher_config, "max_position_embeddings", 2**31))
    data = Conversations(args.train_file, args, teacher_tokenizer, shards, max_length, info["sender_hidden_size"])
    train_rows, eval_rows = split_eval(data, args.eval_ratio, args.seed)
    eval_data = data
    if args.eval_file:
        eval_data = Conversations(args.eval_file, args, teacher_tokenizer, shards, max_length, data.width)
        train_rows, eval_rows = list(range(len(data))), list(range(len(eval_data)))
    if not train_rows:
        raise UserError(f"{args.train_file} has no training rows (--eval_ratio {args.eval_ratio})")
    context = getattr(config, "max_position_embeddings", 2**31)
    prompts = student_prompts(data, tokenizer, args, context, max_length)
    eval_prompts = prompts if eval_data is data else student_prompts(
        eval_data, tokenizer, args, context, max_length)
    # B's prompt has no announcement and no markers: what an actor sees to whom nobody has said anything
    silent = [encode_conversation(teacher_tokenizer, messages, None, data.path) for messages in data.messages]
    max_steps = args.max_steps or math.ceil(args.num_train_epochs * len(train_rows) / args.global_batch_size)
    if is_finished(args, state):
        if rank == 0:
            print(f"{args.output_dir} is finished ({state['step']} steps); --resume never trains it again")
        return

    # models: the student in fp32, the actor frozen
    torch.manual_seed(args.seed)
    actor = load_teacher(args.teacher_model_name_or_path, device, args.trust_remote_code, args.gradient_checkpointing)
    if args.compile:
        compile_layers(actor.lm)
    student = LatentSender.load(source, "fp32", "cpu", args.trust_remote_code)
    if not config.tie_word_embeddings:
        student.lm.get_output_embeddings().requires_grad_(False)  # a student that never writes has no use for its head
    model = distribute(student, args, world, device)

    trained = [p for p in student.parameters() if p.requires_grad]
    fused = device.startswith("cuda") or None  # one kernel, without temporaries as large as the parameters
    optimizer = torch.optim.AdamW([
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0}],
        lr=args.learning_rate, betas=(0.9, args.adam_beta2), fused=fused)
    if checkpoint:
        load_optimizer(student, optimizer, checkpoint)

    # files
    csv_path = os.path.join(args.output_dir, "loss_log.csv")
    if rank == 0:
        clean(args, checkpoint, best_source, state["best_step"])
        log, writer = open_log(csv_path, COLUMNS, state["step"])
        rows = sum(data.message_rows[n] for n in train_rows) / len(train_rows)
        print(f"{len(train_rows)} training rows, {len(eval_rows)} held out, {max_steps} steps of "
              f"{args.global_batch_size} on {world} x {device.split(':')[0]}: {rows:.1f} rows per message become "
              f"{args.K}" + (f", continuing at step {state['step']}" if checkpoint else ""))
        if not checkpoint:
            print(f"first prompt of the student: {tokenizer.decode(prompts[train_rows[0]])}")

    def write_student(directory, state_dict):
        student.save(directory, state_dict)
        tokenizer.save_pretrained(directory)
        write_json(os.path.join(directory, "latent_bridge.json"),
                   {"K": args.K, "prompt_template": args.prompt_template})

    def save(name, resumable):
        save_run(os.path.join(args.output_dir, name), rank, student, write_student, optimizer if resumable else None,
                 {**state, "settings": settings})

    warmup = max(1, round(args.warmup_ratio * max_steps))
    bar = tqdm(total=max_steps, initial=state["step"], desc="compress", unit="step", disable=rank > 0 or None)
    clock, seen_tokens, sigterm = time.perf_counter(), 0, catch_sigterm()
    for step in range(state["step"], state["step"] if state["stopped"] else max_steps):
        # this rank's share of the global batch: every world-th sample by length, so that the ranks' work is equal
        samples = [train_rows[p] for _, p in global_batch(step, len(train_rows), args.global_batch_size, args.seed)]
        n_labels = sum(data.n_labels[n] for n in samples)  # over all ranks and accumulation steps
        mine = sorted(samples, key=lambda n: data.lengths[n])[rank::world]
        size = args.per_device_train_batch_size
        micro = [mine[i:i + size] for i in range(0, len(mine), size)]
        torch.manual_seed(seed_for("dropout", args.seed, step, rank))  # a restart needs no saved RNG state
        sums = torch.zeros(2 + len(LOSS_TERMS), dtype=torch.float64, device=device)
        for m, part in enumerate(micro):
            with accumulate(model, last=m + 1 == len(micro)):
                with autocast(device):
                    latents = model(*left_pad([prompts[n] for n in part], device), args.K)  # (B, K, d_s)
                    loss, terms = compression_loss(
                        actor, latents, rows=[placeholder(data, n, latents) for n in part],
                        data_rows=[data.row(n, "latent") for n in part],  # every row of it; the released code keeps K
                        none_rows=[assemble(*silent[n]) for n in part], n_labels=n_labels,
                        n_samples=len(samples), args=args)
                (loss * world).backward()  # ranks are averaged
            sums[1:] += torch.cat([loss.detach()[None], terms])
            seen_tokens += sum(len(prompts[n]) + args.K for n in part)
        sums[0] = len(sigterm)
        preempted, loss, *terms = all_reduce(sums).tolist()
        grad_norm = clip_gradients(trained, args.max_grad_norm)
        if not math.isfinite(loss + grad_norm):
            raise UserError(f"step {step + 1}: the loss is {loss}, its gradient {grad_norm}; nothing was updated. "
                            f"Samples: {', '.join(data.ids[n] for n in samples)}. "
                            f"Lower --learning_rate, or look at their messages")
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * lr_scale(step, max_steps, warmup)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["step"] = step + 1

        # evaluate, log, save
        epoch = (step + 1) * args.global_batch_size / len(train_rows)
        record = {"step": step + 1, "epoch": round(epoch, 3), "loss": loss, **dict(zip(LOSS_TERMS, terms)),
                  "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm}
        last = step + 1 == max_steps
        if eval_rows and ((step + 1) % args.eval_steps == 0 or last):
            record["eval_loss"] = evaluate(actor, student, eval_data, eval_prompts, eval_rows, args, device, rank,
                                           world)
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
            if (step + 1) % args.logging_steps == 0 or "eval_loss" in record:
                bar.write(f"step {step + 1}/{max_steps} " + " ".join(
                    f"{k} {v:.4g}" for k, v in record.items() if k not in ("step", "epoch")))
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
        plot(csv_path, os.path.join(args.output_dir, "loss_curve.png"), ["loss", *LOSS_TERMS, "eval_loss"], "loss")
        print(f"wrote the student of {publish(args, state, settings)} to {args.output_dir}, with loss_log.csv and "
              f"loss_curve.png; next: python eval_alfworld.py --model_path {args.teacher_model_name_or_path} --sender "
              f"{args.output_dir} --latent_steps {args.K} …")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def main(argv=None):
    parser, args = get_args(argv)
    run(parser, train, args)


if __name__ == "__main__":
    main()
