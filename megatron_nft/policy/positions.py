"""Whether the longest question with the longest answer fits the positions that a model was made for."""

from __future__ import annotations

from megatron_nft.config import Config
from megatron_nft.policy.family import ModelSpec


def check_positions(spec: ModelSpec, config: Config) -> None:
    """ValueError where prompts and answers may be longer than the model's max_position_embeddings.

    That number counts scaled positions already with the RoPE scaling that can be trained (llama3: 131072 for an
    original 8192 and a factor of 8), so that no factor is applied. All engines refuse longer sequences.
    """
    prompt, limit = config.data.max_prompt_tokens, spec.max_position_embeddings
    answers = {"rollout.max_response_tokens": config.rollout.max_response_tokens}
    if config.eval.data and config.eval.max_response_tokens:
        answers["eval.max_response_tokens"] = config.eval.max_response_tokens
    for key, response in answers.items():
        if prompt + response > limit:
            raise ValueError(
                f"data.max_prompt_tokens ({prompt}) + {key} ({response}) = {prompt + response} is more than the "
                f"model's max_position_embeddings ({limit}); lower one of them, so that they make at most {limit}, or "
                "take a model with more positions"
            )
