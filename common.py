"""
What every script needs and the method does not.

    1. errors and flags     a user's mistake is one line and exit code 2
    2. files                every write is atomic
    3. processes, numbers   who this process is, progress, seeds, intervals
    4. a training run       checkpoint-N, from which a killed run continues; loss_log.csv
    5. pictures             curves, bars
"""
import argparse
import contextlib
import csv
import fcntl
import functools
import glob
import hashlib
import importlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

# ---- 1. Errors and flags -------------------------------------------------------------------------
STOP_EXIT = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended
LOCKS = {}  # {folder: its descriptor}, until main ends


class UserError(Exception):
    """A mistake of the user's: one line that says what was expected and what was there; exit code 2."""
    def __init__(self, text):
        super().__init__(" ".join(text.split()))  # one line, whatever was read


class Parser(argparse.ArgumentParser):
    """argparse with a line per flag, and a wrong flag reported in one line."""
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.heading = self

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def group(self, title):
        """The heading in --help of the flags that follow."""
        self.heading = self.add_argument_group(title)

    def flag(self, name, default, help, **options):
        """A flag (or several names of it) whose default tells its type: False -> true|false, 8 -> an integer
        of at least 1, 0 -> any integer; ... -> the flag must be given."""
        if default is ...:
            options["required"] = True
        elif isinstance(default, bool):
            options.setdefault("type", boolean)
        elif isinstance(default, (int, float)):
            options.setdefault("type", positive if isinstance(default, int) and default > 0 else type(default))
        if default not in (..., None, "") and "default" not in help:
            help += " (default: %(default)s)"
        self.heading.add_argument(*name.split(), default=None if default is ... else default, help=help, **options)


def boolean(text):
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise argparse.ArgumentTypeError(f"expected true or false, found {text}")


def positive(text, least=1):
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, found {text}")
    return int(text)


def task_template(text):
    if "{task}" not in text:
        raise argparse.ArgumentTypeError(f"expected a text with {{task}} in it, found {text}")
    return text


def json_object(text):
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected a JSON object, found {text}") from None


def load_object(spec, flag):
    """"module:name" of a module that can be imported here -> the object: a user's game, grader, adapter."""
    module, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a user's module raises when it is imported
        raise UserError(f"{flag} {spec} cannot be loaded as module:name: {error}") from error


def one_line_errors(prog):
    """Decorator of a script's main: a user's mistake becomes one line on stderr and exit code 2."""
    def decorate(main):
        @functools.wraps(main)
        def wrapped(argv=None):
            handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
            try:
                return main(argv)
            except KeyboardInterrupt:
                code, text = 130, "stopped by Ctrl-C; what is on disk stays, the same command continues"
            except (UserError, OSError) as error:  # OSError: no permission, too many files, ...
                code, text = 2, f"error: {error}"
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                while LOCKS:
                    directory, descriptor = LOCKS.popitem()
                    with contextlib.suppress(OSError):  # only a run that failed at its start leaves it empty
                        os.rmdir(directory)
                    os.close(descriptor)
            tqdm.write(f"{prog}: {text}", file=sys.stderr)  # above a bar, not behind it
            raise SystemExit(code)
        return wrapped
    return decorate


def is_text(value):
    """True for a str that has a UTF-8 form, which half of a surrogate pair, from a JSON file, has not."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def catch_stop():
    """A list that SIGTERM (clusters preempt by it) or the first Ctrl-C fills; main's decorator undoes it."""
    asked = []
    def handler(number, frame):
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one does not wait
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
    return asked


# ---- 2. Files ------------------------------------------------------------------------------------
@contextlib.contextmanager
def atomic_path(path):
    """Write a file or directory to a temporary name, fsync, rename: a killed run leaves the old one or the new
    one, never half of one. Raises UserError where the disk refuses."""
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
        known = isinstance(error, (OSError, SafetensorError))  # a full disk: tokenizers and torch.save raise others
        if not known and not re.search("os error|PytorchStream|unexpected pos", str(error)):
            raise
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}; nothing written before is lost: make "
                        "room, then start the same command again") from error
    finally:
        remove(temporary)
        remove(temporary + "old")


