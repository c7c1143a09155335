"""Stage 2: the same curve for any split of the work and after any kill; the best model is kept; it learns."""
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
from safetensors.torch import load_file

import train_actor
from common import read_json, write_json
from data import Conversations, encode_conversation, to_messages
from model import LatentActor, LatentShards, add_markers, collate, load_tokenizer, open_shards, write_shard
from tiny import (argv_of, assert_same_curve, checkpoints, column, make_data, read_log, same_run,
                  same_tensors, save_model, snapshot, tensors)
from train_actor import TERMS, main, make_batches

N = 7  # samples: no multiple of any batch size below
SCRIPT = os.path.abspath(train_actor.__file__)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, a training file, and messages for it: flags of a run."""
    root = tmp_path_factory.mktemp("world")
    train, messages = make_data(str(root / "data"), N)
    return {"model_name_or_path": save_model(root / "model"), "train_file": train, "hidden_data": messages}


def argv(world, out, **flags):
    """The command line of a small run; None leaves a flag out."""
    small = {"num_heads": 4, "learning_rate": 1e-3, "global_batch_size": 4, "max_steps": 4, "eval_ratio": 0.3,
             "eval_steps": 2}
    return argv_of({**world, "output_dir": out, **small, **flags})


def train(world, out, **flags):
    main(argv(world, out, **flags))
    return out


def records_of(world):
    return read_json(world["train_file"])


def with_records(world, path, records):
    """The same flags with another training file."""
    write_json(str(path), records)
    return {**world, "train_file": str(path)}


# ---- one result for any split of the work

SPLIT = {"adapter_dropout": 0, "infonce_probe_interval": 2, "infonce_probe_size": 2}


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    return train(world, str(tmp_path_factory.mktemp("reference") / "o"), **SPLIT)


@pytest.mark.parametrize("flags", [
    {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}, {"per_device_train_batch_size": 3},
    {"gradient_checkpointing": "true"}], ids=str)
def test_memory_flags_change_no_result(world, reference, tmp_path, flags):
    assert_same_curve(train(world, tmp_path / "o", **SPLIT, **flags), reference)


@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": "true"}], ids=str)
def test_bf16_autocast_gives_nearly_the_same_curve(world, reference, tmp_path, flags):
    """What CUDA does, on a CPU: bf16 products over fp32 parameters, in every pass."""
    out = train(world, tmp_path / "o", **SPLIT, bf16="true", **flags)
    assert {tensor.dtype for tensor in tensors(out).values()} == {torch.float32}
    assert column(out, "loss") != column(reference, "loss")  # it was on
    for name in ("loss", "task", "align", "sep", "grad_norm", "eval_loss", "infonce"):
        assert column(out, name) == pytest.approx(column(reference, name), rel=0.03, abs=3e-3), name


def test_compiled_layers_change_no_result(world, reference, tmp_path, monkeypatch):
    compiled, compile_layer = [], torch.nn.Module.compile

    def eager(self, **kwargs):  # the graphs that --compile makes, run without the minute of code generation
        compiled.append(type(self).__name__)
        return compile_layer(self, backend="eager", **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    assert_same_curve(train(world, tmp_path / "o", **SPLIT, compile="true"), reference)
    assert compiled == ["Qwen2DecoderLayer"] * 2


def test_torchrun(world, reference, tmp_path):
    """Two ranks as one starts them follow one rank's curve."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--master_addr", "127.0.0.1", "--master_port", str(port), SCRIPT]
    out = tmp_path / "o"
    done = subprocess.run([*command, *argv(world, out, **SPLIT, per_device_train_batch_size=1)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_curve(out, reference)
    a, b = tensors(out), tensors(reference)
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-3)
    assert done.stdout.count("wrote the actor") == 1  # one rank talks


def test_schedule_and_optimizer_flags(world, tmp_path):
    out = train(world, tmp_path / "o", max_steps=None, num_train_epochs=4.5, warmup_ratio=0.5, adam_beta2=0.9,
                eval_ratio=0, adapter_learning_rate=0.1, adapter_scale=3, adapter_output_scale=5)
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
        assert 0 < abs(adapter[name].item() - start) < 1  # it starts there, and is learned


# ---- kills and restarts

LONG = {"max_steps": 6, "save_steps": 2, "infonce_probe_interval": 3, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    return train(world, str(tmp_path_factory.mktemp("uninterrupted") / "o"), **LONG)


@pytest.mark.parametrize("event", [2, 20, 40, 60])
def test_resumed_is_uninterrupted_bit_for_bit(world, uninterrupted, forked, tmp_path, event):
    """Killed at the n-th touch of a file of its output: weights, optimizer, log and state are as without."""
    out = tmp_path / "o"
    killed, = forked("train_actor", argv(world, out, **LONG), event=event)["codes"]
    assert killed == -9
    for name in checkpoints(out):  # whatever has its final name is whole
        if ".tmp" not in name:
            assert set(os.listdir(out / name)) == set(os.listdir(os.path.join(uninterrupted, "checkpoint-6")))
    assert forked("train_actor", argv(world, out, **LONG))["codes"] == [0]
    assert same_run(out, uninterrupted)


def test_a_checkpoint_has_the_model_the_optimizer_and_the_state(uninterrupted):
    names = set(os.listdir(os.path.join(uninterrupted, "checkpoint-6")))
    assert {"optimizer.pt", "trainer_state.json", "model.safetensors", "latent_adapter.safetensors",
            "latent_adapter.json", "config.json", "tokenizer.json"} <= names
    assert names - {"optimizer.pt"} < set(os.listdir(uninterrupted))
    assert read_json(os.path.join(uninterrupted, "trainer_state.json"))["step"] == 6


def test_a_finished_run_says_so_and_does_nothing(world, uninterrupted, capsys):
    before = snapshot(uninterrupted)
    train(world, uninterrupted, **LONG)
    assert "is finished (6 steps)" in capsys.readouterr().out and snapshot(uninterrupted) == before


def test_changed_flags_on_resume(world, uninterrupted, refuses, tmp_path):
    before = snapshot(uninterrupted)
    changed = argv(world, uninterrupted, **LONG | {"learning_rate": 1e-4, "seed": 3, "curriculum": 0})
    refuses(main, changed, "--learning_rate", "--seed", "--curriculum", "--resume never")
    refuses(main, argv(world, tmp_path / "o", resume=tmp_path / "nowhere"), "nowhere")
    assert snapshot(uninterrupted) == before


def test_resume_never_and_from_a_path(world, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "o")
    assert same_run(train(world, tmp_path / "o", **LONG, resume="never"), uninterrupted)
    saved = os.path.join(uninterrupted, checkpoints(uninterrupted)[0])
    step = read_json(os.path.join(saved, "trainer_state.json"))["step"]
    moved = train(world, tmp_path / "p", **LONG, resume=saved)
    assert same_tensors(moved / "checkpoint-6", os.path.join(uninterrupted, "checkpoint-6"))
    assert column(moved, "step") == list(range(step + 1, 7))


# ---- what is kept

def scripted_evaluation(monkeypatch, losses):
    losses = iter(losses)
    monkeypatch.setattr(train_actor, "evaluate", lambda *args, **kwargs: next(losses))


def test_early_stopping_and_the_best_model(world, tmp_path, monkeypatch, capsys):
    """Two evaluations without a new best end the run; the output is the best model, which is not pruned."""
    scripted_evaluation(monkeypatch, [3.0, 2.0, 2.5, 2.1, 1.0])
    flags = {"max_steps": 9, "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 2,
             "save_total_limit": 1}
    out = train(world, tmp_path / "o", **flags)
    assert column(out, "eval_loss") == [3.0, 2.0, 2.5, 2.1]
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4"]
    assert same_tensors(out, out / "checkpoint-2") and not same_tensors(out, out / "checkpoint-4")
    before = snapshot(out)
    train(world, out, **flags)
    assert "is finished (4 steps)" in capsys.readouterr().out and snapshot(out) == before


def test_a_new_best_is_saved_whatever_save_steps_says(world, tmp_path, monkeypatch):
    scripted_evaluation(monkeypatch, [3.0, 2.0, 4.0, 4.0])
    out = train(world, tmp_path / "o", eval_steps=1, save_steps=100)
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4"]  # the best and the end
    assert same_tensors(out, out / "checkpoint-2")
    state = read_json(str(out / "trainer_state.json"))
    assert state["best_step"] == 2 and state["best_eval_loss"] == 2.0


def test_the_best_of_another_directory_is_not_taken_for_ones_own(world, tmp_path, monkeypatch):
    """--resume PATH into a new directory: what it keeps is the best of what it has."""
    flags = {"eval_steps": 1, "save_steps": 1, "save_total_limit": 9}
    scripted_evaluation(monkeypatch, [1.0, 2.0, 3.0, 4.0])
    a = train(world, tmp_path / "a", **flags)
    scripted_evaluation(monkeypatch, [3.0, 4.0])
    b = train(world, tmp_path / "b", **flags, resume=a / "checkpoint-2")
    assert same_tensors(b, b / "checkpoint-3") and same_tensors(b, a / "checkpoint-3")


def test_without_held_out_samples_the_last_model_is_kept(world, tmp_path):
    out = train(world, tmp_path / "o", eval_ratio=0, save_steps=1, save_total_limit=1)
    assert checkpoints(out) == ["checkpoint-4"] and same_tensors(out, out / "checkpoint-4")
    assert not column(out, "eval_loss")


@pytest.mark.parametrize("message", ["latent", "text", "none"])
def test_the_kept_model_has_the_logged_loss_on_whole_messages(world, tmp_path, message):
    """The output directory reproduces the lowest eval_loss, by plain Hugging Face on inputs made by hand."""
    held_out = records_of(world)[4:]
    write_json(str(tmp_path / "eval.json"), held_out)
    out = train(world, tmp_path / "o", eval_file=tmp_path / "eval.json", eval_ratio=0, message=message,
                learning_rate=0.01, eval_steps=1, save_steps=1)
    losses = column(out, "eval_loss")
    best_step = read_json(str(out / "trainer_state.json"))["best_step"]
    assert len(losses) == 4 and best_step == 1 + np.argmin(losses)
    actor, shards = LatentActor.load(str(out)), LatentShards(world["hidden_data"])
    assert os.path.exists(out / "latent_adapter.safetensors") == (message == "latent")
    assert actor.info["message"] == message
    words, total, tokens = actor.lm.get_input_embeddings(), 0, 0
    for record in held_out:
        announcement = actor.info["plan_announcement"] if message != "none" else None
        before, after, labels = encode_conversation(actor.tokenizer, to_messages(record), announcement)
        with torch.no_grad():
            parts = [words(torch.tensor(before)), words(torch.tensor(after))]
            if message == "latent":
                H = shards[record["id"]]
                parts.insert(1, actor.adapter(H[None], torch.ones(1, len(H), dtype=torch.bool))[0])
            if message == "text":
                plan = actor.tokenizer(shards.records[record["id"]]["plan"]).input_ids
                parts.insert(1, words(torch.tensor(plan)))
            logits = actor.lm(inputs_embeds=torch.cat(parts)[None]).logits[0, -len(after) - 1:-1]
        total += F.cross_entropy(logits, torch.tensor(labels), reduction="sum", ignore_index=-100).item()
        tokens += sum(label != -100 for label in labels)
    assert total / tokens == pytest.approx(min(losses), abs=1e-4)


def test_what_an_evaluation_needs_is_kept_with_the_actor(world, tmp_path):
    """latent_adapter.json: the announcement, the instruction, the template's and the adapter's arguments."""
    eto = [("human", "instruction"), ("gpt", "OK"), ("human", "the task"), ("gpt", "go")]
    turns = [{"from": role, "value": text} for role, text in eto]
    records = [{**record, "conversations": turns} for record in records_of(world)]
    out = train(with_records(world, tmp_path / "t.json", records), tmp_path / "o", task_turn=2, max_steps=1,
                plan_announcement="Listen:", adapter_scale=0.5, adapter_dropout=0,
                chat_template_kwargs='{"enable_thinking": true}')
    info = read_json(str(out / "latent_adapter.json"))
    output_scale = info["adapter"].pop("output_scale")
    assert info.pop("format_version") > 0
    assert info == {"message": "latent", "plan_announcement": "Listen:", "instruction": "instruction",
                    "sender": "tiny", "chat_template_kwargs": {"enable_thinking": True},
                    "adapter": {"sender_dim": 32, "dim": 32, "num_heads": 4, "dropout": 0, "scale": 0.5}}
    assert 0 < output_scale < 10 and LatentActor.load(str(out)).adapter.attention.num_heads == 4


def test_baselines_need_no_messages(world, tmp_path):
    records = [{**record, "plan": "look around"} for record in records_of(world)]
    for message, flags in (("text", with_records(world, tmp_path / "plans.json", records)), ("none", world)):
        out = train(flags | {"hidden_data": None}, tmp_path / message, message=message)
        assert column(out, "sep") == column(out, "align") == [0] * 4
        assert not os.path.exists(out / "latent_adapter.safetensors")
        assert read_json(str(out / "latent_adapter.json"))["message"] == message


def test_messages_in_the_training_file(world, tmp_path, reference):
    """Without --hidden_data: plans and states of the records themselves."""
    shards, records = LatentShards(world["hidden_data"]), records_of(world)
    for record in records:
        record["plan"] = shards.records[record["id"]]["plan"]
        record["hidden_state"] = shards[record["id"]].tolist()
    inline = with_records(world, tmp_path / "t.json", records) | {"hidden_data": None}
    assert_same_curve(train(inline, tmp_path / "o", **SPLIT), reference, 1e-5)


def test_the_first_sample_is_shown(world, tmp_path, capsys):
    """Supervised tokens between » and «, latents in their place."""
    train(world, tmp_path / "o", max_steps=1, eval_ratio=0)
    printed = capsys.readouterr().out
    assert "first sample: <|im_start|>system\nYou are helpful." in printed
    assert "Its plan:<bop>[3 latents]<eop><|im_end|>\n<|im_start|>assistant\n»go<|im_end|>«\n" in printed


# ---- the loss terms in the log

@pytest.mark.parametrize("adaptive", ["true", "false"])
def test_weights_stay_in_their_bounds(world, tmp_path, adaptive):
    out = train(world, tmp_path / "o", adaptive_weights=adaptive, plan_similarity_weight=0.4,
                random_contrast_weight=2)
    rows = [{name: float(value) for name, value in row.items() if value} for row in read_log(out)]
    for last, row in zip([None, *rows], rows):
        for name, term, ceiling, scale in (("w_align", "align", 0.4, 1), ("w_sep", "sep", 2, math.log(2))):
            expected = ceiling
            if adaptive == "true" and last:
                expected = ceiling * min(max(last[term] / scale, 0.1), 1)
            assert row[name] == pytest.approx(expected, rel=1e-4) and 0.0999 * ceiling <= row[name] <= ceiling
        loss = row["task"] + row["w_align"] * row["align"] + row["w_sep"] * row["sep"]
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert row["align"] == pytest.approx(0.7 * row["kl"] + 0.3 * row["cosine_distance"], rel=1e-4)
        assert 0 < row["sep"] <= math.log(2) and set(TERMS) <= row.keys()


def test_zero_weights_drop_their_passes(world, tmp_path):
    """What is not computed is logged as 0, and the loss is that of the task."""
    out = train(world, tmp_path / "o", plan_similarity_weight=0, random_contrast_weight=0, eval_ratio=0)
    assert all(column(out, name) == [0] * 4 for name in ("align", "kl", "cosine_distance", "sep"))
    assert column(out, "loss") == column(out, "task")


def test_infonce_columns(reference):
    for row in read_log(reference):
        assert bool(row["infonce"]) == bool(row["infonce_bound"]) == (int(row["step"]) % 2 == 0)
        if row["infonce"]:
            assert float(row["infonce"]) + float(row["infonce_bound"]) == pytest.approx(math.log(2), abs=1e-5)


# ---- the batches of a step

@pytest.fixture(scope="module")
def data(world):
    tokenizer = load_tokenizer(world["model_name_or_path"])
    add_markers(tokenizer)
    return Conversations(world["train_file"], tokenizer, open_shards(world["hidden_data"]))


def passes(data, drawn, curriculum, **settings):
    defaults = {"message": "latent", "with_plan": True, "with_other": True, "seed": 0, "device": "cpu"}
    return make_batches(data, drawn, range(len(data)), curriculum=curriculum, **defaults | settings)


@pytest.mark.parametrize("curriculum", [[0.0], [0.5], [0.0, 1.0], [r / 10 for r in range(11)]], ids=str)
def test_ratios_are_drawn_from_the_curriculum(data, curriculum):
    """The same one for the sample and its negative; all of them come, by the number of the draw alone."""
    expected = {ratio: (math.floor(ratio * 7 + 1e-9), data.message_lengths[4]) for ratio in curriculum}
    assert data.message_lengths[4] == 7
    seen = set()
    for draw in range(100):
        batch, plan_batch, other_batch = passes(data, [(draw, 4)], curriculum)
        skip = 7 - int(batch["keep_mask"].sum())
        ratios = [ratio for ratio in curriculum if expected[ratio][0] == skip]
        assert ratios and not plan_batch["message_mask"].any()
        L = int(other_batch["latents_mask"].sum())
        skips = [math.floor(ratio * L + 1e-9) for ratio in ratios]
        assert L - int(other_batch["keep_mask"].sum()) in skips
        seen.add(skip)
    assert seen == {skip for skip, _ in expected.values()}


def test_a_negative_is_the_same_in_any_batch(data):
    drawn = [(draw, draw % N) for draw in range(12)]
    together = passes(data, drawn, [0.0])[2]
    alone = [passes(data, [pair], [0.0])[2] for pair in drawn]
    for n, (_, sample) in enumerate(drawn):
        L = int(together["latents_mask"][n].sum())
        assert torch.equal(together["latents"][n, :L], alone[n]["latents"][0])
        source, = [m for m in range(N) if torch.equal(data.latents(m), alone[n]["latents"][0])]
        assert data.tasks[source] != data.tasks[sample]


def test_a_curriculum_of_zero_shows_no_word_of_the_plan(world, tmp_path):
    """Two training files that differ in their plans only: the same curve."""
    outs = []
    for plan in ("left", "right right"):
        records = [{**record, "plan": plan} for record in records_of(world)]
        flags = with_records(world, tmp_path / f"{plan}.json", records)
        outs.append(train(flags, tmp_path / plan, curriculum=[0], plan_similarity_weight=0))
    assert read_log(outs[0]) == read_log(outs[1])


# ---- learning

def test_learns_to_read_the_message(tmp_path, world):
    """The reply is written in the latents only: read, it is known; with no message it can only be guessed."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(4, 32, generator=generator)
    latents = {f"t{i}": kinds[i % 4] + 0.1 * torch.randn(3, 32, generator=generator) for i in range(48)}
    records = {task_id: {"task": task_id, "plan": "abcd"[i % 4] * 3, "plan_token_ids": []}
               for i, task_id in enumerate(latents)}
    write_shard(str(tmp_path / "m" / "latents-rank00000-00000.safetensors"), latents, records,
                {"model": "tiny", "hidden_size": 32})
    records = [{"id": task_id, "conversations": turns(("human", f"{i}?"), ("gpt", "abcd"[i % 4]))}
               for i, task_id in enumerate(latents)]
    world = with_records(world, tmp_path / "t.json", records) | {"hidden_data": tmp_path / "m"}
    losses = {}
    for message in ("latent", "none"):
        out = train(world, tmp_path / message, message=message, max_steps=60, eval_steps=10,
                    learning_rate=5e-3, global_batch_size=8, per_device_train_batch_size=8,
                    infonce_probe_interval=60, random_contrast_weight=0.3)
        losses[message] = column(out, "eval_loss")
    # two supervised tokens: the letter (ln 4 nats if guessed) and the end of turn
    assert losses["latent"][-1] < 0.5 * losses["latent"][0] and losses["latent"][-1] < 0.2
    assert min(losses["none"]) > 0.9 * math.log(4) / 2
    assert column(tmp_path / "latent", "infonce_bound")[-1] > 0.3  # in nats, of at most log 8


# ---- bad input

def first(**fields):
    """Change the fields of the first record; None removes one."""
    def change(records):
        changed = {name: value for name, value in {**records[0], **fields}.items() if value is not None}
        return [changed, *records[1:]]
    return change


def turns(*pairs):
    return [{"from": role, "value": text} for role, text in pairs]


@pytest.mark.parametrize("change, words", [
    (first(id="stranger"), ["id stranger", "no message", "collect.py"]), (first(id="t1"), ["t1", "twice"]),
    (first(id=None), ["record 0", "'id'"]), (first(conversations=None), ["id t0", "'conversations'"]),
    (first(conversations=turns(("gpt", "x"))), ["id t0", "human turn"]),
    (first(conversations=turns(("human", "x"))), ["id t0", "no assistant turn"]),
    (first(conversations=[{"from": "human", "text": "x"}]), ["id t0", "'value'"]),
    (first(hidden_state=[[1.0, 2.0], [3.0]], plan="x"), ["id t0", "hidden_state"]),
    (first(hidden_state=[[1.0, math.nan] * 16], plan="x"), ["id t0", "finite"]),
    (first(hidden_state=[], plan="x"), ["id t0", "hidden_state"]),
    (first(hidden_state_path="/nowhere.npy", plan="x"), ["id t0", "/nowhere.npy"]),
    (first(plan=["a"]), ["id t0", "plan is not a text"]), (first(system=5), ["id t0", "system"]),
    (lambda records: records[1:] + [first(hidden_state=[[1.0] * 31] * 2, plan="x")(records)[0]],
     ["id t0", "31", "32"]),
    (first(hidden_state=[[1.0] * 32] * 50, plan="x"), ["id t0", "50 states", "--prepended_length 20"]),
    (first(conversations=turns(("human", "x" * 5000), ("gpt", "x"))), ["id t0", "context of 4096"]),
    (lambda records: [first(id=name, hidden_state=[[1.0] * 32], plan="x")(records)[0] for name in "abcde"],
     ["tasks are the same", "L_sep"]),
    (lambda records: {}, ["list of records"]), (lambda records: ["x"], ["record 0", "'id'"]),
    (lambda records: [], ["list of records"])])
def test_bad_records(world, tmp_path, refuses, change, words):
    bad = with_records(world, tmp_path / "t.json", change(records_of(world)))
    refuses(main, argv(bad, tmp_path / "o", eval_ratio=0, prepended_length=20), *words)


def test_widths_of_two_kinds_of_messages(world, tmp_path, refuses):
    records = first(hidden_state=[[1.0] * 31] * 2, plan="x")(records_of(world))
    write_json(str(tmp_path / "e.json"), records)
    flags = argv(world, tmp_path / "o", eval_file=tmp_path / "e.json", eval_ratio=0)
    refuses(main, flags, "id t0", "31", "32")


@pytest.mark.parametrize("name, value, words", [
    ("num_heads", 5, ["--num_heads 5", "32"]),
    ("prepended_length", 3, ["--prepended_length 3", "states", "id t"]),
    ("model_max_length", 50, ["context of 50", "id t"]),
    ("surprise", 1, ["--surprise"]), ("learning_rat", 1, ["--learning_rat"]),
    ("message", "smoke", ["--message"]), ("adaptive_weights", "maybe", ["--adaptive_weights"]),
    ("bf16", "yes", ["--bf16"]), ("chat_template_kwargs", "[1]", ["--chat_template_kwargs"]),
    ("curriculum", 1.5, ["--curriculum", "1.5"]), ("fsdp", "true", ["--fsdp", "torchrun"]),
    ("train_file", "/nowhere.json", ["no file /nowhere.json"]),
    ("eval_file", "/nowhere.json", ["no file /nowhere.json"]),
    ("hidden_data", "/nowhere", ["no directory /nowhere"]), ("model_name_or_path", "/nowhere", ["/nowhere"]),
    ("eval_ratio", 1, ["no training samples"]), ("task_turn", 4, ["--task_turn 4", "id t0"]),
    *((name, 0, ["--" + name]) for name in (
        "global_batch_size", "per_device_train_batch_size", "per_device_eval_batch_size", "eval_steps",
        "save_steps", "logging_steps", "num_heads", "save_total_limit", "max_steps", "infonce_probe_size"))])
def test_bad_flags(world, tmp_path, refuses, name, value, words):
    refuses(main, argv(world, tmp_path / "o", **{name: value}), *words)
    assert not os.path.exists(tmp_path / "o" / "loss_log.csv")


def test_the_global_batch_must_divide_over_ranks(world, tmp_path, refuses, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refuses(main, argv(world, tmp_path / "o"), "--global_batch_size 4", "3 ranks")


@pytest.mark.parametrize("how, words", [
    ("nan", ["id t2", "NaN"]), ("truncated", ["truncated"]), ("plan", ["id t2", "empty plan"]),
    ("empty", ["holds no latent shards"])])
def test_bad_shards(world, tmp_path, refuses, how, words):
    shards, path = LatentShards(world["hidden_data"]), tmp_path / "m" / "latents-rank00000-00000.safetensors"
    latents = {task_id: shards[task_id].clone() for task_id in shards.records}
    os.makedirs(tmp_path / "m")
    if how == "nan":
        latents["t2"][1, 3] = math.nan
    if how == "plan":
        shards.records["t2"]["plan"] = ""
    if how != "empty":
        write_shard(str(path), latents, shards.records, shards.sender)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    refuses(main, argv(world | {"hidden_data": tmp_path / "m"}, tmp_path / "o", max_steps=8), *words)


def test_a_loss_that_is_not_finite_stops_and_keeps_what_is_there(world, tmp_path, refuses):
    out = tmp_path / "o"
    flags = {"learning_rate": 1e30, "save_steps": 1, "eval_steps": 9, "max_grad_norm": 1e9}
    line = refuses(main, argv(world, out, **flags), "step 2", "loss is", "--learning_rate")
    assert sum(f"t{i}" in line for i in range(N)) >= 3  # the batch's ids
    assert column(out, "step") == [1] and checkpoints(out) == ["checkpoint-1"]
