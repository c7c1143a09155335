"""
Ours against what people would otherwise write: same machine, same run, same random-weight Qwen2.

  python tests/bench.py collect --json collect.json
  python tests/bench.py train --layers 12 --hidden_size 512 --vocab_size 32000
  OMP_NUM_THREADS=2 python tests/bench.py {collect,train,compress,eval,io,startup,scaling}

Each side of a row has a process of its own, and the sides take turns, so that a busy moment of the machine hits both.
Seconds are the median of --repeats turns after one that is not counted (fewer turns where one takes long). GB is the
peak of resident memory during the turns, beyond what the process held before it made its model and data: weights,
gradients and optimizer are in it.
"""
import argparse
import contextlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from transformers import LogitsProcessorList, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as hf_logging

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

import collect  # noqa: E402
import tiny  # noqa: E402
from common import Parser, positive, run, write_json  # noqa: E402
from eval_alfworld import play  # noqa: E402
from games import GameWorkers  # noqa: E402
from lm import lm_logits  # noqa: E402
from model import (PLAN_ANNOUNCEMENT, HiddenStateProcessor, LatentActor, LatentSender, LatentShards,  # noqa: E402
                   add_markers, assemble, collate, write_shard)

hf_logging.set_verbosity_error()

# prompt: tokens before the message; length: tokens written, message rows or latent steps; turns: replies per episode
SHAPES = {
    "collect": {"layers": 8, "hidden_size": 512, "vocab_size": 32000, "batch": 16, "prompt": 32, "length": 64},
    "train": {"layers": 6, "hidden_size": 256, "vocab_size": 152000, "batch": 2, "prompt": 100, "length": 96},
    "compress": {"layers": 6, "hidden_size": 256, "vocab_size": 1000, "batch": 4, "prompt": 128, "length": 64},
    "eval": {"layers": 4, "hidden_size": 256, "vocab_size": 300, "batch": 16, "prompt": 400, "length": 96,
             "turns": 15},
    "io": {"hidden_size": 896, "batch": 128, "length": 128},
    "scaling": {"layers": 2, "hidden_size": 256, "vocab_size": 8000, "batch": 4, "prompt": 32, "length": 32,
                "turns": 3}}
REPLY = 24  # tokens of a reply in eval
RECORD = {"task": "put a clean cup on the shelf", "plan": "find a cup, clean it, put it on the shelf. " * 4,
          "plan_token_ids": list(range(1000, 1032)), "sender_ms": 1.0}


def get_args(argv):
    parser = Parser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=[*SHAPES, "startup"])
    for name in ("layers", "hidden_size", "vocab_size", "batch", "prompt", "length", "turns"):
        default = {benchmark: shape[name] for benchmark, shape in SHAPES.items() if name in shape}
        parser.add_argument(f"--{name}", type=positive, help=f"default: {default}")
    parser.add_argument("--directory_gb", type=float, default=5, help="io: the directory that one row is read from")
    parser.add_argument("--records", type=positive, default=1_000_000, help="io: records to index")
    parser.add_argument("--repeats", type=positive, default=3, help="turns per side that count")
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args(argv)
    for name, value in SHAPES.get(args.benchmark, {}).items():
        setattr(args, name, getattr(args, name) or value)
    return parser, args


# ---------------------------------------------------------------------------------------------------------------------
# measuring

def memory(key, path="/proc/self/status"):
    """VmRSS (now) or VmHWM (peak) of this process in GB; None where there is no /proc."""
    with contextlib.suppress(OSError), open(path) as f:
        return int(re.search(rf"{key}:\s+(\d+)", f.read())[1]) * 1024 / 1e9


def serve(pipe, setup, *args):
    """One side's process: makes its model and data, then does its work once for each request."""
    before, work = memory("VmRSS"), setup(*args)
    while pipe.recv():
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # VmHWM starts anew from what is resident now
        start = time.perf_counter()
        result = work()
        seconds, peak = time.perf_counter() - start, memory("VmHWM")
        pipe.send((seconds, peak and peak - before, result))


