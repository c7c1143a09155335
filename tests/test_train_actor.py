"""Stage 2: the same curve for any split of the work and after a kill; the best model is kept; it learns."""
import math
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import model
import train_actor
from common import read_json, write_json
from data import Conversations, encode_conversation, to_turns
from hf import load_tokenizer
from model import ADAPTER_FORMAT, LatentActor, LatentShards, add_markers, open_shards, write_shard
from tiny import (argv_of, assert_same_curve, checkpoints, column, make_data, read_log, same_run, same_tensors,
                  save_model, snapshot, tensors)
from train_actor import loss_weights, main, make_batches

N = 7  # samples: no multiple of any batch size below


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


def with_records(world, path, records):
    """The same flags with another training file."""
    write_json(str(path), records)
    return {**world, "train_file": str(path)}


def turns(*pairs):
    return [{"from": role, "value": text} for role, text in pairs]


# ---- one result for any split of the work

SPLIT = {"adapter_dropout": 0, "infonce_probe_interval": 2, "infonce_probe_size": 2}


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    return train(world, str(tmp_path_factory.mktemp("reference") / "o"), **SPLIT)


@pytest.mark.parametrize("flags", [
    {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "logging_steps": 3},
    {"per_device_train_batch_size": 3, "gradient_checkpointing": "true", "self_check": "false"}], ids=str)
def test_memory_flags_change_no_result(world, reference, tmp_path, flags):
    assert_same_curve(train(world, tmp_path / "o", **SPLIT, **flags), reference)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_bf16_autocast_gives_nearly_the_same_curve(world, reference, tmp_path, checkpointing):
    """What CUDA does, on a CPU: bf16 products over fp32 parameters, in every pass."""
    out = train(world, tmp_path / "o", **SPLIT, bf16="true", gradient_checkpointing=checkpointing)
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
    out = train(world, tmp_path / "o", **SPLIT, compile="true", max_steps=1)
    for name in ("loss", "align", "sep", "grad_norm"):
        assert column(out, name) == pytest.approx(column(reference, name)[:1], rel=1e-4), name
    assert compiled == ["Qwen2DecoderLayer"] * 2


