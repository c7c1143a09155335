"""
Ours against what people would otherwise write: same machine, same run, same random weights in a real model's shape.

  python tests/bench.py train --json train.json
  python tests/bench.py collect --shape qwen2.5-0.5b --device cuda
  python tests/bench.py gpu --json rows.json        # all that waits for one 80 GB card, under nine minutes
  OMP_NUM_THREADS=2 python tests/bench.py {collect,train,compress,eval,io,startup,scaling}

Each side of a row has a process of its own, and the sides take turns, so that a busy moment of the machine hits
both. Seconds are the median of --repeats turns after one that is not counted (a side that takes over 45 s has one
turn). GB is the peak of memory during the turns: on a CPU beyond what the process held before it made its model, on
a GPU what torch allocated. A ratio below 1 means that ours is the slower side.
"""
import argparse
import contextlib
import importlib.util
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
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as hf_logging

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

import collect  # noqa: E402
import tiny  # noqa: E402
from common import Parser, one_line_errors, positive, write_json  # noqa: E402
from model import (DTYPES, HiddenStateProcessor, LatentActor, LatentSender, LatentShards, add_markers,  # noqa: E402
                   build_sample, collate, decoder_layers, decoder_states, write_shard)

hf_logging.set_verbosity_error()

SHAPES = {  # layers, width, heads, KV heads, feed-forward, vocabulary, tied
    "tiny": (2, 64, 4, 2, 128, 300, True),
    "smollm2-135m": (30, 576, 9, 3, 1536, 49152, True),
    "qwen2.5-0.5b": (24, 896, 14, 2, 4864, 151936, True),
    "qwen2.5-7b": (28, 3584, 28, 4, 18944, 152064, False)}
REPLY = 24  # tokens of a reply in eval
RECORD = {"task": "put a clean cup on the shelf", "plan": "find a cup, clean it, put it on the shelf. " * 4,
          "plan_token_ids": list(range(1000, 1032)), "sender_ms": 1.0}


def get_args(argv):
    parser = Parser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=[*BENCHMARKS])
    parser.add_argument("--shape", choices=SHAPES, help="default: smollm2-135m; gpu: qwen2.5-0.5b and qwen2.5-7b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=positive, default=3, help="turns per side that count")
    parser.add_argument("--records", type=positive, default=1_000_000, help="io: records to index")
    parser.add_argument("--json", help="write the rows here")
    return parser.parse_args(argv)


# ---- measuring

def memory(key, path="/proc/self/status"):
    """VmRSS (now) or VmHWM (peak) of this process in GB; None where there is no /proc."""
    with contextlib.suppress(OSError), open(path) as file:
        return int(re.search(rf"{key}:\s+(\d+)", file.read())[1]) * 1024 / 1e9


def timed(work, device, before=0.0):
    """Do some work -> (seconds, peak GB, its result)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM starts anew from what is resident now
    start = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else (memory("VmHWM") or before) - before
    return seconds, peak, result


def serve(pipe, device, setup, arguments):
    """One side's process: makes its model and data, then does its work once for each request."""
    before = memory("VmRSS") or 0.0
    work = setup(**arguments)
    while pipe.recv():
        pipe.send(timed(work, device, before))


def measure(repeats, device="cpu", **sides):
    """{side: (setup, arguments)}, setup(**arguments) -> work() -> {side: (median seconds, peak GB, last result)}."""
    # on a CPU fork: the imports are there already, and no tensor work has been done yet; CUDA cannot be forked
    context = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
    running, turns = {}, {side: [] for side in sides}
    for side, (setup, arguments) in sides.items():
        pipe, end = context.Pipe()
        process = context.Process(target=serve, args=(end, device, setup, arguments), daemon=True)
        process.start()
        end.close()
        running[side] = process, pipe
    for _ in range(1 + repeats):
        for side, (_, pipe) in running.items():
            if sum(seconds for seconds, _, _ in turns[side]) < 45:
                pipe.send(True)
                turns[side].append(pipe.recv())
    for process, pipe in running.values():
        pipe.send(False)
        process.join()
    counted = {side: done[1:] or done for side, done in turns.items()}
    return {side: (statistics.median(turn[0] for turn in done), max(turn[1] for turn in done), done[-1][2])
            for side, done in counted.items()}


def row(name, ours, plain=None, **more):
    """Print and return a line of the table; ours and plain are (seconds, GB, ...)."""
    line = {"name": name, "ours_s": ours[0], "plain_s": plain and plain[0], "ratio": plain and plain[0] / ours[0],
            "ours_gb": ours[1], "plain_gb": plain and plain[1], **more}
    figures = ["-" if line[key] is None else f"{line[key]:.3g}" for key in line if key != "name"]
    print(f"{name:88s} " + " ".join(f"{figure:>8s}" for figure in figures), flush=True)
    return line


def same(what, a, b, tolerance=0.0):
    """Both sides must have done the same work, or the comparison means nothing."""
    if a != b and not (tolerance and abs(a - b) < tolerance * abs(b)):
        raise AssertionError(f"the two sides differ in their {what}: {a} and {b}")


def make_lm(shape, device="cpu", dtype="fp32"):
    """A causal LM of the shape, random weights that differ from word to word."""
    layers, width, heads, kv_heads, feed_forward, vocabulary, tied = SHAPES[shape]
    torch.manual_seed(0)
    config_class, lm_class = (LlamaConfig, LlamaForCausalLM) if "llm" in shape else (Qwen2Config, Qwen2ForCausalLM)
    config = config_class(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied, bos_token_id=None,
        eos_token_id=None, pad_token_id=None, max_position_embeddings=8192)
    with torch.device(device):
        return lm_class(config).to(DTYPES[dtype]).eval()


def random_ids(shape, *size, seed=0):
    vocabulary = SHAPES[shape][5]
    return torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(seed)).tolist()


