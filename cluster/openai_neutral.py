"""Fields of OpenAI's, vLLM's and FastDeploy's requests that change nothing here.

The first only name the caller or the purpose. Of the others the one value is taken that asks for what is done anyway,
which clients send as their default; any other value is refused by name, like a field that is not known at all.
"""

from __future__ import annotations

from typing import Literal

from cluster.openai_structure import Strict


class NamingFields(Strict):
    """Those that name the caller or the purpose: every request takes them."""

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class DecodingFields(NamingFields):
    """Those about the text of replies: chats and completions take them."""

    skip_special_tokens: Literal[True] | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    include_stop_str_in_output: Literal[False] | None = None
    return_tokens_as_token_ids: Literal[False] | None = None
    use_beam_search: Literal[False] | None = None


class NeutralFields(DecodingFields):
    """Base of requests that take them all."""

    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    verbosity: Literal["medium"] | None = None
    modalities: list[Literal["text"]] | None = None
    include_reasoning: Literal[True] | None = None
    echo: Literal[False] | None = None
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None
    add_special_tokens: Literal[False] | None = None
    disable_chat_template: Literal[False] | None = None
