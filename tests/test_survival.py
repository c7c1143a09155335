"""What a run loses when it is killed, preempted, out of disk, on other ranks or in other batches: nothing. And the
flags that mean the same to both trainers."""
import json
import math
import os
import random
import shutil
import signal
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
import test_families
import train_actor
from common import read_json, write_json
from forked import Forked
from model import LatentShards
from tiny import (argv_of, assert_same_training, checkpoints, column, make_actor, make_data, read_log, same_run,
                  same_tensors, save_model, snapshot, tensors, without_timing, write_messages, write_tasks)

SCRIPTS = ["collect", "train_actor", "compress"]
TRAINERS = {"train_actor": train_actor, "compress": compress}
LONG = pytest.mark.long


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    d = tmp_path_factory.mktemp("world")
    train, messages = make_data(d / "data", n=7)
    records = read_json(train)
    records[3]["conversations"].append({"from": "gpt", "value": "look " * 60})  # label counts differ wildly
    write_json(train, records)
    make_actor().save(str(d / "actor"))
    write_tasks(d / "tasks.json", 400)
    return {"model": save_model(d / "model"), "tied": save_model(d / "tied", tied=True), "train": train,
            "messages": messages, "actor": str(d / "actor"), "tasks": str(d / "tasks.json")}


def command(world, script, out, steps=8, model="model", **flags):
    """The arguments of a small run of a stage; flags override."""
    training = {"train_file": world["train"], "hidden_data": world["messages"], "max_steps": steps,
                "global_batch_size": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
                "eval_ratio": 0.3, "eval_steps": 3, "save_steps": 2}
    given = {
        "collect": {"model_name_or_path": world[model], "dataset_path": world["tasks"], "torch_dtype": "fp32",
                    "max_new_tokens": 8, "do_sample": "true", "batch_size": 1, "shard_size_mb": 1e-6,
                    "max_samples": steps},
        "train_actor": training | {"model_name_or_path": world[model], "num_heads": 4, "adapter_dropout": 0,
                                   "infonce_probe_interval": 3, "infonce_probe_size": 2},
        "compress": training | {"teacher_model_name_or_path": world["actor"], "K": 3,
                                "student_model_name_or_path": world[model]}}
    preset = ["custom"] if script == "collect" else []
    return [*preset, *argv_of(given[script] | flags), "--output_dir", str(out)]


def assert_same(script, out, reference):
    """Two runs' results are bit for bit the same; nothing half-written is left."""
    assert not [name for _, dirs, files in os.walk(out) for name in dirs + files if ".tmp" in name]
    if script != "collect":
        assert same_run(out, reference)
        return
    a, b = LatentShards(str(out)), LatentShards(str(reference))  # an id that is there twice is refused here
    assert a.records.keys() == b.records.keys() and len(a)
    for task_id in b.records:
        assert torch.equal(a[task_id], b[task_id])
        assert without_timing(a.records[task_id]) == without_timing(b.records[task_id])


def assert_usable(script, out):
    """After a kill: whatever has its final name is whole."""
    if script == "collect":
        shards = LatentShards(str(out))
        assert all(len(shards[task_id]) == shards.lengths[task_id] for task_id in shards.records)
        return
    for name in checkpoints(out):
        if ".tmp" not in name:
            assert tensors(os.path.join(out, name)) and torch.load(os.path.join(out, name, "optimizer.pt"))


