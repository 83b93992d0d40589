"""Writes the chat template of a model folder to a Jinja file, for `model.chat_template` of another model.

python tools/chat_template.py data/models/Qwen2.5-Math-7B data/models/qwen2.5-math-7b.jinja
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_nft.data.prompts import load_tokenizer
from megatron_nft.data.rows import DataError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with a tokenizer")
    parser.add_argument("output", type=Path, help="Jinja file to write")
    args = parser.parse_args(argv)
    try:
        template = load_tokenizer(args.model).chat_template
        if not isinstance(template, str):
            raise DataError(f"model folder {args.model}: its tokenizer has no chat template")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(template, encoding="utf-8")
    except DataError as e:
        print(f"chat_template: {e}", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"chat_template: {args.output} cannot be written: {e.strerror or e}", file=sys.stderr)
        return 1
    print(f"chat template of {args.model} ({len(template)} characters) written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
