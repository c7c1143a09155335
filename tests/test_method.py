"""
The method in ten properties: read this first. Each test says what it guards; model.py how it is done.
"""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

from collect import decode_plans
from data import Conversations, encode_conversation, encode_prompt
from model import (BOP, EOP, LATENT, LatentSender, add_markers, build_sample, collate, js_divergence,
                   open_shards)
from tiny import argv_of, column, make_actor, make_data, make_lm, make_tokenizer, save_model
from train_actor import make_batches
from variants import perturb

TURNS = [{"role": "user", "content": "You see a cup. Find it!"},
         {"role": "assistant", "content": "go to shelf 1"},
         {"role": "user", "content": "On shelf 1: a cup."},
         {"role": "assistant", "content": "take cup 1"}]


def test_a_message_is_the_states_that_predict_its_words():
    """Guards H: L words give L states, each the one from which its word was predicted. One more pass over
    prompt and plan gives the same states, one place before their words."""
    lm, prompt = make_lm(), list(range(5, 14))
    (plan, H, _), = decode_plans(lm, [prompt], [0], eos_ids=[258], max_new_tokens=8)
    with torch.no_grad():
        output = lm(torch.tensor([prompt + plan]), output_hidden_states=True)
    states = output.hidden_states[-1][0]  # (9 + 8, D), after the final norm
    assert len(H) == len(plan) == 8
    torch.testing.assert_close(H, states[len(prompt) - 1:-1], rtol=1e-4, atol=1e-4)


def test_what_the_actor_reads_is_what_one_would_concatenate_by_hand():
    """Guards the insertion: [words before] [adapter(H)] [words after], nothing between; also beside a shorter
    sample."""
    actor, H = make_actor(), torch.randn(7, 32)
    words = actor.lm.get_input_embeddings()
    before, after, labels = encode_conversation(actor.tokenizer, TURNS, "The plan:")
    assert [before[-1], after[0]] == actor.tokenizer.convert_tokens_to_ids([BOP, EOP])
    batch = collate([build_sample([5], [6], [6]), build_sample(before, after, labels, latents=H)])
    with torch.no_grad():
        message = actor.adapter(H[None], torch.ones(1, 7, dtype=torch.bool))[0]  # (7, D)
        by_hand = torch.cat([words(torch.tensor(before)), message, words(torch.tensor(after))])
        torch.testing.assert_close(actor.embed(batch)[1], by_hand, rtol=0, atol=1e-5)
    assert batch["labels"][1].tolist() == [-100] * (len(before) + 7) + labels


@pytest.mark.parametrize("template, space", [("chatml", ""), ("llama3", ""), ("mistral", " ")])
def test_prompts_of_training_and_evaluation_are_the_templates(template, space):
    """Guards the prompt: a game that is played turn by turn reads the ids that training read, and both are
    those of the chat template. The labels are the replies and their ends, nothing else."""
    tokenizer = make_tokenizer(template)
    add_markers(tokenizer)
    before, after, labels = encode_conversation(tokenizer, TURNS, "The plan:")
    end = after[-1:]
    reply_ids = [tokenizer(space + TURNS[k]["content"], add_special_tokens=False).input_ids for k in (1, 3)]
    played = []
    for k, reply in zip((1, 3), reply_ids):  # a prompt, then a reply, whose end opens the next prompt
        prompt = encode_prompt(tokenizer, TURNS[:k], "The plan:")
        played += prompt["before"] + prompt["after"] + reply
    assert before + after == played + end
    assert [label for label in labels if label != -100] == reply_ids[0] + end + reply_ids[1] + end
    first = {"role": "user", "content": f"{TURNS[0]['content']}\nThe plan:{BOP}{EOP}"}
    text = tokenizer.apply_chat_template([first, *TURNS[1:]], tokenize=False)
    assert tokenizer.decode(before + after) == text.rstrip("\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight samples; t0 and t1 have the same task."""
    train, messages = make_data(str(tmp_path_factory.mktemp("data")))
    tokenizer, shards = make_tokenizer(), open_shards(messages)
    add_markers(tokenizer)
    shards.records["t1"]["task"] = shards.records["t0"]["task"]
    return Conversations(train, tokenizer, shards)


PASSES = {"negatives": range(8), "kind": "latent", "curriculum": [r / 10 for r in range(11)],
          "with_plan": True, "with_other": True, "seed": 0, "device": "cpu"}


def test_the_curriculum_ends_in_pure_latents(data):
    """Guards the order, words first, and that r = 0 is trained: it is what evaluation uses."""
    sample = build_sample([1], [2], [2], plan_ids=[11, 12, 13, 14, 15], latents=torch.randn(5, 8), ratio=0.4)
    assert sample["input_ids"] == [1, 11, 12, LATENT, LATENT, LATENT, 2]  # p1 p2, three places
    assert collate([sample])["keep_mask"].tolist() == [[False, False, True, True, True]]  # of h3 h4 h5
    drawn = [make_batches(data, [(draw, 4)], **PASSES)[0] for draw in range(80)]  # sample 4 has L = 7
    assert {int(batch["keep_mask"].sum()) for batch in drawn} == set(range(8))


def test_a_negative_is_another_tasks_whole_message(data):
    """Guards L_sep: never the sample's own task, alone in its batch as well, and with the same r."""
    for draw in range(60):
        batch, _, other = make_batches(data, [(draw, draw % 8)], **PASSES)
        tasks = [data.tasks[n] for n in range(8) if torch.equal(data.shards[data.ids[n]], other["latents"][0])]
        assert tasks and tasks != [data.tasks[draw % 8]]
        shares = [b["keep_mask"].float().mean().item() for b in (batch, other)]
        assert abs(shares[0] - shares[1]) < 0.34  # the same r: messages have 3 to 7 states


def test_js_is_between_0_and_ln_2():
    """Guards L_sep = ln 2 - JS >= 0 (the released code's expression is not bounded)."""
    for scale in (1e-3, 1, 100):
        p, q = (F.log_softmax(scale * torch.randn(50, 200), -1) for _ in range(2))
        js = js_divergence(p, q)
        assert js.min() > -1e-6 and js.max() < math.log(2) + 1e-6
        assert torch.allclose(js, js_divergence(q, p), atol=1e-6) and js_divergence(p, p).abs().max() < 1e-6
    nothing_in_common = torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]])
    assert js_divergence(*nothing_in_common).item() == pytest.approx(math.log(2))