def measure(repeats, **sides):
    """{side: (setup, *args)}, setup(*args) -> work() -> {side: (median seconds, peak GB, result of the last turn)}."""
    context = multiprocessing.get_context("fork")  # the imports are there already; no tensor work has been done yet
    running, turns = {}, {side: [] for side in sides}
    for side, call in sides.items():
        pipe, end = context.Pipe()
        process = context.Process(target=serve, args=(end, *call), daemon=True)
        process.start()
        end.close()
        running[side] = process, pipe
    for _ in range(1 + repeats):
        for side, (_, pipe) in running.items():
            if len(turns[side]) < 2 or sum(turn[0] for turn in turns[side]) < 45:  # a slow side counts once
                pipe.send(True)
                turns[side].append(pipe.recv())
    for process, pipe in running.values():
        pipe.send(False)
        process.join()
    return {side: (statistics.median(turn[0] for turn in done[1:]), max(turn[1] or 0 for turn in done[1:]) or None,
                   done[-1][2]) for side, done in turns.items()}


def row(name, ours, plain=None):
    """Print and return a line of the table; ours and plain are (seconds, GB, ...)."""
    line = {"name": name, "ours_s": ours[0], "plain_s": plain and plain[0], "ratio": plain and plain[0] / ours[0],
            "ours_gb": ours[1], "plain_gb": plain and plain[1]}
    figures = ["-" if line[k] is None else f"{line[k]:.3g}" for k in line if k != "name"]
    print(f"{name:85s} " + " ".join(f"{figure:>8s}" for figure in figures), flush=True)
    return line


def same(what, a, b):
    """Both sides must have done the same work, or the comparison means nothing."""
    if a != b and not (what == "losses" and abs(a - b) < 1e-3 * b):
        raise AssertionError(f"the two sides differ in their {what}: {a} and {b}")


def make_lm(args):
    """A Qwen2 of the shape, random weights, heads of 64 as in Qwen2.5-0.5B."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=args.vocab_size, hidden_size=args.hidden_size, intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.layers, num_attention_heads=max(2, args.hidden_size // 64), num_key_value_heads=2,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None)).eval()


def random_ids(args, *shape, seed=0):
    return torch.randint(args.vocab_size, shape, generator=torch.Generator().manual_seed(seed)).tolist()


def change(args, **changes):
    return argparse.Namespace(**{**vars(args), **changes})


# ---------------------------------------------------------------------------------------------------------------------
# collect: decode_plans against generate(output_hidden_states=True)

def decode(lm, prompts, stop_ids, n):
    flags = argparse.Namespace(max_new_tokens=n, do_sample=False, temperature=1.0, top_k=0, top_p=1.0)
    return [tokens for tokens, _, _ in collect.decode_plans(lm, prompts, range(len(prompts)), stop_ids, flags)]


def generate(lm, prompts, n, **kwargs):
    """What people write: every layer of every position comes back, the last layer's states are picked afterwards."""
    ids = torch.tensor(prompts)
    out = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False,
                      output_hidden_states=True, return_dict_in_generate=True, **kwargs)
    torch.stack([step[-1][:, -1] for step in out.hidden_states], dim=1)  # (B, n, D)
    return out.sequences[:, ids.shape[1]:].tolist()


def collect_ours(args):
    lm, prompts = make_lm(args), random_ids(args, args.batch, args.prompt)
    return lambda: decode(lm, prompts, set(), args.length)


def collect_plain(args):
    lm, prompts = make_lm(args), random_ids(args, args.batch, args.prompt)
    return lambda: [generate(lm, [p], args.length)[0] for p in prompts[:4]]  # enough: its tokens/s know no batch