@pytest.mark.long  # test_method.py and test_survival.py start the ranks themselves
def test_torchrun(world, reference, tmp_path):
    """Two ranks as one starts them follow one rank's curve."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
               "--master_port", str(port), os.path.abspath(train_actor.__file__)]
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
                eval_ratio=0, save_steps=2, save_total_limit=1, weight_decay=0.1, adapter_learning_rate=0.1,
                adapter_scale=3, adapter_output_scale=5)
    steps = math.ceil(4.5 * N / 4)
    assert column(out, "step") == list(range(1, steps + 1))
    warmup, rates = round(steps / 2), column(out, "lr")
    assert rates[:warmup] == pytest.approx([1e-3 * (k + 1) / warmup for k in range(warmup)], rel=1e-4)
    assert rates[warmup - 1] == max(rates) and 0 < rates[-1] < rates[-2]  # then a cosine down
    # nothing is held out: the last model is kept
    assert checkpoints(out) == [f"checkpoint-{steps}"] and same_tensors(out, out / f"checkpoint-{steps}")
    assert not column(out, "eval_loss")
    groups = torch.load(out / f"checkpoint-{steps}" / "optimizer.pt", weights_only=True)["param_groups"]
    assert all(group["betas"][1] == 0.9 for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0, 0]  # matrices, vectors, the adapter
    assert groups[2]["lr"] == pytest.approx(100 * groups[0]["lr"])  # the adapter's own
    adapter = load_file(out / "latent_adapter.safetensors")
    for name, start in (("projection.scale", 3), ("projection.output_scale", 5)):
        assert 0 < abs(adapter[name].item() - start) < 1  # it starts there, and is learned


# ---- kills and restarts; test_common.py has the files, test_survival.py random kills and other ranks

LONG = {"max_steps": 6, "save_steps": 2, "infonce_probe_interval": 3, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    return train(world, str(tmp_path_factory.mktemp("uninterrupted") / "o"), **LONG)


@pytest.mark.parametrize("event", [20, 50])
def test_resumed_is_uninterrupted_bit_for_bit(world, uninterrupted, forked, tmp_path, event):
    """Killed at the n-th touch of a file of its output, with dropout: all is as without."""
    out = tmp_path / "o"
    killed, = forked("train_actor", argv(world, out, **LONG), event=event)["codes"]
    assert killed == -9 and checkpoints(out)
    assert forked("train_actor", argv(world, out, **LONG))["codes"] == [0]
    assert same_run(out, uninterrupted)


def test_a_finished_run_does_nothing_and_takes_no_other_flags(world, uninterrupted, refuses, capsys):
    names = set(os.listdir(os.path.join(uninterrupted, "checkpoint-6")))
    assert names >= {"optimizer.pt", "trainer_state.json", "model.safetensors", "latent_adapter.safetensors",
                     "latent_adapter.json", "config.json", "tokenizer.json"}
    assert names - {"optimizer.pt"} < set(os.listdir(uninterrupted))
    before = snapshot(uninterrupted)
    train(world, uninterrupted, **LONG | {"save_steps": 3, "per_device_train_batch_size": 1})  # not of the result
    assert "is finished (6 steps)" in capsys.readouterr().out
    changed = argv(world, uninterrupted, **LONG | {"learning_rate": 1e-4, "seed": 3, "curriculum": 0})
    refuses(main, changed, "--learning_rate", "--seed", "--curriculum", "--resume never")
    assert snapshot(uninterrupted) == before


def test_early_stopping_and_the_best_model(world, tmp_path, monkeypatch, capsys):
    """Two evaluations without a new best end the run; the best is saved whatever --save_steps says."""
    losses = iter([3.0, 2.0, 2.5, 2.1, 1.0])
    monkeypatch.setattr(train_actor, "evaluate", lambda *args: next(losses))
    flags = {"max_steps": 9, "eval_steps": 1, "save_steps": 100, "early_stopping_patience": 2, "save_total_limit": 1}
    out = train(world, tmp_path / "o", **flags)
    assert column(out, "eval_loss") == [3.0, 2.0, 2.5, 2.1]
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4"]
    assert same_tensors(out, out / "checkpoint-2") and not same_tensors(out, out / "checkpoint-4")
    state = read_json(str(out / "trainer_state.json"))
    assert state["best_step"] == 2 and state["best_eval_loss"] == 2.0
    os.remove(out / "trainer_state.json")  # killed in the files of the end
    train(world, out, **flags)
    assert read_json(str(out / "trainer_state.json")) == state and len(column(out, "step")) == 4


# ---- what is kept

@pytest.mark.parametrize("kind", ["latent", "text", "none"])
def test_the_kept_model_has_the_logged_loss_on_whole_messages(world, tmp_path, kind):
    """The output directory reproduces the lowest eval_loss, by plain Hugging Face on inputs made by hand."""
    held_out = read_json(world["train_file"])[4:]
    write_json(str(tmp_path / "eval.json"), held_out)
    out = train(world, tmp_path / "o", eval_file=tmp_path / "eval.json", eval_ratio=0, message=kind,
                learning_rate=0.01, eval_steps=1, save_steps=1)
    losses = column(out, "eval_loss")
    assert read_json(str(out / "trainer_state.json"))["best_step"] == 1 + np.argmin(losses) and len(losses) == 4
    actor, shards = LatentActor.load(str(out)), LatentShards(world["hidden_data"])
    assert os.path.exists(out / "latent_adapter.safetensors") == (kind == "latent")
    assert actor.info["kind"] == kind
    words, total, tokens = actor.lm.get_input_embeddings(), 0, 0
    for record in held_out:
        announcement = actor.info["plan_announcement"] if kind != "none" else None
        before, after, labels = encode_conversation(actor.tokenizer, to_turns(record), announcement)
        with torch.no_grad():
            parts = [words(torch.tensor(before)), words(torch.tensor(after))]
            if kind == "latent":
                H = shards[record["id"]]
                parts.insert(1, actor.adapter(H[None], torch.ones(1, len(H), dtype=torch.bool))[0])
            if kind == "text":
                plan = actor.tokenizer(shards.records[record["id"]]["plan"]).input_ids
                parts.insert(1, words(torch.tensor(plan)))
            logits = actor.lm(inputs_embeds=torch.cat(parts)[None]).logits[0, -len(after) - 1:-1]
        total += F.cross_entropy(logits, torch.tensor(labels), reduction="sum", ignore_index=-100).item()
        tokens += sum(label != -100 for label in labels)
    assert total / tokens == pytest.approx(min(losses), abs=1e-4)


def test_what_an_evaluation_needs_is_kept_with_the_actor(world, tmp_path):
    """latent_adapter.json: the announcement, the instruction, the template's and the adapter's arguments."""
    eto = turns(("human", "instruction"), ("gpt", "OK"), ("human", "the task"), ("gpt", "go"))
    records = [{**record, "conversations": eto} for record in read_json(world["train_file"])]
    out = train(with_records(world, tmp_path / "t.json", records), tmp_path / "o", task_turn=2, max_steps=1,
                plan_announcement="Listen:", adapter_scale=0.5, adapter_dropout=0,
                chat_template_kwargs='{"enable_thinking": true}')
    info = read_json(str(out / "latent_adapter.json"))
    output_scale = info["adapter"]["arguments"].pop("output_scale")
    arguments = {"sender_dim": 32, "dim": 32, "num_heads": 4, "dropout": 0, "scale": 0.5}
    assert info == {"kind": "latent", "plan_announcement": "Listen:", "instruction": "instruction",
                    "chat_template_kwargs": {"enable_thinking": True}, "sender": {"model": "tiny", "hidden_size": 32},
                    "adapter": {"class": "model:HiddenStateProcessor", "arguments": arguments},
                    "format_version": ADAPTER_FORMAT}
    assert 0 < output_scale < 10 and LatentActor.load(str(out)).adapter.attention.num_heads == 4


def test_baselines_need_no_messages(world, tmp_path):
    records = [{**record, "plan": "look around"} for record in read_json(world["train_file"])]
    for kind, flags in (("text", with_records(world, tmp_path / "plans.json", records)), ("none", world)):
        out = train(flags | {"hidden_data": None}, tmp_path / kind, message=kind)
        assert not {"sep", "align", "w_sep"} & read_log(out)[0].keys() and column(out, "loss") == column(out, "task")
        assert not os.path.exists(out / "latent_adapter.safetensors")
        info = read_json(str(out / "latent_adapter.json"))
        assert info["kind"] == kind and info["sender"] is None and "adapter" not in info


def test_the_first_sample_is_shown(world, tmp_path, capsys):
    """Supervised tokens between » and «, latents in their place."""
    train(world, tmp_path / "o", max_steps=1, eval_ratio=0)
    printed = capsys.readouterr().out
    assert "first sample: <|im_start|>system\nYou are helpful." in printed
    assert "Its plan:<bop>[3 latents]<eop><|im_end|>\n<|im_start|>assistant\n»go<|im_end|>«\n" in printed


# ---- the loss terms

def test_a_weight_moves_with_its_term():
    """Between a tenth of its ceiling and the ceiling, which is where the term starts: 1 for align, ln 2 for sep."""
    assert loss_weights(0.4, 2.0, False, {"align": 0.0, "sep": 0.0}) == {"task": 1.0, "align": 0.4, "sep": 2.0}
    assert loss_weights(0.4, 2.0, True, None) == {"task": 1.0, "align": 0.4, "sep": 2.0}
    for part, share in ((0, 0.1), (0.05, 0.1), (0.5, 0.5), (1, 1), (7, 1)):
        weights = loss_weights(0.4, 2.0, True, {"task": 9.0, "align": part, "sep": part * math.log(2)})
        assert weights == pytest.approx({"task": 1.0, "align": 0.4 * share, "sep": 2 * share})


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_log_has_every_term_and_its_weight(world, tmp_path, adaptive):
    out = train(world, tmp_path / "o", adaptive_weights=adaptive, plan_similarity_weight=0.4, random_contrast_weight=2)
    last = None
    for row in read_log(out):
        row = {name: float(value) for name, value in row.items() if value}
        weights = loss_weights(0.4, 2, adaptive, last)
        assert row["w_align"] == pytest.approx(weights["align"]) and row["w_sep"] == pytest.approx(weights["sep"])
        loss = row["task"] + row["w_align"] * row["align"] + row["w_sep"] * row["sep"]
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert row["align"] == pytest.approx(0.7 * row["kl"] + 0.3 * row["cosine_distance"], rel=1e-4)
        assert 0 < row["sep"] <= math.log(2)
        last = row


def test_a_term_of_ones_own_has_its_column_and_zero_weights_drop_their_passes(world, tmp_path, monkeypatch):
    """A term is one line where it is computed and one where it is weighed; what is not computed is not logged."""
    terms_of, weights_of, norms = model.actor_loss, train_actor.loss_weights, []
    monkeypatch.setattr(model, "actor_loss", lambda logits, targets: terms_of(logits, targets) | {
        "size": logits["sample"].square().mean(-1)})
    for w in (0, 0.5):
        monkeypatch.setattr(train_actor, "loss_weights", lambda *args: weights_of(*args) | {"size": w})
        out = train(world, tmp_path / str(w), plan_similarity_weight=0, random_contrast_weight=0, max_steps=2)
        assert not {"align", "kl", "cosine_distance", "sep"} & read_log(out)[0].keys()
        for task, size, weight, loss in zip(*(column(out, name) for name in ("task", "size", "w_size", "loss"))):
            assert size > 0 and weight == w and loss == pytest.approx(task + w * size)
        norms.append(column(out, "grad_norm")[0])
    assert norms[0] != pytest.approx(norms[1])  # it is learned, too


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


def passes(data, drawn, curriculum):
    return make_batches(data, drawn, range(len(data)), kind="latent", curriculum=curriculum, with_plan=True,
                        with_other=True, seed=0, device="cpu")


@pytest.mark.parametrize("curriculum", [[0.0], [0.5], [0.0, 1.0], [r / 10 for r in range(11)]], ids=str)
def test_ratios_are_drawn_from_the_curriculum(data, curriculum):
    """The same one for the sample and its negative; all of them come, by the number of the draw alone."""
    expected = {ratio: math.floor(ratio * 7 + 1e-9) for ratio in curriculum}
    assert data.message_lengths[4] == 7
    seen = set()
    for draw in range(100):
        batch, plan_batch, other_batch = passes(data, [(draw, 4)], curriculum)
        words = 7 - int(batch["keep_mask"].sum())
        ratios = [ratio for ratio in curriculum if expected[ratio] == words]
        assert ratios and not plan_batch["message_mask"].any()
        L = int(other_batch["latents_mask"].sum())
        assert L - int(other_batch["keep_mask"].sum()) in [math.floor(ratio * L + 1e-9) for ratio in ratios]
        seen.add(words)
    assert seen == set(expected.values())


def test_a_negative_is_the_same_in_any_batch(data):
    drawn = [(draw, draw % N) for draw in range(12)]
    together = passes(data, drawn, [0.0])[2]
    alone = [passes(data, [pair], [0.0])[2] for pair in drawn]
    for b, (_, n) in enumerate(drawn):
        L = int(together["latents_mask"][b].sum())
        assert torch.equal(together["latents"][b, :L], alone[b]["latents"][0])
        source, = [m for m in range(N) if torch.equal(data.latents(m), alone[b]["latents"][0])]
        assert data.tasks[source] != data.tasks[n]


def test_a_curriculum_of_zero_shows_no_word_of_the_plan(world, tmp_path):
    """Two training files that differ in their plans only: the same curve."""
    outs = []
    for plan in ("left", "right right"):
        records = [{**record, "plan": plan} for record in read_json(world["train_file"])]
        flags = with_records(world, tmp_path / f"{plan}.json", records)
        outs.append(train(flags, tmp_path / plan, curriculum=[0], plan_similarity_weight=0))
    assert read_log(outs[0]) == read_log(outs[1])


# ---- learning

@pytest.mark.long
def test_learns_to_read_the_message(tmp_path, world):
    """The reply is written in the latents only: read, it is known; with no message it can only be guessed."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randn(4, 32, generator=generator)
    latents = {f"t{i}": letters[i % 4] + 0.1 * torch.randn(3, 32, generator=generator) for i in range(48)}
    records = {task_id: {"task": task_id, "plan": "abcd"[i % 4] * 3, "plan_token_ids": []}
               for i, task_id in enumerate(latents)}
    write_shard(str(tmp_path / "m" / "latents-rank00000-00000.safetensors"), latents, records,
                {"model": "tiny", "hidden_size": 32})
    records = [{"id": task_id, "conversations": turns(("human", f"{i}?"), ("gpt", "abcd"[i % 4]))}
               for i, task_id in enumerate(latents)]
    world = with_records(world, tmp_path / "t.json", records) | {"hidden_data": tmp_path / "m"}
    losses = {}
    for kind in ("latent", "none"):
        out = train(world, tmp_path / kind, message=kind, max_steps=60, eval_steps=10, learning_rate=5e-3,
                    global_batch_size=8, per_device_train_batch_size=8, infonce_probe_interval=60,
                    random_contrast_weight=0.3)
        losses[kind] = column(out, "eval_loss")
    # two supervised tokens: the letter (ln 4 nats if guessed) and the end of turn
    assert losses["latent"][-1] < 0.5 * losses["latent"][0] and losses["latent"][-1] < 0.2
    assert min(losses["none"]) > 0.9 * math.log(4) / 2
    assert column(tmp_path / "latent", "infonce_bound")[-1] > 0.3  # in nats, of at most log 8