# ---- collect: decode_plans against generate(output_hidden_states=True), one prompt at a time

def collect_ours(shape, device, dtype="fp32", batch=32, prompt=32, length=64):
    lm, prompts = make_lm(shape, device, dtype), random_ids(shape, batch, prompt)

    def work():
        plans = collect.decode_plans(lm, prompts, list(range(batch)), [], max_new_tokens=length, do_sample=False,
                                     temperature=1.0, top_p=1.0, top_k=0)
        return [tokens[:8] for tokens, _, _ in plans[:2]]  # later, a near-tie of two logits may fall either way
    return work


def collect_plain(shape, device, dtype="fp32", batch=32, prompt=32, length=64):
    """What people write: every layer of every position comes back, the last layer's states are picked afterwards."""
    lm, prompts = make_lm(shape, device, dtype), random_ids(shape, batch, prompt)

    def work():
        plans = []
        for ids in prompts[:2]:  # enough: its tokens/s know no batch
            ids = torch.tensor([ids], device=device)
            out = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False,
                              output_hidden_states=True, return_dict_in_generate=True)
            torch.stack([step[-1][:, -1] for step in out.hidden_states], dim=1).cpu()  # (1, L, D)
            plans.append(out.sequences[0, ids.shape[1]:].tolist()[:8])
        return plans
    return work


def bench_collect(shape, device, repeats, batches=(32,), dtype="fp32", length=64, **_):
    rows = []
    for batch in batches:
        arguments = {"shape": shape, "device": device, "dtype": dtype, "batch": batch, "length": length}
        sides = measure(repeats, device, ours=(collect_ours, arguments), plain=(collect_plain, arguments))
        if dtype == "fp32" and batch > 1:
            same("tokens", sides["ours"][2], sides["plain"][2])
        ours = (1000 * sides["ours"][0] / (batch * length), sides["ours"][1])
        plain = (1000 * sides["plain"][0] / (2 * length), sides["plain"][1])
        rows.append(row(f"collect {shape}, 1000 tokens, batch {batch}; generate one by one", ours, plain))
    return rows


# ---- train: LatentActor.forward, backward and AdamW