def spread(args):
    """Lengths from 8 to 256, for --length 64."""
    return torch.linspace(args.length // 8, 4 * args.length, args.batch).long()


def collect_spread_ours(args):
    lm, prompts, lengths, rows = make_lm(args), random_ids(args, args.batch, args.prompt), spread(args), []
    lm.get_decoder().register_forward_pre_hook(lambda *call: rows.append(len(call[2]["input_ids"])), with_kwargs=True)

    def stop_at_length(lm, hidden_states):  # a row of length n says id 0, the stop token, in step n
        logits, step = lm_logits(lm, hidden_states), len(rows) - 1
        logits[lengths[lengths >= step] == step, 0] = math.inf
        return logits
    collect.lm_logits = stop_at_length  # in this process only

    def work():
        rows.clear()
        return sum(map(len, decode(lm, prompts, {0}, int(lengths.max()) + 1))) / sum(rows)
    return work


def collect_spread_plain(args):
    lm, prompts, lengths = make_lm(args), random_ids(args, args.batch, args.prompt), spread(args)

    def stop_at_length(input_ids, scores):
        scores[lengths == input_ids.shape[1] - args.prompt, 0] = math.inf
        return scores

    def work():
        tokens = generate(lm, prompts, int(lengths.max()) + 1, eos_token_id=0, pad_token_id=0,
                          logits_processor=LogitsProcessorList([stop_at_length]))
        return lengths.sum().item() / (len(tokens) * len(tokens[0]))
    return work


def collect_script(args, folder, n):
    """collect.py itself, on a data set of n tasks."""
    tasks = os.path.join(folder, f"{n}.json")
    model = tiny.save_model(os.path.join(folder, "model"), width=args.hidden_size)
    write_json(tasks, [{"id": str(k), "task": f"a task {k}"} for k in range(n)])

    def work():
        with tempfile.TemporaryDirectory(dir=folder) as output, contextlib.redirect_stdout(io.StringIO()), \
             contextlib.redirect_stderr(io.StringIO()):
            collect.main(["custom", "--model_name_or_path", model, "--dataset_path", tasks, "--output_dir", output,
                          "--max_new_tokens", str(args.length), "--torch_dtype", "fp32", "--shard_size_mb", "2"])
    return work


def bench_collect(args):
    large = change(args, batch=4 * args.batch)
    found = measure(args.repeats, ours=(collect_ours, args), large=(collect_ours, large), plain=(collect_plain, args))
    per_1000 = {side: (1000 * s / sum(map(len, tokens)), gb) for side, (s, gb, tokens) in found.items()}
    # compared over the first 8 tokens: later, a near-tie of two logits may fall either way
    same("tokens", *([tokens[:8] for tokens in found[side][2][:4]] for side in ("ours", "plain")))
    rows = [row(f"collect, 1000 tokens, batch {a.batch}; generate one by one", per_1000[side], per_1000["plain"])
            for side, a in (("ours", args), ("large", large))]
    found = measure(1, ours=(collect_spread_ours, args), plain=(collect_spread_plain, args))
    name = f"collect, lengths {spread(args)[0]}-{spread(args)[-1]}, {found['ours'][2]:.0%} of the work on live rows"
    rows.append(row(f"{name}; one batch of generate, {found['plain'][2]:.0%}", found["ours"], found["plain"]))
    with tempfile.TemporaryDirectory() as folder:
        for n in (4 * args.batch, 16 * args.batch):
            found = measure(1, ours=(collect_script, args, folder, n))
            rows.append(row(f"collect.py, a data set of {n} tasks", found["ours"]))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# train: LatentActor.forward, backward and AdamW against rows padded to 2,048 with three passes over the vocabulary

def train_batches(args, tokens):
    """The three batches of a step, every second row a seventh shorter -> batches, labels in them."""
    generator, rows, n_labels = torch.Generator().manual_seed(0), ([], [], []), tokens // 3
    for b in range(args.batch):
        before = random_ids(args, args.prompt, seed=b)
        after = random_ids(args, tokens * (7 - b % 2) // 7 - args.prompt - args.length, seed=b + 1)
        labels = [-100] * (len(after) - n_labels) + after[-n_labels:]
        plan, (own, other) = after[:args.length], torch.randn(2, args.length, args.hidden_size, generator=generator)
        rows[0].append(assemble(before, after, labels, plan, own))
        rows[1].append(assemble(before, after, labels, plan, tenths=10))
        rows[2].append(assemble(before, after, labels, plan, other))
    return [collate(r) for r in rows], args.batch * n_labels


def make_actor(args):
    actor = LatentActor(make_lm(args), None, HiddenStateProcessor(args.hidden_size, args.hidden_size, dropout=0.0))
    return actor.train(), torch.optim.AdamW(actor.parameters(), lr=1e-5)


def train_ours(args, tokens=420, passes=3, checkpointing=False):
    (actor, optimizer), (batches, n_labels), losses = make_actor(args), train_batches(args, tokens), []
    if checkpointing:
        actor.lm.activation_checkpointing_enable()

    def work():
        loss, _ = actor(*batches[:passes], align_weight=0.2, sep_weight=1.0)
        (loss / n_labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item() / n_labels)
        return losses[0]  # compared with the other side, which may make fewer steps
    return work


def train_plain(args, tokens=420):
    (actor, optimizer), (batches, _), losses = make_actor(args), train_batches(args, tokens), []
    for batch in batches:
        for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100), ("message_mask", False)):
            batch[name] = F.pad(batch[name], (0, 2048 - batch[name].shape[1]), value=value)

    def forward(batch, **kwargs):
        return actor.lm(inputs_embeds=actor.embed(batch), attention_mask=batch["attention_mask"], use_cache=False,
                        **kwargs)

    def work():
        out = forward(batches[0], labels=batches[0]["labels"])
        with torch.no_grad():
            plan, other = forward(batches[1]), forward(batches[2])
        log_h, log_p, log_n = (o.logits[:, :-1][batch["labels"][:, 1:] != -100].log_softmax(-1)
                               for o, batch in zip((out, plan, other), batches))  # (N, V) each
        align = (0.7 * F.kl_div(log_h, log_p, log_target=True, reduction="batchmean")
                 + 0.3 * (1 - F.cosine_similarity(log_p.exp(), log_h.exp(), dim=-1)).mean())
        log_m = torch.logaddexp(log_h, log_n) - math.log(2)
        js = sum(F.kl_div(log_m, x, log_target=True, reduction="batchmean") for x in (log_h, log_n)) / 2
        loss = out.loss + 0.2 * align + math.log(2) - js
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        return losses[0]
    return work


