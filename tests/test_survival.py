"""What a run loses when it is killed, preempted, out of disk, or on another number of ranks: nothing."""
import json
import os
import random
import shutil
import signal
import subprocess

import pytest
import torch

import train_actor
from common import read_json, write_json
from forked import Forked
from model import LatentShards, write_shard
from tiny import (argv_of, assert_same_curve, checkpoints, make_actor, make_data, read_log, same_run,
                  same_tensors, save_model, tensors, without_timing, write_tasks)

SCRIPTS = ["collect", "train_actor", "compress"]
TRAINERS = SCRIPTS[1:]
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
        "train_actor": training | {"model_name_or_path": world[model], "num_heads": 4, "adapter_dropout": 0},
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
    steps = min(400, 12 + 12 * kills) if script == "collect" else 4 + 2 * kills
    out, reference, rng, killed = tmp_path / "o", tmp_path / "reference", random.Random(script), 0
    assert forked(script, command(world, script, reference, steps))["codes"] == [0]
    for attempt in range(6 * kills):
        # by turns at the n-th touch of a file, where half-written things would be, and at a random moment
        when = {"seconds": rng.uniform(0.01, 0.4 if script == "collect" else 0.8)}
        if attempt % 2 == 0:
            when = {"event": rng.randint(1, 30) if attempt else 5}  # the first is early enough on any machine
        code, = forked(script, command(world, script, out, steps), **when)["codes"]
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
    assert forked(script, command(world, script, out, steps))["codes"] == [0]
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

@pytest.fixture(scope="module", params=TRAINERS)
def one_rank(request, world, forked, tmp_path_factory):
    out = tmp_path_factory.mktemp("one_rank") / "o"
    assert forked(request.param, command(world, request.param, out, model="tied"))["codes"] == [0]
    return request.param, out


@pytest.mark.parametrize("ranks, fsdp", [(2, "false"), pytest.param(4, "false", marks=LONG), (2, "true")])
def test_ranks_and_fsdp_follow_one_ranks_curve(world, forked, one_rank, tmp_path, ranks, fsdp):
    script, reference = one_rank
    flags = {"infonce_probe_interval": 3} if script == "train_actor" and fsdp == "true" else {}
    argv = command(world, script, tmp_path / "o", model="tied", fsdp=fsdp, **flags)
    done = forked(script, argv, world=ranks)
    assert done["codes"] == [0] * ranks, done
    assert "".join(done["out"]).count("with loss_log.csv") == 1  # one rank talks
    if not flags:
        assert_same_curve(tmp_path / "o", reference, but=["grad_norm"])
    a, b = tensors(tmp_path / "o"), tensors(reference)
    assert a.keys() == b.keys()  # a tied head is stored once
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-3)


def test_checkpoints_fit_any_ranks(world, forked, one_rank, tmp_path):
    """Preempted on 2 sharded ranks, continued by 4, then by one: still the same curve."""
    script, reference = one_rank
    # at the first file of the next checkpoint: the first rename of all is loss_log.csv's
    at_the_next_best = {"event": 2, "on": "os.rename", "signal": signal.SIGTERM}
    argv = command(world, script, tmp_path / "o", model="tied", save_steps=100, eval_steps=3)
    for ranks, more in ((2, ["--fsdp", "true"]), (4, [])):
        done = forked(script, [*argv, *more], world=ranks, **at_the_next_best)
        assert done["codes"] == [143] * ranks, done
    assert forked(script, argv)["codes"] == [0]
    assert_same_curve(tmp_path / "o", reference, but=["grad_norm"])


@pytest.mark.parametrize("script", TRAINERS)
def test_a_failing_rank_ends_the_job_with_its_own_error(world, forked, tmp_path, script):
    """One message has a NaN, so one of the ranks, whichever reads it, stops."""
    shards = LatentShards(world["messages"])
    latents = {task_id: shards[task_id].clone() for task_id in shards.records}
    latents["t5"][0, 0] = torch.nan
    path = tmp_path / "m" / "latents-rank00000-00000.safetensors"
    write_shard(path, latents, shards.records, shards.sender)
    argv = command(world, script, tmp_path / "o", hidden_data=tmp_path / "m", eval_ratio=0,
                   per_device_train_batch_size=1)
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


def test_fsdp_without_torchrun(world, tmp_path, refuses):
    argv = command(world, "train_actor", tmp_path / "o", fsdp="true")
    refuses(train_actor.main, argv, "--fsdp", "torchrun")
