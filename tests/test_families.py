"""Every family that transformers ships runs right, or is refused in one line: no third outcome. And what is no model.

    python -m pytest tests/test_families.py                 the families that people use most
    python -m pytest tests/test_families.py -m long         all the others: two minutes of one core, so in CI alone

A family is a tiny random model, made from its config class. Right is what a user sees: plans are generate's, token by
token, in a batch of which some end early; their states are those of one teacher-forced pass; losses and gradients are
those of the model's own logits; conversations in a batch are what they are alone; gradients pass a student's steps."""
import contextlib
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from collect import decode_plans
from common import UserError
from eval_alfworld import CachedChat
from hf import (context_length, decoder_layers, decoder_of, decoder_states, holes_allowed, left_pad, load_config,
                load_lm, load_tokenizer, self_check)
from model import LatentActor, LatentSender, build_sample, collate, init_markers
from tiny import save_model

# ---- tiny configs: a size for every name that some config class has for it; windows are shorter than the samples
NAMES_OF_SIZES = {
    1: "n_group topk_group mamba_n_groups n_groups first_k_dense_replace n_shared_experts encoder_layers",
    2: "num_key_value_heads linear_num_key_heads num_experts_per_tok moe_topk mamba_expand zero_expert_num",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_attention_heads n_head n_heads num_heads "
       "decoder_attention_heads encoder_attention_heads linear_num_value_heads num_experts n_routed_experts "
       "num_local_experts time_step_rank rotary_dim",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim mamba_n_heads "
       "mamba_d_head mamba_d_state mamba_num_heads mamba_head_dim ssm_state_size state_size sliding_window "
       "sliding_window_size attention_chunk_size attention_window_size window_size",
    16: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size q_lora_rank "
        "kv_lora_rank expert_ffn_hidden_size",
    32: "hidden_size d_model n_embd word_embed_proj_dim lru_width",
    64: "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim intermediate_size_mlp ffn_hidden_size "
        "mamba_d_ssm",
    96: "vocab_size",
    256: "max_position_embeddings n_positions max_seq_len"}
SIZES = {name: size for size, names in NAMES_OF_SIZES.items() for name in names.split()}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
CONV = {"layer_types": ["conv", "full_attention"] * 2}
MAMBA = {"layer_types": ["mamba", "attention"] * 2}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
MLA = {"num_key_value_heads": 4}  # DeepSeek's attention
DSA = {"index_head_dim": 16, "index_n_heads": 16, "index_topk": 8, **MLA}
LONGROPE = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 4,
                                "long_factor": [4.0] * 4, "original_max_position_embeddings": 64},
            "original_max_position_embeddings": 64, "num_key_value_heads": 4}
PER_LAYER = {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, **SLIDING}
DECODER = {"is_decoder": True}


def without_needs(families):
    return dict.fromkeys(families.split(), {})


# ---- the table: name[:variant] of a family, and what its config needs beside the sizes
RIGHT = {
    # attention to all that came before
    **without_needs("apertus arcee aria_text biogpt bitnet bloom codegen cohere diffllama doge ernie4_5 "
                    "ernie4_5_moe falcon flex_olmo gemma glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gptj "
                    "granitemoe granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 jais2 "
                    "jetmoe llama minimax_m2 ministral3 mixtral mpt nanochat nemotron olmo olmo2 olmoe opt "
                    "persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open "
                    "stablelm starcoder2 xglm"),
    **dict.fromkeys(["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"], MLA),
    "dots1": {"num_experts_per_tok": 2},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "hyperclovax:scaled": {"logits_scaling": 0.25},
    "longcat_flash": {"num_layers": 2, **MLA},
    "phi3:longrope": LONGROPE,
    # sliding windows, chunks, an index of where to look
    **without_needs("afmoe cohere2 exaone_moe gemma2 gemma3 gemma3_text gpt_oss granite_swa mimo_v2_flash "
                    "ministral mistral olmo3 vaultgemma"),
    "deepseek_v32": DSA,
    "exaone4": {"sliding_window_pattern": 2},
    "glm_moe_dsa": DSA,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0], "layer_types": None},
    "modernbert-decoder": {"local_attention": 16, **SLIDING},
    # recurrent states
    **without_needs("falcon_h1 nemotron_h qwen3_5"),
    **dict.fromkeys(["olmo_hybrid", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"], LINEAR),
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": MAMBA,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"q_lora_rank": None, "linear_head_dim": 8, "linear_num_heads": 4, "num_experts_per_token": 2,
                    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], **LINEAR, **MLA},
    "lfm2": CONV,
    "lfm2_moe": {"num_dense_layers": 1, **CONV},
    "mamba2": {"num_heads": 8},
}
# columns are counted, or a state is kept: such a family reads a conversation anew in each turn
HOLES_NOT_ALLOWED = set("""
    afmoe bamba cohere2 exaone4 exaone_moe falcon_h1 gemma2 gemma3 gemma3_text gpt_neo gpt_oss granite_swa
    granitemoehybrid jamba kimi_linear lfm2 lfm2_moe llama4_text mamba2 mimo_v2_flash ministral mistral
    modernbert-decoder mpt nemotron_h olmo3 olmo_hybrid qwen3_5 qwen3_5_moe_text qwen3_5_text qwen3_next
    vaultgemma""".split())
