"""
What every script needs and the method does not.

    1. errors and flags     a user's mistake is one line and exit code 2
    2. files                every write is atomic
    3. processes, numbers   who this process is, progress, seeds, intervals
    4. checkpoints          checkpoint-N, from which a killed run continues
    5. log and pictures     loss_log.csv, curves, bars
"""
import argparse
import contextlib
import csv
import functools
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

# ------------------------------------------------------------------------------------------------
# 1. Errors and flags


class UserError(Exception):
    """A mistake of the user's: one line that says what was expected and what was there. Scripts exit
    with code 2."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))  # one line, whatever was read


class Parser(argparse.ArgumentParser):
    """argparse that reports a wrong flag in one line, without the page of usage before it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def boolean(text):
    """argparse type of true|false flags."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise argparse.ArgumentTypeError(f"expected true or false, found {text}")


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


def json_object(text):
    """argparse type of --chat_template_kwargs: a JSON object."""
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected a JSON object, found {text}") from None


def one_line_errors(prog):
    """Decorator of a script's main: a user's mistake becomes one line on stderr and exit code 2."""
    def decorate(main):
        @functools.wraps(main)
        def wrapped(argv=None):
            handler = signal.getsignal(signal.SIGTERM)
            try:
                return main(argv)
            except BrokenPipeError:  # `| head` has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                code, message = 1, "the reader of the output is gone"
            except KeyboardInterrupt:
                code, message = 130, "stopped by Ctrl-C; what is on disk stays, the same command continues"
            except (UserError, OSError) as error:  # OSError: no permission, too many files, ...; it names the file
                code, message = 2, f"error: {error}"
            except RuntimeError as error:  # gloo, when another rank has ended
                if "losed by peer" not in str(error) and "reset by peer" not in str(error):
                    raise
                code, message = 1, f"rank {this_rank()[0]} stops because another rank did; see its message"
            finally:
                signal.signal(signal.SIGTERM, handler)
            for bar in list(getattr(tqdm, "_instances", ())):
                bar.close()  # else the message would stand behind it
            sys.stderr.write(f"{prog}: {message}\n")
            raise SystemExit(code)
        return wrapped
    return decorate


def is_text(value):
    """True for a str that has a UTF-8 form: JSON can hold half of a surrogate pair, which no tokenizer
    reads."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


SIGTERM_EXIT = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended


def catch_sigterm():
    """How clusters preempt -> a list that is no longer empty once SIGTERM came. main's decorator undoes
    it."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    return asked


# ------------------------------------------------------------------------------------------------
# 2. Files

@contextlib.contextmanager
def atomic_path(path):
    """Write to a temporary name, fsync, rename: a killed run leaves the old file or the new one, never
    half of one.

    Works for files and directories. Raises UserError where the disk refuses."""
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
    except Exception as error:
        # a full disk speaks differently through each library: tokenizers raise an Exception, torch.save
        # a RuntimeError
        known = isinstance(error, (OSError, SafetensorError))
        if not known and not re.search("os error|PytorchStream|unexpected pos", str(error)):
            raise
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}; nothing written before is lost: make "
                        "room, then start the same command again") from error
    finally:
        remove(temporary)
        remove(temporary + "old")


def remove(path):
    """Delete a file or a directory, if it is there. A directory loses its name first: a kill leaves no
    half of it."""
    if os.path.isdir(path):
        doomed = path if ".tmp" in os.path.basename(path) else f"{path}.tmp{os.getpid()}old"
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    elif os.path.exists(path):
        os.remove(path)


def sync(path):
    """Have the disk hold what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_text(path, text):
    with atomic_path(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path):
    """Parse .json or .jsonl (a list of records). Raises UserError with the file and the line."""
    number = None
    try:
        with open(path, encoding="utf-8") as file:
            if not path.endswith(".jsonl"):
                return json.load(file)
            records = []
            for number, line in enumerate(file, 1):
                if line.strip():
                    records.append(json.loads(line))
            return records
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (OSError, ValueError) as error:
        line = "" if number is None else f" in line {number}"  # the decoder counts from this line's start
        raise UserError(f"{path} is not valid JSON{line}: {error}") from None


