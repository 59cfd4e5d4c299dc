"""Chat templates for training, made of those that write earlier turns differently when more follow.

Such a template drops the thoughts of earlier turns, so a chat of several turns cannot be learned from in one text: its
history would be one that no turn was written behind. The edits here keep every turn as the last one is written. They
are chosen by the SHA-256 of the template without outer blanks, so that nothing is edited that was not looked at.
"""

from __future__ import annotations

import hashlib
import warnings

_Edits = tuple[tuple[str, str], ...]  # (what stands in the template once, what takes its place)

_LAST_QUERY = ("loop.index0 > ns.last_query_index", "true")
_LAST_TURN = ("loop.last or (not loop.last and reasoning_content)", "true")
_THINK_SPLIT = "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
_TRUNCATES = "if truncate_history_thinking is defined else "

EDITS: dict[str, tuple[str, _Edits]] = {
    "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8": ("Qwen3", (_LAST_QUERY, _LAST_TURN)),
    "a4aee8afcf2e0711942cf848899be66016f8d14a889ff9ede07bca099c28f715": ("Qwen3.5", (_LAST_QUERY,)),
    "273d8e0e683b885071fb17e08d71e5f2a5ddfb5309756181681de4f5a1822d80": ("Qwen3.5", (_LAST_QUERY,)),
    "e84f32a23fdda27689f868aa4a1a5621f41133e51a48d7f3efcbea2839574259": ("Qwen3.6", (_LAST_QUERY,)),
    "56a1447ad31926fdc21fb07e56e5642bd9c850c4f52d8c8af7bbe5f079a84f5f": ("DeepSeek-R1-Distill", ((_THINK_SPLIT, ""),)),
    "563b1ce7d61d50a9b4c7439a912a1116f095b712df5b5e4d3e1116049874eb64": ("DeepSeek-V3", ((_THINK_SPLIT, ""),)),
    "44f815868bf02fa458dd2f741a338046f4bf45f398eb6d067766726b9d96cce3": (
        "GLM-4-MoE",
        (("loop.index0 > ns.last_user_index and reasoning_content", "reasoning_content"),),
    ),
    **dict.fromkeys(
        (
            "43a92aacc2e169bb37055e4d8b0df31edfdc8657d8c387fcf98254cb246e626a",
            "3b74d76d8b903752e764cae114ae8ae2f24cd260466cf672570c745219573d28",
            "82753bef5cedc4932c1ed509b5c9a12be680fd86d1adb65bc3f7398d11c8eebc",
            "58933db77d3099b4f78c55a38347a72e1ea05b97d6bd8f38775303dc0194e0a9",
        ),
        ("Nemotron 3", ((_TRUNCATES + "True", _TRUNCATES + "False"),)),
    ),
}


def training_template(template: str) -> str | None:
    """The template to learn chats with in place of ``template``; None where that one does. A warning says so."""
    found = EDITS.get(hashlib.sha256(template.strip().encode()).hexdigest())
    if found is None:
        return None
    name, edits = found
    for old, new in edits:
        assert template.count(old) == 1
        template = template.replace(old, new)
    warnings.warn(
        f"The chat template of {name} drops thoughts of earlier turns: chats are learned with one that keeps them.",
        stacklevel=2,
    )
    return template