# ---- kills
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_again_and_again(world, forked, tmp_path, request, script):
    kills = request.config.getoption("--kills")
    flags = {"adapter_dropout": 0.1, "weight_decay": 0.1} if script == "train_actor" else {}
    steps = min(400, 12 + 12 * kills) if script == "collect" else 4 + 2 * kills
    out, reference, rng, killed = tmp_path / "o", tmp_path / "reference", random.Random(script), 0
    assert forked(script, command(world, script, reference, steps, **flags))["codes"] == [0]
    for attempt in range(6 * kills):
        # by turns at the n-th touch of a file, where half-written things would be, and at a random moment
        when = {"seconds": rng.uniform(0.01, 0.4 if script == "collect" else 0.8)}
        if attempt % 2 == 0:
            when = {"event": rng.randint(1, 30) if attempt else 5}  # the first is early enough on any machine
        code, = forked(script, command(world, script, out, steps, **flags), **when)["codes"]
        killed += code == -signal.SIGKILL
        assert code in (-signal.SIGKILL, 0)
        assert_usable(script, out) if os.path.isdir(out) else None
        if killed == kills:
            break
        if code == 0:  # it was faster than the kill: all is there, and there is something to kill again
            assert_same(script, out, reference)
            shutil.rmtree(out)
    print(f"{script}: killed {killed} times")
    assert killed
    assert forked(script, command(world, script, out, steps, **flags))["codes"] == [0]
    assert_same(script, out, reference)


@pytest.mark.parametrize("script, number", [(script, signal.SIGTERM) for script in SCRIPTS] +
                         [("train_actor", signal.SIGINT)])
def test_preempted(world, forked, tmp_path, script, number):
    """SIGTERM and Ctrl-C: a code that says so, and not one step or message is done twice."""
    flags = {"save_steps": 100, "eval_steps": 1} if script != "collect" else {}
    done = forked(script, command(world, script, tmp_path / "o", **flags), event=9, signal=number)
    assert done["codes"] == [143], done
    assert "stopped: " in done["out"][0] + done["err"][0] and "Traceback" not in done["err"][0]
    step = len(LatentShards(str(tmp_path / "o")) if script == "collect" else read_log(tmp_path / "o"))
    assert 0 < step < 8
    if script != "collect":
        assert checkpoints(tmp_path / "o")[-1] == f"checkpoint-{step}"
    for out in ("o", "reference"):
        assert forked(script, command(world, script, tmp_path / out, **flags))["codes"] == [0]
    if script == "collect":
        assert_same(script, tmp_path / "o", tmp_path / "reference")
    else:  # one checkpoint more than without
        assert read_log(tmp_path / "o") == read_log(tmp_path / "reference")
        assert same_tensors(tmp_path / "o", tmp_path / "reference")


# ---- full disk
@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """Processes that see a small file system, and its folder."""
    folder = str(tmp_path_factory.mktemp("disk"))
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=1500k none {folder} && exec "$@"', "sh"]
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a small disk")
    server = Forked(*mount)
    yield server, folder
    server.close()


@pytest.mark.parametrize("script, size", [("collect", "130k"), ("train_actor", "1000k"),
                                          pytest.param("compress", "800k", marks=LONG)])
def test_full_disk(world, small_disk, forked, tmp_path, script, size):
    server, folder = small_disk
    server.shell(f"mount -o remount,size={size} none {folder}")
    out = os.path.join(folder, script)
    flags = {"save_total_limit": 9}
    if script == "collect":
        flags = {"max_samples": 16, "max_new_tokens": 100, "batch_size": 8}
    done = server(script, command(world, script, out, **flags))
    assert done["codes"] == [2], done
    error = done["err"][0].strip().splitlines()[-1]
    assert f"{script}.py: error: cannot write {out}" in error and "nothing written before is lost" in error
    assert "Traceback" not in done["err"][0]
    assert server.shell(f"ls {out}").strip()  # something was written before
    server.shell(f"mount -o remount,size=100m none {folder}")
    assert server(script, command(world, script, out, **flags))["codes"] == [0]
    server.shell(f"cp -r {out} {tmp_path}/o; rm -r {out}")
    assert forked(script, command(world, script, tmp_path / "reference", **flags))["codes"] == [0]
    assert_same(script, tmp_path / "o", tmp_path / "reference")


# ---- ranks
EXACT = 1e-9  # in float64; in fp32 a random student's gradients differ by 1e-5 in step 1, by 2e-3 in step 6