def fingerprint(path):
    """16 hex digits of a local model's files; None for a hub id. Weights trained anew into a directory
    are others."""
    if not os.path.isdir(path):
        return None
    digest = hashlib.sha256()
    for name in sorted(os.listdir(path)):
        if name != "config.json" and not name.endswith((".safetensors", ".bin")):
            continue
        with open(os.path.join(path, name), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            for start in (0, max(0, size - 2**20)):  # of a large file both ends: any training step changes them
                file.seek(start)
                digest.update(f"{name} {size}".encode() + file.read(2**20))
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# 3. Processes and numbers

def this_rank():
    """(rank, world size, device) of this process: torchrun's, or (0, 1, ...) without it."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return rank, world, device


class progress(tqdm):
    """tqdm: a bar on a terminal, in a log file a line every ten seconds, nothing for ranks above 0."""
    monitor_interval = 0  # no thread that writes the same line again while nothing moves

    def __init__(self, iterable=None, rank=0, **kwargs):
        terminal = sys.stderr.isatty()
        super().__init__(iterable, disable=rank > 0, mininterval=0.1 if terminal else 10, miniters=1,
                         delay=0 if terminal else 1, **kwargs)

    @staticmethod
    def status_printer(file):
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda text: text and print(text, file=file, flush=True)

    @classmethod
    def write(cls, text, file=None, **kwargs):
        """A line above the bar; in a log file just the line."""
        if sys.stderr.isatty():
            super().write(text, file, **kwargs)
        else:
            print(text, file=file, flush=True)


def memory_gb(device):
    """Peak memory of this process so far: on its GPU if it has one."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def seed_for(*parts):
    """A 63-bit seed from any values: the same on every machine, rank and restart."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def wilson_interval(successes, n, z=1.96):
    """95 % Wilson score interval of a proportion -> (low, high)."""
    if n == 0:
        return 0.0, 1.0
    p, scale = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # p itself is inside, whatever rounding says
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


# ------------------------------------------------------------------------------------------------
# 4. Checkpoints: OUTPUT/checkpoint-N holds the model, optimizer.pt and trainer_state.json; any number
# of ranks, with and without FSDP2, can go on from it. OUTPUT itself becomes the best of them, or the
# last, when the run is over.

NOT_THE_MODEL = ("optimizer.pt", "trainer_state.json")


def checkpoints(directory):
    """[(N, path)] of the checkpoint-N in a directory, oldest first."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    matches = [re.fullmatch(r"checkpoint-(\d+)", name) for name in names]
    return sorted((int(m[1]), os.path.join(directory, m[0])) for m in matches if m)


def latest_checkpoint(output_dir, resume):
    """--resume auto, never or a path -> the checkpoint to continue from, or None."""
    if resume == "auto":
        saved = checkpoints(output_dir)
        return saved[-1][1] if saved else None
    return None if resume == "never" else resume


def read_state(checkpoint, settings, output_dir):
    """trainer_state.json of a checkpoint. Raises UserError if it was trained with other settings.

    settings: the flags that a result depends on. The best model so far stays behind when a run moves to
    another output_dir, and is then forgotten."""
    state = read_json(os.path.join(checkpoint, "trainer_state.json"))
    changed = [name for name in settings if settings[name] != state["settings"].get(name)]
    if changed:
        names = ", ".join("--" + name for name in changed)
        raise UserError(f"{checkpoint} was trained with another {names}: give the same flags, another --output_dir, "
                        f"or --resume never")
    if not os.path.isdir(os.path.join(output_dir, f"checkpoint-{state['best_step']}")):
        state |= {"best_step": None, "best_eval_loss": math.inf, "bad_evals": 0}
    return state


def prepare_output(output_dir, checkpoint):
    """Before the first step: half-written files of a killed run go, and all of an old run that is not
    continued."""
    os.makedirs(output_dir, exist_ok=True)
    for name in os.listdir(output_dir):
        if ".tmp" in name:
            remove(os.path.join(output_dir, name))
    if checkpoint is None:
        remove(os.path.join(output_dir, "trainer_state.json"))
        for _, path in checkpoints(output_dir):
            remove(path)


def save_checkpoint(directory, rank, model, write_model, optimizer, state):
    """One atomic directory. All ranks must call it, because FSDP2 puts the shards together; rank 0 writes.

    write_model(path, state_dict) gets {name: whole tensor on the CPU}."""
    from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                         get_optimizer_state_dict)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=options)
    if rank == 0:
        names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
        with atomic_path(directory) as temporary:
            # named_parameters names a tied head once, so it is not stored twice
            write_model(temporary, {name: tensor for name, tensor in weights.items() if name in names})
            torch.save(optimizer_state, os.path.join(temporary, "optimizer.pt"))
            write_json(os.path.join(temporary, "trainer_state.json"), state)


