"""`algorithm.*`: one flat section whose keys are those of the algorithm that is named, over files and overrides."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from objectives import ALGORITHM_DEFAULTS

from megatron_nft.algorithms.dapo import DAPOSettings
from megatron_nft.algorithms.nft import NFTSettings
from megatron_nft.config import Config, ConfigError, dump_config, load_config

ROOT = Path(__file__).resolve().parents[2]
REST = {"run_dir": "run", "model": {"path": "model"}, "data": {"train": ["train.jsonl"]}}


@pytest.fixture
def write(tmp_path):
    """Writes a config file with the given `algorithm` section and `base`; returns its path."""

    def write_file(name: str, algorithm: object = None, base: str | None = None) -> Path:
        tree = {**REST, "algorithm": algorithm or {}, **({"base": f"{base}.yaml"} if base else {})}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return write_file


def read(*paths: Path, overrides: tuple[str, ...] = ()) -> dict:
    """The resolved section; it reads back to itself."""
    config = load_config(paths, overrides)
    text = dump_config(config)
    again = paths[0].with_name("again.yaml")
    again.write_text(text, encoding="utf-8")
    assert load_config([again]) == config
    section = yaml.safe_load(text)["algorithm"]
    assert section.keys() == type(config.algorithm).model_fields.keys()
    return section


def refused(*paths: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(paths, overrides)
    return str(error.value)


def test_the_name_decides_the_keys(write):
    plain = write("plain")
    assert isinstance(load_config([plain]).algorithm, NFTSettings)  # the default
    assert read(plain)["clamp"] == 1.0
    assert isinstance(load_config([plain], ["algorithm.name=dapo"]).algorithm, DAPOSettings)
    assert "clamp" not in read(plain, overrides=("algorithm.name=dapo", "algorithm.clip_high=0.28"))


def test_a_config_made_in_python_takes_a_mapping_or_settings():
    settings = NFTSettings(clamp=0.5)
    assert Config(**REST, algorithm=settings).algorithm == settings
    assert Config(**REST, algorithm={"clamp": 0.5}) == Config(**REST, algorithm=settings)
    with pytest.raises(ValueError, match="name"):
        Config(**REST, algorithm={"name": "ppo"})


def test_keys_that_a_replaced_algorithm_reads_are_dropped(write):
    nft = {"name": "nft", "negative_weight": 0.5, "prompt_weight": "grpo", "loss_divisor": 1000, "ratio_max_log": 5.0}
    write("nft", nft)
    assert read(write("grpo", {"name": "grpo"}, base="nft")) == {
        "name": "grpo",
        "loss_divisor": 1000.0,
        **ALGORITHM_DEFAULTS,
        "ratio_max_log": 5.0,  # GRPO reads it as well
        "clip_low": 0.2,
        "clip_high": 0.2,
        "answer_loss": "sum",
        "deviation": "population",
    }
    rft = read(write("rft", {"name": "rft"}, base="nft"))
    assert rft["prompt_weight"] == "grpo" and "negative_weight" not in rft


def test_they_are_dropped_from_earlier_files_and_below_the_command_line(write):
    nft, dapo = write("nft", {"clamp": 0.5}), write("dapo", {"name": "dapo", "overlong_buffer_tokens": 8})
    assert read(nft, dapo)["overlong_buffer_tokens"] == 8
    assert "clamp" not in read(nft, overrides=("algorithm.name=grpo",))
    assert "overlong_buffer_tokens" not in read(dapo, overrides=("algorithm.name=grpo",))
    # two levels down, and back to the first algorithm: its keys hold again
    write("middle", {"name": "grpo", "clip_low": 0.1}, base="nft")
    assert read(write("top", {"name": "nft"}, base="middle"))["clamp"] == 0.5
    assert read(nft, dapo, overrides=("algorithm.name=nft",))["clamp"] == 0.5


def test_they_are_refused_beside_the_name_above_it_and_on_the_command_line(write):
    said = "algorithm.clamp: unknown key for algorithm.name=grpo (read by nft; allowed: answer_loss, behaviour, "
    assert said in refused(write("beside", {"name": "grpo", "clamp": 1.0}))
    grpo = write("grpo", {"name": "grpo"})
    assert said in refused(grpo, overrides=("algorithm.clamp=1",))
    assert said in refused(write("any", {"clamp": 0.5}), overrides=("algorithm.clamp=1", "algorithm.name=grpo"))
    assert said in refused(write("above", {"clamp": 1.0}, base="grpo"))
    assert said in refused(grpo, write("later", {"clamp": 1.0}))


def test_what_no_algorithm_reads_is_refused_wherever_it_stands(write):
    write("typo", {"name": "nft", "clampp": 1.0, "clamp": 0.5})
    said = refused(write("grpo", {"name": "grpo"}, base="typo"))
    assert "algorithm.clampp: unknown key for algorithm.name=grpo (" in said and "algorithm.clamp:" not in said
    assert "algorithm.clampp: unknown key for algorithm.name=nft (did you mean clamp? allowed: " in refused(
        write("same", {"clampp": 1.0})
    )
    # read by DAPO, but it was NFT that was replaced: the file below was wrong by itself
    write("wrong", {"name": "nft", "overlong_penalty": 0.5})
    assert "algorithm.overlong_penalty: unknown key for algorithm.name=grpo (read by dapo; " in refused(
        write("over", {"name": "grpo"}, base="wrong")
    )


def test_a_file_that_is_wrong_by_itself_is_refused_under_a_new_name_too(write):
    wrong = write("wrong", {"name": "grpo", "clamp": 0.5})
    said = "algorithm.clamp: unknown key for algorithm.name=grpo (read by nft; "
    assert said in refused(wrong)
    assert said in refused(write("top", {"name": "nft"}, base="wrong"))
    assert said in refused(wrong, overrides=("algorithm.name=nft",))


def test_keys_of_a_replaced_algorithm_that_cannot_be_loaded_are_refused_with_the_reason(write):
    write("gone", {"name": "gone:A", "baseline": 0.5})
    said = refused(write("top", {"name": "nft"}, base="gone"))
    assert said.startswith("algorithm.name: 'gone:A': cannot import gone: ModuleNotFoundError")
    write("plain", {"name": "gone:A", "loss_divisor": 5})
    assert read(write("over", {"name": "nft"}, base="plain"))["loss_divisor"] == 5.0


OF_0_1_0 = yaml.safe_load(
    """
{name: grpo, negative_weight: 1.0, clamp: 1.0, prompt_weight: dr_grpo, ratio: token, ratio_max_log: 10.0,
correct_rate_min: 0.02, correct_rate_max: 0.98, clip_low: 0.1, clip_high: 0.2, loss_divisor: tokens,
truncated: negative, overlong_buffer_tokens: 0, overlong_penalty: 1.0}"""
)


def test_the_section_that_0_1_0_wrote_is_read_with_a_warning(write):
    old = write("old", OF_0_1_0)
    said = (
        "grpo does not read clamp, correct_rate_max, correct_rate_min, negative_weight, overlong_buffer_tokens, "
        "overlong_penalty, prompt_weight, ratio: dropped"
    )
    with pytest.warns(FutureWarning, match=said):
        assert load_config([old]) == load_config([write("new", {"name": "grpo", "clip_low": 0.1})])
    with pytest.warns(FutureWarning):
        assert load_config([old], ["algorithm.name=nft"]) == load_config([write("nft")])
    assert "algorithm.clamp: unknown key" in refused(
        write("cut", {key: value for key, value in OF_0_1_0.items() if key != "ratio"})
    )


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {"name": "ppo"},
            "algorithm.name: 'ppo' is none of nft, rft, grpo, dr_grpo, dapo, gspo, cispo, w_reinforce, and not",
        ),
        ({"name": 3}, "algorithm.name: 3 is none of"),
        ({"name": "no_such:Loss"}, "algorithm.name: 'no_such:Loss': cannot import no_such"),
        ({"clamp": 0}, "algorithm.clamp = 0: input should be greater than 0"),
        ({"name": "dapo", "clip_low": "x"}, "algorithm.clip_low = 'x': input should be a valid number"),
        ([1], "algorithm = [1]: input should be a valid dictionary"),
        (
            {"ratio": "sequence"},
            "ratio=sequence gives one loss per answer, which algorithm.loss_divisor=tokens would divide by the tokens",
        ),
        (
            {"name": "grpo", "answer_loss": "mean"},
            "answer_loss=mean gives one loss per answer, which algorithm.loss_divisor=tokens would divide by",
        ),
        ({"name": "dr_grpo", "deviation": "sample"}, "algorithm.deviation: unknown key for algorithm.name=dr_grpo"),
        ({"name": "dapo", "overlong_buffer_tokens": 9999}, "algorithm.overlong_buffer_tokens (9999) must be at most"),
    ],
)
def test_wrong_values_are_named(write, section, said):
    assert said in refused(write("wrong", section))


def test_settings_of_your_own_are_validated_by_their_own_class(write, tmp_path, monkeypatch):
    (tmp_path / "own_settings.py").write_text(
        "from megatron_nft.algorithms import Algorithm, AlgorithmSettings\n"
        "from megatron_nft.section import PositiveFloat\n"
        "class Settings(AlgorithmSettings):\n"
        "    strength: PositiveFloat = 2.0\n"
        "class Own(Algorithm):\n"
        "    Settings = Settings\n"
        "    def loss(self, logprobs, batch): return -logprobs\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_settings", raising=False)
    write("nft", {"clamp": 0.5, "loss_divisor": 7.0})
    own = write("own", {"name": "own_settings:Own"}, base="nft")
    expected = {"name": "own_settings:Own", "loss_divisor": 7.0, **ALGORITHM_DEFAULTS, "strength": 2.0}
    assert read(own) == expected
    assert read(own, overrides=("algorithm.strength=3",)) == {**expected, "strength": 3.0}
    assert "algorithm.strength = -1: input should be greater than 0" in refused(
        own, overrides=("algorithm.strength=-1",)
    )
    assert "algorithm.clamp: unknown key for algorithm.name=own_settings:Own (read by nft; allowed: " in refused(
        own, overrides=("algorithm.clamp=1",)
    )
    # and replaced in turn
    write("strong", {"name": "own_settings:Own", "strength": 3.0})
    assert "strength" not in read(write("grpo", {"name": "grpo"}, base="strong"))


def test_a_module_of_your_own_is_found_in_the_working_directory(write, tmp_path):
    """By the check of a Slurm job as by the command itself; neither imports torch for it."""
    (tmp_path / "own_loss.py").write_text((ROOT / "tests" / "endtoend" / "own_likelihood.py").read_text())
    (tmp_path / "model").mkdir()
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 264, "max_position_embeddings": 8192, "model_type": "qwen2"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(sizes))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text("{}")
    settings = ["--config", str(write("own", {"name": "own_loss:OwnLikelihood", "strength": 2.0}))]
    check = [sys.executable, str(ROOT / "launch_slurm" / "check.py"), "--ranks", "1", *settings]
    console = f"import sys; from megatron_nft.cli import main; print(main({['train', *settings, '--dry-run']}))"
    console += "; print('torch' in sys.modules)"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # -P, like a console script: the working directory is not on the path
    for command in (check, [sys.executable, "-P", "-c", console]):
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (tmp_path / "model" / "config.json").unlink(missing_ok=True)  # a dry run looks at a model that is there
    assert "strength: 2.0" in done.stdout and done.stdout.endswith("0\nFalse\n")
