"""
Ours against what people would otherwise write: same machine, same run, same random weights in a real
model's shape.

  OMP_NUM_THREADS=2 python examples/bench.py train --json train.json
  python examples/bench.py collect --shape qwen2.5-0.5b --device cuda
  python examples/bench.py gpu --json rows.json   # all that waits for one 80 GB card, under nine minutes

Each side of a row has a process of its own, and the sides take turns, so that a busy moment of the
machine hits both. Seconds are the median of --repeats turns after one that is not counted (a side that
takes over 45 s has one turn). GB is the peak of memory during the turns: on a CPU beyond what the process
held before it made its model, on a GPU what torch allocated. A ratio below 1: ours is the slower side.
"""
import collections
import contextlib
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as hf_logging

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts are one folder up

import collect  # noqa: E402
from common import Parser, one_line_errors, write_json  # noqa: E402
from data import PLAN_ANNOUNCEMENT  # noqa: E402
from eval_alfworld import Job, play  # noqa: E402
from examples.scratch import SPECIAL, build_tokenizer, made_by, optional  # noqa: E402
from games import GameWorkers  # noqa: E402
from hf import DTYPES, decoder_layers, decoder_states  # noqa: E402
from model import (HiddenStateProcessor, LatentActor, LatentSender, LatentShards, actor_loss,  # noqa: E402
                   build_sample, collate, make_record, write_shard)

hf_logging.set_verbosity_error()

Shape = collections.namedtuple("Shape", "layers width heads kv_heads feed_forward vocabulary tied")
SHAPES = {
    "tiny": Shape(2, 64, 4, 2, 128, 300, True),
    "smollm2-135m": Shape(30, 576, 9, 3, 1536, 49152, True),
    "qwen2.5-0.5b": Shape(24, 896, 14, 2, 4864, 151936, True),
    "qwen2.5-7b": Shape(28, 3584, 28, 4, 18944, 152064, False),
}


def get_args(argv):
    parser = Parser(prog="bench.py", description=__doc__)
    parser.add_argument("benchmark", choices=[*BENCHMARKS])
    parser.flag("--shape", None, "default: smollm2-135m; gpu: qwen2.5-0.5b and qwen2.5-7b", choices=SHAPES)
    parser.flag("--device", "cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    parser.flag("--repeats", 3, "turns per side that count")
    parser.flag("--json", None, "write the rows here")
    return parser.parse_args(argv)


# ---- measuring
COLUMNS = ("ours_s", "plain_s", "ratio", "ours_gb", "plain_gb")


def memory_of(key):
    """VmRSS (now) or VmHWM (peak) of this process in GB; 0 where there is no /proc."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return int(re.search(rf"{key}:\s+(\d+)", file.read())[1]) * 1024 / 1e9
    return 0.0


def serve(pipe, device, setup):
    """One side's process: makes its model and data, then works once for each request."""
    before = memory_of("VmRSS")
    work = setup()
    while pipe.recv():
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # VmHWM starts anew from what is resident now
        start = time.perf_counter()
        units, answer = work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else memory_of("VmHWM") - before
        pipe.send((seconds, units, peak, answer))


def compare(name, device, repeats, ours, plain=None, check=True):
    """Run both sides by turns -> their row of the table, which is printed, too. A side is setup() -> work();
    work() -> (units of work, answer). The row's seconds are those of a unit. With `check` the answers must be
    the same, or the comparison means nothing."""
    # on a CPU fork: all is imported, and no tensor work has been done yet; CUDA cannot be forked
    context = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
    processes, pipes, turns = [], {}, {}
    for side, setup in {"ours": ours, "plain": plain}.items():
        if setup is not None:
            pipes[side], end = context.Pipe()
            processes.append(context.Process(target=serve, args=(end, device, setup), daemon=True))
            processes[-1].start()
            end.close()
            turns[side] = []
    for _ in range(1 + repeats):
        for side, pipe in pipes.items():
            if sum(seconds for seconds, *_ in turns[side]) < 45:
                pipe.send(True)
                turns[side].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()

    row, last = {"name": name, **dict.fromkeys(COLUMNS)}, {}
    for side, done in turns.items():
        seconds, units, peaks, answers = zip(*(done[1:] or done))
        row[f"{side}_s"] = statistics.median(seconds) / units[0]
        row[f"{side}_gb"] = max(peaks)
        last[side] = answers[-1]
    if plain:
        row["ratio"] = row["plain_s"] / row["ours_s"]
        if check:
            same(last["ours"], last["plain"])
    print_line(name, ["-" if row[column] is None else f"{row[column]:.3g}" for column in COLUMNS])
    return row


def same(a, b):
    if not (math.isclose(a, b, rel_tol=1e-3) if isinstance(a, float) else a == b):
        raise AssertionError(f"the two sides did different work: {a} and {b}")


def print_line(name, figures):
    print(f"{name:82s}" + "".join(f"{figure:>9s}" for figure in figures), flush=True)


def make_lm(shape, device="cpu", dtype="fp32"):
    """A causal LM of the shape, random weights that differ from word to word."""
    size = SHAPES[shape]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        tie_word_embeddings=size.tied,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None)
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(DTYPES[dtype]).eval()