def train_batches(shape, device, batch=2, tokens=420, n_labels=140, length=96):
    """The batches of a step's three passes, every second sample a seventh shorter."""
    width, generator = SHAPES[shape][1], torch.Generator().manual_seed(0)
    samples = [], [], []
    for b in range(batch):
        before = random_ids(shape, 100, seed=b)
        after = random_ids(shape, tokens * (7 - b % 2) // 7 - 100 - length, seed=b + 1)
        labels = [-100] * (len(after) - n_labels) + after[-n_labels:]
        plan_ids = random_ids(shape, length, seed=b + 2)
        latents, other = torch.randn(2, length, width, generator=generator)
        samples[0].append(build_sample(before, after, labels, plan_ids, latents))
        samples[1].append(build_sample(before, after, labels, plan_ids, ratio=1.0))
        samples[2].append(build_sample(before, after, labels, plan_ids, other))
    return [collate(part, device) for part in samples], batch * n_labels


def make_actor(shape, device, trained_layers=None):
    """An actor and its optimizer; trained_layers: only the adapter and so many last layers are trained."""
    lm, width = make_lm(shape, device), SHAPES[shape][1]
    actor = LatentActor(lm, None, HiddenStateProcessor(width, width, dropout=0.0).to(device)).train()
    if trained_layers:
        lm.requires_grad_(False)
        for layer in decoder_layers(lm)[-trained_layers:]:
            layer.requires_grad_(True)
    parameters = [p for p in actor.parameters() if p.requires_grad]
    return actor, torch.optim.AdamW(parameters, lr=1e-5, fused=device == "cuda" or None)


def train_ours(shape, device, passes=3, bf16=False, compiled=False, checkpointing=False, trained_layers=None, **sizes):
    actor, optimizer = make_actor(shape, device, trained_layers)
    batches, n_labels = train_batches(shape, device, **sizes)
    losses = []
    if checkpointing:
        actor.lm.activation_checkpointing_enable()
    if compiled:
        for layer in decoder_layers(actor.lm):
            layer.compile(dynamic=True)

    def work():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            terms = actor(*batches[:passes])
            loss = terms["task"] + 0.2 * terms.get("align", 0) + 1.0 * terms.get("sep", 0)
        (loss / n_labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item() / n_labels)
        return losses[0]  # compared with the other side, which may make fewer steps
    return work


def train_plain(shape, device, **sizes):
    """What people write: padded to 2,048, three passes over the whole vocabulary."""
    actor, optimizer = make_actor(shape, device)
    batches, _ = train_batches(shape, device, **sizes)
    losses = []
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100, "message_mask": False}
    for batch in batches:
        for name, value in fill.items():
            batch[name] = F.pad(batch[name], (0, 2048 - batch[name].shape[1]), value=value)

    def log_probs(batch):
        logits = actor.lm(inputs_embeds=actor.embed(batch), attention_mask=batch["attention_mask"]).logits
        log_p = logits.log_softmax(-1)  # (B, 2048, V): the released losses are over all tokens, too
        return log_p[:, :-1][batch["labels"][:, 1:] != -100]  # (N, V)

    def work():
        log_h = log_probs(batches[0])
        with torch.no_grad():
            log_p, log_n = log_probs(batches[1]), log_probs(batches[2])
        labels = batches[0]["labels"][:, 1:]
        task = F.nll_loss(log_h, labels[labels != -100])
        kl = F.kl_div(log_h, log_p, log_target=True, reduction="batchmean")
        cosine = F.cosine_similarity(log_p.exp(), log_h.exp(), dim=-1).mean()
        log_m = torch.logaddexp(log_h, log_n) - math.log(2)
        js = sum(F.kl_div(log_m, log, log_target=True, reduction="batchmean") for log in (log_h, log_n)) / 2
        loss = task + 0.2 * (0.7 * kl + 0.3 * (1 - cosine)) + math.log(2) - js
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        return losses[0]
    return work


def train_closed_forms(shape, device, bf16=False, **sizes):
    """The same step with the losses of commit 69220d2, which wrote their gradients by hand."""
    folder = tempfile.mkdtemp()
    for name in ("model.py", "lm.py", "common.py"):
        text = subprocess.run(["git", "show", f"69220d2:{name}"], cwd=ROOT, capture_output=True, text=True, check=True)
        with open(os.path.join(folder, name), "w") as file:
            file.write(text.stdout)
    actor, optimizer = make_actor(shape, device)
    batches, n_labels = train_batches(shape, device, **sizes)
    for name in ("model", "common"):
        del sys.modules[name]
    sys.path.insert(0, folder)
    import model as old  # 69220d2's
    actor = old.LatentActor(actor.lm, None, actor.adapter)
    losses = []

    def work():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss, _ = actor(*batches, align_weight=0.2, sep_weight=1.0)
        (loss / n_labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item() / n_labels)
        return losses[0]
    return work


