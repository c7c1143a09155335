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
from data import load_tasks, text_ids
from eval_math import generate, load_grader, main, read_problems, summarize
from model import HiddenStateProcessor, LatentActor, LatentShards, add_markers, init_markers, write_shard
from tiny import CHATML, make_lm, make_tokenizer, save_model
from variants import message_sample

SUBJECTS = {"algebra": "Algebra", "counting_and_probability": "Counting & Probability", "geometry": "Geometry",
            "intermediate_algebra": "Intermediate Algebra", "number_theory": "Number Theory",
            "prealgebra": "Prealgebra", "precalculus": "Precalculus"}


def write_math(root, split="test", number=1):
    """MATH's own directory: seven subjects, five levels, one problem each, answers 0 to 3."""
    for s, (folder, name) in enumerate(SUBJECTS.items()):
        os.makedirs(os.path.join(root, split, folder))
        for level in range(1, 6):
            with open(os.path.join(root, split, folder, f"{level * number}.json"), "w") as f:
                json.dump({"problem": f"What is {'very ' * (level % 3)}{name} {level}?", "level": f"Level {level}",
                           "type": name, "solution": f"It is $\\boxed{{{(s + level) % 4}}}$."}, f)
    return str(root)


def answering_lm():
    """A tiny LM that often says an answer or ends: words for \\boxed{0} to \\boxed{3}, louder than the others."""
    lm, tokenizer = make_lm(), make_tokenizer()
    tokenizer.add_tokens([f"\\boxed{{{d}}}{' ' * k}" for d in range(4) for k in range(3)])
    boxes = range(len(tokenizer) - 12, len(tokenizer))
    lm.lm_head.weight.data[[tokenizer.eos_token_id, *boxes]] *= 2
    return lm, tokenizer


def save_actor(directory, lm, tokenizer, sender_dim):
    """An actor whose random adapter is loud enough to change what it says."""
    torch.manual_seed(1)
    arguments = {"sender_dim": sender_dim, "dim": 32, "num_heads": 4, "scale": 1.0, "output_scale": 0.3}
    info = {"message": "latent", "adapter": arguments}
    LatentActor(lm, tokenizer, HiddenStateProcessor(**arguments), info).save(directory)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """MATH's directory, a plain LM, an actor, and messages for all problems."""
    root = tmp_path_factory.mktemp("math")
    data, (lm, tokenizer) = write_math(root / "MATH"), answering_lm()
    lm.save_pretrained(root / "lm")
    tokenizer.save_pretrained(root / "lm")
    init_markers(lm, add_markers(tokenizer))
    save_actor(root / "actor", lm, tokenizer, 48)
    LatentActor(lm, tokenizer, None, {"message": "text"}).save(root / "text_actor")
    tasks = read_problems(data)
    latents = {t["id"]: torch.randn(3 + n % 4, 48) for n, t in enumerate(tasks)}
    write_shard(root / "messages" / "latents-rank00000-00000.safetensors", latents,
                {t["id"]: {"task": t["task"], "plan": f"add {n}", "plan_token_ids": [], "sender_ms": 2.0}
                 for n, t in enumerate(tasks)}, {"model": "tiny", "hidden_size": 48})
    return types.SimpleNamespace(data=data, tasks=tasks, **{k: str(root / k) for k in ("lm", "actor", "text_actor",
                                                                                        "messages")})


SAMPLED = ["--temperature", 1.0, "--samples_per_question", 3]


def argv(world, out, *more, variants=("latent", "text", "no_comm", "cross_task", "randomrot"), model="actor"):
    messages = [] if model == "lm" else ["--hidden_data", world.messages]
    return [str(a) for a in ("--model_path", getattr(world, model), *messages, "--dataset", world.data, "--variants",
                             *variants, "--output_dir", out, "--torch_dtype", "fp32", "--max_length", 6,
                             "--batch_size", 32, *more)]


TIMES = ("actor_ms", "timestamp")


def results(out):
    """Lines of detailed_results.jsonl, less the times."""
    with open(os.path.join(out, "detailed_results.jsonl")) as f:
        return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in f]


