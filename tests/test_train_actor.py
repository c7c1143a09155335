"""Stage 2: loss terms, batches, what is kept, and it learns. What compress.py does alike: test_survival.py."""
import math
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

import model
import train_actor
from common import read_json, write_json
from data import Conversations
from hf import load_tokenizer
from model import ADAPTER_FORMAT, LatentActor, LatentShards, add_markers, open_shards
from tiny import (argv_of, column, loss_by_hand, make_data, message_of, read_log, same_tensors, save_model,
                  write_messages)
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


@pytest.mark.long  # test_method.py and test_survival.py start the ranks themselves
def test_torchrun(world, tmp_path):
    """Two ranks as one starts them; that they follow one rank's curve, test_survival.py says."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
               "--master_port", str(port), os.path.abspath(train_actor.__file__)]
    done = subprocess.run([*command, *argv(world, tmp_path / "o")],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1  # one rank talks


# ---- what is kept
@pytest.mark.parametrize("kind", ["latent", "text", "none"])
def test_the_kept_model_has_the_logged_loss_on_whole_messages(world, tmp_path, kind):
    """The output directory reproduces the lowest eval_loss, by plain Hugging Face on inputs made by hand.
    A baseline needs no messages: its plans may stand in the training file."""
    records = read_json(world["train_file"])
    if kind == "text":
        records = [{**record, "plan": f"look {record['id']}"} for record in records]
    flags, held_out = with_records(world, tmp_path / "t.json", records), records[4:]
    flags["hidden_data"] = world["hidden_data"] if kind == "latent" else None
    write_json(str(tmp_path / "eval.json"), held_out)
    out = train(flags, tmp_path / "o", eval_file=tmp_path / "eval.json", eval_ratio=0, message=kind,
                learning_rate=0.01, eval_steps=1, save_steps=1)
    losses = column(out, "eval_loss")
    assert read_json(str(out / "trainer_state.json"))["best_step"] == 1 + np.argmin(losses) and len(losses) == 4
    actor, shards = LatentActor.load(str(out)), LatentShards(world["hidden_data"])
    assert os.path.exists(out / "latent_adapter.safetensors") == (kind == "latent")
    assert actor.info["kind"] == kind
    if kind != "latent":
        assert not {"sep", "align", "w_sep"} & read_log(out)[0].keys()
        assert column(out, "loss") == column(out, "task")
        assert actor.info["sender"] is None and "adapter" not in actor.info

    def message(record):
        if kind == "latent":
            return message_of(actor, shards[record["id"]])
        plan = actor.tokenizer(record["plan"]).input_ids if kind == "text" else []
        return actor.lm.get_input_embeddings()(torch.tensor(plan, dtype=torch.long))

    assert loss_by_hand(actor, held_out, message) == pytest.approx(min(losses), abs=1e-4)


def test_what_an_evaluation_needs_is_kept_with_the_actor(world, tmp_path, capsys):
    """latent_adapter.json: the announcement, the instruction, the template's and the adapter's arguments.
    The first sample is shown: supervised tokens between » and «, latents in their place."""
    eto = turns(("human", "instruction"), ("gpt", "OK"), ("human", "the task"), ("gpt", "go"))
    records = [{**record, "conversations": eto} for record in read_json(world["train_file"])]
    out = train(with_records(world, tmp_path / "t.json", records), tmp_path / "o", task_turn=2, max_steps=1,
                plan_announcement="Listen:", adapter_scale=0.5, adapter_dropout=0,
                chat_template_kwargs='{"enable_thinking": true}')
    printed = capsys.readouterr().out
    assert "first sample: <|im_start|>system\nYou are helpful.<|im_end|>\n" in printed
    assert "<|im_start|>user\ninstruction\n\nthe task\nListen:<bop>[" in printed
    assert " latents]<eop><|im_end|>\n<|im_start|>assistant\n»go<|im_end|>«\n" in printed
    info = read_json(str(out / "latent_adapter.json"))
    output_scale = info["adapter"]["arguments"].pop("output_scale")
    arguments = {"sender_dim": 32, "dim": 32, "num_heads": 4, "dropout": 0, "scale": 0.5}
    assert info == {"kind": "latent", "plan_announcement": "Listen:", "instruction": "instruction",
                    "chat_template_kwargs": {"enable_thinking": True}, "sender": {"model": "tiny", "hidden_size": 32},
                    "adapter": {"class": "model:HiddenStateProcessor", "arguments": arguments},
                    "format_version": ADAPTER_FORMAT}
    assert 0 < output_scale < 10 and LatentActor.load(str(out)).adapter.attention.num_heads == 4


# ---- the loss terms
def test_a_weight_moves_with_its_term():
    """Between a tenth of its ceiling and the ceiling, where the term starts: 1 for align, ln 2 for sep."""
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
    """One line where it is computed and one where it is weighed; what is not computed is not logged."""
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


# ---- the batches of a step
@pytest.mark.parametrize("curriculum", [[0.0], [0.5], [0.0, 1.0], [r / 10 for r in range(11)]], ids=str)
def test_ratios_are_drawn_from_the_curriculum(world, curriculum):
    """The same one for the sample and its negative; all of them come, by the number of the draw alone."""
    tokenizer = load_tokenizer(world["model_name_or_path"])
    add_markers(tokenizer)
    data = Conversations(world["train_file"], tokenizer, open_shards(world["hidden_data"]))
    expected = {ratio: math.floor(ratio * 7 + 1e-9) for ratio in curriculum}
    assert data.shards.lengths[data.ids[4]] == 7
    seen = set()
    for draw in range(100):
        batch, plan_batch, other_batch = make_batches(
            data, [(draw, 4)], range(N), kind="latent", curriculum=curriculum, with_plan=True,
            with_other=True, seed=0, device="cpu")
        words = 7 - int(batch["keep_mask"].sum())
        ratios = [ratio for ratio in curriculum if expected[ratio] == words]
        assert ratios and not plan_batch["message_mask"].any()
        L = int(other_batch["latents_mask"].sum())
        assert L - int(other_batch["keep_mask"].sum()) in [math.floor(ratio * L + 1e-9) for ratio in ratios]
        seen.add(words)
    assert seen == set(expected.values())


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
    write_messages(tmp_path / "m", latents, records)
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


def test_zero_is_a_rate_and_a_scale(world, tmp_path):
    """An adapter at rate 0 stays as it was, here silent; the best model may be that of step 0."""
    flags = {"adapter_output_scale": 0, "adapter_learning_rate": 0, "plan_similarity_weight": 0,
             "random_contrast_weight": 0}
    first = LatentActor.load(train(world, str(tmp_path / "o"), max_steps=0, **flags))
    assert not message_of(first, torch.randn(3, 32)).any()
    second = LatentActor.load(train(world, str(tmp_path / "o"), max_steps=1, **flags))
    assert read_json(f"{tmp_path}/o/trainer_state.json")["step"] == 1
    for a, b in zip(first.adapter.parameters(), second.adapter.parameters()):
        assert torch.equal(a, b)
    train(world, str(tmp_path / "best"), max_steps=0, learning_rate=1e3)
    worse = train(world, str(tmp_path / "best"), max_steps=1, learning_rate=1e3)
    assert read_json(f"{worse}/trainer_state.json")["best_step"] == 0 and same_tensors(worse, f"{worse}/checkpoint-0")


# ---- bad input
@pytest.mark.parametrize("change, words", [
    (lambda records, sent: records[0].pop("id"), ["record 0", "'id'"]),
    (lambda records, sent: records[0].update(conversations=turns(("human", "x" * 5000), ("gpt", "x"))),
     ["id t0", "context of 4096"]),
    (lambda records, sent: (sent["t0"].update(plan=""), records[0].update(plan=[0])), ["id t0", "plan is not a text"]),
    (lambda records, sent: sent["t2"].update(plan=""), ["id t2", "empty plan"]),
    (lambda records, sent: sent["t2"].update(plan="", plan_token_ids=[1]), ["id t2", "empty plan"]),
    (lambda records, sent: [record.update(task="x") for record in sent.values()],
     ["tasks are the same", "--random_contrast_weight 0"])])
def test_bad_records_and_messages(world, tmp_path, refuses, change, words):
    records = read_json(world["train_file"])
    shards = LatentShards(world["hidden_data"])
    latents = {task_id: shards[task_id] for task_id in shards.records}
    change(records, shards.records)
    flags = with_records(world, tmp_path / "t.json", records)
    flags["hidden_data"] = write_messages(tmp_path / "m", latents, shards.records)
    refuses(main, argv(flags, tmp_path / "o", eval_ratio=0), *words)