def bench_train(shape, device, repeats, **_):
    rows = []
    arguments = {"shape": shape, "device": device}
    for bf16 in (False, True):
        ours, supervised = ({**arguments, "bf16": bf16, "passes": passes} for passes in (3, 1))
        sides = measure(repeats, device, ours=(train_ours, ours), plain=(train_ours, supervised))
        kind = "bf16 autocast" if bf16 else "fp32"
        rows.append(row(f"train {shape}, one step, {kind}; a supervised step through the same head", sides["ours"],
                        sides["plain"]))
    # alone: memory of a process that waits can be taken from it
    sides = measure(1, device, ours=(train_ours, arguments))
    layers, _, _, _, _, vocabulary, _ = SHAPES[shape]
    needed, free = 7 * 4 * 2 * 2048 * vocabulary / 1e9 + 8, memory("MemAvailable", "/proc/meminfo")
    if free and needed > free and device == "cpu":
        print(f"no plain side: it needs {needed:.0f} GB, {free:.0f} are free")
        return rows
    sides |= measure(0, device, plain=(train_plain, arguments))  # one turn: it takes minutes
    same("losses", sides["ours"][2], sides["plain"][2], tolerance=1e-3)
    rows.append(row(f"train {shape}, one step, fp32; padded to 2048, three full-vocabulary passes", sides["ours"],
                    sides["plain"]))
    return rows


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
        return [round(x, 1) for x in latents[:, -1].norm(dim=-1).tolist()]
    return work


def bench_compress(shape, device, repeats, **_):
    """One prompt at a time reads all weights for each token; several share that, as in collect.py."""
    rows = []
    for batch, steps, backward in ((1, 64, False), (4, 64, False), (1, 32, True)):
        ours, plain = ({"shape": shape, "device": device, "think": think, "backward": backward, "batch": batch,
                        "steps": steps} for think in (LatentSender.forward, think_again))
        sides = measure(1, device, ours=(compress_side, ours), plain=(compress_side, plain))
        same("latents", sides["ours"][2], sides["plain"][2])
        what = "a message and its gradient" if backward else f"{batch} message{'s' * (batch > 1)}"
        rows.append(row(f"compress {shape}, K = {steps}, {what}; prefix read again each step", sides["ours"],
                        sides["plain"]))
    return rows


# ---- eval: play, batched and cached, against one episode at a time with its history read again at each turn

class Toy:
    """A game that nobody wins: each reply gets a line of observation."""

    def reset(self, task):
        self.turn = 0
        return task["task"]

    def step(self, action):
        self.turn += 1
        observation = f"Observation: in turn {self.turn} you see a cup 1, a shelf 2 and a lamp 3."
        return observation, 0.0, False, {"won": False}


def make_player(shape, device, folder, batch, prompt, length):
    """Actor, tasks and messages. The head knows the printable characters only, so no reply ends before REPLY tokens."""
    tokenizer, lm, width = tiny.make_tokenizer(), make_lm(shape, device), SHAPES[shape][1]
    add_markers(tokenizer)
    lm.lm_head = torch.nn.Linear(width, 94, bias=False, device=device)
    lm.config.vocab_size = 94
    actor = LatentActor(lm, tokenizer, HiddenStateProcessor(width, width).to(device)).eval()
    task = "look around, " * (prompt // 13)
    tasks = [{"id": str(n), "task": f"task {n:2d}: {task}"} for n in range(batch)]
    latents = {task["id"]: torch.randn(length, width) for task in tasks}
    path = os.path.join(tempfile.mkdtemp(dir=folder), "latents-rank00000-00000.safetensors")
    write_shard(path, latents, dict.fromkeys(latents, RECORD), {"hidden_size": width})
    return actor, tasks, LatentShards(os.path.dirname(path))


def eval_ours(shape, device, folder, batch=16, prompt=200, length=64, turns=5, count=2):
    from eval_alfworld import play
    from games import GameWorkers
    actor, tasks, shards = make_player(shape, device, folder, batch, prompt, length)
    rows = {"latent": {"variant": "latent", "shards": shards, "keep": 1.0}}

    def work():
        jobs = [("latent", 0, n) for n in range(batch)]
        records = play(actor, jobs, tasks, rows, GameWorkers(Toy), game=Toy, max_steps=turns, max_new_tokens=REPLY)
        replies = {int(record["id"]): [turn["reply"] for turn in record["turns"]] for record in records}
        return [replies[n] for n in range(count)]
    return work


def eval_plain(shape, device, folder, batch=16, prompt=200, length=64, turns=5, count=2):
    from data import PLAN_ANNOUNCEMENT
    actor, tasks, shards = make_player(shape, device, folder, batch, prompt, length)
    tokenizer, embed = actor.tokenizer, actor.lm.get_input_embeddings()
    eop = tokenizer.convert_tokens_to_ids("<eop>")

    @torch.inference_mode()
    def work():
        played = []
        for task in tasks[:count]:
            game, replies = Toy(), []
            messages = [{"role": "user", "content": f"{game.reset(task).strip()}\n{PLAN_ANNOUNCEMENT}<bop><eop>"}]
            for _ in range(turns):
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(device)  # (1, T)
                k = ids[0].tolist().index(eop)
                latents = shards[task["id"]][None].to(device)  # (1, L, D)
                message = actor.adapter(latents, torch.ones(latents.shape[:2], dtype=torch.bool, device=device))
                embeds = torch.cat([embed(ids[:, :k]), message, embed(ids[:, k:])], dim=1)  # (1, T + L, D)
                mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=device)
                out = actor.lm.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=REPLY,
                                        do_sample=False)
                replies.append(tokenizer.decode(out[0], skip_special_tokens=True).strip())
                messages += [{"role": "assistant", "content": replies[-1]},
                             {"role": "user", "content": game.step(replies[-1])[0]}]
            played.append(replies)
        return played
    return work


