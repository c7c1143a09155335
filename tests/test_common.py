"""Errors in one line, atomic files, seeds, intervals, checkpoints, log: what the scripts share."""
import argparse
import os
import signal

import pytest

from common import (Parser, UserError, atomic_path, boolean, catch_sigterm, fingerprint, json_object,
                    one_line_errors, open_log, plot_bars, plot_curves, positive, progress, prune_checkpoints,
                    read_json, seed_for, share, wilson_interval, write_json, write_text)


# ---- errors and flags

@pytest.mark.parametrize("error, code, words", [
    (UserError("a wrong\n flag"), 2, "x.py: error: a wrong flag\n"),
    (FileNotFoundError(2, "No such file", "a.json"), 2, "x.py: error: [Errno 2] No such file: 'a.json'\n"),
    (KeyboardInterrupt(), 130, "x.py: stopped by Ctrl-C"),
    (RuntimeError("Connection closed by peer"), 1, "x.py: rank 0 stops because another rank did"),
    (BrokenPipeError(), 1, "x.py: the reader of the output is gone")])
def test_a_mistake_is_one_line(capfd, error, code, words):
    @one_line_errors("x.py")
    def main(argv=None):
        raise error

    stdout = os.dup(1)  # a broken pipe leaves the script's own output closed
    with pytest.raises(SystemExit) as exit_info:
        main([])
    os.dup2(stdout, 1)
    message = capfd.readouterr().err
    assert exit_info.value.code == code and message.startswith(words) and message.count("\n") == 1


def test_a_bug_is_no_mistake_of_the_users():
    @one_line_errors("x.py")
    def main(argv=None):
        return {"value": 1}[argv]

    assert main("value") == 1
    with pytest.raises(KeyError):
        main("nothing")


def test_sigterm_is_caught_only_while_a_script_runs():
    @one_line_errors("x.py")
    def main(argv=None):
        asked = catch_sigterm()
        os.kill(os.getpid(), signal.SIGTERM)
        return bool(asked)

    before = signal.getsignal(signal.SIGTERM)
    assert main() and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("kind, right, wrong", [
    (boolean, {"true": True, "False": False}, ["yes", "1", ""]),
    (positive, {"1": 1, "30": 30}, ["0", "-1", "x"]),
    (share, {"1": 1.0, "0.5": 0.5}, ["0", "1.5", "nan"]),
    (json_object, {'{"a": [1]}': {"a": [1]}}, ["1", "{", "x"])])
def test_types_of_flags(kind, right, wrong):
    for text, value in right.items():
        assert kind(text) == value
    for text in wrong:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            kind(text)


def test_a_wrong_flag_is_one_line(capsys):
    parser = Parser(prog="x.py", allow_abbrev=False)
    parser.add_argument("--number", type=positive)
    for argv in (["--numb", "1"], ["--number", "0"], ["--number"]):
        with pytest.raises(SystemExit) as exit_info:
            parser.parse_args(argv)
        line = capsys.readouterr().err
        assert exit_info.value.code == 2 and line.startswith("x.py: error: ") and line.count("\n") == 1


# ---- files

@pytest.mark.parametrize("directory", [False, True])
def test_an_exception_leaves_the_old_file(tmp_path, directory):
    path = tmp_path / "file"
    if not directory:
        write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        if directory:
            os.makedirs(temporary)
            temporary = os.path.join(temporary, "part")
        with open(temporary, "w") as file:
            file.write("half of the n")
        assert not path.exists() if directory else path.read_text() == "old"
        raise RuntimeError
    assert os.listdir(tmp_path) == ([] if directory else ["file"])
    if not directory:
        assert path.read_text() == "old"
        write_text(path, "new")
        assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name, text, words", [
    ("a.json", "{", "a.json is not valid JSON"), ("b.json", None, "no file"),
    ("c.jsonl", '{"id": 1}\n\n{"id": 3}\n{"id"\n', "c.jsonl is not valid JSON in line 4"),
    ("d.json", b"\xff\xfe\x00", "d.json is not valid JSON")])
def test_a_broken_file_is_named(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words):
        read_json(str(tmp_path / name))


def test_jsonl_is_a_list_of_records(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "ü"}\n\n{"id": 2}\n', encoding="utf-8")
    assert read_json(str(tmp_path / "a.jsonl")) == [{"id": "ü"}, {"id": 2}]


def test_weights_trained_anew_have_another_fingerprint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20))
    first = fingerprint(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    assert fingerprint(str(tmp_path)) == first and len(first) == 16
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20 - 1) + b"x")
    assert fingerprint(str(tmp_path)) != first and fingerprint("some/hub-id") is None


# ---- numbers

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
        bar = progress(range(3), rank=rank, desc="read", unit="sample")
        assert list(bar) == [0, 1, 2]
    progress.write("a line")
    assert capsys.readouterr().out == "a line\n"


# ---- checkpoints, log, pictures

def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    prune_checkpoints(str(tmp_path), 1, best_step=4)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-12", "checkpoint-4", "checkpoint-x"]
    prune_checkpoints(str(tmp_path), 1, best_step=None)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-12", "checkpoint-x"]


def test_the_log_goes_on_after_the_checkpoint(tmp_path):
    """What came after it is run, and logged, again; a line that a kill tore is dropped."""
    path = str(tmp_path / "loss_log.csv")
    file, writer = open_log(path, ["step", "loss", "memory_gb"], 0)
    writer.writerows({"step": step, "loss": step / 2, "memory_gb": 1} for step in (1, 2, 3))
    file.write("4,2.0")
    file.close()
    file, writer = open_log(path, ["step", "loss", "memory_gb"], 2)
    writer.writerow({"step": 3, "loss": 9, "memory_gb": 1})
    file.close()
    with open(path) as file:
        assert file.read().split() == ["step,loss,memory_gb", "1,0.5,1", "2,1.0,1", "3,9,1"]


def test_pictures_are_written(tmp_path):
    write_text(str(tmp_path / "log.csv"), "step,loss,sep\n1,2.0,0\n2,1.0,\n")
    plot_curves(str(tmp_path / "log.csv"), str(tmp_path / "a.png"), ["loss", "sep", "eval_loss"], "nats")
    plot_bars(str(tmp_path / "b.png"), ["latent", "text"], [0.9, 0.5], [(0.8, 1.0), (0.4, 0.6)], "success")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    write_json(str(tmp_path / "x.json"), {"ü": 1})
    assert "ü" in (tmp_path / "x.json").read_text()