@pytest.fixture(scope="module", params=TRAINERS)
def one_rank(request, world, forked, tmp_path_factory):
    out = tmp_path_factory.mktemp("one_rank") / "o"
    assert forked(request.param, command(world, request.param, out, model="tied"), exact=True)["codes"] == [0]
    return request.param, out


def test_two_ranks_do_not_wait_for_what_gets_no_gradient(world, forked, tmp_path, monkeypatch):
    """The vision tower of a model like Gemma-3, the bridge of a student that thinks one step: DDP failed in step 2."""
    for name, size in (("vocab_size", 300), ("max_position_embeddings", 512)):
        monkeypatch.setitem(test_families.SIZES, name, size)
    save_model(tmp_path / "pictures")
    lm = AutoModelForCausalLM.from_config(test_families.tiny_config("gemma3"))
    lm.save_pretrained(tmp_path / "pictures")
    flags = {"train_actor": {"model_name_or_path": tmp_path / "pictures"}, "compress": {"K": 1}}
    for script in TRAINERS:
        argv = command(world, script, tmp_path / script, steps=3, **flags[script])
        done = forked(script, argv, world=2)
        assert done["codes"] == [0, 0], done["err"][0]


@pytest.mark.parametrize("ranks, fsdp", [(2, "false"), pytest.param(4, "false", marks=LONG), (2, "true")])
def test_ranks_and_fsdp_follow_one_ranks_curve(world, forked, one_rank, tmp_path, ranks, fsdp):
    script, reference = one_rank
    argv = command(world, script, tmp_path / "o", model="tied", fsdp=fsdp)
    done = forked(script, argv, world=ranks, exact=True)
    assert done["codes"] == [0] * ranks, done
    assert "".join(done["out"]).count("wrote ") == 1  # one rank talks
    assert_same_training(tmp_path / "o", reference, EXACT)


def test_checkpoints_fit_any_ranks(world, forked, one_rank, tmp_path):
    """Preempted on 2 sharded ranks, continued by 4, then by one: still the same curve."""
    script, reference = one_rank
    # at the first file of the next checkpoint: the first rename of all is loss_log.csv's
    at_the_next_best = {"event": 2, "on": "os.rename", "signal": signal.SIGTERM}
    argv = command(world, script, tmp_path / "o", model="tied", save_steps=100, eval_steps=3)
    for ranks, more in ((2, ["--fsdp", "true"]), (4, [])):
        done = forked(script, [*argv, *more], world=ranks, exact=True, **at_the_next_best)
        assert done["codes"] == [143] * ranks, done
    assert forked(script, argv, exact=True)["codes"] == [0]
    assert_same_training(tmp_path / "o", reference, EXACT)


@pytest.mark.parametrize("script", TRAINERS)
def test_a_failing_rank_ends_the_job_with_its_own_error(world, forked, tmp_path, script):
    """One message has a NaN, so one of the ranks, whichever reads it, stops."""
    shards = LatentShards(world["messages"])
    latents = {task_id: shards[task_id].clone() for task_id in shards.records}
    latents["t5"][0, 0] = torch.nan
    messages = write_messages(tmp_path / "m", latents, shards.records)
    argv = command(world, script, tmp_path / "o", hidden_data=messages, eval_ratio=0, per_device_train_batch_size=1)
    done = forked(script, argv, world=2, timeout=60)
    assert sorted(done["codes"]) in ([1, 2], [2, 2]), done  # 1: gloo's traceback, that the other rank is gone
    error = done["err"][done["codes"].index(2)]
    assert "id t5: NaN" in error and "Traceback" not in error


@pytest.mark.parametrize("script", ["train_actor", pytest.param("compress", marks=LONG)])
def test_fsdp_holds_a_share_of_everything(world, tmp_path, forked, script):
    """Parameters and Adam's moments of a rank, counted: half of the whole on two ranks."""
    argv = command(world, script, tmp_path / "o", steps=1, fsdp="true")
    done = forked("local_bytes", [script, *argv], world=2)
    assert done["codes"] == [0, 0], done
    for out in done["out"]:
        local, whole = json.loads(out.strip().splitlines()[-1])
        assert whole > 0 and local / whole == pytest.approx(0.5, rel=0.05)


