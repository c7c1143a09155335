"""Stage 4b: what is counted is what was answered, whatever the batch, the ranks and the kills."""
import json
import os
import shutil
import sys
import types

import pytest
import torch

import collect
import eval_math
import hf
from common import read_json, write_json
from eval_math import Job, chooser, is_equiv, main, read_problems, summarize
from model import ADAPTER_FORMAT, LatentActor, LatentShards, add_markers, init_markers, make_adapter
from tiny import CHATML, make_lm, make_tokenizer, save_lm, save_model, write_messages

SUBJECTS = {"algebra": "Algebra", "counting_and_probability": "Counting & Probability", "geometry": "Geometry",
            "intermediate_algebra": "Intermediate Algebra", "number_theory": "Number Theory",
            "prealgebra": "Prealgebra", "precalculus": "Precalculus"}


def write_math(root, split="test", number=1):
    """MATH's own directory: seven subjects, five levels, one problem each, answers 0 to 3."""
    for s, (folder, name) in enumerate(SUBJECTS.items()):
        for level in range(1, 6):
            write_json(os.path.join(root, split, folder, f"{level * number}.json"), {
                "problem": f"What is {'very ' * (level % 3)}{name} {level}?", "level": f"Level {level}",
                "type": name, "solution": f"It is $\\boxed{{{(s + level) % 4}}}$."})
    return str(root)


def answering_lm():
    """A tiny LM that often says an answer or ends: words for \\boxed{0} to \\boxed{3}, louder than the others."""
    lm, tokenizer = make_lm(), make_tokenizer()
    tokenizer.add_tokens([f"\\boxed{{{d}}}{' ' * k}" for d in range(4) for k in range(3)])
    boxes = range(len(tokenizer) - 12, len(tokenizer))
    lm.lm_head.weight.data[[tokenizer.eos_token_id, *boxes]] *= 2
    return lm, tokenizer


def save_actor(directory, lm, tokenizer):
    """An actor whose random adapter is loud enough to change what it says."""
    torch.manual_seed(1)
    arguments = {"sender_dim": 48, "dim": 32, "num_heads": 4, "scale": 1.0, "output_scale": 0.3}
    adapter = {"class": "model:HiddenStateProcessor", "arguments": arguments}
    info = {"kind": "latent", "adapter": adapter, "format_version": ADAPTER_FORMAT}
    LatentActor(lm, tokenizer, make_adapter(adapter), info).save(directory)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """MATH's directory, a plain LM, an actor, and messages for all problems."""
    root = tmp_path_factory.mktemp("math")
    data, (lm, tokenizer) = write_math(root / "MATH"), answering_lm()
    save_lm(root / "lm", lm, tokenizer)
    init_markers(lm, add_markers(tokenizer))
    save_actor(root / "actor", lm, tokenizer)
    LatentActor(lm, tokenizer, None, {"kind": "text", "format_version": ADAPTER_FORMAT}).save(root / "text_actor")
    tasks = read_problems(data)
    latents = {t["id"]: torch.randn(3 + n % 4, 48) for n, t in enumerate(tasks)}
    write_messages(root / "messages", latents, {t["id"]: {
        "task": t["task"], "plan": f"add {n}", "plan_token_ids": [], "sender_ms": 2.0} for n, t in enumerate(tasks)})
    return types.SimpleNamespace(data=data, tasks=tasks, **{k: str(root / k) for k in ("lm", "actor", "text_actor",
                                                                                        "messages")})


SAMPLED = ["--temperature", 1.0, "--samples_per_question", 3]


def argv(world, out, *more, variants=("latent", "text", "no_comm", "cross_task", "randomrot"), model="actor"):
    messages = [] if model == "lm" else ["--hidden_data", world.messages]
    return [str(a) for a in ("--model_path", getattr(world, model), *messages, "--dataset", world.data, "--variants",
                             *variants, "--output_dir", out, "--torch_dtype", "fp32", "--max_length", 6,
                             "--batch_size", 32, *more)]


def plain(world, out, *more):
    """A model that is told nothing."""
    return argv(world, out, *more, model="lm", variants=["no_comm"])