def random_ids(shape, *size):
    return torch.randint(SHAPES[shape].vocabulary, size, generator=torch.Generator().manual_seed(0)).tolist()


# ---- collect: decode_plans against generate(output_hidden_states=True), one prompt at a time
def collect_ours(shape, device, dtype="fp32", batch=32, prompt=32, length=64):
    lm, prompts = make_lm(shape, device, dtype), random_ids(shape, batch, prompt)

    def work():
        plans = collect.decode_plans(lm, prompts, range(batch), [], max_new_tokens=length)
        answer = [tokens[:8] for tokens, _, _ in plans[:2]]  # later on, a near-tie may fall either way
        return batch * length / 1000, answer
    return work


def collect_plain(shape, device, dtype="fp32", batch=32, prompt=32, length=64):
    """What people write: the states of all layers and positions come back, the last ones are picked."""
    lm, prompts = make_lm(shape, device, dtype), random_ids(shape, batch, prompt)

    def work():
        plans = []
        for ids in prompts[:2]:  # enough: its tokens/s know no batch
            ids = torch.tensor([ids], device=device)
            out = lm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                do_sample=False,
                output_hidden_states=True,
                return_dict_in_generate=True)
            torch.stack([step[-1][:, -1] for step in out.hidden_states], dim=1).cpu()  # (1, L, D)
            plans.append(out.sequences[0, ids.shape[1]:].tolist()[:8])
        return len(plans) * length / 1000, plans
    return work


def collect_given(shape, device, batch=32, prompt=32, length=64):
    """--plan_field: the plans are there and are only read."""
    lm, texts = make_lm(shape, device), random_ids(shape, batch, prompt + length)

    def work():
        plans = collect.read_plans(lm, texts, [length] * batch)
        return batch * length / 1000, len(plans)
    return work


def bench_collect(shape, device, repeats, batch=32, **sizes):
    ours = partial(collect_ours, shape, device, batch=batch, **sizes)
    plain = partial(collect_plain, shape, device, batch=batch, **sizes)
    name = f"collect {shape}, 1000 tokens, batch {batch}; generate one by one"
    if sizes:  # of the benchmark gpu, whose models are large and whose bf16 makes near-ties
        return [compare(name, device, repeats, ours, plain, check=False)]
    given = partial(collect_given, shape, device, batch=batch)
    return [compare(name, device, repeats, ours, plain),
            compare(f"collect {shape}, 1000 tokens of given plans; decoding them", device, repeats, given, ours,
                    check=False)]


