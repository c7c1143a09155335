"""
What the two trainers share and the method does not need.

    1. ranks         from torchrun; DDP, or FSDP2 with --fsdp
    2. checkpoints   checkpoint-N to continue from, best-N, and at the end the output directory itself
    3. log           loss_log.csv, loss_curve.png
"""
import contextlib
import csv
import math
import os
import re
import shutil

import matplotlib
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from common import UserError, atomic_path, read_json, remove, this_rank, write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# flags that may change between a run and its continuation: they move memory and files, not results
NOT_SETTINGS = ["output_dir", "resume", "per_device_train_batch_size", "per_device_eval_batch_size", "logging_steps",
                "save_steps", "save_total_limit", "gradient_checkpointing", "fsdp", "compile", "trust_remote_code"]


# ---------------------------------------------------------------------------------------------------------------------
# 1. Ranks

def ranks(args):
    """`this_rank` -> (rank, world size, device). Raises UserError if the flags do not fit the number of ranks."""
    rank, world, device = this_rank()
    if args.global_batch_size % world:
        raise UserError(f"--global_batch_size {args.global_batch_size} must be a multiple of the {world} ranks")
    if args.fsdp and "RANK" not in os.environ:
        raise UserError("--fsdp shards over ranks: start with torchrun --nproc_per_node N")
    return rank, world, device


def distribute(module, args, world, device):
    """Spread a module over the ranks -> what to call. It comes on the CPU, in fp32.

    DDP holds everything on every rank. --fsdp holds 1/world of the parameters, gradients and Adam's moments, and
    gathers one decoder layer at a time for its turn; embeddings, head, adapter and bridge form one more unit."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if world > 1 or args.fsdp:
        cuda = torch.device(device) if device.startswith("cuda") else None
        dist.init_process_group("nccl" if cuda else "gloo", device_id=cuda)
    if args.fsdp:
        mesh = init_device_mesh(device.split(":")[0], (world,))
        for layer in module.lm.get_decoder().layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(module, mesh=mesh)
    module.to(device)
    if world == 1:
        return module
    # buckets are the gradients themselves: a copy would cost 4 more bytes per parameter
    return DDP(module, device_ids=[device] if device.startswith("cuda") else None, gradient_as_bucket_view=True)


def compile_layers(lm):
    """--compile: layer by layer, so that equal layers are compiled once and --fsdp can gather between them."""
    for layer in lm.get_decoder().layers:
        layer.compile(dynamic=True)


def accumulate(model, last):
    """Context of a backward pass: DDP sums gradients over ranks once a step, in the `last` pass. FSDP does it in every
    pass, because a gradient that is not summed yet is whole, and whole gradients do not fit."""
    return model.no_sync() if isinstance(model, DDP) and not last else contextlib.nullcontext()


def all_reduce(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def clip_gradients(parameters, max_norm):
    """Clip the norm of the whole gradient, wherever its parts are -> the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def autocast(device):
    """bf16 products over fp32 parameters on CUDA: a step of 1e-5 is lost in bf16 parameters. Nothing on CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# 2. Checkpoints: <output_dir>/checkpoint-N can be continued from, by any number of ranks, with and without --fsdp

def numbered(directory, name):
    """[(N, path)] of name-N in a directory, in order."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    found = [(int(m[1]), m[0]) for m in map(re.compile(rf"{name}-(\d+)").fullmatch, names) if m]
    return [(n, os.path.join(directory, entry)) for n, entry in sorted(found)]


def find_start(args):
    """-> (settings, state, checkpoint or None, where the best model so far comes from or None).

    `settings` are the flags that a result depends on; a checkpoint of other settings is refused. With --resume PATH
    into a new directory the best model comes along, or is forgotten if it is gone."""
    settings = {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS}
    state = {"step": 0, "best_step": None, "best_eval_loss": math.inf, "bad_evals": 0, "stopped": False, "last": {}}
    checkpoint = None if args.resume in ("auto", "never") else args.resume
    if args.resume == "auto" and (found := numbered(args.output_dir, "checkpoint")):
        checkpoint = found[-1][1]
    if not checkpoint:
        return settings, state, None, None
    state = read_json(os.path.join(checkpoint, "trainer_state.json"))
    changed = [k for k in settings if settings[k] != state["settings"].get(k)]
    if changed:
        raise UserError(f"{checkpoint} was trained with another {', '.join('--' + k for k in changed)}: give the same "
                        f"flags, another --output_dir, or --resume never")
    best = f"best-{state['best_step']}"
    if state["best_step"] is None or os.path.isdir(os.path.join(args.output_dir, best)):
        return settings, state, checkpoint, None
    best_source = os.path.join(os.path.dirname(os.path.abspath(checkpoint)), best)
    if not os.path.isdir(best_source):
        best_source = checkpoint if state["best_step"] == state["step"] else None
    if best_source is None:
        state |= {"best_step": None, "best_eval_loss": math.inf, "bad_evals": 0}
    return settings, state, checkpoint, best_source