def bench_eval(shape, device, repeats, batch=16, turns=5, **_):
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"shape": shape, "device": device, "folder": folder, "batch": batch, "turns": turns}
        sides = measure(1, device, ours=(eval_ours, arguments), plain=(eval_plain, arguments))
    same("replies", sides["ours"][2], sides["plain"][2])
    plain = (sides["plain"][0] * batch / 2, sides["plain"][1])  # two of its episodes were played
    name = f"eval {shape}, {batch} episodes of {turns} turns; one by one, history read again"
    return [row(name, sides["ours"], plain)]


# ---- io: latent shards against nested-list Parquet of float32

def make_latents(batch=128, length=128, width=896):
    return {f"task-{n}": torch.randn(length, width).bfloat16() for n in range(batch)}


def io_write_ours(folder):
    latents, path = make_latents(), os.path.join(folder, "latents-rank00000-00000.safetensors")

    def work():
        write_shard(path, latents, dict.fromkeys(latents, RECORD), {"hidden_size": 896})
        return os.path.getsize(path)
    return work


def io_write_plain(folder):
    import pyarrow
    import pyarrow.parquet
    latents, path = make_latents(), os.path.join(folder, "latents.parquet")
    hidden_state = pyarrow.list_(pyarrow.list_(pyarrow.float32()))

    def work():
        nested = [H.float().tolist() for H in latents.values()]
        table = {"id": list(latents), **{key: [RECORD[key]] * len(latents) for key in RECORD}}
        table["hidden_state"] = pyarrow.array(nested, hidden_state)
        pyarrow.parquet.write_table(pyarrow.table(table), path)
        return os.path.getsize(path)
    return work


def io_read_ours(folder):
    def work():
        shards = LatentShards(folder)
        return len({task_id: shards[task_id] for task_id in shards.records})
    return work


def io_read_plain(folder):
    import pyarrow.parquet
    path = os.path.join(folder, "latents.parquet")

    def work():
        records = pyarrow.parquet.read_table(path).to_pylist()
        return len({record["id"]: torch.tensor(record["hidden_state"]) for record in records})
    return work