def bench_train(args):
    # first, because the 20 GB of the side below disturb whoever comes next
    found = measure(2 * args.repeats, ours=(train_ours, args), plain=(train_ours, args, 420, 1))
    rows = [row("train, one step; a plain supervised step through the same head", found["ours"], found["plain"])]
    sides = {"ours": (train_ours, args), "plain": (train_plain, args)}
    needed, free = 8 * 4 * args.batch * 2048 * args.vocab_size / 1e9, memory("MemAvailable", "/proc/meminfo")
    if free and needed > free:
        print(f"no plain side: it needs {needed:.0f} GB, {free:.0f} are free; give a smaller --vocab_size or --batch")
        del sides["plain"]
    found = measure(args.repeats, **sides)
    if "plain" in found:
        same("losses", found["ours"][2], found["plain"][2])
    rows.append(row("train, one step; padded to 2048, three full-vocabulary passes", found["ours"], found.get("plain")))
    plain = (train_ours, args, 2048, 1)
    found = measure(args.repeats, ours=(*plain, True), plain=plain)
    name = "train, supervised rows of 2048, gradient checkpointing; without"
    return [*rows, row(name, found["ours"], found["plain"])]


# ---------------------------------------------------------------------------------------------------------------------
# compress: LatentSender over a cache against reading prompt and latents again in each step

def think_again(sender, ids, mask, steps):
    embeds = torch.cat([sender.lm.get_input_embeddings()(ids), sender.start.expand(len(ids), 1, -1)], dim=1)
    latents = []
    for _ in range(steps):
        latents.append(sender.lm.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1:])
        embeds = torch.cat([embeds, sender.bridge(sender.norm(latents[-1]))], dim=1)
    return torch.cat(latents, dim=1)