# ---- train: LatentActor.forward, backward and AdamW
def train_batches(shape, device, batch=2, tokens=420, n_labels=140, length=96):
    """The batches of a step's three passes: a message of `length` states after 100 tokens."""
    torch.manual_seed(0)
    samples, plans, others = [], [], []
    for ids in random_ids(shape, batch, tokens - length):
        before, after, plan_ids = ids[:100], ids[100:], ids[-length:]
        labels = [-100] * (len(after) - n_labels) + after[-n_labels:]
        latents, other = torch.randn(2, length, SHAPES[shape].width)
        samples.append(build_sample(before, after, labels, plan_ids, latents))
        plans.append(build_sample(before, after, labels, plan_ids, ratio=1.0))
        others.append(build_sample(before, after, labels, plan_ids, other))
    return [collate(part, device) for part in (samples, plans, others)], batch * n_labels


def make_actor(shape, device):
    adapter = HiddenStateProcessor(SHAPES[shape].width, SHAPES[shape].width, dropout=0.0)
    return LatentActor(make_lm(shape, device), None, adapter.to(device)).train()


def make_step(actor, device, forward):
    """forward() -> the mean loss; -> work() that makes a training step."""
    parameters = [p for p in actor.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device == "cuda" or None)
    losses = []

    def work():
        loss = forward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        return 1, losses[0]  # of the first step: the sides may make more or less of them
    return work


def train_ours(shape, device, passes=3, bf16=False, compiled=False, trained_layers=None, ddp=False, **sizes):
    """A step as train_actor.py makes it. trained_layers: the adapter and so many last layers are trained,
    with gradient checkpointing; ddp: under DistributedDataParallel, on one rank."""
    model = actor = make_actor(shape, device)
    batches, n_labels = train_batches(shape, device, **sizes)
    layers = decoder_layers(actor.lm)
    if trained_layers:
        actor.lm.requires_grad_(False)
        layers[-trained_layers:].requires_grad_(True)
        actor.lm.activation_checkpointing_enable()
    if compiled:
        for layer in layers:
            layer.compile(dynamic=True)
    if ddp:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 1000)}
        dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=0, world_size=1)
        model = DistributedDataParallel(actor, gradient_as_bucket_view=True)

    def forward():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            terms = model(*batches[:passes])
        return (terms["task"] + 0.2 * terms.get("align", 0) + terms.get("sep", 0)) / n_labels
    return make_step(actor, device, forward)


def train_plain(shape, device, **sizes):
    """What people write: padded to 2,048, three passes over the whole vocabulary."""
    actor = make_actor(shape, device)
    batches, _ = train_batches(shape, device, **sizes)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100, "message_mask": False}
    for batch in batches:
        for name, value in fill.items():
            batch[name] = F.pad(batch[name], (0, 2048 - batch[name].shape[1]), value=value)
    next_labels = batches[0]["labels"][:, 1:]  # (B, 2047)
    supervised = next_labels != -100

    def log_probs(batch):
        logits = actor.lm(inputs_embeds=actor.embed(batch), attention_mask=batch["attention_mask"]).logits
        log_p = logits.log_softmax(-1)  # (B, 2048, V): the released losses are over all tokens, too
        return log_p[:, :-1][supervised]  # (N, V)

    def forward():
        branches = {"sample": log_probs(batches[0])}
        with torch.no_grad():
            branches |= {"plan": log_probs(batches[1]), "other": log_probs(batches[2])}
        terms = actor_loss(branches, {"labels": next_labels[supervised]})
        return (terms["task"] + 0.2 * terms["align"] + terms["sep"]).mean()
    return make_step(actor, device, forward)


def bench_train(shape, device, repeats):
    rows, ours = [], partial(train_ours, shape, device)
    for bf16 in (False, True):
        name = f"train {shape}, one step, bf16 {bf16}; a supervised step through the same head"
        three_passes, supervised = partial(ours, bf16=bf16), partial(ours, bf16=bf16, passes=1)
        rows.append(compare(name, device, repeats, three_passes, supervised, check=False))
    name = f"train {shape}, one step; padded to 2048, three full-vocabulary passes"
    return [*rows, compare(name, device, repeats, ours, partial(train_plain, shape, device))]