# in decoding they overwrite the state that a student's gradient needs
NO_STUDENT = {"bamba", "falcon_h1", "granitemoehybrid", "jamba", "mamba2", "nemotron_h"}
REFUSED = {  # name: (what its config needs, a word of the line that refuses it)
    **dict.fromkeys("bart blenderbot mbart pegasus recurrent_gemma trocr".split(), ({}, "padded")),
    **dict.fromkeys("falcon_mamba mamba minimax openai-gpt xlm xlnet".split(), ({}, "cache")),
    **dict.fromkeys(["roberta", "xlm-roberta"], (DECODER, "embeddings")),
    **dict.fromkeys(["electra", "rembert"], (DECODER, "wide")),
    "deepseek_v4": ({}, "embeddings"),
    "gemma3n_text": ({"num_kv_shared_layers": 0, "laurel_rank": 8, "activation_sparsity_pattern": None, **PER_LAYER},
                     "embeddings"),
    "gemma4_text": ({"per_layer_config": {"01": {"head_dim": 8}, "03": {"head_dim": 8}}, **PER_LAYER}, "embeddings"),
    "opt:350m": ({"word_embed_proj_dim": 16}, "wide"),
    "prophetnet": ({}, "logits"),
    "rwkv": ({"attention_hidden_size": 32}, "padded"),
}
FEW = set("llama qwen2 qwen3 gemma2 gemma3 mistral gpt2 mpt lfm2 qwen3_5 hyperclovax:scaled phi3:longrope rwkv "
          "gemma3n_text opt:350m".split())  # what runs without -m long


def tiny_config(name, **needs):
    cls = CONFIG_MAPPING[name]
    if "vision_config" in cls.sub_configs:  # it also reads pictures, which nobody shows it
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "depth": 1, "num_heads": 2, "out_hidden_size": 32}
        return AutoConfig.for_model(name, text_config=tiny_config(f"{name}_text").to_dict(), vision_config=vision)
    names = {field.name for field in dataclasses.fields(cls)} | cls.attribute_map.keys()
    sizes = {key: size for key, size in SIZES.items() if key in names}
    if getattr(cls, "sliding_window", None) is None:
        sizes.pop("sliding_window", None)  # a family that has windows only where a config asks for them
    return AutoConfig.for_model(name, **{**sizes, **needs})


def save_tiny(directory, family, needs):
    """A checkpoint, loud enough that whatever goes wrong is seen: no parameter is all zeros or ones."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(tiny_config(family.partition(":")[0], **needs))
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn(parameter.shape))
            elif parameter.std() < 0.05:
                parameter.normal_(std=0.2)
    lm.save_pretrained(directory)
    return str(directory)


def make_prompts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 96, (length,), generator=generator).tolist() for length in lengths]


def refusal(function, *args):
    with pytest.raises(UserError) as error:
        function(*args)
    return str(error.value)


def table(families):
    return [pytest.param(name, marks=() if name in FEW else pytest.mark.long) for name in families]


# ---- what is right
def check_plans(lm):
    """collect.py: a batch whose plans end at different times."""
    prompts, expected = make_prompts(7, 12, 20), []
    for prompt in prompts:
        ids = lm.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None,
                          pad_token_id=0)
        expected.append(ids[0, len(prompt):].tolist())
    first_ids = {plan[0] for plan in expected}
    ends = [token for token in expected[0][3:] if token not in first_ids][:1]  # the first plan ends soon
    plans = decode_plans(lm, prompts, [0, 0, 0], ends, max_new_tokens=12)
    for prompt, tokens, (plan, states, _) in zip(prompts, expected, plans):
        assert plan == (tokens[:tokens.index(ends[0])] if set(ends) & set(tokens) else tokens)
        with torch.no_grad():
            one_pass = decoder_of(lm)(input_ids=torch.tensor([prompt + plan]), use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(states, one_pass[len(prompt) - 1:-1], atol=1e-3, rtol=1e-3)


def gradients(module):
    """All gradients in one vector, which are then cleared."""
    vector = torch.cat([p.grad.flatten() for _, p in sorted(module.named_parameters()) if p.grad is not None])
    module.zero_grad()
    return vector


def check_training(lm):
    """train_actor.py: a padded batch in training mode, against the model's own logits, sample by sample."""
    samples = [build_sample([], ids, [-100] * 3 + ids[3:]) for ids in make_prompts(9, 14, 21)]
    loss = 0
    for sample in samples:
        logits = lm(input_ids=torch.tensor([sample["input_ids"]]), use_cache=False).logits[0, :-1]
        loss += F.cross_entropy(logits.float(), torch.tensor(sample["labels"][1:]), reduction="sum")
    loss.backward()
    expected = gradients(lm)
    actor = LatentActor(lm, None).train()
    task = actor(collate(samples))["task"]
    task.backward()
    assert task.item() == pytest.approx(loss.item(), rel=1e-4)
    assert (gradients(lm) - expected).norm() < 1e-3 * expected.norm()
    actor.eval()


