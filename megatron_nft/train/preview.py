"""The first prompt of a run as the model will see it, for `--dry-run`."""

from __future__ import annotations

from megatron_nft.config import Config
from megatron_nft.data.prompts import PromptStream, load_tokenizer, show_prompt
from megatron_nft.engines.end_tokens import describe, find_end_tokens


def first_prompt(config: Config) -> str:
    """Return text and tokens of the first training prompt, and the tokens that end an answer.

    Says why there is nothing to show where the model folder or the questions are not on this machine. ValueError for
    what a run would refuse: questions, chat template, end tokens.
    """
    absent = [path for path in (config.model.path / "config.json", *config.data.train) if not path.is_file()]
    if absent:
        return f"first prompt: not shown, {absent[0]} is not on this machine"
    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    ends = find_end_tokens(config.model.path, tokenizer, config.rollout.stop_token_ids)
    stream = PromptStream(
        config.data.train,
        tokenizer,
        config.data.max_prompt_tokens,
        config.data.over_long,
        shuffle=False,
        system_prompt=config.model.system_prompt,
    )
    prompt = show_prompt(tokenizer, stream.prompt(0).token_ids)
    return f"first prompt ({config.data.train[0]}), {prompt}\n{describe(ends)}"
