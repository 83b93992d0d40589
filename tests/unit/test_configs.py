"""Every shipped config is read, and the published runs carry the published figures."""

import json
from pathlib import Path

import pytest
import yaml
from objectives import ALGORITHM_DEFAULTS

from megatron_nft.config import Config, ConfigError, dump_config, load_config
from megatron_nft.config.load import REMOVED
from megatron_nft.plan.hardware import CHIPS, GIB
from megatron_nft.plan.layout import Cluster, LayoutSettings
from megatron_nft.plan.plan import fraction_choices, make_plan
from megatron_nft.plan.timing import Workload
from megatron_nft.policy.family import check_layout, spec_from_config

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(p.name for p in CONFIGS.glob("*.yaml"))
SIZES = {"qwen2.5_math_7b": 32, "qwen2.5_32b": 128}  # GPUs of the published runs
BASELINES = ("rft", "grpo", "dr_grpo", "dapo")
LIKELIHOOD = {"prompt_weight": "dr_grpo", "ratio": "token", "correct_rate_min": 0.02, "correct_rate_max": 0.98}
"""What NFT and RFT read beside the keys that all have."""


def load(name):
    return load_config([CONFIGS / f"{name}.yaml"])


def tree(name):
    return load(name).model_dump(mode="json")


def differences(a, b, path=""):
    """Dotted keys whose values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return {k for key in a.keys() | b.keys() for k in differences(a.get(key), b.get(key), f"{path}.{key}")}
    return {path[1:]} if a != b else set()


def test_the_shipped_configs_are_these():
    expected = {f"{a}_{size}.yaml" for size in SIZES for a in ("nft", *BASELINES)}
    expected |= {f"quickstart{a}.yaml" for a in ("", "_nft_positive_only", *(f"_{b}" for b in BASELINES))}
    assert expected <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_config_is_read_and_written_back(name, tmp_path):
    config = load_config([CONFIGS / name])
    (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config([tmp_path / "c.yaml"]) == config
    # sampling is unbiased, and no path belongs to one machine
    assert (config.rollout.top_p, config.rollout.top_k, config.rollout.allow_biased_sampling) == (1.0, -1, False)
    paths = [config.run_dir, config.model.path, *config.data.train, *config.eval.data]
    assert not any(p.is_absolute() for p in paths)


@pytest.mark.parametrize("name", NAMES)
def test_layout_divides_the_model_and_the_machine(name):
    config = load_config([CONFIGS / name])
    check_layout(spec_from_config(config.model.architecture), config.policy)
    size = next((gpus for size, gpus in SIZES.items() if size in name), config.num_processes)
    dp = config.policy.data_parallel_size(size)
    assert config.train.questions_per_optimizer_step * config.rollout.answers_per_question >= dp


@pytest.mark.parametrize(("size", "gpus"), SIZES.items())
def test_published_figures_common_to_both_sizes(size, gpus):
    c = load(f"nft_{size}")
    assert (c.rollout.questions_per_batch, c.rollout.answers_per_question) == (1536, 16)
    assert (c.train.questions_per_step, c.train.questions_per_optimizer_step, c.train.num_epochs) == (512, 32, 1)
    assert c.train.questions_per_step // c.train.questions_per_optimizer_step == 16
    assert c.rollout.max_generation_batches == 10
    o = c.optimizer
    assert (o.lr, o.lr_decay_style, o.lr_warmup_steps, o.weight_decay, o.clip_grad) == (1e-6, "constant", 10, 0.1, 1.0)
    assert (o.adam_beta1, o.adam_beta2) == (0.9, 0.999)
    a = c.algorithm
    assert (a.name, a.negative_weight, a.clamp, a.prompt_weight, a.ratio) == ("nft", 1.0, 1.0, "dr_grpo", "token")
    assert (a.correct_rate_min, a.correct_rate_max, a.ratio_max_log) == (0.02, 0.98, 10.0)
    assert a.truncated == "negative"
    assert c.rollout.temperature == 1.0
    assert (c.eval.temperature, c.eval.top_p, c.eval.every_steps) == (0.6, 0.7, 2)
    assert {p.stem for p in c.eval.data} == {"aime24", "aime25", "amc23", "math500", "olympiadbench", "minerva"}
    assert c.policy.precision == "bf16" and c.rollout.engine == "sglang"
    servers = c.rollout.server
    assert servers.num_servers * servers.tensor_parallel_size == 8  # the GPUs of a node
    assert c.num_processes == gpus


def test_published_figures_of_the_7b_run():
    c = load("nft_qwen2.5_math_7b")
    assert (c.data.max_prompt_tokens, c.rollout.max_response_tokens) == (512, 3584)
    assert c.algorithm.loss_divisor == 32_000
    assert c.model.system_prompt is None and c.model.chat_template is None  # the model's own
    assert c.model.architecture == {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    }
    assert c.model.architecture["max_position_embeddings"] == c.data.max_prompt_tokens + c.rollout.max_response_tokens


def test_published_figures_of_the_32b_run():
    c = load("nft_qwen2.5_32b")
    assert (c.data.max_prompt_tokens, c.rollout.max_response_tokens) == (2048, 14336)
    assert c.algorithm.loss_divisor == 16_000
    p = c.policy
    assert (p.tensor_model_parallel_size, p.pipeline_model_parallel_size) == (8, 2)
    assert c.policy.data_parallel_size(128) == 8
    assert c.model.chat_template.name == "qwen2.5-math-7b.jinja"
    figures = c.model.architecture
    assert (figures["hidden_size"], figures["intermediate_size"], figures["num_hidden_layers"]) == (5120, 27648, 64)
    assert (figures["num_attention_heads"], figures["num_key_value_heads"], figures["vocab_size"]) == (40, 8, 152064)
    assert (figures["rope_theta"], figures["rms_norm_eps"]) == (1_000_000.0, 1e-5)
    assert figures["max_position_embeddings"] == 131072


@pytest.mark.parametrize(("size", "gpus"), SIZES.items())
def test_published_runs_fit_h100s_without_recompute(size, gpus):
    """With room to spare: 5 GiB in every phase, for what the model does not see."""
    config = load(f"nft_{size}")
    spec, cluster = spec_from_config(config.model.architecture), Cluster(CHIPS["h100"], gpus // 8, 8)
    work = Workload.of(config, None, 0.5)
    plan = make_plan(spec, config, LayoutSettings.of(config), cluster, work)
    assert plan.fits, plan.problems
    assert config.policy.recompute == "none" and config.rollout.server.mem_fraction_static == 0.8
    assert max(device.peak for device in plan.devices) < (79.6 - 5) * GIB
    fractions = [fraction for fraction, _ in fraction_choices(spec, config, plan.layout, cluster, work)]
    assert fractions[0] == 0.8 and 0.9 < fractions[1] < 0.95


@pytest.mark.parametrize("size", [*SIZES, "quickstart"])
@pytest.mark.parametrize("algorithm", BASELINES)
def test_baselines_differ_in_the_algorithm_alone(size, algorithm):
    quick = size == "quickstart"
    name, base = (f"quickstart_{algorithm}", size) if quick else (f"{algorithm}_{size}", f"nft_{size}")
    ours, theirs = tree(name), tree(base)
    algorithms = ours.pop("algorithm"), theirs.pop("algorithm")
    assert differences(ours, theirs) == {"run_dir"}
    divisor = {"qwen2.5_math_7b": 32_000, "qwen2.5_32b": 16_000, "quickstart": 1000}[size]
    assert algorithms[0] == {
        "name": algorithm,
        "loss_divisor": "tokens" if algorithm == "dapo" else divisor,
        **ALGORITHM_DEFAULTS,
        "ratio_max_log": 10.0,
        **{
            "rft": LIKELIHOOD | {"prompt_weight": "uniform"},
            "grpo": {"clip_low": 0.2, "clip_high": 0.2, "answer_loss": "sum", "deviation": "population"},
            "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "answer_loss": "sum"},
            "dapo": {
                "answer_loss": "sum",
                "deviation": "population",
                "clip_low": 0.2,
                "clip_high": 0.28,
                "overlong_buffer_tokens": 4096 if size == "qwen2.5_32b" else 0,
                "overlong_penalty": 1.0,
            },
        }[algorithm],
    }
    nft = {"name": "nft", "loss_divisor": divisor, "negative_weight": 1.0, "clamp": 1.0}
    nft |= {"reference": "behaviour", "reference_decay": 0.9}
    assert algorithms[1] == {**nft, **ALGORITHM_DEFAULTS, "ratio_max_log": 10.0, **LIKELIHOOD}


def test_the_ablation_without_negatives_differs_in_their_weight_alone():
    ours, theirs = tree("quickstart_nft_positive_only"), tree("quickstart")
    assert differences(ours, theirs) == {"run_dir", "algorithm.negative_weight"}
    assert ours["algorithm"]["negative_weight"] == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_no_shipped_config_trains_stale_groups(name):
    assert load_config([CONFIGS / name]).rollout.max_staleness == 0


def test_quick_start_is_the_calibrated_run():
    c = load("quickstart")
    assert (c.num_processes, c.policy.tensor_model_parallel_size, c.policy.precision) == (2, 2, "fp32")
    assert (c.rollout.engine, c.rollout.questions_per_batch, c.rollout.answers_per_question) == ("embedded", 64, 16)
    assert c.train.questions_per_step // c.train.questions_per_optimizer_step == 4
    o = c.optimizer
    assert (o.lr, o.lr_warmup_steps, o.weight_decay, o.clip_grad) == (3e-4, 10, 0.0, 1.0)
    a = c.algorithm
    assert (a.name, a.clamp, a.prompt_weight, a.loss_divisor, a.negative_weight) == ("nft", 1.0, "dr_grpo", 1000, 1.0)
    # The pipeline layout works by overrides alone.
    other = ["policy.tensor_model_parallel_size=1", "policy.pipeline_model_parallel_size=2"]
    assert load_config([CONFIGS / "quickstart.yaml"], other).policy.data_parallel_size(2) == 1


def test_quick_start_architecture_is_what_the_maker_writes(tmp_path):
    from megatron_nft.data.synthetic import MAX_RESPONSE_TOKENS, write_model

    config = load("quickstart")
    made = json.loads((write_model(tmp_path) / "config.json").read_text())
    figures = config.model.architecture
    assert {key: made[key] for key in figures} == figures
    assert config.rollout.max_response_tokens == MAX_RESPONSE_TOKENS


def test_configs_hold_no_key_twice_and_name_what_they_are():
    for name in NAMES:
        text = (CONFIGS / name).read_text(encoding="utf-8")
        assert text.startswith("# "), f"{name} begins with a line that says what it is"
        assert isinstance(yaml.safe_load(text), dict)


def test_a_removed_key_of_an_inner_section_is_still_read(tmp_path):
    quickstart = CONFIGS / "quickstart.yaml"
    old = tmp_path / "old.yaml"
    old.write_text(f"base: {quickstart}\nrollout: {{server: {{request_timeout_s: 1800.0, max_retries: 5}}}}\n")
    with pytest.warns(FutureWarning, match=r"rollout\.server\.request_timeout_s was removed: .*stall_timeout_s"):
        config = load_config([old])
    assert config == load_config([quickstart], ["rollout.server.max_retries=5"])


@pytest.mark.parametrize("where", ["file", "override"])
def test_a_removed_key_is_still_read_and_has_no_effect(tmp_path, where):
    quickstart = CONFIGS / "quickstart.yaml"
    (tmp_path / "old.yaml").write_text(
        f"base: {quickstart}\ncheckpoint: {{save_optimizer: false, keep: 7}}\n", encoding="utf-8"
    )
    with pytest.warns(FutureWarning, match=r"checkpoint\.save_optimizer was removed"):
        if where == "file":
            config = load_config([tmp_path / "old.yaml"])
        else:
            config = load_config([quickstart], ["checkpoint.save_optimizer=false", "checkpoint.keep=7"])
    assert config == load_config([quickstart], ["checkpoint.keep=7"])


def test_removed_keys_are_not_settings_and_their_neighbours_are_still_checked():
    for key in REMOVED:
        *sections, name = key.split(".")
        model = Config
        for section in sections:
            model = model.model_fields[section].annotation
        assert name not in model.model_fields
    with pytest.raises(ConfigError, match=r"checkpoint\.save_optimiser: unknown key"):
        load_config([CONFIGS / "quickstart.yaml"], ["checkpoint.save_optimiser=false"])


def test_one_pass_over_the_logits_is_for_losses_per_token():
    sequence = ["algorithm.ratio=sequence", "algorithm.loss_divisor=answers"]
    with pytest.raises(ValueError, match=r"policy\.lm_head=one_pass .* use two_pass or auto"):
        load_config([CONFIGS / "quickstart.yaml"], ["policy.lm_head=one_pass", *sequence])
    assert load_config([CONFIGS / "quickstart.yaml"], ["policy.lm_head=one_pass"]).policy.lm_head == "one_pass"
    assert load_config([CONFIGS / "quickstart.yaml"], sequence).policy.lm_head == "auto"