def summary(out):
    with open(os.path.join(out, "summary.json")) as f:
        return json.load(f)


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    """Sampled answers of one uninterrupted run on one rank."""
    out = tmp_path_factory.mktemp("reference") / "o"
    main(argv(world, out, *SAMPLED, variants=("latent", "no_comm")))
    return out


# ---- the files

def test_actor_gives_complete_files(world, tmp_path, capsys):
    main(argv(world, tmp_path / "o", "--baseline_path", world.text_actor,
              variants=("latent", "text", "no_comm", "cross_task", "randomrot", "cot_full")))
    text, rows, shards = capsys.readouterr().out, results(tmp_path / "o"), LatentShards(world.messages)
    assert [(r["variant"], r["id"]) for r in rows] == [
        (v, t["id"]) for v in ("latent", "text", "no_comm", "cross_task", "randomrot", "cot_full") for t in world.tasks]
    for r in rows:
        assert r["question"] == f"{shards.records[r['id']]['task']}\nPut the final answer in \\boxed{{}}."
        split, folder, number = r["id"].split("/")
        assert (split, SUBJECTS[folder], number) == ("test", r["subject"], r["level"])
        assert r["reference_answer"] == str((list(SUBJECTS).index(folder) + int(number)) % 4)
        assert r["extracted_answer"] == eval_math.extract_answer(r["model_output"])
        assert r["correct"] == (r["extracted_answer"] == r["reference_answer"]) and not r["failed"]
        if r["variant"] in ("latent", "randomrot"):
            assert r["message_length"] == shards.lengths[r["id"]]
        assert (r["message_length"] > 0) == (r["variant"] != "no_comm") == (r["sender_ms"] > 0)
    outputs = {tuple(r["model_output"] for r in rows if r["variant"] == v)
               for v in ("latent", "cross_task", "no_comm", "text")}
    assert len(outputs) == 4  # each variant is told something else
    s = summary(tmp_path / "o")
    assert s["variants"] == summarize(rows) and 0 < s["variants"]["latent"]["accuracy"] < 1
    assert list(s["variants"]["latent"]["by_level"]) == list("12345")
    assert list(s["variants"]["latent"]["by_subject"]) == sorted(SUBJECTS.values())
    assert f"\nlatent {s['variants']['latent']['accuracy']:27.3f}" in text
    assert "\nCounting & Probability       5" in text
    with open(tmp_path / "o" / "results.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"


def test_plain_lm_answers_as_generate_does(world, tmp_path):
    """Greedy answers against Hugging Face's own loop, one prompt at a time."""
    main(argv(world, tmp_path / "o", model="lm", variants=["no_comm"]))
    lm, tokenizer = answering_lm()
    rows = results(tmp_path / "o")
    assert len(rows) == 35 and len({len(r["model_output"]) for r in rows}) > 3
    for r in rows[::4]:
        ids = tokenizer(tokenizer.apply_chat_template([{"role": "user", "content": r["question"]}], tokenize=False,
                                                      add_generation_prompt=True), return_tensors="pt").input_ids
        out = lm.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
        assert r["model_output"] == tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()


def test_the_question_is_the_training_question(world, tmp_path):
    """train.json of collect.py math and the evaluation give the actor the same prompt, byte for byte."""
    sender = save_model(tmp_path / "sender")
    collect.main(["math", "--model_name_or_path", sender, "--dataset_path", world.data, "--split", "test",
                  "--output_dir", str(tmp_path / "m"), "--max_samples", "3", "--max_new_tokens", "4"])
    train = json.load(open(tmp_path / "m" / "train.json"))
    main(argv(world, tmp_path / "o", "--num_samples", 3, variants=["latent"]))
    assert [(t["id"], t["conversations"][0]["value"]) for t in train] == [(r["id"], r["question"])
                                                                         for r in results(tmp_path / "o")]


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


def test_sampling_follows_the_models_distribution(world):
    actor = LatentActor.load(world.lm)
    sample = message_sample(actor, [{"role": "user", "content": "hi"}], 0, world.tasks, 0, "no_comm")
    actor.lm.lm_head.weight.data *= 0.2
    with torch.no_grad():
        probs = actor.lm(torch.tensor([sample["input_ids"]])).logits[0, -1].softmax(-1)
    uniforms = (torch.arange(2000, dtype=torch.float64)[:, None] + 0.5) / 2000
    replies = generate(actor, [sample] * 2000, 1, 1.0, uniforms)
    drawn = [(reply["ids"] or [actor.tokenizer.eos_token_id])[0] for reply in replies]
    counts = torch.bincount(torch.tensor(drawn), minlength=len(probs)) / 2000
    assert (counts - probs).abs().max() < 2 / 2000


def lines_of_parts(out):
    return [line for path in sorted((out / "parts").iterdir()) for line in path.read_text().splitlines() if line]


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed(world, reference, tmp_path, forked, ranks):
    """What a kill leaves of the reference: 99 answers and half a line. The rest is answered, by any number of ranks,
    and nothing twice."""
    out = tmp_path / "o"
    shutil.copytree(reference, out)
    part = out / "parts" / "rank00000.jsonl"
    lines = [line for line in part.read_text().splitlines(keepends=True) if line.strip()]
    part.write_text("".join(lines[:99]) + lines[99][:len(lines[99]) // 2])
    for name in ("summary.json", "detailed_results.jsonl", "results.png"):
        (out / name).unlink()
    flags = argv(world, out, *SAMPLED, "--batch_size", 50, variants=("latent", "no_comm"))
    for _ in range(2):  # the second time nothing is left to do
        run = forked("eval_math", flags, world=ranks)
        assert run["codes"] == [0] * ranks, run["err"]
        assert len(lines_of_parts(out)) == 2 * 35 * 3 + 1  # and the torn one
    assert results(out) == results(reference)
    assert summary(out)["variants"] == summary(reference)["variants"]


def test_two_ranks_give_the_same_as_one(world, reference, tmp_path, forked):
    run = forked("eval_math", argv(world, tmp_path / "o", *SAMPLED, variants=("latent", "no_comm")), world=2)
    assert run["codes"] == [0, 0], run["err"]
    assert sorted(os.listdir(tmp_path / "o" / "parts")) == ["rank00000.jsonl", "rank00001.jsonl"]
    assert results(tmp_path / "o") == results(reference) and summary(tmp_path / "o") == summary(reference)


# ---- the figures

def record(task, sample, extracted, reference, **more):
    return {"variant": "latent", "id": task, "sample": sample, "level": "1", "subject": "A", "failed": False,
            "extracted_answer": extracted, "correct": extracted == reference, "message_length": 2, "tokens": 10,
            "cut": False, **more}


def test_pass_at_1_pass_at_n_and_majority_by_hand():
    rows = [record("a", k, said, "5") for k, said in enumerate(["5", "7", "7.0", None])]
    rows += [record("b", k, said, "2", level="2", failed=k == 3, cut=k < 2)
             for k, said in enumerate(["1", "2", "2", None])]
    s = summarize(rows)["latent"]
    assert s["questions"] == 2 and s["samples"] == 8 and s["failed"] == 1 and s["no_answer"] == 2
    assert s["cut"] == 2 and s["by_level"]["1"]["cut"] == 0 and s["by_level"]["2"]["cut"] == 2
    assert s["accuracy"] == (1 / 4 + 2 / 4) / 2 and s["pass_at_n"] == 1.0
    assert s["majority"] == 0.5  # a: 7 and 7.0 are one answer, and outvote 5
    assert s["by_level"]["2"]["accuracy"] == 0.5 and s["by_level"]["2"]["majority"] == 1.0
    low, high = s["interval"]
    assert low < 0.375 < high and high - low > 0.7  # two questions, not eight


def save_deaf(directory, words=(), end=True):
    """The answering LM, where reading any of these words makes its logits NaN; end=False: it never ends."""
    lm, tokenizer = answering_lm()
    ids = [i for word in words for i in text_ids(tokenizer, word)]
    lm.model.embed_tokens.weight.data[ids] = torch.nan
    if not end:
        lm.model.norm.weight.data.zero_()  # all logits are 0: the first token of the table, for ever
    lm.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def write_problems(path, problems):
    path.write_text(json.dumps([{"problem": problem, "answer": "1"} for problem in problems]))
    return path


def test_a_failed_answer_is_wrong_and_alone(world, tmp_path, capsys):
    """A prompt beyond the context and one whose logits are NaN fail, and no other of the same batch; an answer that
    fails after its box is not right; the same command tries failed answers again."""
    data = write_problems(tmp_path / "d.json", ["one", "two", "th~ee", "four" * 2000, "five"])
    flags = ["--dataset", data, "--self_check", "false"]
    main(argv(world, tmp_path / "good", *flags, model="lm", variants=["no_comm"]))
    flags += ["--model_path", save_deaf(tmp_path / "deaf", ["~"])]
    main(argv(world, tmp_path / "o", *flags, model="lm", variants=["no_comm"]))
    rows, good = results(tmp_path / "o"), results(tmp_path / "good")
    assert [r["failed"] for r in rows] == [False, False, True, True, False] and not good[2]["failed"]
    assert rows[2]["error"] == "the logits are not finite" and "context of 4096" in rows[3]["error"]
    assert [rows[i] for i in (0, 1, 4)] == [good[i] for i in (0, 1, 4)]
    s = summary(tmp_path / "o")["variants"]["no_comm"]
    assert s["failed"] == 2 and s["questions"] == 5 and s["accuracy"] == sum(r["correct"] for r in rows) / 5
    assert "2 answers failed" in capsys.readouterr().out
    save_deaf(tmp_path / "deaf", [])  # cured, and of the same name
    (tmp_path / "o" / "settings.json").unlink()
    main(argv(world, tmp_path / "o", *flags, model="lm", variants=["no_comm"]))
    assert results(tmp_path / "o") == good and len(lines_of_parts(tmp_path / "o")) == 7

    boxes = [f"\\boxed{{{d}}}{' ' * k}" for d in range(4) for k in range(3)]  # it writes a box, then fails
    dumb = ["--model_path", save_deaf(tmp_path / "dumb", boxes), "--self_check", "false"]
    main(argv(world, tmp_path / "p", *dumb, model="lm", variants=["no_comm"]))
    boxed = [r for r in results(tmp_path / "p") if r["extracted_answer"] == r["reference_answer"]]
    assert boxed and all(r["failed"] and not r["correct"] for r in boxed)


def test_an_evaluation_in_which_every_answer_failed_is_an_error(world, tmp_path, refuses):
    flags = ["--model_path", save_deaf(tmp_path / "deaf", ["e"]), "--self_check", "false"]
    line = refuses(main, argv(world, tmp_path / "o", *flags, model="lm", variants=["no_comm"]), "all 35 answers failed")
    assert "not finite" in line and len(results(tmp_path / "o")) == 35


def test_cut_answers(world, tmp_path, capsys, refuses):
    """An answer stops at --max_length and at the end of the actor's context, and is counted as cut."""
    data = write_problems(tmp_path / "d.json", ["x" * n for n in (10, 3900, 5000)])
    flags = ["--dataset", data, "--max_length", 400, "--model_path", save_deaf(tmp_path / "mute", end=False)]
    refuses(main, argv(world, tmp_path / "o", *flags, model="lm", variants=["no_comm"]), "mute", "--self_check")
    capsys.readouterr()
    main(argv(world, tmp_path / "o", *flags, "--self_check", "false", model="lm", variants=["no_comm"]))
    rows = results(tmp_path / "o")
    assert [r["cut"] for r in rows] == [True, True, False] and [r["failed"] for r in rows] == [False, False, True]
    assert rows[0]["tokens"] == 400 and 50 < rows[1]["tokens"] < 160
    heading, line = [text.split() for text in capsys.readouterr().out.splitlines() if text.startswith(("vari", "no_c"))]
    assert line[-3] == "2" and heading[-3] == "cut" and summary(tmp_path / "o")["variants"]["no_comm"]["cut"] == 2


def test_a_sender_that_is_asked_now(world, tmp_path):
    sender = save_model(tmp_path / "sender", width=48)
    main(argv(world, tmp_path / "o", "--num_samples", 4, "--sender", sender, "--latent_steps", 4, 2,
              "--subjects", "geometry", "--sender_batch_size", 3, variants=["latent", "text"]))
    said = {(r["variant"], r["message_length"]) for r in results(tmp_path / "o") if "_k" in r["variant"]}
    assert said == {("latent_k4", 4), ("latent_k2", 2)}
    assert set(LatentShards(str(tmp_path / "o" / "messages_k4")).records) == {f"test/geometry/{n}" for n in range(1, 5)}
    assert list(summary(tmp_path / "o")["variants"]) == ["latent", "latent_k4", "latent_k2", "text"]


def test_keep_ratio(world, tmp_path):
    main(argv(world, tmp_path / "o", "--num_samples", 4, "--keep_ratio", 1, 0.5, variants=["none"]))
    lengths = LatentShards(world.messages).lengths
    for r in results(tmp_path / "o"):
        keep = {"latent": 1, "latent_keep0.5": 0.5}[r["variant"]]
        assert r["message_length"] == round(keep * lengths[r["id"]])


def test_qwen2llama_reads_another_senders_messages(world, tmp_path):
    (lm, tokenizer), wide = answering_lm(), str(tmp_path / "wide")
    init_markers(lm, add_markers(tokenizer))
    save_actor(wide, lm, tokenizer, 40)
    cross = tmp_path / "cross" / "latents-rank00000-00000.safetensors"
    records = {t["id"]: {"task": t["task"], "plan": "", "plan_token_ids": [], "sender_ms": 3.0} for t in world.tasks}
    write_shard(cross, {k: torch.randn(2, 40) for k in records}, records, {"model": "other", "hidden_size": 40})
    main(argv(world, tmp_path / "o", "--cross_hidden_data", cross.parent, "--baseline_path", wide, "--num_samples", 4,
              "--torch_dtype", "bf16", variants=["latent", "qwen2llama"]))
    said, lengths = results(tmp_path / "o"), LatentShards(world.messages).lengths
    assert [(r["variant"], r["message_length"], r["sender_ms"]) for r in said] == [
        *(("latent", lengths[t["id"]], 2.0) for t in world.tasks[:4]), *[("qwen2llama", 2, 3.0)] * 4]
    assert summary(tmp_path / "o")["actors"] == {"latent": world.actor, "qwen2llama": wide}


# ---- graders

def test_math_verify(world, tmp_path, monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    refuses(main, argv(world, tmp_path / "o", "--grader", "math_verify"), "math_verify", "pip install math-verify")
    fake = types.SimpleNamespace(parse=lambda text: eval(eval_math.extract_answer(text)), verify=lambda a, b: a == b)
    monkeypatch.setitem(sys.modules, "math_verify", fake)
    correct = load_grader("math_verify")
    assert correct("4/2", "2") and not correct("3", "2") and not correct(None, "2")


def test_the_real_math_verify():
    pytest.importorskip("math_verify")
    correct = load_grader("math_verify")
    assert correct(r"\frac{4}{8}", "0.5") and correct("1+x", "x+1") and not correct("3", "2") and not correct(None, "2")


def test_a_grader_of_your_own(world, tmp_path, monkeypatch, refuses):
    (tmp_path / "my_grader.py").write_text("def close(answer, reference):\n"
                                           "    return answer is not None and abs(int(answer) - int(reference)) <= 1\n")
    monkeypatch.chdir(tmp_path)
    main(argv(world, tmp_path / "o", "--grader", "my_grader:close", variants=["no_comm"]))
    rows = results(tmp_path / "o")
    apart = [(abs(int(r["extracted_answer"]) - int(r["reference_answer"])), r["correct"])
             for r in rows if r["extracted_answer"]]
    assert (1, True) in apart and all(right == (d <= 1) for d, right in apart)
    for name in ("my_grader:far", "my_grade:close", "builtin"):
        refuses(main, argv(world, tmp_path / "p", "--grader", name), "--grader", name, "module:function")


def save_parrot(directory, text):
    """An LM that always says the same."""
    lm, tokenizer = answering_lm()
    tokenizer.add_tokens([text, text + " "])  # the scores of both have different signs, and one of them wins
    lm.lm_head.weight.data[len(tokenizer) - 2] = 1000 * lm.lm_head.weight.data[0]
    lm.lm_head.weight.data[len(tokenizer) - 1] = -1000 * lm.lm_head.weight.data[0]
    lm.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_thoughts_are_not_graded(world, tmp_path):
    parrot = save_parrot(tmp_path / "lm", "<think>\\boxed{1}?</think>\nNo box.")
    main(argv(world, tmp_path / "o", "--model_path", parrot, "--max_length", 1, model="lm", variants=["no_comm"]))
    assert {(r["model_output"], r["extracted_answer"]) for r in results(tmp_path / "o")} == {("No box.", None)}


def test_chat_template_kwargs_reach_the_template(world, tmp_path):
    lm, tokenizer = answering_lm()
    tokenizer.chat_template = CHATML.replace("helpful", "{{ mood | default('helpful') }}")
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    said = []
    for n, more in enumerate(([], ['{"mood": "helpful"}'], ['{"mood": "lazy"}'])):
        more = ["--chat_template_kwargs", *more] if more else []
        main(argv(world, tmp_path / str(n), *more, "--model_path", tmp_path / "lm", model="lm", variants=["no_comm"]))
        said.append([r["model_output"] for r in results(tmp_path / str(n))])
    assert said[0] == said[1] != said[2]


def test_answer_phrase(world, tmp_path):
    """An answer in words counts only behind the flag."""
    words = "So the final answer is $\\frac12$. I hope it is right."
    assert eval_math.extract_answer(words) is None
    assert eval_math.extract_answer(words, phrase=True) == "$\\frac12$"
    parrot = save_parrot(tmp_path / "lm", "The final answer is 1.")
    for flag in ("true", "false"):
        main(argv(world, tmp_path / flag, "--model_path", parrot, "--max_length", 1, "--answer_phrase", flag,
                  model="lm", variants=["no_comm"]))
    right = [[r["correct"] for r in results(tmp_path / flag)] for flag in ("true", "false")]
    assert right[0] == [t["reference"] == "1" for t in world.tasks] and not any(right[1])


# ---- files of every shape

MATH_500 = [{"problem": "p", "solution": "so \\boxed{\\frac12}", "answer": "\\frac{1}{2}", "subject": "Algebra",
             "level": level, "unique_id": f"test/algebra/{level}.json"} for level in (2, 5)]
GSM8K = [{"question": "q", "answer": f"He has 2 <<1+1=2>>2.\n#### {n}"} for n in ("42", "1,000")]
AIME24 = [{"id": n, "problem": "p", "solution": "long", "answer": "204", "url": "u", "year": "2024"} for n in (60, 61)]
AMC23 = [{"id": n, "question": "q", "answer": 27.0, "url": "u"} for n in range(2)]
TORA = [{"idx": n, "problem": "p", "level": "Level 3", "type": "Geometry", "solution": "\\boxed{5\\pi}"}
        for n in range(2)]
SHAPES = {  # name: (records, [(id, level, subject, reference)] , the reply in train.json)
    "math500.jsonl": (MATH_500, [(f"test/algebra/{n}.json", str(n), "Algebra", "\\frac{1}{2}") for n in (2, 5)],
                      "so \\boxed{\\frac12}"),
    "math500.parquet": (MATH_500, [(f"test/algebra/{n}.json", str(n), "Algebra", "\\frac{1}{2}") for n in (2, 5)],
                        "so \\boxed{\\frac12}"),
    "gsm8k.jsonl": (GSM8K, [("0", "", "", "42"), ("1", "", "", "1,000")], "He has 2 <<1+1=2>>2.\n\\boxed{42}"),
    "aime24.json": (AIME24, [("60", "", "", "204"), ("61", "", "", "204")], "long"),
    "amc23.jsonl": (AMC23, [("0", "", "", "27.0"), ("1", "", "", "27.0")], "\\boxed{27.0}"),
    "tora.jsonl": (TORA, [(str(n), "3", "Geometry", "5\\pi") for n in range(2)], "\\boxed{5\\pi}")}


@pytest.mark.parametrize("name", SHAPES)
def test_fields_are_found(world, tmp_path, name):
    """MATH's directory is the world of the other tests; these are what people have beside it."""
    (records, expected, reply), path = SHAPES[name], tmp_path / name
    if name.endswith(".parquet"):
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(records), path)
    else:
        lines = json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records))
        path.write_text(lines)
    main(argv(world, tmp_path / "o", "--dataset", path, model="lm", variants=["no_comm"]))
    rows = results(tmp_path / "o")
    assert [(r["id"], r["level"], r["subject"], r["reference_answer"]) for r in rows] == expected
    assert all(r["question"].startswith(records[0].get("problem", "q") + "\n") for r in rows)
    assert load_tasks(str(path))[0]["reply"] == reply


def test_fields_that_are_given(world, tmp_path, refuses):
    """A name that the user gives is read in every record, or is an error: a mistyped id is never a position."""
    data = tmp_path / "d.jsonl"
    records = [{"id": "a", "key": "k1", "problem": "p", "prompt": "q", "gt": 7, "answer": "8", "text": "\\boxed{9}"},
               {"id": "b", "key": "k2", "problem": "p", "prompt": "r", "gt": 7, "answer": "8", "text": "\\boxed{9}"}]
    data.write_text("\n".join(map(json.dumps, records)))
    flags = ["--dataset", data, "--id_field", "key", "--task_field", "prompt"]
    for out, more, reference in (("gt", ["--answer_field", "gt"], "7"), ("answer", [], "8"),
                                 ("text", ["--answer_field", "", "--response_field", "text"], "9")):
        main(argv(world, tmp_path / out, *flags, *more, model="lm", variants=["no_comm"]))
        rows = results(tmp_path / out)
        assert [(r["id"], r["question"][0], r["reference_answer"]) for r in rows] == [("k1", "q", reference),
                                                                                     ("k2", "r", reference)]
    for flag in ("--id_field", "--task_field", "--answer_field", "--response_field"):
        line = refuses(main, argv(world, tmp_path / "p", "--dataset", data, flag, "typo", variants=["no_comm"]),
                       str(data), "id a", flag, "'typo'", "prompt")
        assert "--conversations_index" not in line
    del records[1]["problem"]
    data.write_text("\n".join(map(json.dumps, records)))
    refuses(main, argv(world, tmp_path / "p", "--dataset", data, variants=["no_comm"]), "id b", "'problem'")
    data.write_text('{"text": "x"}')
    line = refuses(main, argv(world, tmp_path / "p", "--dataset", data, variants=["no_comm"]),
                   "'problem' or 'question'")
    assert "--conversations_index" not in line


# ---- bad input

@pytest.mark.parametrize("flags, words", [
    (["--samples_per_question", 2], ["--temperature", "--samples_per_question"]),
    (["--temperature", -1], ["--temperature"]), (["--variants", "telepathy"], ["telepathy", "no_comm"]),
    (["--split", "dev"], ["dev", "['test']"]), (["--subjects", "poetry"], ["poetry", "Number Theory"]),
    (["--dataset", "/nowhere/MATH"], ["no file or directory /nowhere/MATH"]),
    (["--hidden_data", "/nowhere"], ["/nowhere"]), (["--latent_steps", 4], ["--sender"]),
    (["--keep_ratio", 2], ["--keep_ratio"]), (["--cross_hidden_data", "x"], ["qwen2llama"]),
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
        refuses(main, argv(world, tmp_path / "o", "--dataset", data), *words)
    more = write_math(tmp_path / "MORE", number=7)
    refuses(main, argv(world, tmp_path / "o", "--dataset", more), world.messages, "no message")
    main(argv(world, tmp_path / "p", "--num_samples", 2, variants=["no_comm"]))
    refuses(main, argv(world, tmp_path / "p", "--num_samples", 2, "--seed", 1, variants=["no_comm"]), "another --seed")