def remove(path):
    """Delete a file or a directory, if it is there. A directory loses its name first: no kill leaves half."""
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
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path):
    """Parse .json, or .jsonl and .ndjson (a list). UserError names file and line."""
    number = None
    try:
        with open(path, encoding="utf-8") as file:
            if not path.endswith((".jsonl", ".ndjson")):
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
    """16 hex digits of what a file or a folder holds; None for a hub id or no path. Of weights and shards both
    ends and some 64 places between are read; of folders inside a folder names and sizes."""
    if not path or not os.path.exists(path):
        return None
    digest = hashlib.sha256()
    for name in sorted(glob.glob("**", root_dir=path, recursive=True)) or [""]:  # "": path is a file
        file_path = os.path.join(path, name) if name else path
        if not os.path.isfile(file_path) or re.search(r"^checkpoint-|\.tmp|\.(csv|png)$", name):
            continue
        size = os.path.getsize(file_path)
        digest.update(f"{name} {size}".encode())
        if os.sep in name:
            continue
        with open(file_path, "rb") as file:
            if name.endswith((".safetensors", ".bin")):
                digest.update(file.read(2**20))
                for place in range(2**26, size, max(2**26, size // 64)):  # a merged LoRA may leave both ends alone
                    file.seek(place)
                    digest.update(file.read(2**16))
                file.seek(max(0, size - 2**20))
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:16]


def changed_settings(before, now):
    """What makes a run another one, in words. now: {flag: value, "contents": {flag: fingerprint of what is at that
    path}}; before: the same of an earlier run."""
    old, new = before.get("contents", {}), now["contents"]
    moved = [name for name in new if new[name] and all(new[name]) and old.get(name) == new[name]]
    names = [f"--{name}" for name in now if name not in ("contents", *moved) and before.get(name) != now[name]]
    names += [f"file or folder at --{name}" for name in new if old.get(name) != new[name]]
    return ", ".join(names)


def check_output(flag, output, inputs):
    """No output may eat an input: UserError where its folder is an input's folder, or lies in one."""
    output = os.path.realpath(output)
    for path in filter(None, inputs):
        folder = os.path.realpath(path)
        inside = os.path.isdir(folder) and (output + os.sep).startswith(folder + os.sep)
        eaten = os.path.isfile(folder) or os.path.basename(folder).startswith("checkpoint-")  # by --resume never
        if inside or eaten and os.path.dirname(folder) == output:
            raise UserError(f"{flag} {output} is where the input {path} is: give a folder of its own")


def lock(directory):
    """Make a folder this process's alone, before a model is loaded. A killed run leaves no lock."""
    os.makedirs(directory, exist_ok=True)
    if directory in LOCKS:
        return
    if not os.access(directory, os.W_OK):
        raise UserError(f"{directory} cannot be written to: give another folder")
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another run is writing to {directory}: wait for it, or give another folder") from None
    LOCKS[directory] = descriptor  # of this run now: who is refused does not remove the other's empty folder


# ---- 3. Processes and numbers --------------------------------------------------------------------
def this_rank():
    """(rank, world size, device) of this process: torchrun's, or (0, 1, ...) without it."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), device


def progress(iterable=None, rank=0, **options):
    """A tqdm bar of rank 0; in a log file a line every ten seconds."""
    return tqdm(iterable, disable=rank > 0, mininterval=0.1 if sys.stderr.isatty() else 10, **options)


def all_reduce_sum(values, device):
    """{name: number} of each rank -> the sums over all ranks."""
    if not dist.is_initialized():
        return values
    totals = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return dict(zip(values, totals.tolist()))


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
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))  # p is inside, whatever rounding says


# ---- 4. A training run ---------------------------------------------------------------------------
NOT_SHOWN = ("step", "epoch", "cosine_distance")  # columns of loss_log.csv that the log line leaves out
# flags that may change between a run and its continuation: they move memory and files, not results
NOT_SETTINGS = ["output_dir", "resume", "max_steps", "per_device_train_batch_size", "save_steps", "fsdp",
                "per_device_eval_batch_size", "logging_steps", "save_total_limit", "gradient_checkpointing",
                "compile", "trust_remote_code", "self_check"]


def add_training_flags(parser, learning_rate):
    """The flags that both trainers have."""
    flag = parser.flag
    parser.group("data")
    flag("--train_file", ..., ".json or .jsonl of conversations")
    flag("--task_turn", 0, "fold turns 0 and N into the first human turn (ETO: 2)")
    flag("--eval_file", None, "held-out samples, same format")
    flag("--eval_ratio", 0.0, "hold out this share of --train_file, chosen by id")
    flag("--model_max_length", 4096, "a longer sample is an error")
    flag("--prepended_length", 2048, "a longer message is an error")
    parser.group("optimization")
    flag("--learning_rate", learning_rate, "peak, then cosine to 0")
    flag("--warmup_ratio", 0.03, "share of the steps that warm up linearly")
    flag("--adam_beta2", 0.999, "AdamW's memory of squares; short runs: 0.95")
    flag("--weight_decay", 0.0, "AdamW, on matrices only")
    flag("--max_grad_norm", 1.0, "clip the gradient's norm")
    flag("--global_batch_size", 16, "samples per optimizer step, over all ranks")
    flag("--per_device_train_batch_size", 4, "samples per pass: memory only")
    flag("--per_device_eval_batch_size", 8, "samples per evaluation pass")
    flag("--bf16", "auto", "bf16 autocast over fp32 parameters; auto: on CUDA", choices=["auto", "true", "false"])
    flag("--gradient_checkpointing", False, "recompute the actor's activations: less memory")
    flag("--fsdp", False, "shard parameters, gradients and Adam over the ranks")
    flag("--compile", False, "torch.compile the actor's layers")
    flag("--seed", 0, "of all that is drawn")
    parser.group("output")
    flag("--output_dir", ..., "for the model, its checkpoints and its log; one that exists is continued")
    flag("--logging_steps", 1, "a log line every N steps (the csv has them all)")
    flag("--eval_steps", 500, "evaluate every N steps, and at the end")
    flag("--save_steps", 500, "checkpoint every N steps, and at the end")
    flag("--save_total_limit", 2, "checkpoints to keep, besides the best")
    flag("--early_stopping_patience", 0, "stop after N evaluations without a new best")
    flag("--resume", "auto", "auto: from the last checkpoint; never", choices=["auto", "never"])


def run_settings(flags, inputs):
    """What a continuation must share with its run: {flag: value}, the contents of what is at the flags `inputs`."""
    settings = {name: value for name, value in flags.items() if name not in NOT_SETTINGS}
    return settings | {"contents": {name: fingerprint(flags[name]) for name in inputs}}


def read_rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def checkpoints(directory):
    """[(N, path)] of the checkpoint-N in a directory, oldest first."""
    names = [name for name in glob.glob("checkpoint-*", root_dir=directory) if name[11:].isdecimal()]
    return sorted((int(name[11:]), os.path.join(directory, name)) for name in names)


class Run:
    """The files of one training run; it knows nothing of models and losses.
        OUTPUT/checkpoint-N/   model, optimizer.pt, trainer_state.json: a killed run goes on from the newest
        OUTPUT/loss_log.csv    a line per step
        OUTPUT/                becomes the best model, or the last, when the run is over
    `state` is what trainer_state.json holds. Raises UserError where settings differ from the run to continue."""
    def __init__(self, output_dir, settings, resume="auto", rank=0):
        self.output_dir, self.rank, self.log_file = output_dir, rank, None
        self.state = {"step": 0, "stopped": False, "settings": settings,
                      "best_step": None, "best_eval_loss": math.inf, "bad_evals": 0}
        saved = checkpoints(output_dir) if resume == "auto" else []
        self.checkpoint = saved[-1][1] if saved else None
        if self.checkpoint:
            self.state = read_json(os.path.join(self.checkpoint, "trainer_state.json"))
            if changed := changed_settings(self.state["settings"], settings):
                raise UserError(f"{self.checkpoint} was trained with another {changed}: give the same flags, "
                                f"another --output_dir, or --resume never")

    def is_over(self, max_steps, patience=0):
        """True where no step is left and all is written, trainer_state.json last. A larger max_steps goes on."""
        state = self.state
        state["stopped"] = state["step"] >= max_steps or 0 < patience <= state["bad_evals"]
        over = state["stopped"] and os.path.exists(os.path.join(self.output_dir, "trainer_state.json"))
        if over and self.rank == 0:
            print(f"{self.output_dir} is finished ({state['step']} of {max_steps} steps)")
        return over

    def clear(self):
        """Before the first step: half-written files go, and all of an old run that is not continued."""
        if self.rank > 0:
            return
        for name in os.listdir(self.output_dir):
            if ".tmp" in name or name == "trainer_state.json":
                remove(os.path.join(self.output_dir, name))
        for _, path in [] if self.checkpoint else checkpoints(self.output_dir):
            remove(path)

    def log(self, record):
        """A line of loss_log.csv, whose columns the first record names -> the same for the screen. What follows
        the checkpoint goes."""
        if self.log_file is None:
            path, columns = os.path.join(self.output_dir, "loss_log.csv"), list(record)
            kept = read_rows(path) if self.checkpoint and os.path.exists(path) else []  # a torn line has no end
            kept = [row for row in kept if row[columns[-1]] and int(row["step"]) < record["step"]]
            with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(kept)
            self.log_file = open(path, "a", newline="")
            self.writer = csv.DictWriter(self.log_file, columns)
        self.writer.writerow(record)
        self.log_file.flush()
        return " ".join(f"{name} {value:.4g}" for name, value in record.items()
                        if value is not None and name not in NOT_SHOWN)

    def note_eval(self, eval_loss, patience):
        """Note an evaluation -> whether it is the best so far. `patience` > 0 others in a row stop the run."""
        state, is_best = self.state, eval_loss < self.state["best_eval_loss"]
        state["bad_evals"] = 0 if is_best else state["bad_evals"] + 1
        if is_best:
            state |= {"best_step": state["step"], "best_eval_loss": eval_loss}
        state["stopped"] |= 0 < patience <= state["bad_evals"]
        return is_best

    def save(self, model, write_model, optimizer, keep):
        """checkpoint-N in one atomic step -> its path; then all but the newest `keep` and the best go. All ranks
        must call it (FSDP2 joins the shards); write_model(path, {name: whole tensor on the CPU}) is rank 0's."""
        from torch.distributed.checkpoint import state_dict as dcp  # slow to import
        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = dcp.get_model_state_dict(model, options=options)
        optimizer_state = dcp.get_optimizer_state_dict(model, optimizer, options=options)
        directory = os.path.join(self.output_dir, f"checkpoint-{self.state['step']}")
        if self.rank > 0:
            return directory
        names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}  # a tied head once
        with atomic_path(directory) as temporary:
            write_model(temporary, {name: tensor for name, tensor in weights.items() if name in names})
            torch.save(optimizer_state, os.path.join(temporary, "optimizer.pt"))
            write_json(os.path.join(temporary, "trainer_state.json"), self.state)
        for step, path in checkpoints(self.output_dir)[:-keep]:
            if step != self.state["best_step"]:
                remove(path)
        return directory

    def load_optimizer(self, model, optimizer):
        """Each rank maps the checkpoint's optimizer.pt into memory and takes its part."""
        from torch.distributed.checkpoint import state_dict as dcp
        path = os.path.join(self.checkpoint, "optimizer.pt")
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        dcp.set_optimizer_state_dict(model, optimizer, state, options=dcp.StateDictOptions(full_state_dict=True))

    def publish(self, curves, ylabel):
        """OUTPUT becomes the best (else last) model -> its checkpoint. curves: columns of loss_curve.png."""
        if self.log_file is not None:
            self.log_file.close()
        log, picture = (os.path.join(self.output_dir, name) for name in ("loss_log.csv", "loss_curve.png"))
        if os.path.exists(log):  # --max_steps 0 writes none
            plot_curves(log, picture, curves, ylabel)
        best, last = self.state["best_step"], self.state["step"]
        source = os.path.join(self.output_dir, f"checkpoint-{last if best is None else best}")  # best may be 0
        remove(os.path.join(self.output_dir, "config.json"))  # without it, half of an old model is no model
        for name in sorted(os.listdir(source), key=lambda name: name == "config.json"):  # so it comes last
            if name not in ("optimizer.pt", "trainer_state.json"):
                with atomic_path(os.path.join(self.output_dir, name)) as temporary:
                    shutil.copy(os.path.join(source, name), temporary)
        write_json(os.path.join(self.output_dir, "trainer_state.json"), self.state)
        return source


