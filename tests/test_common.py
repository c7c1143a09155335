"""Errors in one line, flags, atomic files, seeds, intervals, the files of a run: what the scripts share."""
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import (Parser, Run, UserError, all_reduce_sum, atomic_path, catch_stop, check_output, fingerprint,
                    is_text, json_object, load_object, lock, one_line_errors, positive, progress, read_json, seed_for,
                    wilson_interval, write_json, write_text)
from tiny import checkpoints, column, read_log, same_run, same_tensors


@pytest.mark.parametrize("error, code, words", [
    (UserError("a wrong\n flag"), 2, "x.py: error: a wrong flag\n"),
    (FileNotFoundError(2, "No such file", "a.json"), 2, "x.py: error: [Errno 2] No such file: 'a.json'\n"),
    (KeyboardInterrupt(), 130, "x.py: stopped by Ctrl-C")])
def test_a_mistake_is_one_line_and_a_bug_is_not(capfd, error, code, words):
    @one_line_errors("x.py")
    def main(argv):
        raise argv

    with pytest.raises(SystemExit) as exit_info:
        main(error)
    line = capfd.readouterr().err
    assert exit_info.value.code == code and line.startswith(words) and line.count("\n") == 1
    with pytest.raises(KeyError):
        main(KeyError())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_stop_is_caught_only_while_a_script_runs(number):
    """The first one: a second Ctrl-C ends it at once."""
    @one_line_errors("x.py")
    def main(argv=None):
        asked = catch_stop()
        os.kill(os.getpid(), number)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        return asked == [number]

    before = signal.getsignal(number)
    assert main() and signal.getsignal(number) == before


def test_a_flag_has_the_type_of_its_default_and_says_it(capsys):
    parser = Parser(prog="x.py", description="what it does")
    parser.group("model")
    parser.flag("--path", ..., "must be given")
    for name, default in (("--n --number", 8), ("--any", 0), ("--rate", 1.0), ("--on", False), ("--text", None)):
        parser.flag(name, default, f"like {default}")
    for name, default, kind in (("--most", None, positive), ("--json", None, json_object)):
        parser.flag(name, default, "of a type", type=kind)
    parser.flag("--names", ["a", "b"], "several", nargs="+")
    values = list(vars(parser.parse_args(["--path", "p"])).values())
    assert values == ["p", 8, 0, 1.0, False, None, None, None, ["a", "b"]]
    given = '--path p --number 1 --any -3 --rate 2 --on True --text 5 --most 4 --json {"a":[1]} --names c'
    values = list(vars(parser.parse_args(given.split())).values())
    assert repr(values) == "['p', 1, -3, 2.0, True, '5', 4, {'a': [1]}, ['c']]"
    for words in ("model:\n", "like 8 (default: 8)", "like False (default: False)", "like None\n"):
        assert words in parser.format_help()
    for wrong in ("--n 0", "--on yes", "--most 0", "--any x", "--rat 1", "--json 1", "--n"):
        with pytest.raises(SystemExit) as exit_info:
            parser.parse_args(["--path", "p", *wrong.split()])
        line = capsys.readouterr().err
        assert exit_info.value.code == 2 and line.startswith("x.py: error: ") and line.count("\n") == 1


def test_an_object_of_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text("of_the_user.py", "answer = 42\n")
    assert load_object("of_the_user:answer", "--grader") == 42
    for spec in ("of_the_user:nothing", "nowhere:answer", "of_the_user"):
        with pytest.raises(UserError, match=f"--grader {spec} cannot be loaded"):
            load_object(spec, "--grader")


# ---- files
@pytest.mark.parametrize("directory", [False, True])
def test_an_exception_leaves_what_was_there(tmp_path, directory):
    path = tmp_path / "x"
    for text, fails in (("old", False), ("half of the n", True), ("new", False)):
        try:
            with atomic_path(path) as temporary:
                if directory:
                    os.makedirs(temporary)
                with open(os.path.join(temporary, "part") if directory else temporary, "w") as file:
                    file.write(text)
                assert not fails or 1 / 0
        except ZeroDivisionError:
            text = "old"
        assert (path / "part" if directory else path).read_text() == text and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("name, text, words", [
    ("a.json", b"{", "a.json is not valid JSON"), ("b.json", None, "no file"),
    ("c.jsonl", b'{"id": 1}\n\n{"id": 3}\n{"id"\n', "c.jsonl is not valid JSON in line 4"),
    ("d.json", b"\xff\xfe\x00", "d.json is not valid JSON")])
def test_a_broken_file_is_named(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match=words):
        read_json(str(tmp_path / name))


def test_json_and_jsonl(tmp_path):
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")
    write_json(a, {"ü": 1})
    write_text(b, '{"id": "ü"}\n\n{"id": 2}\n')
    assert read_json(a) == {"ü": 1} and "ü" in open(a).read() and read_json(b) == [{"id": "ü"}, {"id": 2}]
    assert is_text("ü 🙂") and not is_text("\ud83d") and not is_text(1)  # half of a surrogate pair


def test_a_fingerprint_is_of_what_is_there(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20))
    (tmp_path / "train.json").write_text("1 2 3")
    first = fingerprint(str(tmp_path))
    (tmp_path / "checkpoint-5").mkdir()
    for name in (".hidden", "loss_log.csv", "x.tmp1", "checkpoint-5/x"):  # what a run leaves beside its model
        (tmp_path / name).write_text("x")
    assert fingerprint(str(tmp_path)) == first and len(first) == 16
    for name, content in (("model.safetensors", bytes(3 * 2**20 - 1) + b"x"), ("train.json", b"7 7 7")):
        (tmp_path / name).write_bytes(content)  # of the same size
        assert fingerprint(str(tmp_path)) != first
        first = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path / "train.json")) and fingerprint("some/hub-id") is fingerprint(None) is None


