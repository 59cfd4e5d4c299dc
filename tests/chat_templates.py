"""Chat templates of the forms that models have, each with a byte-level tokenizer that knows its special tokens."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ORIGINALS = ROOT / ".trl" / "1.16.0" / "trl" / "chat_templates"  # those of models, as TRL has them: scripts/test.sh


@dataclass(frozen=True)
class Form:
    """A template, its tokenizer's EOS and BOS, whether the tokenizer writes BOS itself, and what ends a turn."""

    template: str
    eos: str
    end: str
    bos: str | None = None
    adds_bos: bool = False


_LOOP = "{% for m in messages %}"
_CHATML = _LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

FORMS: dict[str, Form] = {
    "chatml": Form(_CHATML + _CHATML_PROMPT, "<|endoftext|>", "<|im_end|>"),
    "qwen2.5": Form(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        + _CHATML
        + _CHATML_PROMPT,
        "<|im_end|>",
        "<|im_end|>",
    ),
    # thoughts of earlier turns are dropped, and the last turn always has some
    "qwen3": Form(
        "{% set ns = namespace(last=-1) %}"
        + _LOOP
        + "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
        "{% endfor %}" + _LOOP + "{% set text = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
        "{% if m.role == 'assistant' and '</think>' in text %}"
        "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 > ns.last %}"
        "<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ text }}"
        "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}</tool_call>{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
        + _CHATML_PROMPT.replace(
            "assistant\n{%", "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{%"
        ),
        "<|im_end|>",
        "<|im_end|>",
    ),
    "llama2": Form(
        _LOOP + "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
        "</s>",
        "</s>",
        "<s>",
        adds_bos=True,
    ),
    "llama3": Form(
        "{{ bos_token }}"
        + _LOOP
        + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
        adds_bos=True,
    ),
    "gemma": Form(
        "{{ bos_token }}"
        + _LOOP
        + "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<eos>",
        "<end_of_turn>",
        "<bos>",
        adds_bos=True,
    ),
    "phi": Form(
        _LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|endoftext|>",
        "<|end|>",
    ),
    # a rollout's turn opens with a thought; of earlier turns what stands in front of </think> is dropped
    "deepseek": Form(
        "{{ bos_token }}" + _LOOP + "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'system' %}"
        "{{ m.content }}{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        adds_bos=True,
    ),
    # the tokenizer writes BOS, and the template does not
    "zephyr": Form(
        _LOOP + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "</s>",
        "</s>",
        "<s>",
        adds_bos=True,
    ),
}
_NAMES = re.compile(r"<[|｜][^ <>]{1,30}?[|｜]>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>")


def chat_tokenizer(form: Form) -> Any:
    """A token a byte, and one for each special token of the template. Thoughts' marks are added tokens, not special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = sorted({*_NAMES.findall(form.template), form.eos, form.end, *([form.bos] if form.bos else [])})
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    tokenizer.add_tokens([AddedToken(name, special=False) for name in ("<think>", "</think>")])
    if form.bos and form.adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{form.bos} $A", special_tokens=[(form.bos, tokenizer.token_to_id(form.bos))]
        )
    special = {"eos_token": form.eos, "pad_token": form.eos, **({"bos_token": form.bos} if form.bos else {})}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=names, **special)
    fast.chat_template = form.template
    return fast


def original(name: str) -> str:
    """A model's own template."""
    return (ORIGINALS / f"{name}.jinja").read_text()


def save(form: Form, directory: Path, eos_ids: list[int] | None = None) -> Path:
    """Write the form's tokenizer, and a ``generation_config.json`` that names ``eos_ids``."""
    chat_tokenizer(form).save_pretrained(directory)
    if eos_ids is not None:
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_ids}))
    return directory
