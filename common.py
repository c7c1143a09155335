"""
What every script needs and the method does not: errors, files, flags, seeds.

    1. errors and flags    a user's mistake is one line and exit code 2
    2. files               every write is atomic
    3. ranks and numbers   who this process is, seeds, intervals
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys

import torch
from safetensors import SafetensorError
from tqdm import tqdm


class UserError(Exception):
    """A mistake of the user's: one line that says what was expected and found. Scripts exit with code 2."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))  # one line, whatever was found


# ---------------------------------------------------------------------------------------------------------------------
# 1. Errors and flags

def boolean(text):
    """argparse type of true|false flags."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise ValueError(text)


def positive(text):
    """argparse type of counts: an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, found {text}")
    return int(text)


def share(text):
    """argparse type of shares: a number above 0, up to 1."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, found {text}")
    return float(text)


class Parser(argparse.ArgumentParser):
    """argparse that reports a wrong flag in one line, without the page of usage before it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def run(parser, function, args):
    """Call a script's body; a user's mistake becomes one line on stderr and exit code 2."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return function(args)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code, message = 1, "the reader of the output is gone"
    except (UserError, OSError) as e:  # OSError: no permission, a full disk, too many files, ... it names the file
        code, message = 2, f"error: {e}"
    except RuntimeError as e:
        if "losed by peer" not in str(e) and "reset by peer" not in str(e):
            raise
        code, message = 1, f"rank {os.environ.get('RANK')} stops because another rank did; see its message"
    finally:
        signal.signal(signal.SIGTERM, handler)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # else the message would stand behind it
    parser.exit(code, f"{parser.prog}: {message}\n")


def is_text(value):
    """True for a str that has a UTF-8 form: JSON can hold half of a surrogate pair, which no tokenizer reads."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


SIGTERM_EXIT = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended


def catch_sigterm():
    """How clusters preempt -> a list that is no longer empty once SIGTERM came; `run` puts the old handler back."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    return asked


# ---------------------------------------------------------------------------------------------------------------------
# 2. Files

@contextlib.contextmanager
def atomic_path(path):
    """Write to a temporary name, fsync, rename: a killed run leaves the old file or the new one, never half of one.
    Works for files and directories; an error of the disk is a UserError."""
    temporary = f"{path}.tmp{os.getpid()}"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        yield temporary
        for root, _, files in os.walk(temporary):
            for name in files:
                sync(os.path.join(root, name))
        sync(temporary)
        if os.path.isdir(path):  # a directory cannot be replaced in one step
            os.rename(path, temporary + "old")
        os.replace(temporary, path)
        sync(os.path.dirname(os.path.abspath(path)))
    except Exception as e:
        # a full disk speaks differently through each library: tokenizers raise an Exception, torch.save a RuntimeError
        known = isinstance(e, (OSError, SafetensorError)) or re.search("os error|PytorchStream|unexpected pos", str(e))
        if not known:
            raise
        raise UserError(f"cannot write {path}: {str(e).splitlines()[0]}; nothing written before is lost: make room, "
                        f"then start the same command again") from e
    finally:
        remove(temporary)
        remove(temporary + "old")


def remove(path):
    """Delete a file or a directory, if it is there. A directory loses its name first: a kill leaves no half of it."""
    if os.path.isdir(path):
        doomed = path if ".tmp" in os.path.basename(path) else f"{path}.tmp{os.getpid()}old"
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    elif os.path.exists(path):
        os.remove(path)


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def write_text(path, text):
    with atomic_path(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path):
    """Parse .json or .jsonl (a list of records). Raises UserError with the file and the line."""
    try:
        with open(path, encoding="utf-8") as f:
            return [json.loads(line) for line in f if line.strip()] if path.endswith(".jsonl") else json.load(f)
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is not valid JSON: {e}") from None


def fingerprint(path):
    """16 hex digits of a local model's files; None for a hub id. Weights trained anew into a directory are others."""
    if not os.path.isdir(path):
        return None
    digest = hashlib.sha256()
    for name in sorted(n for n in os.listdir(path) if n == "config.json" or n.endswith((".safetensors", ".bin"))):
        with open(os.path.join(path, name), "rb") as f:  # of a large file both ends: any training step changes them
            size = f.seek(0, os.SEEK_END)
            for start in (0, max(0, size - 2**20)):
                f.seek(start)
                digest.update(f"{name} {size}".encode() + f.read(2**20))
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# 3. Ranks and numbers

def this_rank():
    """(rank, world size, device) of this process: torchrun's, or (0, 1, ...) without it."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    return rank, world, f"cuda:{local}" if torch.cuda.is_available() else "cpu"


def memory_gb(device):
    """Peak memory of this process so far: on its GPU if it has one."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def seed_for(*parts):
    """A 63-bit seed from any values: the same on every machine, rank and restart."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "little") >> 1


def wilson_interval(successes, n, z=1.96):
    """95 % Wilson score interval of a proportion -> (low, high)."""
    if n == 0:
        return 0.0, 1.0
    p, centre = successes / n, successes / n + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # p itself is inside, whatever rounding says
    return max(0.0, min(p, (centre - half) / (1 + z * z / n))), min(1.0, max(p, (centre + half) / (1 + z * z / n)))