def compress_side(args, think=LatentSender.forward, backward=False):
    sender, ids = LatentSender(make_lm(args)), torch.tensor(random_ids(args, args.batch, args.prompt))

    def work():
        with torch.set_grad_enabled(backward):
            latents = think(sender, ids, torch.ones_like(ids), args.length)  # (B, K, D)
            if backward:
                latents.square().mean().backward()
                sender.zero_grad(set_to_none=True)
        return [round(x, 2) for x in latents[:, -1].norm(dim=-1).tolist()]
    return work


def bench_compress(args):
    rows = []
    for backward, what in ((False, "a message"), (True, "a message and its gradient")):
        found = measure(args.repeats, ours=(compress_side, args, LatentSender.forward, backward),
                        plain=(compress_side, args, think_again, backward))
        same("latents", found["ours"][2], found["plain"][2])
        name = f"compress, K = {args.length}, {what}; prefix read again each step"
        rows.append(row(name, found["ours"], found["plain"]))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# eval: play, batched and cached, against one episode at a time with its whole history encoded again at each turn

class Toy:
    """A game that nobody wins: --turns replies, each with a line of observation."""

    def reset(self, task):
        self.turn = 0
        return task["task"]

    def step(self, action):
        self.turn += 1
        observation = f"Observation: in turn {self.turn} you see a cup 1, a shelf 2 and a lamp 3."
        return observation, 0.0, False, {"won": False}


def make_player(args, folder):
    """Actor, tasks and messages. The head knows the printable characters only, so no reply ends before REPLY tokens."""
    tokenizer, lm, D = tiny.make_tokenizer(), make_lm(args), args.hidden_size
    add_markers(tokenizer)
    lm.lm_head = torch.nn.Linear(D, 94, bias=False)
    actor = LatentActor(lm, tokenizer, HiddenStateProcessor(D, D)).eval()
    task = "look around, " * (args.prompt // 13)
    tasks = [{"id": str(n), "task": f"task {n:2d}: {task}"} for n in range(args.batch)]
    latents = {task["id"]: torch.randn(args.length, D) for task in tasks}
    path = os.path.join(tempfile.mkdtemp(dir=folder), "latents-rank00000-00000.safetensors")
    write_shard(path, latents, dict.fromkeys(latents, RECORD), {"hidden_size": D})
    return actor, tasks, LatentShards(os.path.dirname(path))


def eval_ours(args, folder):
    actor, tasks, shards = make_player(args, folder)
    flags = argparse.Namespace(split="test", seed=0, temperature=0.0, max_steps=args.turns, max_new_tokens=REPLY)

    def work():
        records = play(actor, [("none", "none", 0, n) for n in range(args.batch)], tasks, {"none": (shards, 1.0)},
                       GameWorkers(Toy), str.strip, flags)
        return sorted((int(record["id"]), [turn["reply"] for turn in record["turns"]]) for record in records)
    return work


def eval_plain(args, folder):
    actor, tasks, shards = make_player(args, folder)
    tokenizer, embed = actor.tokenizer, actor.lm.get_input_embeddings()
    eop = tokenizer.convert_tokens_to_ids("<eop>")

    @torch.inference_mode()
    def work():
        played = []
        for n, task in enumerate(tasks):
            game, replies = Toy(), []
            messages = [{"role": "user", "content": f"{game.reset(task).strip()}\n{PLAN_ANNOUNCEMENT}<bop><eop>"}]
            for _ in range(args.turns):
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids  # (1, T)
                latents, k = shards[task["id"]][None], ids[0].tolist().index(eop)  # (1, L, D)
                message = actor.adapter(latents, torch.ones(latents.shape[:2], dtype=torch.bool))
                embeds = torch.cat([embed(ids[:, :k]), message, embed(ids[:, k:])], dim=1)  # (1, T + L, D)
                out = actor.lm.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(embeds[..., 0]),
                                        max_new_tokens=REPLY, do_sample=False)
                replies.append(tokenizer.decode(out[0], skip_special_tokens=True).strip())
                messages += [{"role": "assistant", "content": replies[-1]},
                             {"role": "user", "content": game.step(replies[-1])[0]}]
            played.append((n, replies))
        return played
    return work


