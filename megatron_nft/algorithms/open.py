"""Algorithms by name: the only table of the built-in ones, and `module:Class` for one of your own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from megatron_nft.algorithms.base import Algorithm, AlgorithmSettings

ALGORITHMS = {
    "nft": "megatron_nft.algorithms.nft:NFT",
    "rft": "megatron_nft.algorithms.rft:RFT",
    "grpo": "megatron_nft.algorithms.grpo:GRPO",
    "dr_grpo": "megatron_nft.algorithms.dr_grpo:DrGRPO",
    "dapo": "megatron_nft.algorithms.dapo:DAPO",
    "gspo": "megatron_nft.algorithms.gspo:GSPO",
    "cispo": "megatron_nft.algorithms.cispo:CISPO",
    "w_reinforce": "megatron_nft.algorithms.w_reinforce:WReinforce",
}
"""name -> module:Class"""
DEFAULT = "nft"


class AlgorithmError(ValueError):
    """An algorithm's name is unknown, or its class cannot be loaded or is not an algorithm."""


def algorithm_class(name: object) -> type[Algorithm]:
    """The class that `name` (as `algorithm.name` of the settings) stands for. Imports its module, but no torch for the
    built-in ones. AlgorithmError says what is wrong."""
    if not isinstance(name, str) or (name not in ALGORITHMS and ":" not in name):
        raise AlgorithmError(f"{name!r} is none of {', '.join(ALGORITHMS)}, and not module:Class of your own")
    module_name, _, attribute = ALGORITHMS.get(name, name).partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's may fail in any way
        raise AlgorithmError(
            f"{name!r}: cannot import {module_name}: {type(error).__name__}: {error}. Modules are looked for in the "
            "working directory and on PYTHONPATH"
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        raise AlgorithmError(
            f"{name!r}: {module_name} ({module.__file__}) has no {attribute or 'class after the colon'}"
        )
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise AlgorithmError(f"{name!r}: {attribute} is not a subclass of megatron_nft.algorithms.Algorithm")
    settings = getattr(found, "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, AlgorithmSettings)):
        raise AlgorithmError(
            f"{name!r}: {attribute} has no Settings, a subclass of megatron_nft.algorithms.AlgorithmSettings"
        )
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise AlgorithmError(f"{name!r}: {attribute} does not define {missing}")
    return found


def read_settings(values: Mapping[str, Any]) -> AlgorithmSettings:
    """The settings of the algorithm that `values["name"]` stands for (nft without it), checked.

    pydantic's ValidationError for a name that cannot be used, for unknown keys and for wrong values.
    """
    name = values.get("name", DEFAULT)
    try:
        settings = algorithm_class(name).Settings
    except AlgorithmError as error:
        reason = PydanticCustomError("value_error", str(error))
        details = InitErrorDetails(type=reason, loc=("name",), input=name)
        raise ValidationError.from_exception_data("algorithm", [details]) from error
    return settings.model_validate(dict(values))


def open_algorithm(settings: AlgorithmSettings, *, max_response_tokens: int) -> Algorithm:
    """The algorithm that `settings.name` stands for, with its settings."""
    return algorithm_class(settings.name)(settings, max_response_tokens=max_response_tokens)