def is_finished(args, state):
    """True for a run that is over: its root has a trainer_state.json, which is written last of all."""
    return state["stopped"] and os.path.exists(os.path.join(args.output_dir, "trainer_state.json"))


def full_state(model):
    """{name: tensor}, whole; under --fsdp put together on rank 0 (others: {}), so all ranks must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options) if isinstance(model, FSDPModule) else model.state_dict()
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}  # a tied head is not stored twice
    return {name: tensor for name, tensor in state.items() if name in own}


def full_optimizer_state(model, optimizer):
    """The optimizer's state by parameter name: the same file for DDP, FSDP and one process. All ranks must call it."""
    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_run(directory, rank, model, write_model, optimizer=None, trainer_state=None):
    """One atomic directory: what write_model(path, whole state_dict) writes and, to continue from it, the optimizer and
    trainer_state.json. All ranks must call it; rank 0 writes."""
    weights = full_state(model)
    optimizer_state = full_optimizer_state(model, optimizer) if optimizer is not None else None
    if rank == 0:
        with atomic_path(directory) as temporary:
            write_model(temporary, weights)
            if optimizer is not None:
                torch.save(optimizer_state, os.path.join(temporary, "optimizer.pt"))
                write_json(os.path.join(temporary, "trainer_state.json"), trainer_state)


def load_optimizer(model, optimizer, checkpoint):
    """Each rank maps the file into memory and takes its own part."""
    state = torch.load(os.path.join(checkpoint, "optimizer.pt"), weights_only=True, map_location="cpu", mmap=True)
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def clean(args, checkpoint, best_source, best_step):
    """Before the first step: half-written files of a killed run go, and all of an old run with --resume never."""
    os.makedirs(args.output_dir, exist_ok=True)
    for name in os.listdir(args.output_dir):
        if ".tmp" in name or (not checkpoint and re.fullmatch(r"(checkpoint|best)-\d+|trainer_state.json", name)):
            remove(os.path.join(args.output_dir, name))
    if best_source:
        with atomic_path(os.path.join(args.output_dir, f"best-{best_step}")) as temporary:
            shutil.copytree(best_source, temporary, ignore=shutil.ignore_patterns("optimizer.pt", "trainer_state.json"))


def prune(directory, limit, best_step):
    """Keep the newest `limit` checkpoints and the best model. Only after a new checkpoint is on disk."""
    for _, old in numbered(directory, "checkpoint")[:-limit]:
        remove(old)
    for n, old in numbered(directory, "best"):
        if n != best_step:
            remove(old)


def publish(args, state, settings):
    """The output directory itself becomes the best model, or the last where nothing was held out -> its name."""
    final = f"best-{state['best_step']}" if state["best_step"] else f"checkpoint-{state['step']}"
    for name in sorted(os.listdir(os.path.join(args.output_dir, final))):
        if name not in ("optimizer.pt", "trainer_state.json"):
            with atomic_path(os.path.join(args.output_dir, name)) as temporary:
                shutil.copy(os.path.join(args.output_dir, final, name), temporary)
    write_json(os.path.join(args.output_dir, "trainer_state.json"), {**state, "settings": settings})
    return final + (f", best eval loss {state['best_eval_loss']:.4f}" if state["best_step"] else "")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Log

def lr_scale(step, max_steps, warmup):
    """Linear warm-up, then cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, max_steps - warmup)))


def open_log(path, columns, step):
    """loss_log.csv up to `step` -> (file, writer): what came after the checkpoint is run, and logged, again."""
    kept = []
    if step and os.path.exists(path):
        with open(path) as f:
            # a line that a kill tore lacks its last field
            kept = [row for row in csv.DictReader(f) if row[columns[-1]] and int(row["step"]) <= step]
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as f:
        csv.DictWriter(f, columns).writeheader()
        csv.DictWriter(f, columns).writerows(kept)
    log = open(path, "a", newline="")
    return log, csv.DictWriter(log, columns)


def plot(csv_path, png_path, names, ylabel):
    """Columns of loss_log.csv against the step."""
    with open(csv_path) as f:
        rows = list(csv.DictReader(f))
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in names:
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        if any(y for _, y in points):
            axes.plot(*zip(*points), label=name, marker="o" if name == "eval_loss" else None, markersize=4)
    axes.set(xlabel="step", ylabel=ylabel, ylim=(0, None))
    axes.legend()
    with atomic_path(png_path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