# ---- compress: LatentSender over a cache against reading prompt and latents again in each step
def think_again(sender, ids, mask, steps):
    start = sender.start.expand(len(ids), 1, -1)
    embeds = torch.cat([sender.lm.get_input_embeddings()(ids), start], dim=1)  # (B, T + 1, D)
    latents = []
    for _ in range(steps):
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        latents.append(decoder_states(sender.lm, embeds, mask)[:, -1:])
        embeds = torch.cat([embeds, sender.bridge(sender.norm(latents[-1]))], dim=1)
    return torch.cat(latents, dim=1)


def compress_side(shape, device, think=LatentSender.forward, backward=False, batch=1, prompt=128, steps=64):
    sender = LatentSender(make_lm(shape, device)).to(device)
    ids = torch.tensor(random_ids(shape, batch, prompt), device=device)

    def work():
        with torch.set_grad_enabled(backward):
            latents = think(sender, ids, torch.ones_like(ids), steps)  # (B, K, D)
            if backward:
                latents.square().mean().backward()
                sender.zero_grad(set_to_none=True)
        return 1, latents[:, -1].norm().item()
    return work


def bench_compress(shape, device, repeats):
    """One prompt at a time reads all weights for each token; several share that, as in collect.py."""
    rows = []
    for batch, steps, backward in ((1, 64, False), (4, 64, False), (1, 32, True)):
        ours = partial(compress_side, shape, device, batch=batch, steps=steps, backward=backward)
        what = "a message and its gradient" if backward else f"{batch} message{'s' * (batch > 1)}"
        name = f"compress {shape}, K = {steps}, {what}; prefix read again each step"
        rows.append(compare(name, device, 1, ours, partial(ours, think=think_again)))
    return rows


# ---- eval: play, batched and cached, against one episode at a time whose history is read again at each turn
TURNS, REPLY = 5, 24  # of an episode, tokens of a reply
OBSERVATION = "you see a cup 1 , a shelf 2 and a lamp 3 . " * 5
TASK = "look around , " * 65


class Toy:
    """A game that nobody wins: each reply gets the same observation."""

    def reset(self, task):
        return task["task"]

    def step(self, action):
        return OBSERVATION, 0.0, False, {"won": False}


def eval_side(shape, device, folder, one_by_one=False):
    """The head gives nothing to the special tokens, so that no reply ends early."""
    width, numbers = SHAPES[shape].width, " ".join(map(str, range(100)))
    tokenizer = build_tokenizer([OBSERVATION, TASK, PLAN_ANNOUNCEMENT, numbers])
    tokenizer.chat_template_kwargs = {}  # as load_tokenizer sets it
    lm = make_lm(shape, device)
    lm.lm_head = torch.nn.Linear(width, len(tokenizer), device=device)
    lm.lm_head.bias.data[:len(SPECIAL)] = -1e9
    lm.config.vocab_size = len(tokenizer)
    actor = LatentActor(lm, tokenizer, HiddenStateProcessor(width, width).to(device)).eval()
    tasks = [{"id": str(n), "task": f"{n} {TASK}"} for n in range(16)]
    write_ours(folder, {task["id"]: torch.randn(64, width) for task in tasks}, width)
    rows = {"latent": {"variant": "latent", "shards": LatentShards(folder), "keep": 1.0}}
    jobs = [Job("latent", 0, n) for n in range(2 if one_by_one else 16)]  # two are enough

    def work():
        replies = {}
        for batch in [[job] for job in jobs] if one_by_one else [jobs]:
            for record in play(actor, batch, tasks, rows, GameWorkers(Toy), game=Toy, max_steps=TURNS,
                               max_new_tokens=REPLY, read_again=one_by_one):
                replies[record["id"]] = [turn["reply"] for turn in record["turns"]]
        return len(jobs) / 16, [replies["0"], replies["1"]]
    return work


def bench_eval(shape, device, repeats):
    name = f"eval {shape}, 16 episodes of {TURNS} turns; one by one, history read again"
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        ours = partial(eval_side, shape, device, a)
        plain = partial(eval_side, shape, device, b, one_by_one=True)
        return [compare(name, device, 1, ours, plain)]


