"""What a run loses when it is killed, preempted, out of disk, or on another number of ranks: nothing."""
import csv
import json
import os
import random
import shutil
import signal
import subprocess

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import train_actor
from forked import Forked
from model import LatentShards, write_shard
from tiny import make_actor, make_data, save_model, write_tasks

TIMING = {"tokens_per_s", "memory_gb", "sender_ms"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    d = tmp_path_factory.mktemp("world")
    train, messages = make_data(d / "data", n=7)
    with open(train) as f:
        rows = json.load(f)
    rows[3]["conversations"].append({"from": "gpt", "value": "look " * 60})  # supervised counts differ wildly
    with open(train, "w") as f:
        json.dump(rows, f)
    make_actor().save(str(d / "actor"))
    write_tasks(d / "tasks.json", 400)
    return {"model": save_model(d / "model"), "tied": save_model(d / "tied", tied=True), "train": train,
            "messages": messages, "actor": str(d / "actor"), "tasks": str(d / "tasks.json")}


def command(world, script, out, steps=8, model="model", **flags):
    """The arguments of a small run of a stage; flags override."""
    if script == "collect":
        given = {"model_name_or_path": world[model], "dataset_path": world["tasks"], "torch_dtype": "fp32",
                 "max_new_tokens": 8, "do_sample": "true", "batch_size": 1, "shard_size_mb": 1e-6, "max_samples": steps}
    else:
        given = {"train_file": world["train"], "hidden_data": world["messages"], "max_steps": steps, "eval_ratio": 0.3,
                 "global_batch_size": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "eval_steps": 3,
                 "save_steps": 2}
        given |= ({"model_name_or_path": world[model], "num_heads": 4, "adapter_dropout": 0} if script == "train_actor" else
                  {"teacher_model_name_or_path": world["actor"], "student_model_name_or_path": world[model], "K": 3})
    argv = [str(x) for k, v in (given | flags).items() for x in (f"--{k}", v)]
    return [*(["custom"] if script == "collect" else []), *argv, "--output_dir", str(out)]


def log(out):
    with open(os.path.join(out, "loss_log.csv")) as f:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(f)]


def tensors(directory):
    return {(name, k): v for name in sorted(os.listdir(directory)) if name.endswith(".safetensors")
            for k, v in load_file(os.path.join(directory, name)).items()}


def assert_same(script, out, reference):
    """Two runs' results are bit for bit the same; nothing half-written is left."""
    assert not [name for _, dirs, files in os.walk(out) for name in dirs + files if ".tmp" in name]
    if script == "collect":
        a, b = LatentShards(str(out)), LatentShards(str(reference))  # an id that is there twice is refused here
        assert a.records.keys() == b.records.keys() and len(a)
        for task_id in b.records:
            assert torch.equal(a[task_id], b[task_id])
            assert {k: v for k, v in a.records[task_id].items() if k not in TIMING} == {
                k: v for k, v in b.records[task_id].items() if k not in TIMING}
        return
    assert sorted(os.listdir(out)) == sorted(os.listdir(reference))
    assert log(out) == log(reference)
    for directory in ("", *(name for name in os.listdir(reference) if name.startswith("checkpoint"))):
        x, y = (os.path.join(d, directory) for d in (out, reference))
        a, b = tensors(x), tensors(y)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        with open(os.path.join(x, "trainer_state.json")) as f, open(os.path.join(y, "trainer_state.json")) as g:
            assert json.load(f) == json.load(g)
        if directory:
            a, b = (torch.load(os.path.join(d, "optimizer.pt"), weights_only=True)["state"] for d in (x, y))
            assert a.keys() == b.keys() and all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])


def assert_usable(script, out):
    """After a kill: whatever has its final name is whole."""
    if script == "collect":
        shards = LatentShards(str(out))
        assert all(len(shards[k]) == shards.lengths[k] for k in shards.records)
    for name in os.listdir(out) if script != "collect" and os.path.isdir(out) else ():
        if name.startswith(("checkpoint", "best")) and ".tmp" not in name:
            assert tensors(os.path.join(out, name))
        if name.startswith("checkpoint") and ".tmp" not in name:
            torch.load(os.path.join(out, name, "optimizer.pt"), weights_only=True)


# ---- kills

@pytest.mark.parametrize("script", ["collect", "train_actor", "compress"])
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


@pytest.mark.parametrize("script", ["collect", "train_actor", "compress"])
def test_preempted(world, forked, tmp_path, script):
    """SIGTERM: a code that says so, and not one step or message is done twice."""
    flags = {"save_steps": 100, "eval_steps": 1} if script != "collect" else {}
    done = forked(script, command(world, script, tmp_path / "o", **flags), event=9, signal=signal.SIGTERM)
    assert done["codes"] == [143], done
    assert "SIGTERM" in done["out"][0] + done["err"][0] and "Traceback" not in done["err"][0]
    if script != "collect":
        checkpoint, = [name for name in os.listdir(tmp_path / "o") if name.startswith("checkpoint")]
        assert len(log(tmp_path / "o")) == int(checkpoint.split("-")[1]) < 8
    assert forked(script, command(world, script, tmp_path / "o", **flags))["codes"] == [0]
    assert forked(script, command(world, script, tmp_path / "reference", **flags))["codes"] == [0]
    assert len(LatentShards(str(tmp_path / "o"))) == 8 if script == "collect" else log(tmp_path / "o") == log(tmp_path / "reference")


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


