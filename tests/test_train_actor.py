"""Stage 2: the same curve for any split of the work and after any kill; the best model kept; learning happens."""
import csv
import json
import math
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import train_actor
from data import Conversations
from model import LatentActor, LatentShards, encode_conversation, open_shards, to_messages, write_shard
from tiny import make_data, save_model
from train_actor import LOSS_TERMS, main

N = 7  # rows: no multiple of any batch size below
TIMING = {"tokens_per_s", "memory_gb"}
ROOT = os.path.dirname(os.path.abspath(train_actor.__file__))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny actor, a train file, and messages for it."""
    root = tmp_path_factory.mktemp("world")
    train, messages = make_data(str(root / "data"), N)
    return {"model": save_model(root / "model"), "train": train, "messages": messages}


def argv(world, out, *more):
    """The last of two equal flags wins."""
    return [str(a) for a in [
        "--model_name_or_path", world["model"], "--train_file", world["train"], "--hidden_data", world["messages"],
        "--output_dir", out, "--num_heads", 4, "--learning_rate", 1e-3, "--global_batch_size", 4, "--max_steps", 4,
        "--eval_ratio", 0.3, "--eval_steps", 2, *more]]


def log(out):
    with open(os.path.join(out, "loss_log.csv")) as f:
        return list(csv.DictReader(f))


def column(out, name):
    return [float(r[name]) for r in log(out) if r[name]]


def assert_same_curve(a, b, tolerance=1e-4):
    rows, others = log(a), log(b)
    assert len(rows) == len(others) > 0
    for x, y in zip(rows, others):
        for name in x.keys() - TIMING:
            assert (x[name] == "") == (y[name] == ""), name
            if x[name]:
                assert float(x[name]) == pytest.approx(float(y[name]), rel=tolerance, abs=tolerance), (x["step"], name)


def weights(out):
    return {(name, k): v for name in ("model.safetensors", "latent_adapter.safetensors")
            if os.path.exists(os.path.join(out, name)) for k, v in load_file(os.path.join(out, name)).items()}


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def write(path, records):
    with open(path, "w") as f:
        json.dump(records, f)
    return str(path)


def rows_of(world):
    with open(world["train"]) as f:
        return json.load(f)


# ---- one result for any split of the work

SPLIT = ["--adapter_dropout", 0, "--infonce_probe_interval", 2, "--infonce_probe_size", 2]


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("reference") / "o")
    main(argv(world, out, *SPLIT))
    return out


@pytest.mark.parametrize("more", [["--per_device_train_batch_size", 1, "--per_device_eval_batch_size", 1],
                                  ["--per_device_train_batch_size", 3], ["--gradient_checkpointing", "true"]])
def test_memory_flags_change_no_result(world, reference, tmp_path, more):
    main(argv(world, tmp_path / "o", *SPLIT, *more))
    assert_same_curve(tmp_path / "o", reference)


@pytest.mark.parametrize("more", [[], ["--gradient_checkpointing", "true"]])
def test_bf16_autocast_gives_nearly_the_same_curve(world, reference, tmp_path, monkeypatch, more):
    """What CUDA does, on a CPU: bf16 products over fp32 parameters, in every pass."""
    monkeypatch.setattr(train_actor, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    main(argv(world, tmp_path / "o", *SPLIT, *more))
    assert {v.dtype for v in weights(tmp_path / "o").values()} == {torch.float32}
    assert column(tmp_path / "o", "loss") != column(reference, "loss")  # it was on
    for name in ("loss", "task", "align", "sep", "grad_norm", "eval_loss", "infonce"):
        assert column(tmp_path / "o", name) == pytest.approx(column(reference, name), rel=0.03, abs=3e-3), name


def test_schedule_and_optimizer_flags(world, tmp_path):
    out = tmp_path / "o"
    flags = argv(
        world, out, "--num_train_epochs", 4.5, "--warmup_ratio", 0.5, "--adam_beta2", 0.9, "--adapter_learning_rate", 0.1,
        "--adapter_scale", 3, "--adapter_output_scale", 5, "--eval_ratio", 0)
    n = flags.index("--max_steps")
    main(flags[:n] + flags[n + 2:])
    steps = math.ceil(4.5 * N / 4)
    assert column(out, "step") == list(range(1, steps + 1))
    warmup, rates = round(steps / 2), column(out, "lr")
    assert rates[:warmup] == pytest.approx([1e-3 * (k + 1) / warmup for k in range(warmup)], rel=1e-4)
    assert rates[warmup - 1] == max(rates) and 0 < rates[-1] < rates[-2]  # then a cosine down
    groups = torch.load(out / f"checkpoint-{steps}" / "optimizer.pt", weights_only=True)["param_groups"]
    assert all(group["betas"][1] == 0.9 for group in groups)
    assert groups[2]["lr"] == pytest.approx(100 * groups[0]["lr"])  # the adapter's own
    adapter = load_file(out / "latent_adapter.safetensors")
    for name, start in (("projection.scale", 3), ("projection.output_scale", 5)):
        assert adapter[name].item() == pytest.approx(start, abs=1.0) and adapter[name].item() != start  # learned from there


def test_compiled_layers_change_no_result(world, reference, tmp_path, monkeypatch):
    compiled, compile_layer = [], torch.nn.Module.compile

    def eager(self, **kwargs):  # the graphs that --compile makes, run without the minute of code generation
        compiled.append(type(self).__name__)
        return compile_layer(self, backend="eager", **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    main(argv(world, tmp_path / "o", *SPLIT, "--compile", "true"))
    assert_same_curve(tmp_path / "o", reference)
    assert compiled == ["Qwen2DecoderLayer"] * 2


def test_two_ranks_follow_one_ranks_curve(world, reference, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
               "--master_port", str(port), os.path.join(ROOT, "train_actor.py"),
               *argv(world, tmp_path / "o", *SPLIT, "--per_device_train_batch_size", 1)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_curve(tmp_path / "o", reference)
    for (_, name), a, b in zip(weights(reference), weights(reference).values(), weights(tmp_path / "o").values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=name)
    assert done.stdout.count("wrote the actor") == 1  # one rank talks


def test_batches_cover_the_data_and_depend_on_the_step_alone():
    batches = [train_actor.global_batch(step, 7, 4, 3) for step in range(7)]
    draws = [d for batch in batches for d in batch]
    assert [k for k, _ in draws] == list(range(28))
    for epoch in range(4):
        assert sorted(p for _, p in draws[7 * epoch:7 * epoch + 7]) == list(range(7))
    assert train_actor.global_batch(5, 7, 4, 3) == batches[5] != train_actor.global_batch(5, 7, 4, 4)
    assert [p for _, p in draws[:7]] != [p for _, p in draws[7:14]]


def test_held_out_rows_are_chosen_by_id(world, tmp_path, monkeypatch):
    reverse = {**world, "train": write(tmp_path / "r.json", rows_of(world)[::-1])}
    sides = []
    for w in (world, reverse):
        args = train_actor.get_args(argv(w, tmp_path / "o"))[1]
        tokenizer = train_actor.load_tokenizer(w["model"])
        train_actor.add_markers(tokenizer)
        data = Conversations(w["train"], args, tokenizer, open_shards(w["messages"]), 4096)
        sides.append([{data.ids[n] for n in side} for side in train_actor.split_eval(data, 0.3, 0)])
    assert sides[0] == sides[1] and len(sides[0][1]) == 2 and not sides[0][0] & sides[0][1]


# ---- kills and restarts

class Killed(BaseException):
    pass


def dies_at(monkeypatch, target, name, call):
    """The n-th call of target.name raises, as a kill would, before it does anything."""
    real, calls = getattr(target, name), []

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return real(*args, **kwargs)
    monkeypatch.setattr(target, name, wrapper)


LONG = ["--max_steps", 6, "--save_steps", 2, "--infonce_probe_interval", 3, "--weight_decay", 0.1]


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("uninterrupted") / "o")
    main(argv(world, out, *LONG))
    return out


@pytest.mark.parametrize("target, name, call", [
    (torch.optim.AdamW, "step", 2), (torch.optim.AdamW, "step", 6), (torch, "save", 2), (train_actor, "plot", 1),
    (train_actor, "evaluate", 2), (LatentActor, "save", 4)])
def test_resumed_is_uninterrupted_bit_for_bit(world, uninterrupted, tmp_path, monkeypatch, capsys, target, name, call):
    out = tmp_path / "o"
    with monkeypatch.context() as patch:
        dies_at(patch, target, name, call)
        with pytest.raises(Killed):
            main(argv(world, out, *LONG))
    for f in saved(out, "checkpoint"):  # whatever is there by its final name is whole
        assert set(os.listdir(out / f)) == set(os.listdir(os.path.join(uninterrupted, "checkpoint-6")))
    main(argv(world, out, *LONG))
    assert sorted(os.listdir(out)) == sorted(os.listdir(uninterrupted))
    checkpoint = "checkpoint-6"
    assert same_weights(out, uninterrupted) and same_weights(out / checkpoint, os.path.join(uninterrupted, checkpoint))
    a, b = (torch.load(os.path.join(d, checkpoint, "optimizer.pt")) for d in (out, uninterrupted))
    assert json.dumps(a["param_groups"]) == json.dumps(b["param_groups"])  # a tuple of betas comes back as a list
    assert a["state"].keys() == b["state"].keys() and a["state"]
    assert all(torch.equal(a["state"][i][k], b["state"][i][k]) for i in a["state"] for k in a["state"][i])
    for x, y in zip(log(out), log(uninterrupted), strict=True):
        assert {k: v for k, v in x.items() if k not in TIMING} == {k: v for k, v in y.items() if k not in TIMING}
    states = [json.load(open(os.path.join(d, "trainer_state.json"))) for d in (out, uninterrupted)]
    assert states[0] == states[1] and states[0]["step"] == 6


def snapshot(directory):
    paths = [os.path.join(root, name) for root, _, names in os.walk(directory) for name in names]
    return {path: os.stat(path).st_mtime_ns for path in paths}


def test_finished_run_says_so_and_does_nothing(world, uninterrupted, capsys):
    before = snapshot(uninterrupted)
    main(argv(world, uninterrupted, *LONG))
    assert "is finished (6 steps)" in capsys.readouterr().out and snapshot(uninterrupted) == before


def test_changed_flags_on_resume(world, uninterrupted, refuses, tmp_path):
    before = snapshot(uninterrupted)
    refuses(main, argv(world, uninterrupted, *LONG, "--learning_rate", 1e-4, "--seed", 3), "--learning_rate", "--seed",
            "--resume never")
    refuses(main, argv(world, tmp_path / "o", "--resume", tmp_path / "nowhere"), "nowhere")
    assert snapshot(uninterrupted) == before


def test_resume_never_and_from_a_path(world, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "o")
    main(argv(world, tmp_path / "o", *LONG, "--resume", "never"))
    assert_same_curve(tmp_path / "o", uninterrupted, 0)
    main(argv(world, tmp_path / "p", *LONG, "--resume", os.path.join(uninterrupted, "checkpoint-4")))
    assert same_weights(tmp_path / "p" / "checkpoint-6", os.path.join(uninterrupted, "checkpoint-6"))
    assert [int(r["step"]) for r in log(tmp_path / "p")] == [5, 6]


def test_best_model_of_another_directory_is_not_lost(world, tmp_path, monkeypatch):
    """--resume PATH into a new directory, where no later evaluation beats the one before the checkpoint."""
    flags = ["--eval_steps", 1, "--save_steps", 1, "--save_total_limit", 9]
    scripted_evaluation(monkeypatch, [1.0, 2.0, 3.0, 4.0])
    main(argv(world, tmp_path / "a", *flags))
    scripted_evaluation(monkeypatch, [3.0, 4.0])
    main(argv(world, tmp_path / "b", *flags, "--resume", tmp_path / "a" / "checkpoint-2"))
    assert same_weights(tmp_path / "b", tmp_path / "a" / "best-1")


# ---- what is kept

def scripted_evaluation(monkeypatch, losses):
    losses = iter(losses)
    monkeypatch.setattr(train_actor, "evaluate", lambda *args: next(losses))


def saved(out, kind):
    return sorted(f for f in os.listdir(out) if f.startswith(kind))


def test_early_stopping_and_the_best_model(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "o"
    scripted_evaluation(monkeypatch, [3.0, 2.0, 2.5, 2.1, 1.0])
    flags = ["--max_steps", 9, "--eval_steps", 1, "--save_steps", 1, "--early_stopping_patience", 2,
             "--save_total_limit", 3]
    main(argv(world, out, *flags))
    assert column(out, "eval_loss") == [3.0, 2.0, 2.5, 2.1]  # two evaluations without a new best
    assert saved(out, "best") == ["best-2"] and saved(out, "checkpoint") == [f"checkpoint-{n}" for n in (2, 3, 4)]
    assert same_weights(out, out / "best-2") and same_weights(out, out / "checkpoint-2")
    assert not same_weights(out, out / "checkpoint-4")
    before = snapshot(out)
    main(argv(world, out, *flags))
    assert "is finished (4 steps)" in capsys.readouterr().out and snapshot(out) == before


def test_without_held_out_rows_the_last_model_is_kept(world, tmp_path):
    main(argv(world, tmp_path / "o", "--eval_ratio", 0, "--save_steps", 1, "--save_total_limit", 1))
    assert saved(tmp_path / "o", "best") == [] and saved(tmp_path / "o", "checkpoint") == ["checkpoint-4"]
    assert same_weights(tmp_path / "o", tmp_path / "o" / "checkpoint-4") and not column(tmp_path / "o", "eval_loss")


@pytest.mark.parametrize("message", ["latent", "text", "none"])
def test_kept_model_has_the_logged_loss_on_whole_messages(world, tmp_path, message):
    """The output directory reproduces the lowest eval_loss, by plain Hugging Face on hand-made inputs (r = 0)."""
    out = str(tmp_path / "o")
    eval_file = write(tmp_path / "eval.json", rows_of(world)[4:])
    main(argv(world, out, "--eval_file", eval_file, "--eval_ratio", 0, "--message", message, "--learning_rate", 0.01,
              "--eval_steps", 1, "--save_steps", 1))
    losses = column(out, "eval_loss")
    best_step = json.load(open(os.path.join(out, "trainer_state.json")))["best_step"]
    assert len(losses) == 4 and best_step == 1 + np.argmin(losses)
    actor, shards = LatentActor.load(out), LatentShards(world["messages"])
    assert os.path.exists(os.path.join(out, "latent_adapter.safetensors")) == (message == "latent")
    assert actor.info["message"] == message
    total = tokens = 0
    for row in rows_of(world)[4:]:
        announcement = actor.info["plan_announcement"] if message != "none" else None
        before, after, labels = encode_conversation(actor.tokenizer, to_messages(row["conversations"]), announcement)
        table = actor.lm.get_input_embeddings()
        with torch.no_grad():
            parts = [table(torch.tensor(before)), table(torch.tensor(after))]
            if message == "latent":
                H = shards[row["id"]]
                parts.insert(1, actor.adapter(H[None], torch.ones(1, len(H), dtype=torch.bool))[0])
            if message == "text":
                parts.insert(1, table(torch.tensor(actor.tokenizer(shards.records[row["id"]]["plan"]).input_ids)))
            logits = actor.lm(inputs_embeds=torch.cat(parts)[None]).logits[0, -len(after) - 1:-1]
        total += F.cross_entropy(logits, torch.tensor(labels), reduction="sum", ignore_index=-100).item()
        tokens += sum(label != -100 for label in labels)
    assert total / tokens == pytest.approx(min(losses), abs=1e-4)


def test_baselines_need_no_messages(world, tmp_path):
    rows = [{**r, "plan": "look around"} for r in rows_of(world)]
    for message, train in (("text", write(tmp_path / "plans.json", rows)), ("none", world["train"])):
        args = argv({**world, "train": train}, tmp_path / message, "--message", message)
        del args[args.index("--hidden_data"):args.index("--hidden_data") + 2]
        main(args)
        assert column(tmp_path / message, "sep") == column(tmp_path / message, "align") == [0] * 4
        assert not os.path.exists(tmp_path / message / "latent_adapter.safetensors")


# ---- the loss terms in the log

@pytest.mark.parametrize("adaptive", ["true", "false"])
def test_weights_stay_in_their_bounds(world, tmp_path, adaptive):
    main(argv(world, tmp_path / "o", "--adaptive_weights", adaptive, "--plan_similarity_weight", 0.4,
              "--random_contrast_weight", 2))
    rows = [{k: float(v) for k, v in r.items() if v} for r in log(tmp_path / "o")]
    for last, row in zip([None, *rows], rows):
        for name, term, ceiling, scale in (("w_align", "align", 0.4, 1), ("w_sep", "sep", 2, math.log(2))):
            expected = ceiling * min(max(last[term] / scale, 0.1), 1) if adaptive == "true" and last else ceiling
            assert row[name] == pytest.approx(expected, rel=1e-4) and 0.0999 * ceiling <= row[name] <= ceiling
        loss = row["task"] + row["w_align"] * row["align"] + row["w_sep"] * row["sep"]
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert row["align"] == pytest.approx(0.7 * row["kl"] + 0.3 * row["cosine"], rel=1e-4)
        assert 0 < row["sep"] <= math.log(2) and set(LOSS_TERMS) <= row.keys()


def test_zero_weights_drop_their_passes(world, tmp_path, monkeypatch):
    passes, real = [], LatentActor.states
    monkeypatch.setattr(LatentActor, "states", lambda *args: passes.append(1) or real(*args))
    main(argv(world, tmp_path / "o", "--plan_similarity_weight", 0, "--random_contrast_weight", 0, "--eval_ratio", 0))
    assert len(passes) == 4  # one per step


def test_infonce_columns(world, reference):
    for r in log(reference):
        assert bool(r["infonce"]) == bool(r["infonce_bound"]) == (int(r["step"]) % 2 == 0)
        if r["infonce"]:
            assert float(r["infonce"]) + float(r["infonce_bound"]) == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("per_device", [1, 4])
def test_negative_is_another_task_at_the_same_ratio(world, tmp_path, monkeypatch, per_device):
    rows = rows_of(world)
    for row in rows[1:4]:  # four rows share their task
        row["conversations"][0]["value"] = rows[0]["conversations"][0]["value"]
    calls, real = [], Conversations.row

    def spy(data, n, message, tenths=0, source=None):
        calls.append((data, n, message, tenths, source))
        return real(data, n, message, tenths, source)
    monkeypatch.setattr(Conversations, "row", spy)
    main(argv({**world, "train": write(tmp_path / "t.json", rows)}, tmp_path / "o", "--max_steps", 12,
              "--eval_steps", 12, "--per_device_train_batch_size", per_device))
    calls = calls[1:]  # the row that is shown first
    training, evaluation = calls[:12 * 4 * 3], calls[12 * 4 * 3:]
    for (data, n, kind, r, _), plan, (_, m, other_kind, other_r, source) in zip(*(iter(training),) * 3):
        assert plan[1:3] == (n, "text") and kind == other_kind == "latent"
        assert m == n and other_r == r and data.tasks[source] != data.tasks[n]
    # r = 0 included: what evaluation uses
    assert {r for _, _, kind, r, _ in training if kind == "latent"} == set(range(11))
    assert len(evaluation) == 2 and all(r == 0 and source is None for *_, r, source in evaluation)


# ---- learning

def test_learns_to_read_the_message(tmp_path, world):
    """The reply is written in the latents only: read, it is known; with no message it can only be guessed."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(4, 32, generator=generator)
    latents = {f"t{i}": kinds[i % 4] + 0.1 * torch.randn(3, 32, generator=generator) for i in range(48)}
    write_shard(str(tmp_path / "m" / "latents-rank00000-00000.safetensors"), latents,
                {k: {"task": k, "plan": "abcd"[i % 4] * 3, "plan_token_ids": []} for i, k in enumerate(latents)},
                {"model": "tiny", "hidden_size": 32})
    train = write(tmp_path / "t.json", [{"id": f"t{i}", "conversations": [
        {"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "abcd"[i % 4]}]} for i in range(48)])
    losses = {}
    for message in ("latent", "none"):
        out = tmp_path / message
        main(argv({**world, "train": train, "messages": str(tmp_path / "m")}, out, "--message", message,
                  "--max_steps", 60, "--eval_steps", 4, "--learning_rate", 5e-3, "--global_batch_size", 8,
                  "--per_device_train_batch_size", 8, "--infonce_probe_interval", 60, "--random_contrast_weight", 0.3))
        losses[message] = column(out, "eval_loss")
    # two supervised tokens: the letter (ln 4 nats if guessed) and the end of turn
    assert losses["latent"][-1] < 0.5 * losses["latent"][0] and losses["latent"][-1] < 0.2
    assert min(losses["none"]) > 0.9 * math.log(4) / 2
    assert column(tmp_path / "latent", "infonce_bound")[-1] > 0.3  # in nats, of at most log 8


# ---- messages inside the rows

@pytest.mark.parametrize("form", ["inline", ".npy", ".pt", ".safetensors"])
def test_inline_messages_equal_shards(world, tmp_path, form):
    shards, rows = LatentShards(world["messages"]), rows_of(world)
    for row in rows:
        H, path = shards[row["id"]], str(tmp_path / (row["id"] + form))
        row["plan"] = shards.records[row["id"]]["plan"]
        if form == "inline":
            row["hidden_state"] = H.tolist()
            continue
        row["hidden_state_path"] = path
        if form == ".npy":
            np.save(path, H.numpy())
        elif form == ".pt":
            torch.save(H, path)
        else:
            save_file({"hidden": H}, path)
    for out, args in (("o", argv({**world, "train": write(tmp_path / "t.json", rows)}, tmp_path / "o")),
                      ("ref", argv(world, tmp_path / "ref"))):
        if out == "o":
            del args[args.index("--hidden_data"):args.index("--hidden_data") + 2]
        main(args)
    assert_same_curve(tmp_path / "o", tmp_path / "ref", 1e-5)


# ---- bad input

def first(**fields):
    """Change the fields of the first row; None removes one."""
    def change(rows):
        rows[0] = {k: v for k, v in {**rows[0], **fields}.items() if v is not None}
        return rows
    return change


@pytest.mark.parametrize("change, words", [
    (first(id="stranger"), ["id stranger", "no message", "collect.py"]), (first(id="t1"), ["id t1", "twice"]),
    (first(id=None), ["record 0", "'id'"]), (first(conversations=None), ["record 0", "'conversations'"]),
    (first(conversations=[{"from": "gpt", "value": "x"}]), ["id t0", "human turn"]),
    (first(conversations=[{"from": "human", "value": "x"}]), ["id t0", "no assistant turn"]),
    (first(conversations=[{"from": "human", "text": "x"}]), ["id t0", "'value'"]),
    (first(hidden_state=[[1.0, 2.0], [3.0]], plan="x"), ["id t0", "hidden_state"]),
    (first(hidden_state=[[1.0, math.nan] * 16], plan="x"), ["id t0", "finite"]),
    (first(hidden_state=[], plan="x"), ["id t0", "hidden_state"]),
    (first(hidden_state_path="/nowhere.npy", plan="x"), ["id t0", "/nowhere.npy"]),
    (lambda rows: rows[:-1] + [{**rows[-1], "hidden_state": [[1.0] * 31] * 2, "plan": "x"}], ["id t6", "31", "32"]),
    (first(hidden_state=[[1.0] * 32] * 50, plan="x"), ["id t0", "50 rows", "--prepended_length 20"]),
    (first(conversations=[{"from": "human", "value": "x" * 5000}, {"from": "gpt", "value": "x"}]),
     ["id t0", "context of 4096"]),
    (lambda rows: [{**rows[0], "id": f"x{i}", "hidden_state": [[1.0] * 32] * 2, "plan": "x"} for i in range(5)],
     ["tasks are the same", "L_sep"]),
    (lambda rows: {}, ["list of records"]), (lambda rows: ["x"], ["list of records"]),
    (lambda rows: [], ["no training rows"])])
def test_bad_rows(world, tmp_path, refuses, change, words):
    bad = {**world, "train": write(tmp_path / "t.json", change(rows_of(world)))}
    refuses(main, argv(bad, tmp_path / "o", "--eval_ratio", 0, "--prepended_length", 20), *words)


def test_widths_of_two_kinds_of_messages(world, tmp_path, refuses):
    rows = rows_of(world)
    rows[0] |= {"hidden_state": [[1.0] * 31] * 2, "plan": "x"}
    eval_file = write(tmp_path / "e.json", rows)
    refuses(main, argv(world, tmp_path / "o", "--eval_file", eval_file, "--eval_ratio", 0), "id t0", "31", "32")


@pytest.mark.parametrize("flags, words", [
    (["--num_heads", 5], ["--num_heads 5", "32"]),
    (["--prepended_length", 3], ["--prepended_length 3", "rows", "id t"]),
    (["--model_max_length", 50], ["context of 50", "id t"]), (["--surprise", 1], ["--surprise"]),
    (["--message", "smoke"], ["--message"]), (["--train_file", "/nowhere.json"], ["no file /nowhere.json"]),
    (["--hidden_data", "/nowhere"], ["no directory /nowhere"]), (["--model_name_or_path", "/nowhere"], ["/nowhere"]),
    (["--eval_file", "/nowhere.json"], ["no file /nowhere.json"]), (["--eval_ratio", 1], ["no training rows"]),
    (["--task_turn", 4], ["--task_turn 4", "id t0"]), (["--adaptive_weights", "maybe"], ["--adaptive_weights"]),
    (["--learning_rat", 1], ["--learning_rat"]), (["--global_batch_size", 0], ["--global_batch_size"]),
    (["--per_device_train_batch_size", 0], ["--per_device_train_batch_size"]),
    (["--per_device_eval_batch_size", 0], ["--per_device_eval_batch_size"]), (["--eval_steps", 0], ["--eval_steps"]),
    (["--save_steps", 0], ["--save_steps"]), (["--logging_steps", 0], ["--logging_steps"]),
    (["--num_heads", 0], ["--num_heads"]),
    (["--save_total_limit", 0], ["--save_total_limit"])], ids=lambda words: " ".join(map(str, words)))
def test_bad_flags(world, tmp_path, refuses, flags, words):
    refuses(main, argv(world, tmp_path / "o", *flags), *words)
    assert not os.path.exists(tmp_path / "o" / "loss_log.csv")


def test_global_batch_must_divide_over_ranks(world, tmp_path, refuses, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refuses(main, argv(world, tmp_path / "o"), "--global_batch_size 4", "3 ranks")


@pytest.mark.parametrize("how, words", [("nan", ["id t2", "NaN"]), ("truncated", ["truncated"]),
                                        ("plan", ["id t2", "empty plan"]), ("empty", ["holds no latent shards"])])
def test_bad_shards(world, tmp_path, refuses, how, words):
    shards = LatentShards(world["messages"])
    latents, records = {k: shards[k].clone() for k in shards.records}, {k: dict(r) for k, r in shards.records.items()}
    path = tmp_path / "m" / "latents-rank00000-00000.safetensors"
    os.makedirs(tmp_path / "m")
    if how == "nan":
        latents["t2"][1, 3] = math.nan
    if how == "plan":
        records["t2"]["plan"] = ""
    if how != "empty":
        write_shard(str(path), latents, records, shards.sender)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    refuses(main, argv({**world, "messages": str(tmp_path / "m")}, tmp_path / "o", "--max_steps", 8), *words)


def test_loss_that_is_not_finite_stops_and_keeps_what_is_there(world, tmp_path, refuses):
    out = tmp_path / "o"
    flags = ["--learning_rate", 1e30, "--save_steps", 1, "--eval_steps", 9, "--max_grad_norm", 1e9]
    line = refuses(main, argv(world, out, *flags), "step 2", "loss is", "--learning_rate")
    assert sum(f"t{i}" in line for i in range(N)) >= 3  # the batch's ids
    assert [r["step"] for r in log(out)] == ["1"] and saved(out, "checkpoint") == ["checkpoint-1"]