def test_no_output_eats_an_input(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "train.json").write_text("[]")
    for output, path in (("model", "model"), ("model/actor", "model"), (".", "train.json"), ("x/../model", "model")):
        with pytest.raises(UserError, match="--output_dir .* is where the input"):
            check_output("--output_dir", str(tmp_path / output), [None, str(tmp_path / path)])
    inputs = [str(tmp_path / "model"), str(tmp_path / "train.json"), "a/b"]
    check_output("--output_dir", str(tmp_path / "actor"), inputs)
    check_output("--output_dir", str(tmp_path / "model2"), [str(tmp_path / "model")])


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    @one_line_errors("x.py")
    def main(argv=None):
        lock(str(tmp_path))
        lock(str(tmp_path))  # it is this run's
        if argv:
            with pytest.raises(UserError, match="another run is writing"):
                lock(f"{tmp_path}/.")

    main("twice")
    main()  # the lock went with the run
    assert not tmp_path.exists()  # empty, it goes as well


# ---- processes, numbers
def test_seeds_are_stable_and_separate_their_parts():
    assert seed_for("a", 1) == seed_for("a", "1") != seed_for("a1")
    assert seed_for("a", 12) != seed_for("a1", 2) and 0 <= seed_for("x") < 2**63
    assert seed_for("order", 0, 1) == 8130264713017042820  # on every machine


@pytest.mark.parametrize("k, n, low, high", [  # Newcombe 1998, table I, and the corners
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    (20, 20, 0.8389, 1.0), (5, 10, 0.2366, 0.7634), (0, 0, 0.0, 1.0)])
def test_wilson_interval(k, n, low, high):
    assert wilson_interval(k, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_only_one_rank_shows_progress(capsys):
    for rank in (0, 1):
        assert list(progress(range(3), rank, desc="read")) == [0, 1, 2]
        assert ("read" in capsys.readouterr().err) == (rank == 0)
    assert all_reduce_sum({"task": 1.5}, "cpu") == {"task": 1.5}  # of one process


# ---- the files of a run, without an LM
SETTINGS = {"learning_rate": 0.1, "curriculum": [0.0, 1.0], "contents": {"train_file": "a"}}


def train(out, eval_losses=(3.0, 2.0, 2.5, 2.1), until=None, resume="auto", rank=0):
    """A script's loop with a term of its own; it dies after step `until`, between its line and its checkpoint."""
    run = Run(str(out), SETTINGS, resume, rank)
    if run.is_over(len(eval_losses)):
        return run
    os.makedirs(out, exist_ok=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    if run.checkpoint:
        model.load_state_dict(load_file(os.path.join(run.checkpoint, "model.safetensors")))
        run.load_optimizer(model, optimizer)
    run.clear()
    for step in range(run.state["step"], len(eval_losses)):
        loss = model(torch.full((1, 3), step + 1.0)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.state |= {"step": step + 1, "stopped": step + 1 == len(eval_losses)}
        run.note_eval(eval_losses[step], patience=0)
        if rank == 0:
            run.log({"step": step + 1, "hinge": loss.item(), "eval_loss": eval_losses[step], "memory_gb": 1})
        if step + 1 == until:
            return run
        run.save(model, write_weights, optimizer, keep=1)
    if rank == 0:
        run.publish(["hinge", "eval_loss"], "nats")
    return run


def write_weights(directory, weights):
    os.makedirs(directory)
    save_file(weights, os.path.join(directory, "model.safetensors"))


@pytest.mark.parametrize("until", [1, 3, 4])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, until):
    """Its last line had no checkpoint and is written again; a torn line and half-written files go."""
    train(tmp_path / "whole")
    train(tmp_path / "o", until=until)
    with open(tmp_path / "o" / "loss_log.csv", "a") as file:
        file.write(f"{until + 1},2.0")
    (tmp_path / "o" / "checkpoint-4.tmp1").mkdir()
    assert train(tmp_path / "o").checkpoint == (str(tmp_path / f"o/checkpoint-{until - 1}") if until > 1 else None)
    assert same_run(tmp_path / "o", tmp_path / "whole")
    # killed in the files of the end: trainer_state.json comes last
    os.remove(tmp_path / "o" / "trainer_state.json")
    os.remove(tmp_path / "o" / "model.safetensors")
    train(tmp_path / "o")
    assert same_run(tmp_path / "o", tmp_path / "whole")


def test_other_settings_and_other_ranks(tmp_path):
    train(tmp_path)
    with pytest.raises(UserError, match="another --learning_rate: .*--resume never"):
        Run(str(tmp_path), SETTINGS | {"learning_rate": 0.2})
    with pytest.raises(UserError, match="another file or folder at --train_file: "):
        Run(str(tmp_path), SETTINGS | {"contents": {"train_file": "b"}})
    train(tmp_path, [1.0, 2.0], resume="never")  # nothing of the old run stays
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"] and column(tmp_path, "step") == [1, 2]
    train(tmp_path / "o", rank=1)
    assert not os.listdir(tmp_path / "o")


def test_a_finished_run_goes_on_if_it_is_made_longer(tmp_path):
    train(tmp_path / "o", [3.0, 2.0])
    train(tmp_path / "o", [3.0, 2.0, 2.5, 2.1])
    train(tmp_path / "whole")
    assert read_log(tmp_path / "o") == read_log(tmp_path / "whole")
    assert same_tensors(tmp_path / "o" / "checkpoint-4", tmp_path / "whole" / "checkpoint-4")