def results(out):
    """Lines of detailed_results.jsonl, less the times."""
    rows = read_json(os.path.join(out, "detailed_results.jsonl"))
    return [{k: v for k, v in row.items() if k not in ("actor_ms", "timestamp")} for row in rows]


def summary(out):
    return read_json(os.path.join(out, "summary.json"))


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    """Sampled answers of one uninterrupted run on one rank."""
    out = tmp_path_factory.mktemp("reference") / "o"
    main(argv(world, out, *SAMPLED, variants=("latent", "no_comm")))
    return out


# ---- the files
def test_actor_gives_complete_files(world, tmp_path, capsys):
    variants = ("latent", "text", "no_comm", "cross_task", "randomrot", "cot_full")
    main(argv(world, tmp_path / "o", "--baseline_path", world.text_actor, variants=variants))
    text, rows, shards = capsys.readouterr().out, results(tmp_path / "o"), LatentShards(world.messages)
    assert [(r["variant"], r["id"]) for r in rows] == [(v, t["id"]) for v in variants for t in world.tasks]
    for r in rows:
        assert r["question"] == f"{shards.records[r['id']]['task']}\nPut the final answer in \\boxed{{}}."
        split, folder, number = r["id"].split("/")
        assert (split, SUBJECTS[folder], number) == ("test", r["subject"], r["level"])
        assert r["reference_answer"] == str((list(SUBJECTS).index(folder) + int(number)) % 4)
        assert r["extracted_answer"] == eval_math.extract_answer(r["model_output"])
        assert r["correct"] == is_equiv(r["extracted_answer"], r["reference_answer"])
        assert r["variant"] not in ("latent", "randomrot") or r["message_length"] == shards.lengths[r["id"]]
        assert (r["message_length"] > 0) == (r["variant"] != "no_comm") == (r["sender_ms"] > 0)
        assert (r["message_of"] == r["id"]) == (r["variant"] not in ("no_comm", "cross_task"))
    outputs = {tuple(r["model_output"] for r in rows if r["variant"] == v)
               for v in ("latent", "cross_task", "no_comm", "text")}
    assert len(outputs) == 4  # each variant is told something else
    s = summary(tmp_path / "o")
    assert s["variants"] == summarize(rows, is_equiv) and 0 < s["variants"]["latent"]["accuracy"] < 1
    assert list(s["differences"]) == ["gain", "pairing", "presence"] and "\ngain " in text
    accuracy = {name: row["accuracy"] for name, row in s["variants"].items()}
    assert s["differences"]["gain"][0] == pytest.approx(accuracy["latent"] - accuracy["no_comm"])
    assert list(s["variants"]["latent"]["by_level"]) == list("12345")
    assert list(s["variants"]["latent"]["by_subject"]) == sorted(SUBJECTS.values())
    assert f"\nlatent {s['variants']['latent']['accuracy']:27.3f}" in text
    assert "\nCounting & Probability       5" in text
    assert (tmp_path / "o" / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_plain_lm_answers_as_generate_does(world, tmp_path):
    """Greedy answers against Hugging Face's own loop, one prompt at a time."""
    main(plain(world, tmp_path / "o"))
    lm, tokenizer = answering_lm()
    rows = results(tmp_path / "o")
    assert len(rows) == 35 and len({len(r["model_output"]) for r in rows}) > 3
    for r in rows[::4]:
        ids = tokenizer(tokenizer.apply_chat_template([{"role": "user", "content": r["question"]}], tokenize=False,
                                                      add_generation_prompt=True), return_tensors="pt").input_ids
        out = lm.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
        assert r["model_output"] == tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()


def test_sender_and_actor_are_asked_as_in_training(world, tmp_path):
    """collect.py math writes the same messages as --sender, and a train.json with the same questions."""
    sender = save_model(tmp_path / "sender")
    collect.main(["math", "--model_name_or_path", sender, "--dataset_path", world.data, "--split", "test",
                  "--output_dir", str(tmp_path / "m"), "--max_samples", "3", "--max_new_tokens", "4",
                  "--torch_dtype", "fp32"])
    main(plain(world, tmp_path / "o", "--num_samples", 3, "--sender", sender, "--max_plan_tokens", 4))
    asked = [(t["id"], t["conversations"][0]["value"]) for t in read_json(str(tmp_path / "m" / "train.json"))]
    assert asked == [(r["id"], r["question"]) for r in results(tmp_path / "o")]
    messages, expected = (LatentShards(str(path)) for path in (tmp_path / "o" / "messages", tmp_path / "m"))
    assert messages.sender == expected.sender and messages.records.keys() == expected.records.keys()
    assert all(torch.equal(messages[task_id], expected[task_id]) for task_id in expected.records)


# ---- the same answers in any company
@pytest.mark.parametrize("batch_size", [1, 7])
def test_answers_do_not_depend_on_the_batch(world, reference, tmp_path, batch_size):
    main(argv(world, tmp_path / "o", *SAMPLED, "--batch_size", batch_size, "--variants", "latent"))
    assert results(tmp_path / "o") == [r for r in results(reference) if r["variant"] == "latent"]


def test_samples_are_seeded_and_differ(world, reference, tmp_path):
    rows = [r for r in results(reference) if r["variant"] == "latent"]
    first, second, third = ([r["model_output"] for r in rows if r["sample"] == k] for k in range(3))
    assert first != second and second != third and first != third
    main(argv(world, tmp_path / "o", "--temperature", 1.0, variants=["latent"]))  # one, or the first of three
    assert [r["model_output"] for r in results(tmp_path / "o")] == first
    main(argv(world, tmp_path / "s", "--temperature", 1.0, "--seed", 1, variants=["latent"]))
    assert [r["model_output"] for r in results(tmp_path / "s")] != first


def test_sampling_follows_the_models_distribution(monkeypatch):
    """At a temperature, whoever has left the batch. Numbers that lie evenly in [0, 1) draw what is likely."""
    numbers = iter((torch.arange(2000, dtype=torch.float64)[:, None] + 0.5) / 2000)
    monkeypatch.setattr(eval_math, "uniform_numbers", lambda seed, steps: next(numbers))
    choose = chooser([Job("latent", draw, 0) for draw in range(2000)], [{"id": "a"}], 0.5, 0, 1)
    logits = torch.randn(20)
    drawn = choose(logits.expand(2000, -1), list(range(2000)), 0)
    counts = torch.bincount(drawn, minlength=20) / 2000
    assert (counts - (logits / 0.5).softmax(-1)).abs().max() < 2 / 2000
    assert choose(logits.expand(2, -1), [1999, 0], 0).tolist() == [drawn[1999], drawn[0]]


def lines_of_parts(out):
    return [line for path in sorted((out / "parts").iterdir()) for line in path.read_text().splitlines() if line]


def test_killed_and_resumed_on_two_ranks(world, reference, tmp_path, forked):
    """What a kill leaves of one rank's answers: 99 and half a line. The rest is answered, and nothing twice."""
    out = tmp_path / "o"
    shutil.copytree(reference, out)
    part = out / "parts" / "rank00000.jsonl"
    lines = [line for line in part.read_text().splitlines(keepends=True) if line.strip()]
    part.write_text("".join(lines[:99]) + lines[99][:len(lines[99]) // 2])
    for name in ("summary.json", "detailed_results.jsonl", "results.png"):
        (out / name).unlink()
    flags = argv(world, out, *SAMPLED, "--batch_size", 50, variants=("latent", "no_comm"))
    for _ in range(2):  # the second time nothing is left to do
        run = forked("eval_math", flags, world=2)
        assert run["codes"] == [0, 0], run["err"]
        assert sorted(os.listdir(out / "parts")) == ["rank00000.jsonl", "rank00001.jsonl"]
        assert len(lines_of_parts(out)) == 2 * 35 * 3 + 1  # and the torn one
    assert results(out) == results(reference) and summary(out) == summary(reference)


# ---- the figures
def record(task, sample, extracted, reference, **more):
    return {"variant": "latent", "id": task, "sample": sample, "level": "1", "subject": "A",
            "extracted_answer": extracted, "correct": extracted == reference, "message_length": 2, "tokens": 10,
            "cut": False, **more}


def test_pass_at_1_pass_at_n_and_majority_by_hand():
    rows = [record("a", k, said, "5") for k, said in enumerate(["5", "7", "x = 7", None])]
    rows += [record("b", k, said, "2", level="2", cut=k < 2) for k, said in enumerate(["1", "2", "2", None])]
    s = summarize(rows, is_equiv)["latent"]
    assert s["questions"] == 2 and s["samples"] == 8 and s["no_answer"] == 2
    assert s["cut"] == 2 and s["by_level"]["1"]["cut"] == 0 and s["by_level"]["2"]["cut"] == 2
    assert s["accuracy"] == (1 / 4 + 2 / 4) / 2 and s["pass_at_n"] == 1.0
    assert s["majority"] == 0.5  # a: 7 and x = 7 are one answer, and outvote 5
    assert s["by_level"]["2"]["accuracy"] == 0.5 and s["by_level"]["2"]["majority"] == 1.0
    low, high = s["interval"]
    assert low < 0.375 < high and high - low > 0.7  # two questions, not eight
    # the vote is counted by the grader: to another one 7 and x = 7 are two answers, and of the tie 5 is the first
    assert summarize(rows, lambda answer, reference: answer == reference)["latent"]["majority"] == 1.0
    # one that reads numbers only may fail on two wrong answers, which nobody promised it
    assert summarize(rows, lambda answer, reference: float(answer) == float(reference))["latent"]["majority"] == 1.0
    assert summarize(rows, lambda answer, reference, reply: True)["latent"]["majority"] is None


def save_deaf(directory, end=True):
    """The answering LM, where reading "~" makes its logits NaN; end=False: it never ends."""
    lm, tokenizer = answering_lm()
    lm.model.embed_tokens.weight.data[tokenizer("~").input_ids] = torch.nan
    if not end:
        lm.model.norm.weight.data.zero_()  # all logits are 0: the first token of the table, for ever
    return save_lm(directory, lm, tokenizer)


def write_problems(path, problems):
    write_json(path, [{"id": n, "problem": problem, "answer": "1"} for n, problem in enumerate(problems)])
    return path


@pytest.mark.parametrize("problems, words, kept", [
    (["one", "four" * 2000], ["id 1 (no_comm)", "context of 4096"], []),  # the longest first: said at once
    (["one", "th~ee" * 3, "five" * 9], ["id 1 (no_comm)", "not finite", "--torch_dtype bf16 or fp32"], ["2"])])
def test_what_cannot_be_answered_is_one_line(world, tmp_path, refuses, problems, words, kept):
    """And what was answered before is kept."""
    data, deaf = write_problems(tmp_path / "d.json", problems), save_deaf(tmp_path / "deaf")
    refuses(main, plain(world, tmp_path / "o", "--dataset", data, "--self_check", "false", "--batch_size", 1,
                        "--model_path", deaf), *words)
    assert [json.loads(line)["id"] for line in lines_of_parts(tmp_path / "o")] == kept


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
                         ids=lambda error: type(error).__name__)
def test_out_of_memory(world, reference, tmp_path, refuses, monkeypatch, error):
    """One line; finished answers are kept, and the same command with smaller batches goes on. Other errors are
    not hidden."""
    flags = argv(world, tmp_path / "o", *SAMPLED, "--batch_size", 50, variants=("latent", "no_comm"))
    batches = iter([None, error, RuntimeError("CUDA error: an illegal memory access was encountered")])

    def decode(*args):
        problem = next(batches)
        if problem:
            raise problem
        return hf.decode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(eval_math, "decode", decode)
        refuses(main, flags, "out of memory with 50 answers", "--batch_size")
        with pytest.raises(RuntimeError, match="illegal"):
            main(flags)
    assert len(lines_of_parts(tmp_path / "o")) == 50
    main([*flags, "--batch_size", "20"])
    assert results(tmp_path / "o") == results(reference)


def test_cut_answers(world, tmp_path, capsys, refuses):
    """An answer stops at --max_length and at the end of the actor's context, and is counted as cut."""
    data = write_problems(tmp_path / "d.json", ["x" * n for n in (10, 3900)])
    flags = plain(world, tmp_path / "o", "--dataset", data, "--max_length", 400,
                  "--model_path", save_deaf(tmp_path / "mute", end=False))
    refuses(main, flags, "mute", "--self_check")
    capsys.readouterr()
    main([*flags, "--self_check", "false"])
    rows = results(tmp_path / "o")
    assert [r["cut"] for r in rows] == [True, True] and summary(tmp_path / "o")["variants"]["no_comm"]["cut"] == 2
    assert rows[0]["tokens"] == 400 and 50 < rows[1]["tokens"] < 160
    lines = capsys.readouterr().out.splitlines()
    heading, line = [text.split() for text in lines if text.startswith(("vari", "no_c"))]
    assert line[-3] == "2" and heading[-3] == "cut"


def test_a_sender_that_is_asked_now(world, tmp_path, capsys):
    sender = save_model(tmp_path / "sender", width=48)
    main(argv(world, tmp_path / "o", "--num_samples", 4, "--sender", sender, "--latent_steps", 4, 2,
              "--subjects", "geometry", "--sender_batch_size", 3, variants=["latent", "text", "self"]))
    assert "self is left out" in capsys.readouterr().out
    said = {(r["variant"], r["message_length"]) for r in results(tmp_path / "o") if "_k" in r["variant"]}
    assert said == {("latent_k4", 4), ("latent_k2", 2)}
    messages = LatentShards(str(tmp_path / "o" / "messages_k4"))
    assert set(messages.records) == {f"test/geometry/{n}" for n in range(1, 5)}
    assert list(summary(tmp_path / "o")["variants"]) == ["latent", "latent_k4", "latent_k2", "text"]


def test_keep_ratio_and_messages_of_others(world, tmp_path):
    """Others have a row under their own name, read by the actor of --model_path."""
    records = {t["id"]: {"task": t["task"], "plan": "", "plan_token_ids": [], "sender_ms": 3.0} for t in world.tasks}
    other = write_messages(tmp_path / "other", {k: torch.randn(2, 48) for k in records}, records, model="other")
    main(argv(world, tmp_path / "o", "--messages", f"llama={other}", "--keep_ratio", 1, 0.5,
              "--num_samples", 4, "--torch_dtype", "bf16", variants=["none"]))
    said, lengths = results(tmp_path / "o"), [LatentShards(world.messages).lengths[t["id"]] for t in world.tasks[:4]]
    assert [(r["variant"], r["message_length"], r["sender_ms"]) for r in said] == [
        *(("latent", n, 2.0) for n in lengths), *(("latent_keep0.5", round(n / 2), 2.0) for n in lengths),
        *[("llama", 2, 3.0)] * 4]
    assert summary(tmp_path / "o")["actors"] == dict.fromkeys(("latent", "latent_keep0.5", "llama"), world.actor)


# ---- graders
GRADERS = """
def close(answer, reference, tolerance=1):
    return answer is not None and abs(int(answer) - int(reference)) <= tolerance

def reads(answer, reference, reply):
    return reference in reply

def fails(answer, reference):
    return int("x")
"""


def test_a_grader_of_your_own(world, tmp_path, monkeypatch, refuses, capsys):
    (tmp_path / "my_graders.py").write_text(GRADERS)
    monkeypatch.chdir(tmp_path)
    flags = [*SAMPLED, "--num_samples", 7, "--grader"]
    main(plain(world, tmp_path / "o", *flags, "my_graders:close"))
    rows = [r for r in results(tmp_path / "o") if r["extracted_answer"]]
    apart = [(abs(int(r["extracted_answer"]) - int(r["reference_answer"])), r["correct"]) for r in rows]
    assert (1, True) in apart and all(right == (distance <= 1) for distance, right in apart)
    assert 0 <= summary(tmp_path / "o")["variants"]["no_comm"]["majority"] <= 1
    capsys.readouterr()
    main(plain(world, tmp_path / "r", *flags, "my_graders:reads"))
    assert all(r["correct"] == (r["reference_answer"] in r["model_output"]) for r in results(tmp_path / "r"))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("no_comm"))
    assert summary(tmp_path / "r")["variants"]["no_comm"]["majority"] is None and line.split()[5] == "-"
    refuses(main, plain(world, tmp_path / "p", "--grader", "my_graders:fails"), "fails", "id test/", "'x'")
    monkeypatch.setitem(sys.modules, "math_verify", None)
    for name, words in (("my_graders:far", "module:name"), ("my_grade:close", "module:name"),
                        ("builtin", "module:name"), ("math_verify", "pip install math-verify")):
        refuses(main, plain(world, tmp_path / "q", "--grader", name), "--grader", name, words)


def save_parrot(directory, text):
    """An LM that always says the same."""
    lm, tokenizer = answering_lm()
    tokenizer.add_tokens([text, text + " "])  # the scores of both have different signs, and one of them wins
    lm.lm_head.weight.data[len(tokenizer) - 2] = 1000 * lm.lm_head.weight.data[0]
    lm.lm_head.weight.data[len(tokenizer) - 1] = -1000 * lm.lm_head.weight.data[0]
    return save_lm(directory, lm, tokenizer)


def test_thoughts_are_not_graded(world, tmp_path):
    parrot = save_parrot(tmp_path / "lm", "<think>\\boxed{1}?</think>\nNo box.")
    main(plain(world, tmp_path / "o", "--model_path", parrot, "--max_length", 1))
    assert {(r["model_output"], r["extracted_answer"]) for r in results(tmp_path / "o")} == {("No box.", None)}


def test_chat_template_kwargs_reach_the_template(world, tmp_path):
    lm, tokenizer = answering_lm()
    tokenizer.chat_template = CHATML.replace("helpful", "{{ mood | default('helpful') }}")
    path, said = save_lm(tmp_path / "lm", lm, tokenizer), []
    for n, mood in enumerate(("{}", '{"mood": "helpful"}', '{"mood": "lazy"}')):
        main(plain(world, tmp_path / str(n), "--chat_template_kwargs", mood, "--model_path", path))
        said.append([r["model_output"] for r in results(tmp_path / str(n))])
    assert said[0] == said[1] != said[2]


# ---- files of every shape
SHAPES = {  # name: (records, [(id, level, subject, reference)], the reply in train.json)
    "MATH-500": ([{"problem": "p", "solution": "so \\boxed{\\frac12}", "answer": "\\frac{1}{2}", "subject": "Algebra",
                   "level": level, "unique_id": f"test/algebra/{level}.json"} for level in (2, 5)],
                 [(f"test/algebra/{n}.json", str(n), "Algebra", "\\frac{1}{2}") for n in (2, 5)],
                 "so \\boxed{\\frac12}"),
    "GSM8K": ([{"question": f"p {n}", "answer": f"He has 2 <<1+1=2>>2.\n#### {n}"} for n in ("42", "1,000")],
              [(None, "", "", "42"), (None, "", "", "1,000")], "He has 2 <<1+1=2>>2.\n\\boxed{42}"),
    "AIME": ([{"id": n, "problem": "p", "solution": "long", "answer": "204", "year": "2024"} for n in (60, 61)],
             [("60", "", "", "204"), ("61", "", "", "204")], "long"),
    "AMC": ([{"id": n, "question": "p", "answer": 27.0, "url": "u"} for n in range(2)],
            [("0", "", "", "27"), ("1", "", "", "27")], "\\boxed{27}"),
    "ToRA": ([{"idx": n, "problem": "p", "level": "Level 3", "type": "Geometry", "solution": "\\boxed{5\\pi}"}
              for n in range(2)], [(str(n), "3", "Geometry", "5\\pi") for n in range(2)], "\\boxed{5\\pi}")}


@pytest.mark.parametrize("name", SHAPES)
def test_fields_are_found(tmp_path, name):
    """MATH's directory is the world of the other tests; these are what people have beside it."""
    (records, expected, reply), path = SHAPES[name], tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    tasks = read_problems(str(path))
    for task, (task_id, *more) in zip(tasks, expected, strict=True):
        assert task["id"] == (task_id or task["id"]) and task["task"][0] == "p"
        assert [task["level"], task["subject"], task["reference"]] == more
    assert tasks[0]["reply"] == reply


def test_fields_that_are_given(world, tmp_path, refuses):
    """A name that the user gives is read in every record, or is an error: a mistyped id is never a position."""
    data = tmp_path / "d.jsonl"
    records = [{"id": "a", "key": "k1", "problem": "p", "prompt": "q", "gt": 7, "answer": "8", "text": "\\boxed{9}"},
               {"id": "b", "key": "k2", "problem": "p", "prompt": "r", "gt": 7, "answer": "8", "text": "\\boxed{9}"}]
    data.write_text("\n".join(map(json.dumps, records)))
    flags = ["--dataset", data, "--id_field", "key", "--task_field", "prompt"]
    for out, more, reference in (("gt", ["--answer_field", "gt"], "7"), ("answer", [], "8"),
                                 ("text", ["--answer_field", "", "--response_field", "text"], "9")):
        main(plain(world, tmp_path / out, *flags, *more))
        said = [(r["id"], r["question"][0], r["reference_answer"]) for r in results(tmp_path / out)]
        assert said == [("k1", "q", reference), ("k2", "r", reference)]
    for flag in ("--id_field", "--task_field", "--answer_field", "--response_field"):
        refuses(main, plain(world, tmp_path / "p", "--dataset", data, flag, "typo"),
                str(data), "id a", flag, "'typo'", "prompt")


# ---- bad input
@pytest.mark.parametrize("flags, words", [
    (["--samples_per_question", 2], ["--temperature", "--samples_per_question"]),
    (["--temperature", -1], ["--temperature"]), (["--variants", "telepathy"], ["telepathy", "no_comm"]),
    (["--split", "dev"], ["dev", "['test']"]), (["--subjects", "poetry"], ["poetry", "Number Theory"]),
    (["--dataset", "/nowhere/MATH"], ["no file or directory /nowhere/MATH"]),
    (["--hidden_data", "/nowhere"], ["/nowhere"]), (["--latent_steps", 4], ["--sender"]),
    (["--keep_ratio", 2], ["--keep_ratio"]), (["--variants", "self"], ["self needs --sender"]),
    (["--sender", "/nowhere"], ["--hidden_data", "--latent_steps"]),
    (["--sender_batch_size", 0], ["--sender_batch_size"]),
    (["--question_template", "x"], ["--question_template"]), (["--model_path", "/nowhere/m"], ["/nowhere/m"]),
    (["--variants", "cot_full"], ["cot_full", "--baseline_path"]), (["--surprise", 1], ["--surprise"])],
    ids=lambda words: " ".join(map(str, words)))
def test_bad_flags(world, tmp_path, refuses, flags, words):
    refuses(main, argv(world, tmp_path / "o", *flags), *words)
    assert not (tmp_path / "o").exists()


def test_bad_data_and_settings(world, tmp_path, refuses):
    refuses(main, argv(world, tmp_path / "o", model="lm", variants=["latent"]), "no adapter", "train_actor.py")
    data = write_math(tmp_path / "MATH")
    bad = tmp_path / "MATH" / "test" / "geometry" / "3.json"
    for text, words in (('{"problem": "x", "solution": "five"}', ["test/geometry/3", "\\boxed"]),
                        ('{"problem": "x"}', ["test/geometry/3", "solution"]), ("[1]", ["3.json", "one problem"]),
                        ("{", ["3.json", "not valid JSON"]), ('{"solution": "x"}', ["test/geometry/3", "'problem'"])):
        bad.write_text(text)
        refuses(main, plain(world, tmp_path / "o", "--dataset", data), *words)
    more = write_math(tmp_path / "MORE", number=7)
    refuses(main, argv(world, tmp_path / "o", "--dataset", more), world.messages, "no message")
    main(argv(world, tmp_path / "p", "--num_samples", 2, variants=["no_comm"]))
    refuses(main, argv(world, tmp_path / "p", "--num_samples", 2, "--seed", 1, variants=["no_comm"]), "another --seed")
