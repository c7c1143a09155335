"""Chat templates of ten families, each cut down to what it does with turns and a generation prompt."""

# Qwen2.5's and SmolLM2's: a default system turn
CHATML = r"""
{%- for m in messages %}
    {%- if loop.first and m.role != 'system' %}
        {{- '<|im_start|>system\n' }}You are helpful.{{ '<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

# an empty thought opens the last reply and no other
QWEN3 = r"""
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
    {{- m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

# gpt-oss: a channel before each reply, and another end of turn for the last one
HARMONY = r"""
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- 'A<|chan|>final<|msg|>' + m.content + ('<|ret|>' if loop.last else '<|im_end|>') }}
    {%- else %}
        {{- m.role + '<|msg|>' + m.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'A' }}
{%- endif %}"""

LLAMA3 = r"""
{{- '<|begin_of_text|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

# the date in the system turn
LLAMA32 = r"""
{{- '<|begin_of_text|>' }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- endif %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}
{{- 'Today Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}""" + LLAMA3.partition("' }}")[2]

# Llama-2's: the system turn inside the first human one, a beginning of text before each human turn
LLAMA2 = r"""
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<s>[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + m.content + ' </s>' }}
    {%- endif %}
{%- endfor %}"""

# 0.1's; 0.3's has no space before [/INST]
MISTRAL = r"""
{{- '<s>' }}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + m.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + m.content + '</s>' }}
    {%- endif %}
{%- endfor %}"""
MISTRAL3 = MISTRAL.replace(" [/INST]", "[/INST]")

# a generation prompt that ends in a space
VICUNA = r"""
{{- '<s>' }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- ' ASSISTANT: ' + m.content + '</s>' }}
    {%- else %}
        {{- ('' if m.role == 'system' else 'USER: ') + m.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ' ASSISTANT: ' }}
{%- endif %}"""

GEMMA2 = r"""
{{- '<bos>' }}
{%- for m in messages %}
    {%- if m.role == 'system' %}
        {{- raise_exception('System role not supported') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}
    {{- '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\n' }}
{%- endif %}"""

LLAMA3_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MISTRAL_TOKENS = ["<s>", "</s>", "[INST]", "[/INST]"]
GEMMA_TOKENS = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
# name: (template, special tokens, end of text, begin of text)
SPECIAL = {"chatml": (CHATML, CHATML_TOKENS, "<|im_end|>", None),
           "qwen3": (QWEN3, CHATML_TOKENS, "<|im_end|>", None),
           "harmony": (HARMONY, ["<|ret|>", "<|chan|>", "<|msg|>", "<|im_end|>"], "<|ret|>", None),
           "llama3": (LLAMA3, LLAMA3_TOKENS, "<|eot_id|>", "<|begin_of_text|>"),
           "llama3.2": (LLAMA32, LLAMA3_TOKENS, "<|eot_id|>", "<|begin_of_text|>"),
           "llama2": (LLAMA2, ["<s>", "</s>"], "</s>", "<s>"),
           "mistral": (MISTRAL, MISTRAL_TOKENS, "</s>", "<s>"),
           "mistral3": (MISTRAL3, MISTRAL_TOKENS, "</s>", "<s>"),
           "vicuna": (VICUNA, ["<s>", "</s>"], "</s>", "<s>"),
           "gemma2": (GEMMA2, GEMMA_TOKENS, "<eos>", "<bos>")}
# when a "▁" goes before a text
SENTENCEPIECE = {"llama2": "always", "mistral3": "first", "vicuna": "never", "gemma2": "never"}
