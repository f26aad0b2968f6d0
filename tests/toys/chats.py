"""Chat templates of well-known families in their published form, and what they make of a question and its answer."""

# ruff: noqa: E501  (templates are kept as they were published)

from __future__ import annotations

from typing import Any, NamedTuple

from tokenizers import AddedToken
from toys.tokenizers import tokenizer_of
from transformers import PreTrainedTokenizerFast

_BYTES, _WORDS = "byte-level BPE", "byte-level BPE, GPT-4's words"
_LLAMA, _GEMMA = "SentencePiece BPE, prefix space, bytes", "SentencePiece BPE, bytes"
_TURNS = ("<|im_start|>", "<|im_end|>")


class ChatFamily(NamedTuple):
    """A template, its tokens, and the prompt and completion of ``{q}`` and ``{a}``."""

    template: str
    prompt: str
    completion: str
    family: str = _BYTES
    special: tuple[Any, ...] = _TURNS
    bos: str = "<s>"
    eos: str = "<|endoftext|>"
    plain: tuple[str, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012  (of a NamedTuple, never changed)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return tokenizer_of(
            self.family, self.special, self.bos, self.eos, self.template, self.family == _LLAMA, self.plain
        )


_LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_LLAMA_3_2 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_MISTRAL = (
    "{{ bos_token }}{%% for message in messages %%}{%% if message['role'] == 'user' %%}"
    "{{ '[INST]%s' + message['content'] + '%s[/INST]' }}{%% elif message['role'] == 'assistant' %%}"
    "{{ '%s' + message['content'] + eos_token }}"
    "{%% else %%}{{ raise_exception('Only user and assistant roles are supported!') }}{%% endif %%}{%% endfor %%}"
)
_GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
_GEMMA_3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
"""
_QWEN_2_5 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_QWEN_3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and ns.last_query_index == messages|length - 1 %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
_PHI_3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_PHI_4 = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}"
    "{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}"
    "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
_SMOLLM_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_OLMO_2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<|system|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'user' %}"
    "{{ '<|user|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'assistant' %}{% if not loop.last %}"
    "{{ '<|assistant|>\\n'  + message['content'] + eos_token + '\\n' }}{% else %}"
    "{{ '<|assistant|>\\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
)
_ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
_DEEPSEEK = (
    "{{ bos_token }}{%% for message in messages %%}{%% if message['role'] == 'system' %%}{{ message['content'] }}"
    "{%% elif message['role'] == 'user' %%}{{ '<｜User｜>' + message['content'] }}{%% else %%}"
    "{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}{%% endif %%}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<｜Assistant｜>%s' }}{%% endif %%}"
)
_SMOLLM_3 = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' + message.content.lstrip('\\n') + '<|im_end|>\\n' }}"
    "{% endgeneration %}{% else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' }}{% endif %}"
)
_GRANITE = (
    "{%- set system_message = 'Knowledge Cutoff Date: April 2024.\\nToday\\'s Date: ' + strftime_now('%B %d, %Y') + '.' %}"
    "{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}{%- for message in messages %}"
    "{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
)
_COMMAND_R = (
    "{{ bos_token }}{% for message in messages %}{% set content = message['content'] %}{% if message['role'] == 'user' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'  + content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
# A template without an end of its own, as completion models are often asked.
_ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### Response:\\n' + message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)

_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_LLAMA_3_TOKENS: dict[str, Any] = {
    "family": _WORDS,
    "special": _HEADERS,
    "bos": "<|begin_of_text|>",
    "eos": "<|eot_id|>",
}
_ASKED = "<|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
_CHAT_ML = "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n"
_QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
_SMOL = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n" + _CHAT_ML
)
_INST: dict[str, Any] = {"special": ("[INST]", "[/INST]"), "eos": "</s>"}
_OF_GEMMA: dict[str, Any] = {
    "family": _GEMMA,
    "special": ("<start_of_turn>", "<end_of_turn>"),
    "bos": "<bos>",
    "eos": "<eos>",
}
_PHI = tuple(
    AddedToken(name, rstrip=True, normalized=False, special=True)
    for name in ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
)
_DEEP: dict[str, Any] = {
    "family": _WORDS,
    "special": ("<｜User｜>", "<｜Assistant｜>"),
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
}
_DEEP_ASKED = "<｜begin▁of▁sentence｜><｜User｜>{q}<｜Assistant｜>"
_ROLES = ("<|start_of_role|>", "<|end_of_role|>")

CHATS: dict[str, ChatFamily] = {
    "Llama 2": ChatFamily(_LLAMA_2, "<s>[INST] {q} [/INST]", " {a} </s>", _LLAMA, (), eos="</s>"),
    "Llama 3": ChatFamily(_LLAMA_3, "<|begin_of_text|>" + _ASKED, "{a}<|eot_id|>", **_LLAMA_3_TOKENS),
    "Llama 3.2": ChatFamily(
        _LLAMA_3_2,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|>" + _ASKED,
        "{a}<|eot_id|>",
        **_LLAMA_3_TOKENS,
    ),
    "Mistral v0.1": ChatFamily(_MISTRAL % (" ", " ", ""), "<s>[INST] {q} [/INST]", "{a}</s>", _LLAMA, (), eos="</s>"),
    "Mistral v0.3": ChatFamily(_MISTRAL % (" ", "", " "), "<s>[INST] {q}[/INST]", " {a}</s>", _LLAMA, **_INST),
    "Mistral Tekken": ChatFamily(_MISTRAL % ("", "", ""), "<s>[INST]{q}[/INST]", "{a}</s>", _WORDS, **_INST),
    "Gemma 2": ChatFamily(
        _GEMMA_2,
        "<bos><start_of_turn>user\n{q}<end_of_turn>\n<start_of_turn>model\n",
        "{a}<end_of_turn>",
        **_OF_GEMMA,
    ),
    "Gemma 3": ChatFamily(
        _GEMMA_3,
        "<bos><start_of_turn>user\n{q}<end_of_turn>\n<start_of_turn>model\n",
        "{a}<end_of_turn>",
        **_OF_GEMMA,
    ),
    "Qwen 2.5": ChatFamily(_QWEN_2_5, _QWEN + _CHAT_ML, "{a}<|im_end|>", _WORDS),
    "Qwen 3": ChatFamily(
        _QWEN_3,
        _CHAT_ML + "<think>\n\n</think>\n\n",
        "{a}<|im_end|>",
        _WORDS,
        eos="<|im_end|>",
        plain=("<think>", "</think>"),
    ),
    "Qwen 3, no thinking": ChatFamily(
        _QWEN_3,
        _CHAT_ML + "<think>\n\n</think>\n\n",
        "{a}<|im_end|>",
        _WORDS,
        plain=("<think>", "</think>"),
        options={"enable_thinking": False},
    ),
    "Phi-3": ChatFamily(
        _PHI_3, "<|user|>\n{q}<|end|>\n<|assistant|>\n", "{a}<|end|>", _LLAMA, _PHI, eos="<|endoftext|>"
    ),
    "Phi-4": ChatFamily(
        _PHI_4,
        "<|im_start|>user<|im_sep|>{q}<|im_end|><|im_start|>assistant<|im_sep|>",
        "{a}<|im_end|>",
        _WORDS,
        (*_TURNS, "<|im_sep|>"),
    ),
    "SmolLM2": ChatFamily(_SMOLLM_2, _SMOL, "{a}<|im_end|>"),
    "SmolLM3": ChatFamily(
        _SMOLLM_3,
        _CHAT_ML + "<think>\n\n</think>\n",
        "{a}<|im_end|>",
        _WORDS,
        plain=("<think>", "</think>"),
    ),
    "OLMo 2": ChatFamily(
        _OLMO_2, "<|endoftext|><|user|>\n{q}\n<|assistant|>\n", "{a}<|endoftext|>", _WORDS, (), "<|endoftext|>"
    ),
    "Falcon 3": ChatFamily(
        _OLMO_2.removeprefix("{{ bos_token }}"),
        "<|user|>\n{q}\n<|assistant|>\n",
        "{a}<|endoftext|>",
        special=("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "Zephyr": ChatFamily(_ZEPHYR, "<|user|>\n{q}</s>\n<|assistant|>\n", "{a}</s>", _LLAMA, (), eos="</s>"),
    "DeepSeek V3": ChatFamily(_DEEPSEEK % "", _DEEP_ASKED, "{a}<｜end▁of▁sentence｜>", **_DEEP),
    "DeepSeek R1": ChatFamily(
        _DEEPSEEK % "<think>\\n", _DEEP_ASKED, "{a}<｜end▁of▁sentence｜>", **_DEEP, plain=("<think>", "</think>")
    ),
    "Granite 3": ChatFamily(
        _GRANITE,
        "<|start_of_role|>system<|end_of_role|>Knowledge Cutoff Date: April 2024.\nToday's Date: July 26, 2024."
        "<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>{q}<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>",
        "{a}<|end_of_text|>",
        special=_ROLES,
        eos="<|end_of_text|>",
    ),
    "Command R": ChatFamily(
        _COMMAND_R,
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>{q}<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "{a}<|END_OF_TURN_TOKEN|>",
        special=("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        bos="<BOS_TOKEN>",
    ),
    "Alpaca": ChatFamily(_ALPACA, "### Instruction:\n{q}\n\n### Response:\n", "{a}<|endoftext|>", special=()),
}
