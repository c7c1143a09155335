"""Real processes without paying for torch's import each time.

`python forked.py` imports the scripts once, then reads one job per line and forks it:

    {"script", "argv", "world": ranks, "event": n, "on": kind, "seconds": s, "signal": k, "env": {...}, "cwd",
     "exact": true}
        runs script.main(argv) in each rank. The signal hits the n-th time that a rank touches a file of its
        output (only in the way of "on", where it is given), or after s seconds. "exact": what is fp32 has 64 bits.
    {"shell": command}
        runs a command.

Class Forked is the other end of the pipe."""
import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "shutil.copyfile"}


class Forked:
    """Starts the process that forks. `prefix` is a command to start it with, such as unshare."""

    def __init__(self, *prefix):
        command = [*prefix, sys.executable, os.path.abspath(__file__)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, script, argv, **job):
        """-> {"codes": one per rank (negative: the signal that killed it), "out", "err": a text per rank}."""
        return self.send({"script": script, "argv": [str(a) for a in argv], **job})

    def shell(self, command):
        reply = self.send({"shell": command})
        assert reply["code"] == 0, reply
        return reply["out"]

    def send(self, job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def compute_in_float64():
    """In this process fp32 becomes float64: rounding cannot hide a fault, or grow to the size of one."""
    import torch
    import hf
    hf.DTYPES["fp32"], hf.TOLERANCE[torch.float64] = torch.float64, 1e-3
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)


def child(job, rank, world, port, directory):
    """One rank: never returns."""
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(directory, f"{name}{rank}"), os.O_WRONLY), fd)
    os.environ.update(job.get("env", {}))
    os.chdir(job.get("cwd", "."))
    if job.get("exact"):
        compute_in_float64()
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if job.get("event"):
        output, seen = job["argv"][job["argv"].index("--output_dir") + 1], []

        def count(event, args):
            if event in ([job["on"]] if "on" in job else FILE_EVENTS) and str(args[0]).startswith(output):
                seen.append(event)
                if len(seen) == job["event"]:
                    os.kill(os.getpid(), job.get("signal", signal.SIGKILL))

        sys.addaudithook(count)
    code = 0
    try:
        importlib.import_module(job["script"]).main(job["argv"])
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fork(job):
    world = job.get("world", 1)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        ranks = {}
        for rank in range(world):
            for name in ("out", "err"):
                open(os.path.join(directory, f"{name}{rank}"), "w").close()
            pid = os.fork()
            if pid == 0:
                child(job, rank, world, port, directory)
            ranks[pid] = rank
        codes, struck = [None] * world, job.get("seconds") is None
        strike = time.monotonic() + job.get("seconds", 0)
        deadline = time.monotonic() + job.get("timeout", 120)
        while None in codes:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                codes[ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
                continue
            if not struck and time.monotonic() > strike or time.monotonic() > deadline:
                late = time.monotonic() > deadline
                for pid in ranks:
                    os.kill(pid, signal.SIGKILL if late else job.get("signal", signal.SIGKILL))
                struck = True
            time.sleep(0.002)  # of the waiting parent
        texts = {name: [open(os.path.join(directory, f"{name}{rank}"), errors="replace").read()
                        for rank in range(world)] for name in ("out", "err")}
    return {"codes": codes, **texts}


def serve():
    os.environ["OMP_NUM_THREADS"], os.environ["HF_HUB_OFFLINE"] = "1", "1"
    sys.path[:0] = [os.path.dirname(HERE), HERE]
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # the scripts, and what these import only when it is used
    for name in ("collect", "train_actor", "compress", "eval_alfworld", "eval_math", "torch._dynamo",
                 "torch._inductor.utils", "transformers.core_model_loading",
                 "matplotlib.backends.backend_agg", "transformers.models.qwen2.modeling_qwen2"):
        with contextlib.suppress(ImportError):  # a script that does not import says so when it is run
            importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        if "shell" in job:
            done = subprocess.run(job["shell"], shell=True, capture_output=True, text=True)
            reply = {"code": done.returncode, "out": done.stdout, "err": done.stderr}
        else:
            reply = fork(job)
        pipe.write(json.dumps(reply) + "\n")
        pipe.flush()


if __name__ == "__main__":
    serve()