@pytest.mark.parametrize("script, size", [("collect", "400k"), ("train_actor", "1000k"), ("compress", "800k")])
def test_full_disk(world, small_disk, forked, tmp_path, script, size):
    server, folder = small_disk
    server.shell(f"mount -o remount,size={size} none {folder}")
    out = os.path.join(folder, script)
    flags = {"max_samples": 24, "max_new_tokens": 300, "batch_size": 4} if script == "collect" else {"save_total_limit": 9}
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

def assert_close(out, reference):
    """The same curve and the same evaluation, to 1e-4."""
    a, b = log(out), log(reference)
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys() and [k for k in x if x[k]] == [k for k in y if y[k]]
        for k in x:
            if x[k] and k != "grad_norm":
                assert float(x[k]) == pytest.approx(float(y[k]), rel=1e-4, abs=1e-4), (x["step"], k)


@pytest.fixture(scope="module", params=["train_actor", "compress"])
def one_rank(request, world, forked, tmp_path_factory):
    out = tmp_path_factory.mktemp("one_rank") / "o"
    assert forked(request.param, command(world, request.param, out, model="tied"))["codes"] == [0]
    return request.param, out


@pytest.mark.parametrize("ranks, fsdp", [(2, "false"), (4, "false"), (2, "true")])
def test_ranks_and_fsdp_follow_one_ranks_curve(world, forked, one_rank, tmp_path, ranks, fsdp):
    script, reference = one_rank
    flags = {"infonce_probe_interval": 3} if script == "train_actor" and fsdp == "true" else {}
    done = forked(script, command(world, script, tmp_path / "o", model="tied", fsdp=fsdp, **flags), world=ranks)
    assert done["codes"] == [0] * ranks, done
    assert "".join(done["out"]).count("wrote the") == 1  # one rank talks
    if not flags:
        assert_close(tmp_path / "o", reference)
    a, b = tensors(tmp_path / "o"), tensors(reference)
    assert a.keys() == b.keys()  # a tied head is stored once
    for k in b:
        torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-3)


def test_checkpoints_fit_any_ranks(world, forked, one_rank, tmp_path):
    """Preempted on 2 sharded ranks, continued by 4, then by one: still the same curve."""
    script, reference = one_rank
    at_the_next_best = {"event": 2, "on": "os.rename", "signal": signal.SIGTERM}  # the first rename is loss_log.csv's
    argv = command(world, script, tmp_path / "o", model="tied", save_steps=100, eval_steps=3)
    done = forked(script, [*argv, "--fsdp", "true"], world=2, **at_the_next_best)
    assert done["codes"] == [143, 143], done
    done = forked(script, argv, world=4, **at_the_next_best)
    assert done["codes"] == [143] * 4, done
    assert forked(script, argv)["codes"] == [0]
    assert_close(tmp_path / "o", reference)


@pytest.mark.parametrize("script", ["train_actor", "compress"])
def test_a_failing_rank_ends_the_job_with_its_own_error(world, forked, tmp_path, script):
    """One message has a NaN, so one of the ranks, whichever reads it, stops."""
    path = os.path.join(world["messages"], "latents-rank00000-00000.safetensors")
    with safe_open(path, "pt") as f:
        metadata, latents = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    latents["t5"][0, 0] = torch.nan
    write_shard(tmp_path / "m" / "latents-rank00000-00000.safetensors", latents, *map(json.loads, (
        metadata["records"], metadata["sender"])))
    argv = command(world, script, tmp_path / "o", hidden_data=tmp_path / "m", eval_ratio=0, per_device_train_batch_size=1)
    done = forked(script, argv, world=2, timeout=60)
    assert sorted(done["codes"]) in ([1, 2], [2, 2]), done
    errors = "".join(done["err"])
    assert "id t5: NaN" in errors and "Traceback" not in errors
    if 1 in done["codes"]:
        assert "stops because another rank did" in done["err"][done["codes"].index(1)]


@pytest.mark.parametrize("script", ["train_actor", "compress"])
def test_fsdp_holds_a_share_of_everything(world, tmp_path, forked, script):
    """Parameters and Adam's moments of a rank, counted: half of the whole on two ranks."""
    argv = command(world, script, tmp_path / "o", steps=1, fsdp="true")
    done = forked("local_bytes", [script, *argv], world=2)
    assert done["codes"] == [0, 0], done
    for out in done["out"]:
        local, whole = json.loads(out.strip().splitlines()[-1])
        assert whole > 0 and local / whole == pytest.approx(0.5, rel=0.05)


def test_fsdp_without_torchrun(world, tmp_path, refuses):
    refuses(train_actor.main, command(world, "train_actor", tmp_path / "o", fsdp="true"), "--fsdp", "torchrun")