# ---- both trainers: memory, schedule, what is kept, bad flags
@pytest.mark.parametrize("flags", [
    {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "logging_steps": 3},
    {"per_device_train_batch_size": 3, "gradient_checkpointing": "true", "self_check": "false"}], ids=str)
def test_memory_flags_change_no_result(world, forked, one_rank, tmp_path, flags):
    script, reference = one_rank
    argv = command(world, script, tmp_path / "o", model="tied", **flags)
    assert forked(script, argv, exact=True)["codes"] == [0]
    assert_same_training(tmp_path / "o", reference, EXACT)
    if script == "train_actor":  # the probe scores two messages on two samples, in every third step
        for row in read_log(tmp_path / "o"):
            assert bool(row["infonce"]) == bool(row["infonce_bound"]) == (int(row["step"]) % 3 == 0)
        parts = zip(column(tmp_path / "o", "infonce"), column(tmp_path / "o", "infonce_bound"))
        assert [loss + bound for loss, bound in parts] == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("script", TRAINERS)
def test_bf16_autocast_gives_nearly_the_same_curve(world, tmp_path, script):
    """What CUDA does, on a CPU: bf16 products over fp32 parameters, in every pass; false is off."""
    small = {"steps": 4, "eval_steps": 2, "learning_rate": 1e-6}  # larger steps of a random student leave their course
    on = {"bf16": "true"}
    for out, flags in (("auto", {}), ("off", {"bf16": "false"}), ("on", on),
                       ("again", on | {"gradient_checkpointing": "true"})):
        TRAINERS[script].main(command(world, script, tmp_path / out, **small, **flags))
    names = {"loss", "task", "kl", "align", "sep", "eval_loss", "infonce"} & read_log(tmp_path / "on")[0].keys()
    if script == "train_actor":  # a random student's gradient is too steep for 8 bits
        names.add("grad_norm")
    assert same_tensors(tmp_path / "off", tmp_path / "auto")
    assert read_log(tmp_path / "off") == read_log(tmp_path / "auto")
    for out in (tmp_path / "on", tmp_path / "again"):
        assert {tensor.dtype for tensor in tensors(out).values()} == {torch.float32}
        assert column(out, "loss") != column(tmp_path / "off", "loss")  # it was on
        for name in names:
            expected = pytest.approx(column(tmp_path / "off", name), rel=0.05, abs=3e-3)
            assert column(out, name) == expected, name
        assert any(round(128 * kl, 3) % 1 for kl in column(out, "kl"))  # its sums are in fp32