def craft_shards(folder, n, per_shard, size):
    """n messages under true headers, whose latents are holes in the files: any size takes no disk -> bytes."""
    n_bytes, total = 2 * size[0] * size[1], 0
    for i in range(0, n, per_shard):
        ids = [str(k) for k in range(i, min(i + per_shard, n))]
        metadata = {"records": json.dumps(dict.fromkeys(ids, RECORD)), "sender": json.dumps({"hidden_size": size[1]})}
        entries = {task_id: {"dtype": "BF16", "shape": size, "data_offsets": [j * n_bytes, (j + 1) * n_bytes]}
                   for j, task_id in enumerate(ids)}
        header = json.dumps({"__metadata__": metadata, **entries}).encode()
        header += b" " * (-len(header) % 8)
        with open(os.path.join(folder, f"latents-rank00000-{i:08d}.safetensors"), "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            total += file.truncate(8 + len(header) + len(ids) * n_bytes)
    return total


def open_and_read(folder):
    return lambda: LatentShards(folder)["0"].nbytes


def index_all(folder):
    return lambda: len(LatentShards(folder))


def bench_io(repeats, records=1_000_000, directory_gb=5, **_):
    rows, plain = [], importlib.util.find_spec("pyarrow") is not None
    if not plain:
        print("no plain side without pyarrow: pip install pyarrow")
    with tempfile.TemporaryDirectory() as folder:
        for what, ours, theirs in (("write 128 messages", io_write_ours, io_write_plain),
                                   ("read them", io_read_ours, io_read_plain)):
            sides = {"ours": (ours, {"folder": folder})}
            if plain:
                sides["plain"] = theirs, {"folder": folder}
            sides = measure(repeats, **sides)
            rows.append(row(f"io, {what}; nested-list Parquet of float32", sides["ours"], sides.get("plain")))
    with tempfile.TemporaryDirectory() as folder:
        total = craft_shards(folder, int(directory_gb * 1e9 / (2 * 300 * 896)), 1000, [300, 896])
        sides = measure(repeats, ours=(open_and_read, {"folder": folder}))
        rows.append(row(f"io, open {total / 1e9:.1f} GB of shards and read one message of 0.54 MB", sides["ours"]))
    with tempfile.TemporaryDirectory() as folder:
        craft_shards(folder, records, 10_000, [32, 896])
        sides = measure(1, ours=(index_all, {"folder": folder}))
        rows.append(row(f"io, index {records} records", sides["ours"]))
    return rows


# ---- startup: --help of each script, next to the import of torch and transformers alone

def bench_startup(repeats, **_):
    heavy = "import torch; from transformers import AutoModelForCausalLM, DynamicCache"
    commands = {"startup, import torch and transformers alone": ["-c", heavy]}
    for script in ("collect.py", "train_actor.py", "compress.py", "eval_alfworld.py", "eval_math.py", "demo.py"):
        commands[f"startup, {script} --help"] = [script, "--help"]
    seconds = {name: [] for name in commands}
    for _ in range(1 + repeats):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    return [row(name, (statistics.median(times[1:]), None)) for name, times in seconds.items()]


# ---- scaling: time per token of each stage against batch, message length and depth

def bench_scaling(repeats, device, **_):
    """Seconds per token at 1, 2 and 4 times a small default, and the slope of a line through their logarithms: in batch
    and length 0 is linear (below: a larger one pays), in depth 1 is."""
    rows = []
    base = dict(zip(("layers", "batch", "length"), (2, 4, 32)))
    stages = {"collect": lambda s, b, n: (collect_ours, {"shape": s, "device": device, "batch": b, "length": n}),
              "train": lambda s, b, n: (train_ours, {"shape": s, "device": device, "batch": b, "length": n,
                                                     "tokens": 160 + 4 * n, "n_labels": n}),
              "compress": lambda s, b, n: (compress_side, {"shape": s, "device": device, "batch": b, "steps": n})}
    for layers in (2, 4, 8):
        SHAPES[f"scaling-{layers}"] = (layers, 256, 4, 2, 1024, 8000, True)
    for stage, setup in stages.items():
        for what in ("batch", "length", "layers"):
            seconds = []
            for k in (1, 2, 4):
                size = base | {what: k * base[what]}
                side = setup(f"scaling-{size['layers']}", size["batch"], size["length"])
                per_token = size["batch"] * (160 + 4 * size["length"] if stage == "train" else size["length"])
                seconds.append(measure(repeats, device, ours=side)["ours"][0] / per_token)
            # least squares over x = -1, 0, 1 doublings
            exponent = (math.log(seconds[2]) - math.log(seconds[0])) / (2 * math.log(2))
            rows.append(row(f"scaling, {stage}, time per token against {what}: exponent {exponent:.2f}",
                            (seconds[0], None)))
    return rows


# ---- gpu: everything that waits for a card

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16 products per second


def flops(shape, tokens, trained=True):
    """Of one three-pass step: 6 N per token where gradients flow, 2 N in each of the two other passes (N: parameters)."""
    layers, width, heads, kv_heads, feed_forward, _, _ = SHAPES[shape]
    attention = 2 * width * width + 2 * width * width * kv_heads // heads
    n = layers * (attention + 3 * width * feed_forward)
    return (6 + 2 + 2) * n * tokens


def nccl_step(shape, device):
    """A step under DDP on one rank: NCCL for CUDA, gloo for a CPU."""
    import torch.distributed as dist
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 1000)}
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=0, world_size=1)
    actor, optimizer = make_actor(shape, device)
    model = torch.nn.parallel.DistributedDataParallel(actor, gradient_as_bucket_view=True)
    batches, n_labels = train_batches(shape, device)

    def work():
        with torch.autocast(device, torch.bfloat16):
            terms = model(*batches)
        (sum(terms[name] for name in ("task", "align", "sep")) / n_labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return work


def bench_gpu(shape, device, repeats, **_):
    rows = []
    small, large = (shape, shape) if shape else ("qwen2.5-0.5b", "qwen2.5-7b")
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    peak = next((value for key, value in PEAK.items() if key in name), None)
    print(f"device: {name}")
    short = device == "cpu"  # a dry run
    for which in dict.fromkeys((small, large)):
        rows += bench_collect(which, device, repeats=1, batches=(1, 16) if short else (1, 16, 64, 256), dtype="bf16",
                              length=8 if short else 128)
    sizes = {"batch": 2, "tokens": 420 if short else 2048, "n_labels": 140 if short else 600}
    recipes = {"": (small, {}), " --compile true": (small, {"compiled": True}),
               " adapter and last 2 layers only, --gradient_checkpointing true":
                   (large, {"checkpointing": True, "trained_layers": 2})}
    if short:  # compiling takes minutes on a CPU
        del recipes[" --compile true"]
    for what, (which, flags) in recipes.items():
        arguments = {"shape": which, "device": device, "bf16": True, **flags, **sizes}
        ours = measure(repeats, device, ours=(train_ours, arguments))["ours"]
        tokens = sizes["tokens"] + sizes["tokens"] * 6 // 7
        used = flops(which, tokens) / ours[0] / peak if peak else 0.0
        rows.append(row(f"train {which}{what}, a step of {tokens} tokens", ours, tokens_per_s=tokens / ours[0],
                        utilisation=used))
    arguments = {"shape": small, "device": device, "bf16": True, **sizes}
    sides = measure(repeats, device, ours=(train_ours, arguments), plain=(train_closed_forms, arguments))
    same("losses", sides["ours"][2], sides["plain"][2], tolerance=0.01)
    rows.append(row(f"train {small}, plain losses; the closed forms of 69220d2", sides["ours"], sides["plain"]))
    for which in dict.fromkeys((small, large)):
        steps, full = (8, 16) if short else (8, 512)
        ours = {"shape": which, "device": device, "steps": steps}
        plain = {"shape": which, "device": device, "batch": 1, "prompt": 128, "length": full}
        sides = measure(repeats, device, ours=(compress_side, ours), plain=(collect_ours, plain))
        rows.append(row(f"compress {which}, K = {steps}; a full message of {full} states", sides["ours"],
                        sides["plain"]))
    ours = measure(repeats, device, ours=(nccl_step, {"shape": small, "device": device}))["ours"]
    rows.append(row(f"train {small}, a step under DDP on one rank", ours))
    return rows


BENCHMARKS = {"collect": bench_collect, "train": bench_train, "compress": bench_compress, "eval": bench_eval,
              "io": bench_io, "startup": bench_startup, "scaling": bench_scaling, "gpu": bench_gpu}


@one_line_errors("bench.py")
def main(argv=None):
    args = get_args(argv)
    shape = args.shape or (None if args.benchmark == "gpu" else "smollm2-135m")
    print(f"{args.benchmark}, {torch.get_num_threads()} threads, {args.device}\n{'ours; the plain way':88s} "
          + " ".join(f"{column:>8s}" for column in ("ours s", "plain s", "ratio", "ours GB", "plain GB")))
    rows = BENCHMARKS[args.benchmark](shape=shape, device=args.device, repeats=args.repeats, records=args.records)
    if args.json:
        write_json(args.json, {"device": args.device, "shape": shape, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
