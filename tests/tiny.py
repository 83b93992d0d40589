"""Tiny random models in Hugging Face format, for tests: real architectures, a real byte-level tokenizer.

Every tensor is random, norms and biases included, so that a swapped or forgotten tensor shows.
"""

from __future__ import annotations

from pathlib import Path

from megatron_nft.policy import families

FAMILIES = tuple(families.FAMILIES)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer():
    """One token per byte (ids 0..255) and three special tokens (256..258); `<|im_end|>` ends an answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(
    folder: Path | str,
    family: str = "qwen2",
    *,
    tied: bool = True,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int | None = None,
    vocab: int = 264,
    experts: int = 4,
    seed: int = 0,
    dtype: str = "float32",
    max_positions: int = 2048,
) -> Path:
    """Writes config, safetensors, generation config and tokenizer of a random model; returns the folder.

    `vocab` may exceed the tokenizer's 259 tokens (padding rows, as real models have); not less.
    `ffn` is the width of the MLP, by default 3 x hidden (of one expert: hidden).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if family not in FAMILIES:
        raise ValueError(f"family {family!r}: must be one of {', '.join(FAMILIES)}")
    tokenizer = make_tokenizer()
    if vocab < len(tokenizer):
        raise ValueError(f"vocab={vocab}: must hold the tokenizer's {len(tokenizer)} tokens")
    sizes = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn or 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "qwen2":
        del sizes["head_dim"]
    keys = families.FAMILIES[family].experts
    if keys is not None:
        sizes |= {keys.num_experts[0]: experts, keys.experts_per_token: 2, keys.ffn_hidden_size: ffn or hidden}
        sizes |= {keys.normalize_weights: True, "mlp_only_layers": [], "decoder_sparse_step": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.1 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(noise * 1.5 / hidden**0.5)  # logits with a spread: neither uniform nor one-hot
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    folder = Path(folder)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Write a tiny random model in Hugging Face format.")
    parser.add_argument("folder")
    parser.add_argument("--family", default="qwen2", choices=FAMILIES)
    parser.add_argument("--untied", action="store_true")
    for size in ("hidden", "layers", "heads", "kv_heads", "vocab", "seed"):
        parser.add_argument(f"--{size}", type=int, default=make_model.__kwdefaults__[size])
    args = vars(parser.parse_args())
    print(make_model(args.pop("folder"), args.pop("family"), tied=not args.pop("untied"), **args))