@pytest.mark.parametrize("script", TRAINERS)
def test_compiled_layers_change_no_result(world, tmp_path, monkeypatch, script):
    compiled, compile_layer = [], torch.nn.Module.compile

    def eager(self, **kwargs):  # the graphs that --compile makes, run without the minute of code generation
        compiled.append(type(self).__name__)
        return compile_layer(self, backend="eager", **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    for out, flags in (("plain", {}), ("compiled", {"compile": "true"})):
        TRAINERS[script].main(command(world, script, tmp_path / out, steps=1, **flags))
    for name in {"loss", "task", "align", "grad_norm", "kl", "sep"} & read_log(tmp_path / "plain")[0].keys():
        plain, compiled_column = (column(tmp_path / out, name) for out in ("plain", "compiled"))
        assert compiled_column == pytest.approx(plain, rel=1e-4), name
    assert compiled == ["Qwen2DecoderLayer"] * 2  # the actor's; in compress.py the student's cache grows


@pytest.mark.parametrize("script", TRAINERS)
def test_schedule_and_optimizer_flags(world, tmp_path, script):
    out, own = tmp_path / "o", {"adapter_learning_rate": 0.1, "adapter_scale": 3, "adapter_output_scale": 5}
    TRAINERS[script].main(command(
        world, script, out, steps=None, num_train_epochs=4.5, warmup_ratio=0.5, adam_beta2=0.9, eval_ratio=0,
        save_total_limit=1, weight_decay=0.1, **(own if script == "train_actor" else {})))
    steps = math.ceil(4.5 * 7 / 4)
    assert column(out, "step") == list(range(1, steps + 1))
    warmup, rates = round(steps / 2), column(out, "lr")
    assert rates[:warmup] == pytest.approx([1e-3 * (k + 1) / warmup for k in range(warmup)], rel=1e-4)
    assert rates[warmup - 1] == max(rates) and 0 < rates[-1] < rates[-2]  # then a cosine down
    # nothing is held out: the last model is kept
    assert checkpoints(out) == [f"checkpoint-{steps}"] and same_tensors(out, out / f"checkpoint-{steps}")
    assert not column(out, "eval_loss")
    groups = torch.load(out / f"checkpoint-{steps}" / "optimizer.pt", weights_only=True)["param_groups"]
    assert all(group["betas"][1] == 0.9 for group in groups)
    assert [group["weight_decay"] for group in groups][:2] == [0.1, 0]  # matrices, vectors
    if script == "train_actor":
        assert groups[2]["lr"] == pytest.approx(100 * groups[0]["lr"]) and groups[2]["weight_decay"] == 0
        for name, start in (("scale", 3), ("output_scale", 5)):  # it starts there, and is learned
            assert 0 < abs(tensors(out)["latent_adapter.safetensors", f"projection.{name}"].item() - start) < 1


@pytest.mark.parametrize("script", TRAINERS)
def test_early_stopping_and_the_best_model(world, tmp_path, monkeypatch, script):
    """Two evaluations without a new best end the run; the best is saved whatever --save_steps says."""
    losses, out = iter([3.0, 2.0, 2.5, 2.1, 1.0]), tmp_path / "o"
    (out / "checkpoint-x").mkdir(parents=True)
    monkeypatch.setattr(TRAINERS[script], "evaluate", lambda *args: next(losses))
    argv = command(world, script, out, eval_steps=1, save_steps=100, early_stopping_patience=2, save_total_limit=1)
    TRAINERS[script].main(argv)
    assert column(out, "eval_loss") == [3.0, 2.0, 2.5, 2.1]
    assert not os.path.exists(out / "optimizer.pt")
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4", "checkpoint-x"]
    assert same_tensors(out, out / "checkpoint-2") and not same_tensors(out, out / "checkpoint-4")
    assert (out / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"
    state = read_json(str(out / "trainer_state.json"))
    expected = {"step": 4, "stopped": True, "best_step": 2, "best_eval_loss": 2.0, "bad_evals": 2}
    assert expected.items() <= state.items()
    os.remove(out / "trainer_state.json")  # killed in the files of the end
    TRAINERS[script].main(argv)
    assert read_json(str(out / "trainer_state.json")) == state and len(column(out, "step")) == 4


def test_a_finished_run_does_nothing_and_takes_no_other_flags(world, one_rank, refuses, capsys):
    script, out = one_rank
    own, others = ({"latent_adapter.safetensors", "latent_adapter.json"}, {"curriculum": 0})
    if script == "compress":
        own, others = {"latent_bridge.safetensors", "latent_bridge.json"}, {"K": 4, "lambda_kl": 0.1}
    names, others = set(os.listdir(out / "checkpoint-8")), others | {"learning_rate": 1e-4, "seed": 3}
    assert names >= own | {"optimizer.pt", "trainer_state.json", "model.safetensors", "config.json", "tokenizer.json"}
    assert names - {"optimizer.pt"} < set(os.listdir(out))
    before, flags = snapshot(out), {"model": "tied", "save_steps": 3, "per_device_train_batch_size": 1}
    TRAINERS[script].main(command(world, script, out, **flags))  # not of the result
    assert "is finished (8 of 8 steps)" in capsys.readouterr().out
    changed = command(world, script, out, model="tied", **others)
    refuses(TRAINERS[script].main, changed, *(f"--{name}" for name in others), "--resume never")
    assert snapshot(out) == before


BAD_FLAGS = [
    ("prepended_length", 3, ["--prepended_length 3", "states", "id t"]),
    ("model_max_length", 20, ["context of 20", "--model_max_length", "id t"]),
    ("model_max_length", 50, ["context of 50", "id t"]), ("surprise", 1, ["--surprise"]),
    ("learning_rat", 1, ["--learning_rat"]), ("bf16", "yes", ["--bf16"]),
    ("gradient_checkpointing", "maybe", ["--gradient_checkpointing"]), ("resume", "somewhere", ["--resume"]),
    ("chat_template_kwargs", "[1]", ["--chat_template_kwargs", "JSON"]), ("fsdp", "true", ["--fsdp", "torchrun"]),
    *((name, "/nowhere", ["/nowhere"]) for name in ("train_file", "eval_file", "hidden_data")),
    ("global_batch_size", 4, ["--global_batch_size 4", "3", "ranks"]),
    ("eval_ratio", 1, ["no training samples"]), ("task_turn", 4, ["no turn 4", "--task_turn"]),
    *((name, 0, ["--" + name, "at least 1"]) for name in (
        "global_batch_size", "per_device_train_batch_size", "per_device_eval_batch_size", "eval_steps", "save_steps",
        "logging_steps", "save_total_limit"))]


@pytest.mark.parametrize("script, name, value, words", [
    *((script, *bad) for script in TRAINERS for bad in BAD_FLAGS),
    *(("train_actor", *bad) for bad in (
        ("num_heads", 5, ["--num_heads 5", "32"]), ("num_heads", 0, ["--num_heads"]),
        ("adapter", "model:Nothing", ["--adapter model:Nothing"]), ("message", "smoke", ["--message"]),
        ("adaptive_weights", "maybe", ["--adaptive_weights"]), ("curriculum", 1.5, ["--curriculum", "1.5"]),
        ("model_name_or_path", "/nowhere", ["/nowhere"]), ("infonce_probe_size", 0, ["--infonce_probe_size"]))),
    *(("compress", *bad) for bad in (
        ("K", 0, ["--K", "at least 1"]), ("K", 5000, ["id t", "K = 5000", "4096"]),
        ("max_steps", 0, ["--max_steps", "at least 1"]), ("prompt_template", "Plan.", ["{task}"]),
        ("student_model_name_or_path", "/nowhere", ["/nowhere"]),
        ("teacher_model_name_or_path", "/nowhere", ["/nowhere"])))])
def test_bad_flags_leave_nothing(world, tmp_path, refuses, monkeypatch, script, name, value, words):
    if "ranks" in words:
        monkeypatch.setenv("WORLD_SIZE", "3")
    refuses(TRAINERS[script].main, command(world, script, tmp_path / "o", **{name: value}), *words)
    assert not os.path.exists(tmp_path / "o") or name == "adapter" and not os.listdir(tmp_path / "o")


@pytest.mark.parametrize("script", TRAINERS)
@pytest.mark.parametrize("part", ["the loss is", "its gradient"])
def test_what_is_not_finite_changes_nothing(world, tmp_path, refuses, monkeypatch, script, part):
    flags = {"save_steps": 1, "eval_steps": 9}
    if part == "the loss is":
        flags |= {"learning_rate": 1e30, "max_grad_norm": 1e9}
    else:  # through many latent steps a gradient can overflow where the loss is fine
        norms = iter([torch.tensor(1.0), torch.tensor(math.nan)])
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: next(norms))
    argv = command(world, script, tmp_path / "o", **flags)
    line = refuses(TRAINERS[script].main, argv, "step 2: the loss is", f"{part} nan", "nothing was updated")
    assert sum(f"t{n}" in line for n in range(7)) >= 3 and "--learning_rate" in line  # the batch's ids
    assert column(tmp_path / "o", "step") == [1] and checkpoints(tmp_path / "o") == ["checkpoint-1"]