def load_optimizer(model, optimizer, checkpoint):
    """Each rank maps optimizer.pt into memory and takes its part."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
    path = os.path.join(checkpoint, "optimizer.pt")
    state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def prune_checkpoints(output_dir, keep, best_step):
    """Keep the newest `keep` checkpoints and the best. Only after a new one is on disk."""
    for step, path in checkpoints(output_dir)[:-keep]:
        if step != best_step:
            remove(path)


def publish_model(output_dir, state):
    """The output directory itself becomes the best model, or the last where nothing was held out -> its
    checkpoint.

    trainer_state.json is written last of all: who finds it there knows that the run is over."""
    source = os.path.join(output_dir, f"checkpoint-{state['best_step'] or state['step']}")
    for name in sorted(os.listdir(source)):
        if name not in NOT_THE_MODEL:
            with atomic_path(os.path.join(output_dir, name)) as temporary:
                shutil.copy(os.path.join(source, name), temporary)
    write_json(os.path.join(output_dir, "trainer_state.json"), state)
    return source


# ------------------------------------------------------------------------------------------------
# 5. Log and pictures

def open_log(path, columns, step):
    """loss_log.csv up to `step` -> (file, writer): what came after the checkpoint is run, and logged,
    again."""
    kept = []
    if step and os.path.exists(path):
        with open(path) as file:
            for row in csv.DictReader(file):
                if row[columns[-1]] and int(row["step"]) <= step:  # a line that a kill tore lacks its last field
                    kept.append(row)
    with atomic_path(path) as temporary:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(kept)
    file = open(path, "a", newline="")
    return file, csv.DictWriter(file, columns)


def save_figure(figure, path):
    """Write a matplotlib figure as PNG, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")


def plot_curves(csv_path, png_path, columns, ylabel):
    """Columns of loss_log.csv against the step; a column without a number other than 0 is left out."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    with open(csv_path) as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name in columns:
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        if any(y for _, y in points):
            axes.plot(*zip(*points), label=name, marker="o" if len(points) < 30 else None, markersize=4)
    axes.set(xlabel="step", ylabel=ylabel, ylim=(0, None))
    axes.legend()
    save_figure(figure, png_path)


def plot_bars(path, labels, values, intervals, xlabel, title=""):
    """Horizontal bars from 0 to 1 with their intervals [(low, high)]; the first label on top, and dark:
    the message."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 0.8 + 0.38 * len(labels)))
    axes = figure.subplots()
    errors = [[value - low for value, (low, _) in zip(values, intervals)],
              [high - value for value, (_, high) in zip(values, intervals)]]
    colors = ["tab:blue"] + ["lightsteelblue"] * (len(labels) - 1)
    axes.barh(labels, values, xerr=errors, color=colors, capsize=3)
    axes.set(xlim=(0, 1), xlabel=xlabel, title=title)
    axes.invert_yaxis()
    save_figure(figure, path)