# ---- io: latent shards against Parquet of nested lists
RECORD = make_record({"task": "put a clean cup on the shelf"}, "find a cup, clean it. " * 4, range(1000, 1032))


def write_ours(folder, latents, width=896):
    path = os.path.join(folder, "latents-rank00000-00000.safetensors")
    write_shard(path, latents, dict.fromkeys(latents, RECORD), {"hidden_size": width})


def read_ours(folder):
    shards = LatentShards(folder)
    return {task_id: shards[task_id] for task_id in shards.records}


def write_plain(folder, latents):
    rows = []
    for task_id, states in latents.items():
        rows.append({"id": task_id, "hidden_state": states.float().tolist(), **RECORD})
    table = optional("pyarrow").Table.from_pylist(rows)
    optional("pyarrow.parquet").write_table(table, f"{folder}/latents.parquet")


def read_plain(folder):
    rows = optional("pyarrow.parquet").read_table(f"{folder}/latents.parquet").to_pylist()
    return {row["id"]: torch.tensor(row["hidden_state"]) for row in rows}


def io_side(folder, write, read):
    latents = {f"task-{n}": torch.randn(128, 896).bfloat16() for n in range(128)}

    def work():
        write(folder, latents)
        return 1, len(read(folder))
    return work


def bench_io(shape, device, repeats):
    with tempfile.TemporaryDirectory() as folder:
        ours = partial(io_side, folder, write_ours, read_ours)
        plain = partial(io_side, folder, write_plain, read_plain)
        return [compare("io, write and read 128 messages; Parquet of nested lists", "cpu", repeats, ours, plain)]


# ---- gpu: everything that waits for a card
def bench_gpu(shape, device, repeats):
    rows, dry = [], device == "cpu"
    small, large = (shape, shape) if shape else ("qwen2.5-0.5b", "qwen2.5-7b")
    print("device:", "cpu" if dry else torch.cuda.get_device_name())
    for name in dict.fromkeys((small, large)):
        for batch in (1, 16) if dry else (1, 16, 64, 256):
            rows += bench_collect(name, device, 1, batch, dtype="bf16", length=8 if dry else 128)
    sizes = {"batch": 2, "tokens": 420 if dry else 2048, "n_labels": 140 if dry else 600}
    recipes = {
        "": (small, {}),
        " --compile true": (small, {"compiled": not dry}),  # on a CPU it takes minutes
        " the adapter and the last 2 layers, --gradient_checkpointing true": (large, {"trained_layers": 2}),
        " under DDP on one rank": (small, {"ddp": True}),
    }
    for what, (name, flags) in recipes.items():
        ours = partial(train_ours, name, device, bf16=True, **flags, **sizes)
        name = f"train {name}{what}, a step of {2 * sizes['tokens']} tokens"
        rows.append(compare(name, device, repeats, ours))
    for name in dict.fromkeys((small, large)):
        ours = partial(compress_side, name, device, steps=8)
        rows.append(compare(f"compress {name}, a message of 8 latent steps", device, repeats, ours))
    return rows


def bench_all(shape, device, repeats):
    """The README's table."""
    rows = []
    for bench in (bench_train, bench_collect, bench_compress, bench_eval, bench_io):
        rows += bench(shape, device, repeats)
    return rows


BENCHMARKS = {"collect": bench_collect, "train": bench_train, "compress": bench_compress,
              "eval": bench_eval, "io": bench_io, "gpu": bench_gpu, "all": bench_all}


@one_line_errors("bench.py")
def main(argv=None):
    args = get_args(argv)
    shape = args.shape or (None if args.benchmark == "gpu" else "smollm2-135m")
    print(f"{args.benchmark}, {torch.get_num_threads()} threads, {args.device}")
    print_line("ours; the plain way", COLUMNS)
    rows = BENCHMARKS[args.benchmark](shape, args.device, args.repeats)
    if args.json:
        write_json(args.json, made_by() | {"device": args.device, "shape": shape, "rows": rows})


if __name__ == "__main__":
    main()