# ---- bad input

@pytest.mark.parametrize("fields, words", [
    ({"id": "stranger"}, ["id stranger", "no message", "collect.py"]), ({"id": "t1"}, ["t1", "twice"]),
    ({"id": None}, ["record 0", "'id'"]), ({"conversations": None}, ["record 0", "'conversations'"]),
    ({"conversations": turns(("human", "x" * 5000), ("gpt", "x"))}, ["id t0", "context of 4096"]),
    ({"plan": ["a"]}, ["id t0", "plan is not a text"])])
def test_bad_records(world, tmp_path, refuses, fields, words):
    first, *others = read_json(world["train_file"])
    first = {name: value for name, value in (first | fields).items() if value is not None}
    refuses(main, argv(with_records(world, tmp_path / "t.json", [first, *others]), tmp_path / "o"), *words)


@pytest.mark.parametrize("name, value, words", [
    ("num_heads", 5, ["--num_heads 5", "32"]), ("adapter", "model:Nothing", ["--adapter model:Nothing"]),
    ("prepended_length", 3, ["--prepended_length 3", "states", "id t"]),
    ("model_max_length", 50, ["context of 50", "id t"]),
    ("surprise", 1, ["--surprise"]), ("learning_rat", 1, ["--learning_rat"]), ("message", "smoke", ["--message"]),
    ("adaptive_weights", "maybe", ["--adaptive_weights"]), ("bf16", "yes", ["--bf16"]),
    ("resume", "somewhere", ["--resume"]), ("chat_template_kwargs", "[1]", ["--chat_template_kwargs"]),
    ("curriculum", 1.5, ["--curriculum", "1.5"]), ("fsdp", "true", ["--fsdp", "torchrun"]),
    *((name, "/nowhere", ["/nowhere"]) for name in ("train_file", "eval_file", "hidden_data", "model_name_or_path")),
    ("global_batch_size", 4, ["--global_batch_size 4", "3", "ranks"]),
    ("eval_ratio", 1, ["no training samples"]), ("task_turn", 4, ["no turn 4", "--task_turn"]),
    *((name, 0, ["--" + name]) for name in (
        "global_batch_size", "per_device_train_batch_size", "per_device_eval_batch_size", "eval_steps", "save_steps",
        "logging_steps", "num_heads", "save_total_limit", "max_steps", "infonce_probe_size"))])