def lr_scale(step, max_steps, warmup):
    """Linear warm-up, then cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, max_steps - warmup)))


def check_finite(step, loss, grad_norm, ids):
    if not math.isfinite(loss + grad_norm):
        raise UserError(f"step {step}: the loss is {loss}, its gradient {grad_norm}; nothing was updated. Lower "
                        f"--learning_rate, or look at the messages of the samples {', '.join(ids)}")


@torch.no_grad()
def evaluate(model, summed_loss, data, indices, batch_size, device, rank, world):
    """Mean CE over the supervised tokens of held-out samples. summed_loss(indices) -> their summed CE. Every rank
    makes the same number of passes, because FSDP2 needs all ranks in each."""
    was_training = model.training
    model.eval()
    sums = {"loss": 0.0, "tokens": 0.0}
    order = sorted(indices, key=lambda n: data.lengths[n])
    for i in range(0, len(order), batch_size * world):
        part = order[i + rank:i + batch_size * world:world]
        loss = summed_loss(part or order[:1])  # a rank without samples repeats one: all ranks make each pass
        if part:
            sums["loss"] += loss.item()
            sums["tokens"] += sum(data.n_labels[n] for n in part)
    model.train(was_training)
    sums = all_reduce_sum(sums, device)
    return sums["loss"] / sums["tokens"]


# ---- 5. Pictures ---------------------------------------------------------------------------------
def save_figure(figure, path):
    """Write a matplotlib figure as PNG, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")


def plot_curves(csv_path, png_path, columns, ylabel):
    """Columns of loss_log.csv against the step; a column without a number other than 0 is left out."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    rows = read_rows(csv_path)
    axes = Figure(figsize=(7, 4)).subplots()
    for name in columns:
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        if any(y for _, y in points):
            axes.plot(*zip(*points), label=name, marker="o" if len(points) < 30 else None, markersize=4)
    axes.set(xlabel="step", ylabel=ylabel, ylim=(0, None))
    axes.legend()
    save_figure(axes.figure, png_path)


def plot_bars(path, labels, values, intervals, xlabel, title=""):
    """Horizontal bars from 0 to 1, intervals [(low, high)]; the first (the message) on top, and dark."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(8, 0.8 + 0.38 * len(labels))).subplots()
    errors = [[value - low for value, (low, _) in zip(values, intervals)],
              [high - value for value, (_, high) in zip(values, intervals)]]
    colors = ["tab:blue"] + ["lightsteelblue"] * (len(labels) - 1)
    axes.barh(labels, values, xerr=errors, color=colors, capsize=3)
    axes.set(xlim=(0, 1), xlabel=xlabel, title=title)
    axes.invert_yaxis()
    save_figure(axes.figure, path)