def bench_eval(args):
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.repeats, ours=(eval_ours, args, folder), plain=(eval_plain, args, folder))
    same("replies", found["ours"][2], found["plain"][2])
    rates = " and ".join(f"{60 * args.batch / found[side][0]:.0f}" for side in ("ours", "plain"))
    return [row(f"eval, {args.batch} episodes of {args.turns} turns ({rates} a minute); one by one, history read again",
                found["ours"], found["plain"])]


# ---------------------------------------------------------------------------------------------------------------------
# io: latent shards against nested-list Parquet of float32

def make_latents(args):
    return {f"task-{n}": torch.randn(args.length, args.hidden_size).bfloat16() for n in range(args.batch)}


def io_write_ours(args, folder):
    latents, path = make_latents(args), os.path.join(folder, "latents-rank00000-00000.safetensors")
    return lambda: write_shard(path, latents, dict.fromkeys(latents, RECORD), {"hidden_size": args.hidden_size}) or \
        os.path.getsize(path)


def io_write_plain(args, folder):
    import pyarrow
    import pyarrow.parquet
    latents, path = make_latents(args), os.path.join(folder, "latents.parquet")
    hidden_state = pyarrow.list_(pyarrow.list_(pyarrow.float32()))

    def work():
        nested = [H.float().tolist() for H in latents.values()]
        table = {"id": list(latents), **{k: [RECORD[k]] * len(latents) for k in RECORD}}
        pyarrow.parquet.write_table(pyarrow.table(table | {"hidden_state": pyarrow.array(nested, hidden_state)}), path)
        return os.path.getsize(path)
    return work


def io_read_ours(args, folder):
    def work():
        shards = LatentShards(folder)
        return len({task_id: shards[task_id] for task_id in shards.records})
    return work


def io_read_plain(args, folder):
    import pyarrow.parquet
    return lambda: len({row["id"]: torch.tensor(row["hidden_state"]) for row in
                        pyarrow.parquet.read_table(os.path.join(folder, "latents.parquet")).to_pylist()})


def craft_shards(folder, n, per_shard, shape):
    """n messages under true headers, whose latents are holes in the files: any size takes no disk -> bytes."""
    size, total = 2 * shape[0] * shape[1], 0
    for i in range(0, n, per_shard):
        ids = [str(k) for k in range(i, min(i + per_shard, n))]
        metadata = {"records": json.dumps(dict.fromkeys(ids, RECORD)), "sender": json.dumps({"hidden_size": shape[1]})}
        header = json.dumps({"__metadata__": metadata, **{
            task_id: {"dtype": "BF16", "shape": shape, "data_offsets": [j * size, (j + 1) * size]}
            for j, task_id in enumerate(ids)}}).encode()
        header += b" " * (-len(header) % 8)
        with open(os.path.join(folder, f"latents-rank00000-{i:08d}.safetensors"), "wb") as f:
            f.write(len(header).to_bytes(8, "little") + header)
            total += f.truncate(8 + len(header) + len(ids) * size)
    return total


def bench_io(args):
    plain = importlib.util.find_spec("pyarrow") is not None
    if not plain:
        print("no plain side without pyarrow: pip install pyarrow")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.repeats, ours=(io_write_ours, args, folder),
                        **({"plain": (io_write_plain, args, folder)} if plain else {}))
        sizes = [f"{found[side][2] / (4 * args.batch * args.length * args.hidden_size):.2f}" for side in found]
        name = f"io, write {args.batch} messages ({' and '.join(sizes)} of their float32 bytes); nested-list Parquet"
        rows.append(row(name, found["ours"], found.get("plain")))
        read = measure(args.repeats, ours=(io_read_ours, args, folder),
                       **({"plain": (io_read_plain, args, folder)} if plain else {}))
        rows.append(row("io, read them; nested-list Parquet", read["ours"], read.get("plain")))
        both = {side: (found[side][0] + read[side][0], None) for side in found}
        rows.append(row("io, write and read them; nested-list Parquet", both["ours"], both.get("plain")))
    with tempfile.TemporaryDirectory() as folder:
        total = craft_shards(folder, int(args.directory_gb * 1e9 / (2 * 300 * 896)), 1000, [300, 896])
        found = measure(args.repeats, ours=(lambda: lambda: LatentShards(folder)["0"].nbytes,))
        name = f"io, open {total / 1e9:.1f} GB of shards and read one message of {found['ours'][2] / 1e6:.2f} MB"
        rows.append(row(name, found["ours"]))
    with tempfile.TemporaryDirectory() as folder:
        craft_shards(folder, args.records, 10_000, [32, 896])
        found = measure(1, ours=(lambda: lambda: len(LatentShards(folder)),))
        rows.append(row(f"io, index {found['ours'][2]} records", found["ours"]))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# startup: --help of each script, next to the import of torch and transformers alone

