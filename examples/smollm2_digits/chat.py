"""A conversation with a model folder, by transformers alone: two numbers in digits, then what it still says otherwise.

    python examples/smollm2_digits/chat.py MODEL [TEXT …]

Each TEXT is a turn of the user's; without any, three are asked. Decoding is greedy.
"""

from __future__ import annotations

import sys

import torch
from digits import question
from transformers import AutoModelForCausalLM, AutoTokenizer

TURNS = [question(4206)[-1]["content"], question(731)[-1]["content"], "What is the capital of France?"]
MAX_NEW_TOKENS = 40


def main() -> None:
    folder, *turns = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    conversation = question(4206)[:-1]  # the shots, as in training
    for turn in turns or TURNS:
        conversation.append({"role": "user", "content": turn})
        inputs = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        conversation.append({"role": "assistant", "content": answer})
        print(f"user: {turn}\nmodel: {answer}")


if __name__ == "__main__":
    main()
