"""Whether a model folder of a family without a table here holds what transformers needs, judged from the headers.

transformers itself says what it would find missing, too many or of another shape, so that its own rules of former names
and fused experts count. No weight is read: the tensors that it is given have shapes and no data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_nft.weights.hf_folder import HFFolder, name_list

COMPUTED = "rotary_emb.inv_freq"  # ends the names of what older folders store and every model computes by itself
SILENT = 60  # above the level of critical messages


class UnknownModelError(ValueError):
    """transformers cannot say which tensors the model has; the message says why."""


class _Header(torch.Tensor):
    """A tensor without data that stays so when it is moved to a device."""

    def to(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def loading_problems(folder: HFFolder) -> list[str]:
    """Return what is wrong with a folder's tensors, one phrase each: `lacks lm_head.weight`; none where all is well.

    UnknownModelError where transformers does not know the model, or cannot be asked (quantized weights).
    """
    model_class, config = _model_class(folder)
    headers = {
        name: torch.empty(shape, dtype=folder.dtypes[name], device="meta").as_subclass(_Header)
        for name, shape in folder.shapes.items()
        if not name.endswith(COMPUTED)
    }
    try:
        with torch.device("meta"):
            model = model_class(config)
        with _silence():
            _, found = model_class.from_pretrained(
                None, config=config, state_dict=headers, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except RuntimeError:  # experts that do not fit together: it names none of them
        return _differences(folder, model)
    except Exception as error:
        raise UnknownModelError(f"transformers cannot compare them: {type(error).__name__}: {error}") from None
    return _problems(found) + _untied(folder, model)


def _model_class(folder: HFFolder) -> tuple[Any, Any]:
    """Return transformers' class for the folder and its config. The class cannot initialise weights, which takes long.

    The class is the one that config.json names, because AutoModelForCausalLM leaves the eyes of some models out.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder.path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UnknownModelError(f"transformers does not know the model: {str(error).splitlines()[0]}") from None
    if getattr(config, "quantization_config", None):
        raise UnknownModelError("its weights are quantized")
    names = config.architectures or []
    known = [found for name in names if (found := getattr(transformers, name, None)) is not None]
    if not known:
        raise UnknownModelError(f"architectures in config.json is {names}, none of which transformers knows")
    return type(known[0].__name__, (known[0],), {"initialize_weights": lambda self: None}), config


def _problems(found: dict[str, Any]) -> list[str]:
    """Say what transformers' loading info holds."""
    problems = []
    if found["missing_keys"]:
        problems.append(f"lacks {name_list(found['missing_keys'])}")
    if found["unexpected_keys"]:
        problems.append(f"holds tensors that transformers does not know: {name_list(found['unexpected_keys'])}")
    problems += [
        f"{name} has shape {list(there)}, but config.json makes it {list(expected)}"
        for name, there, expected in sorted(found["mismatched_keys"])[:10]
    ]
    return problems


def _differences(folder: HFFolder, model: Any) -> list[str]:
    """Compare the folder with the tensors that transformers would write for the model."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = set(model.all_tied_weights_keys)
    parameters = {name: value for name, value in model.state_dict().items() if name not in tied}
    expected = {name: tuple(value.shape) for name, value in revert_weight_conversion(model, parameters).items()}
    found = {name: shape for name, shape in folder.shapes.items() if not name.endswith(COMPUTED)}
    problems = _problems({
        "missing_keys": expected.keys() - found.keys(),
        "unexpected_keys": found.keys() - expected.keys() - tied,
        "mismatched_keys": [
            (name, found[name], shape) for name, shape in expected.items() if found.get(name, shape) != shape
        ],
    })  # fmt: skip
    if not problems:
        raise UnknownModelError("transformers cannot put its tensors together")
    return problems


def _untied(folder: HFFolder, model: Any) -> list[str]:
    """Say which tensors are stored beside the one that they are tied to, and differ from it."""
    return [
        f"{name} differs from {other}, though config.json ties them"
        for name, other in model.all_tied_weights_keys.items()
        if name in folder and other in folder and not folder.equal(name, other)
    ]


@contextmanager
def _silence() -> Iterator[None]:
    """Keep transformers from reporting in its own words, and from showing progress."""
    from transformers.utils import logging

    level, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(SILENT)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shows_progress:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
