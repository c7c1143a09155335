"""What an actor is told: the statistics of perturbations, the labels of the table, the sample of each variant."""
import math

import pytest
import torch

from common import UserError, write_json
from data import PLAN_ANNOUNCEMENT
from model import BOP, EOP, LatentShards, load_tokenizer
from tiny import make_actor, make_data, save_model
from variants import (LATENT_VARIANTS, PERTURBATIONS, VARIANTS, actors_of_variants, check_messages, check_settings,
                      check_variants, command_line, message_sample, perturb, table_rows)

N = 6


# ---- perturbations

def covariance(X):
    X = X.double() - X.double().mean(0)
    return X.T @ X / max(len(X) - 1, 1)


def correlated(L, d, rank=None, seed=0):
    """A message (L, d) with a mean of 3 and a covariance of the given rank."""
    generator = torch.Generator().manual_seed(seed)
    rank = rank or d
    return torch.randn(L, rank, generator=generator) @ torch.randn(rank, d, generator=generator) + 3


def draws(variant, H, n=600):
    return torch.stack([perturb(variant, H, f"id{i}", 0) for i in range(n)])


@pytest.mark.parametrize("L, d, rank", [(30, 8, 8), (30, 8, 2), (5, 16, 16), (200, 16, 3), (2, 8, 8), (1, 8, 8)])
def test_rotation_keeps_mean_and_covariance_exactly(L, d, rank):
    H = correlated(L, d, rank)
    out = perturb("randomrot", H, "t1", 0)
    torch.testing.assert_close(out.mean(0), H.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(covariance(out), covariance(H), rtol=1e-4, atol=1e-4 * H.var().item())
    if min(L - 1, rank) > 1:
        assert (out - H).norm() > 0.3 * (H - H.mean(0)).norm()  # the structure is gone
    X = H - H.mean(0)
    residual = (out - H.mean(0)) - (out - H.mean(0)) @ torch.linalg.pinv(X, rtol=1e-4) @ X
    assert residual.norm() < 1e-3 * max(X.norm(), 1)  # inside the message's own row space


def test_rotation_of_equal_states():
    H = torch.ones(5, 8) * 2.5
    torch.testing.assert_close(perturb("randomrot", H, "t1", 0), H)


@pytest.mark.parametrize("variant", ["covgauss0", "covgauss1"])
@pytest.mark.parametrize("L, d", [(12, 6), (4, 10)])
def test_gaussian_has_the_messages_statistics(variant, L, d):
    H = correlated(L, d)
    states = draws(variant, H).flatten(0, 1).double()
    mean = H.double().mean(0) * (variant == "covgauss1")
    std = covariance(H).diagonal().sqrt()
    assert ((states.mean(0) - mean).abs() / std).max() < 5 / math.sqrt(len(states))
    assert (covariance(states) - covariance(H)).norm() < 0.1 * covariance(H).norm()


@pytest.mark.parametrize("variant, power", [("covnoise0.5", 0.25), ("covnoise1.0", 1.0), ("whitenoise", 1.0)])
def test_noise_has_its_power_and_shape(variant, power):
    H = correlated(10, 6)
    noise = (draws(variant, H) - H).flatten(0, 1).double()
    trace = covariance(H).trace()
    shape = torch.eye(6).double() * trace / 6 if variant == "whitenoise" else power * covariance(H)
    assert noise.pow(2).sum(1).mean().item() == pytest.approx(power * trace.item(), rel=0.05)
    assert (covariance(noise) - shape).norm() < 0.1 * shape.norm()
    assert (noise.mean(0).abs() / shape.diagonal().sqrt()).max() < 5 / math.sqrt(len(noise))


@pytest.mark.parametrize("variant", PERTURBATIONS)
def test_perturbations_are_seeded(variant):
    H = correlated(9, 6)
    copy = H.clone()
    out = perturb(variant, H, "t1", 0)
    assert torch.equal(out, perturb(variant, H, "t1", 0)) and out.dtype == torch.float32 and out.shape == H.shape
    assert torch.equal(H, copy)
    for other in (("t2", 0), ("t1", 1)):
        assert not torch.allclose(out, perturb(variant, H, *other))
    assert torch.isfinite(perturb(variant, H[:1].bfloat16(), "t1", 0)).all()  # a message of one state


def test_unknown_perturbation():
    with pytest.raises(UserError, match="pinknoise.*covgauss0"):
        perturb("pinknoise", torch.ones(2, 2), "t1")


# ---- flags, actors, labels

def test_names_of_variants():
    assert check_variants(["none", "text", "latent", "text"]) == ["latent", "text"]
    assert len(VARIANTS) == 13 and check_variants(VARIANTS) == list(VARIANTS)


@pytest.mark.parametrize("variants, flags, words", [
    (["smoke"], {}, "unknown variant smoke.*cross_task"),
    (["latent"], {"latent_steps": [8]}, "--latent_steps needs --sender"),
    (["latent"], {"sender": "s", "hidden_data": "m"}, "--hidden_data"),
    (["latent"], {"cross_hidden_data": "m"}, "qwen2llama"),
    (["latent"], {"keep_ratio": [1, 2]}, "--keep_ratio takes shares"),
    (["latent"], {"sender": "s", "latent_steps": [8], "keep_ratio": [0.5]}, "--keep_ratio.*--latent_steps")])
def test_flags_that_contradict_each_other(variants, flags, words):
    with pytest.raises(UserError, match=words):
        check_variants(variants, **flags)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Actors of every kind, messages 32 and 24 wide, tasks."""
    root = tmp_path_factory.mktemp("world")
    for name, flags in {"actor": {}, "text": {"message": "text"}, "none": {"message": "none"},
                        "narrow": {"sender_dim": 24}}.items():
        make_actor(**flags).save(str(root / name))
    save_model(root / "plain")
    for name, width in (("full", 32), ("other", 24)):
        make_data(str(root / name), N, width)
    tasks = [{"id": f"t{n}", "task": f"task {n // 2}"} for n in range(N)]  # t0 and t1 have the same task, ...
    paths = {name: str(root / name) for name in ("actor", "text", "none", "narrow", "plain")}
    return paths | {"tasks": tasks, "full": LatentShards(str(root / "full" / "messages")),
                    "other": LatentShards(str(root / "other" / "messages"))}


def test_each_variant_has_its_actor(world):
    actor, others = world["actor"], [world["text"], world["none"], world["narrow"]]
    found = actors_of_variants(VARIANTS, actor, others, cross=world["other"])
    assert found == dict.fromkeys(VARIANTS, actor) | {
        "cot_full": world["text"], "no_cot": world["none"], "qwen2llama": world["narrow"]}
    assert actors_of_variants(["qwen2llama"], actor) == {"qwen2llama": actor}  # without other messages: as latent
    for variant, flag in (("cot_full", "--message text"), ("no_cot", "--message none")):
        with pytest.raises(UserError, match=flag):
            actors_of_variants([variant], actor)
    with pytest.raises(UserError, match="24 wide"):
        actors_of_variants(["qwen2llama"], actor, cross=world["other"])


def test_a_plain_model_reads_no_text_message(world, tmp_path):
    """Its tokenizer has no <bop>; one with an unknown token has an id for it all the same."""
    unknown = str(save_model(tmp_path / "unknown"))
    tokenizer = load_tokenizer(unknown)
    tokenizer.unk_token = "<|endoftext|>"
    tokenizer.save_pretrained(unknown)
    assert load_tokenizer(unknown).convert_tokens_to_ids(BOP) is not None
    for path in (world["plain"], unknown):
        with pytest.raises(UserError, match=f"{path} knows no <bop>"):
            actors_of_variants(["no_comm", "text"], path)
        assert actors_of_variants(["no_comm"], path) == {"no_comm": path}


def test_labels_of_the_table(world):
    """A row per K or per share for what reads states, one for what does not."""
    full, actors = world["full"], dict.fromkeys(VARIANTS, world["actor"])
    names = ["latent", "text", "randomrot", "no_comm"]
    rows = table_rows(names, actors, world["tasks"], {"": full, "_k8": full})
    assert list(rows) == ["latent", "latent_k8", "text", "randomrot", "randomrot_k8", "no_comm"]
    rows = table_rows(names, actors, world["tasks"], {"": full}, keep_ratio=[1.0, 0.5])
    assert list(rows) == ["latent", "latent_keep0.5", "text", "randomrot", "randomrot_keep0.5", "no_comm"]
    assert rows["randomrot_keep0.5"] == {"variant": "randomrot", "shards": full, "keep": 0.5}
    assert list(table_rows(["no_comm"], actors, world["tasks"], {})) == ["no_comm"]
    rows = table_rows(["latent", "qwen2llama"], {"latent": world["actor"], "qwen2llama": world["narrow"]},
                      world["tasks"], {"_k8": full}, cross=world["other"])
    assert {label: row["shards"] for label, row in rows.items()} == {
        "latent_k8": full, "qwen2llama": world["other"]}


def test_messages_that_cannot_be_read(world):
    tasks, full = world["tasks"], world["full"]
    with pytest.raises(UserError, match="no adapter.*cross_task"):
        check_messages("cross_task", world["plain"], full, tasks)
    with pytest.raises(UserError, match="--hidden_data or --sender"):
        table_rows(["text"], {"text": world["actor"]}, tasks, {})
    with pytest.raises(UserError, match="no message for 1 tasks, the first t9"):
        check_messages("latent", world["actor"], full, [*tasks, {"id": "t9", "task": "x"}])
    with pytest.raises(UserError, match="24 wide.*reads 32.*tiny"):
        check_messages("latent", world["actor"], world["other"], tasks)
    full.records["t3"]["plan"], plan = " ", full.records["t3"]["plan"]
    with pytest.raises(UserError, match="t3 has an empty plan"):
        check_messages("text", world["actor"], full, tasks)
    full.records["t3"]["plan"] = plan


def test_results_of_other_settings_are_refused(tmp_path):
    check_settings(str(tmp_path), {"seed": 0}, "--output_dir")
    write_json(str(tmp_path / "settings.json"), {"seed": 0, "weights": {"actor": "a"}})
    check_settings(str(tmp_path), {"seed": 0, "weights": {"actor": "a"}}, "--output_dir")
    with pytest.raises(UserError, match="another --seed: give another --output_dir"):
        check_settings(str(tmp_path), {"seed": 1}, "--output_dir")
    with pytest.raises(UserError, match="set of weights"):
        check_settings(str(tmp_path), {"weights": {"actor": "b"}}, "--output_dir")


def test_command_line():
    flags = {"K": 8, "subjects": ["A", "B"], "seed": None, "task_field": ("a", "b"), "kwargs": {"think": False},
             "response_field": "", "self_check": True}
    assert command_line(flags) == ["--K", "8", "--subjects", "A", "B", "--kwargs", '{"think": false}',
                                   "--response_field", "", "--self_check", "True"]


# ---- samples

@pytest.fixture(scope="module")
def told(world):
    """told(variant, n, ...) -> (the sample of a variant, its text)."""
    actor = make_actor()

    def call(variant, n, seed=0, keep=1.0):
        turns = [{"role": "user", "content": "what now?"}]
        sample = message_sample(actor, turns, n, world["tasks"], seed, variant, world["full"], keep)
        return sample, actor.tokenizer.decode(sample["input_ids"])
    return call


@pytest.mark.parametrize("variant", ["no_comm", "no_cot"])
def test_who_is_told_nothing_sees_no_trace_of_a_message(told, variant):
    sample, text = told(variant, 0)
    assert sample["message_length"] == 0 and "what now?" in text
    assert not any(word in text for word in (PLAN_ANNOUNCEMENT, BOP, EOP))


@pytest.mark.parametrize("variant", ["text", "cot_full"])
def test_a_text_message_is_the_plan(world, told, variant):
    sample, text = told(variant, 2)
    plan = world["full"].records["t2"]["plan"]
    assert f"{PLAN_ANNOUNCEMENT}{BOP}{plan}{EOP}" in text and sample["message_length"] == len(plan)


def test_latent_messages(world, told):
    full = world["full"]
    for n in range(N):
        H = full[f"t{n}"]
        for variant in ("latent", "qwen2llama"):
            assert torch.equal(told(variant, n)[0]["latents"], H)
        half = told("latent", n, keep=0.5)[0]
        assert torch.equal(half["latents"], H[:round(0.5 * len(H))])
        assert half["message_length"] == len(half["latents"])
        assert told("latent", n, keep=0.0)[0]["message_length"] == 0
        for variant in PERTURBATIONS:
            assert torch.equal(told(variant, n, seed=3)[0]["latents"], perturb(variant, H, 3, f"t{n}"))


def test_cross_task_is_a_whole_message_of_another_task(world, told):
    seen = set()
    for n in range(N):
        for seed in range(8):
            latents = told("cross_task", n, seed)[0]["latents"]
            sources = [m for m in range(N) if torch.equal(latents, world["full"][f"t{m}"])]
            assert len(sources) == 1 and sources[0] // 2 != n // 2  # of another text, not only of another id
            seen.add(sources[0])
    assert seen == set(range(N))


def test_no_label_in_an_evaluation(told):
    for variant in ("latent", "text", "no_comm"):
        sample = told(variant, 1)[0]
        assert set(sample["labels"]) == {-100} and len(sample["labels"]) == len(sample["input_ids"])


def test_every_latent_variant_has_a_sample(told):
    assert all(told(variant, 0)[0]["message_length"] > 0 for variant in LATENT_VARIANTS)