def is_over(reply):
    return len(reply) > 1 and reply[-1] % 3 == 0


@torch.inference_mode()
def check_conversations(lm):
    """eval_alfworld.py: two conversations of three turns, against each of them read anew for every token."""
    turns = [make_prompts(5, 9), make_prompts(8, 4), make_prompts(3, 6)]  # turns[t][b]
    expected = [[], []]
    for b in range(2):
        ids = []
        for turn in turns:
            ids, reply = ids + turn[b], []
            while len(reply) < 5:
                token = lm(input_ids=torch.tensor([ids + reply]), use_cache=False).logits[0, -1].argmax().item()
                if is_over(reply + [token]):
                    break
                reply.append(token)
            ids = ids + reply
            expected[b].append(reply)
    one_by_one = not holes_allowed(lm)
    for batch in [[0], [1]] if one_by_one else [[0, 1]]:
        chat, replies, unread = CachedChat(lm, read_again=one_by_one), [[] for _ in batch], {}
        for t, turn in enumerate(turns):
            blocks = [(replies[n][-1:] if n in unread else []) + turn[b] for n, b in enumerate(batch)]
            ids, mask = left_pad(blocks)
            replies, unread = chat.reply(chat.read(lm.get_input_embeddings()(ids), mask), is_over, 5)
            assert replies == [expected[b][t] for b in batch]


def check_steps(lm):
    """compress.py: latent steps of a padded batch over a cache, and their gradients, against passes without one."""
    prompts, sender, steps = make_prompts(6, 11), LatentSender(lm).train(), 3
    sender.bridge.weight.data += 0.02 * torch.randn(sender.bridge.weight.shape)  # as if it had learned
    expected = []
    for prompt in prompts:
        embeds = torch.cat([lm.get_input_embeddings()(torch.tensor([prompt])), sender.start[None, None]], dim=1)
        for _ in range(steps):
            state = decoder_states(lm, embeds, torch.ones(1, embeds.shape[1], dtype=torch.long))[:, -1:]  # (1, 1, D)
            embeds = torch.cat([embeds, sender.bridge(sender.norm(state))], dim=1)
            expected.append(state)
    expected = torch.cat(expected, dim=1).reshape(2, steps, -1)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    expected_gradients = gradients(sender)
    latents = sender(*left_pad(prompts), steps)
    torch.testing.assert_close(latents, expected, atol=1e-3, rtol=1e-3)
    (latents * weight).sum().backward()
    assert (gradients(sender) - expected_gradients).norm() < 1e-3 * expected_gradients.norm()
    sender.eval()


def check_markers(lm):
    """train_actor.py: <bop> and <eop> are as loud as the mean of all words, and the model is as right as before."""
    mean = lm.get_input_embeddings()(torch.arange(96)).mean(0)
    init_markers(lm, [96, 97])
    torch.testing.assert_close(lm.get_input_embeddings()(torch.tensor([96, 97])), mean.expand(2, -1))
    self_check(lm)
    assert lm(input_ids=torch.tensor([[5, 97, 96]]), use_cache=False).logits.shape == (1, 3, 98)