def test_bad_flags(world, tmp_path, refuses, monkeypatch, name, value, words):
    if "ranks" in words:
        monkeypatch.setenv("WORLD_SIZE", "3")
    refuses(main, argv(world, tmp_path / "o", **{name: value}), *words)
    assert not os.path.exists(tmp_path / "o" / "loss_log.csv")


@pytest.mark.parametrize("change, words", [
    (lambda latents, records: latents["t2"][1].fill_(math.nan), ["id t2", "NaN"]),
    (lambda latents, records: records["t2"].update(plan=""), ["id t2", "empty plan"]),
    (lambda latents, records: [record.update(task="x") for record in records.values()],
     ["tasks are the same", "L_sep"])])
def test_bad_messages(world, tmp_path, refuses, change, words):
    shards, path = LatentShards(world["hidden_data"]), tmp_path / "m" / "latents-rank00000-00000.safetensors"
    latents = {task_id: shards[task_id].clone() for task_id in shards.records}
    change(latents, shards.records)
    write_shard(str(path), latents, shards.records, shards.sender)
    refuses(main, argv(world | {"hidden_data": path.parent}, tmp_path / "o", eval_ratio=0), *words)


def test_a_loss_that_is_not_finite_stops_and_keeps_what_is_there(world, tmp_path, refuses):
    out = tmp_path / "o"
    flags = {"learning_rate": 1e30, "save_steps": 1, "eval_steps": 9, "max_grad_norm": 1e9}
    line = refuses(main, argv(world, out, **flags), "step 2", "loss is", "--learning_rate")
    assert sum(f"t{i}" in line for i in range(N)) >= 3  # the batch's ids
    assert column(out, "step") == [1] and checkpoints(out) == ["checkpoint-1"]