def test_the_training_loss_is_its_definition(data):
    """Guards the loss and its gradients: the formula on whole logits in float64, each label predicted from
    the position before it, the plan's and the other's distribution fixed."""
    actor = make_actor()
    batches = make_batches(data, [(n, n) for n in range(8)], **PASSES)
    exact = copy.deepcopy(actor).double()

    def log_probs(batch):  # (N, V)
        logits = exact.lm(inputs_embeds=exact.embed(batch), attention_mask=batch["attention_mask"]).logits
        return F.log_softmax(logits[:, :-1], -1)[batch["labels"][:, 1:] != -100]

    p_H, p_P, p_N = log_probs(batches[0]), log_probs(batches[1]).detach(), log_probs(batches[2]).detach()
    labels = batches[0]["labels"][batches[0]["labels"] != -100]
    mixture = ((p_H.exp() + p_N.exp()) / 2).log()
    js = sum(F.kl_div(mixture, p, reduction="sum", log_target=True) for p in (p_H, p_N)) / 2
    kl = F.kl_div(p_H, p_P, reduction="sum", log_target=True)  # torch's KL(target || input)
    cosine = F.cosine_similarity(p_P.exp(), p_H.exp(), dim=-1)
    expected = {"task": F.nll_loss(p_H, labels, reduction="sum"),
                "align": 0.7 * kl + 0.3 * (1 - cosine).sum(),
                "sep": len(labels) * math.log(2) - js}
    terms = actor(*batches)
    for name in expected:
        torch.testing.assert_close(terms[name].double(), expected[name], rtol=1e-5, atol=1e-4)
    for loss in (terms, expected):
        (loss["task"] + 0.2 * loss["align"] + 0.7 * loss["sep"]).backward()
    for (name, a), b in zip(actor.named_parameters(), exact.parameters()):
        assert (a.grad - b.grad).abs().max() < 1e-4 * max(1, b.grad.abs().max()), name


def test_latent_steps_with_a_cache_equal_reading_everything_again():
    """Guards the student: each step sees the whole prompt and all thoughts before it, and gradients flow
    through all of them."""
    sender, prompt, K = LatentSender(make_lm()).double(), torch.arange(3, 12)[None], 5
    latents = sender(prompt, torch.ones_like(prompt), K)
    words, again = sender.lm.get_input_embeddings(), []
    embeds = torch.cat([words(prompt), sender.start[None, None]], dim=1)
    for _ in range(K):
        again.append(sender.lm.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1:])
        embeds = torch.cat([embeds, sender.bridge(sender.norm(again[-1]))], dim=1)
    again = torch.cat(again, dim=1)  # (1, K, D)
    torch.testing.assert_close(latents, again, rtol=1e-5, atol=1e-6)
    parameters = [sender.start, sender.bridge.weight, words.weight]
    for a, b in zip(*(torch.autograd.grad(z.pow(3).sum(), parameters) for z in (latents, again))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_perturbations_keep_what_they_claim():
    """Guards the ablations: the chosen statistics stay, the message does not."""
    H = (torch.randn(10, 6) @ torch.randn(6, 6) + 3).double()
    rotated = perturb("randomrot", H, "t1").double()
    torch.testing.assert_close(rotated.mean(0), H.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotated.T.cov(), H.T.cov(), rtol=1e-4, atol=1e-4)
    assert (rotated - H).norm() > 0.3 * (H - H.mean(0)).norm()
    for variant, mean in (("covgauss0", 0 * H.mean(0)), ("covgauss1", H.mean(0))):
        states = torch.cat([perturb(variant, H, f"t{n}") for n in range(1000)]).double()
        assert (states.T.cov() - H.T.cov()).norm() < 0.1 * H.T.cov().norm()
        assert ((states.mean(0) - mean) / H.std(0)).abs().max() < 0.05


def test_two_ranks_train_what_one_rank_trains(tmp_path, forked):
    """Guards --global_batch_size: the number of GPUs changes no result."""
    train, messages = make_data(str(tmp_path / "data"))
    flags = {"model_name_or_path": save_model(tmp_path / "model"), "train_file": train, "hidden_data": messages,
             "num_heads": 4, "adapter_dropout": 0, "global_batch_size": 4, "max_steps": 3, "eval_ratio": 0.3}
    for world in (1, 2):
        done = forked("train_actor", argv_of({**flags, "output_dir": tmp_path / str(world)}), world=world)
        assert done["codes"] == [0] * world, done
    for name in ("loss", "task", "align", "sep", "grad_norm", "eval_loss"):
        assert column(tmp_path / "1", name) == pytest.approx(column(tmp_path / "2", name), rel=1e-4), name