@pytest.mark.parametrize("family", table(RIGHT))
def test_right(family, tmp_path):
    lm = load_lm(save_tiny(tmp_path, family, RIGHT[family]))
    assert holes_allowed(lm) == (family not in HOLES_NOT_ALLOWED)
    assert len(decoder_layers(lm)) in (2, 4)
    check_plans(lm)
    check_training(lm)
    check_conversations(lm)
    with pytest.raises(RuntimeError, match="inplace") if family in NO_STUDENT else contextlib.nullcontext():
        check_steps(lm)
    check_markers(lm)


@pytest.mark.parametrize("family", table(REFUSED))
def test_refused(family, tmp_path):
    needs, word = REFUSED[family]
    path = save_tiny(tmp_path, family, needs)
    line = refusal(load_lm, path)
    assert line.startswith(path) and word in line and "\n" not in line
    load_lm(path, check=False)  # --self_check false


def test_the_tables_name_each_family_once():
    assert not RIGHT.keys() & REFUSED.keys() and FEW <= RIGHT.keys() | REFUSED.keys()
    assert HOLES_NOT_ALLOWED | NO_STUDENT <= RIGHT.keys()


def test_positions_that_depend_on_the_longest_sample_bound_the_context(tmp_path):
    """LongRoPE rotates a batch by its longest sample; up to its first length, which no script passes, it is right."""
    lm = load_lm(save_tiny(tmp_path, "phi3:longrope", LONGROPE))
    assert lm.config.max_position_embeddings == 256 and context_length(lm.config) == 64


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_no_reason_to_refuse_or_to_take(tmp_path, dtype):
    load_lm(save_tiny(tmp_path / "right", "qwen3_moe", {}), dtype)
    assert "padded" in refusal(load_lm, save_tiny(tmp_path / "refused", "rwkv", REFUSED["rwkv"][0]), dtype)


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_that_are_missing_are_not_made_up_and_no_weight_is_left_out(tmp_path):
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    save_tiny(tmp_path, "llama", {})
    weights = load_file(path)
    save_file(weights | {f"{name}_scale": torch.ones(1)}, path, metadata={"format": "pt"})  # FP8's
    assert f"{name}_scale" in refusal(load_lm, str(tmp_path))
    load_lm(str(tmp_path), check=False)
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    assert name in refusal(load_lm, str(tmp_path))


@pytest.mark.parametrize("changes", [
    *({"quantization_config": {"quant_method": method, "bits": 4}} for method in ("gptq", "awq")),
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"_attn_implementation": "flash_attention_2"}, {"model_type": "future"}])
def test_configs_that_cannot_be_run_here_are_one_line(tmp_path, changes):
    path = save_tiny(tmp_path, "llama", {})
    change(tmp_path / "config.json", **changes)
    line = refusal(load_lm, path)
    assert path in line and "\n" not in line


def test_a_folder_that_is_no_model_says_what_it_is(tmp_path):
    assert "no directory" in refusal(load_config, str(tmp_path / "nowhere"))
    (tmp_path / "loss_log.csv").write_text("")  # a trainer's, killed before its end
    assert "no config.json: not finished: run it again" in refusal(load_tokenizer, str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "LoRA" in refusal(load_lm, str(tmp_path))


# ---- tokenizers
def test_what_is_no_tokenizer_for_us(tmp_path):
    for family in ("qwen2", "gemma2", "gpt2", "llama"):  # transformers makes an empty one, in which a text is no ids
        path = save_tiny(tmp_path / family, family, {"vocab_size": 400})
        assert f"no tokenizer at {path}" in refusal(load_tokenizer, path)
    ByT5Tokenizer().save_pretrained(path)
    assert "does not say where in a text each token ends" in refusal(load_tokenizer, path)


def test_a_tokenizer_is_what_its_files_say(tmp_path):
    path = save_model(tmp_path, template="mistral3")
    ids = load_tokenizer(path)("go to  shelf 1").input_ids
    change(tmp_path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")  # whose own pre-tokenizer is another
    assert load_tokenizer(path)("go to  shelf 1").input_ids == ids
    (tmp_path / "chat_template.jinja").unlink()
    for names in (["rag", "default"], ["rag", "tool_use"]):  # several templates, as Command-R has
        change(tmp_path / "tokenizer_config.json", chat_template=[{"name": n, "template": n} for n in names])
        if "default" in names:
            assert load_tokenizer(path).chat_template == "default"
    assert "rag, tool_use and no default" in refusal(load_tokenizer, path)
    change(tmp_path / "config.json", vocab_size=200)
    assert "its table of embeddings 200 rows" in refusal(load_tokenizer, path)
    (tmp_path / "config.json").unlink()  # a tokenizer by itself
    assert "rag, tool_use and no default" in refusal(load_tokenizer, path) and "no config" in refusal(load_lm, path)