def bench_startup(args):
    heavy = "import torch; from transformers import AutoModelForCausalLM, DynamicCache"
    commands = {"startup, import torch and transformers alone": ["-c", heavy]} | {
        f"startup, {script} --help": [script, "--help"] for script in (
            "collect.py", "train_actor.py", "compress.py", "eval_alfworld.py", "eval_math.py", "demo.py")}
    seconds = {name: [] for name in commands}
    for _ in range(1 + args.repeats):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    return [row(name, (statistics.median(times[1:]), None)) for name, times in seconds.items()]


# ---------------------------------------------------------------------------------------------------------------------
# scaling: time per token of each stage against batch, message length, vocabulary and depth

def io_both(args, folder):
    write, read = io_write_ours(args, folder), io_read_ours(args, folder)
    return lambda: (write(), read())


def bench_scaling(args):
    """Seconds per token at 1, 2 and 4 times the default, and the slope of a line through their logarithms. In batch and
    length 0 is linear in all (below: a larger one pays), in vocabulary and depth 1 is."""
    rows = []

    def tokens(a):  # of a training row
        return 2 * a.prompt + 3 * a.length
    with tempfile.TemporaryDirectory() as folder:
        stages = {"collect": (lambda a: collect_ours(a), lambda a: a.batch * a.length),
                  "train": (lambda a: train_ours(a, tokens(a)), lambda a: a.batch * tokens(a)),
                  "compress": (lambda a: compress_side(a), lambda a: a.batch * a.length),
                  "eval": (lambda a: eval_ours(a, folder), lambda a: a.batch * a.turns * REPLY),
                  "io": (lambda a: io_both(a, tempfile.mkdtemp(dir=folder)), lambda a: a.batch * a.length)}
        for stage, (setup, count) in stages.items():
            for what in ("batch", "length", "vocab_size", "layers")[:2 if stage == "io" else 4]:
                shapes = {k: change(args, **{what: k * getattr(args, what)}) for k in (1, 2, 4)}
                found = measure(args.repeats, **{str(k): (setup, shape) for k, shape in shapes.items()})
                times = [found[str(k)][0] / count(shape) for k, shape in shapes.items()]
                # least squares over x = -1, 0, 1 doublings
                exponent = (math.log(times[2]) - math.log(times[0])) / (2 * math.log(2))
                for (k, shape), seconds in zip(shapes.items(), times):
                    name = f"scaling, {stage}, one token, {what} {getattr(shape, what)}"
                    name += f": exponent {exponent:.2f}" if k == 4 else ""
                    rows.append(row(name, (seconds, found[str(k)][1])))
    return rows


def main(argv=None):
    parser, args = get_args(argv)

    def body(args):
        functions = {"collect": bench_collect, "train": bench_train, "compress": bench_compress, "eval": bench_eval,
                     "io": bench_io, "startup": bench_startup, "scaling": bench_scaling}
        shape = "".join(f", {name} {getattr(args, name)}" for name in SHAPES.get(args.benchmark, {}))
        print(f"{args.benchmark}, {torch.get_num_threads()} threads{shape}\n{'ours; the plain way':85s} "
              + " ".join(f"{column:>8s}" for column in ("ours s", "plain s", "ratio", "ours GB", "plain GB")))
        rows = functions[args.benchmark](args)
        if args.json:
            write_json(args.json, {"rows": rows})
        return rows
    return run(parser, body, args)


if __name__ == "__main__":
    main()
