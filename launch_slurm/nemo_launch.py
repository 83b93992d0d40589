"""NeMo-Run recipes and the experiment convert -> train -> eval -> export.

    python launch_slurm/nemo_launch.py recipe=quickstart executor=local --yes
    python launch_slurm/nemo_launch.py recipe=nft_qwen2_5_math_7b executor=slurm executor.account=me \\
        executor.partition=batch recipe.nodes=4 optimizer.lr=2e-6 --dryrun

`recipe.…` and `executor.…` are NeMo-Run's dotted overrides; settings of `megatron-nft train` (`optimizer.lr=…`,
`train.num_steps=…`) are written as they are. Each stage starts when the one before has succeeded. Exit status 1 when a
stage fails. Needs the extra `nemo-run` (tools/install_nemo.sh makes an environment of its own).
"""

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import nemo_run as run

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME))  # NeMo-Run's environment has the settings' requirements, but not this package

from megatron_nft.config import Config  # noqa: E402

STAGES = ("convert", "train", "eval", "export")


@dataclass
class Recipe:
    """One run from start to end. Paths are relative to `work`, on the machine that runs the stages."""

    config: str  # file in configs/, or an absolute path
    run_dir: str
    nodes: int
    procs_per_node: int  # GPUs, or processes on a CPU
    convert: str  # bash, in `work`; NFT_HOME is the checkout
    eval: str  # options of megatron-nft eval, beside --model and --out
    settings: list[str]  # key=value of megatron-nft train; NeMo-Run adds to a list only where a recipe gives one
    home: str = str(HOME)  # the checkout
    work: str = str(HOME)  # gets data/ and runs/
    python: str = str(HOME / ".venv" / "bin" / "python")
    doctor: bool = True  # look at the nodes before the ranks start on them; on Slurm only

    def arguments(self) -> str:
        """The settings of `train`, as bash reads them."""
        config = shlex.quote(os.path.join(self.home, "configs", self.config))
        return f"--config {config} {shlex.join([f'run_dir={self.run_dir}', *self.settings])}"

    def doctor_step(self, container: list[str]) -> str:
        """Bash of a job step that looks at all nodes of the job, and ends the job where the run would not start.

        container: options of srun.
        """
        command = f"cd {shlex.quote(self.work)} && exec python -m megatron_nft doctor"
        command += f" --ranks-per-node={self.procs_per_node} {self.arguments()}"
        step = ["srun", f"--ntasks={self.nodes}", "--ntasks-per-node=1", "--overlap", "--cpu-bind=none"]
        return shlex.join([*step, "--job-name=doctor", *container, "bash", "-c", command]) + " || exit 1"

    def stage(self, name: str) -> run.Script:
        """The stage as a bash script; every rank of `train` runs its own."""
        run_dir, home = shlex.quote(self.run_dir), shlex.quote(self.home)
        newest = f'"$(ls -d {run_dir}/checkpoints/step_?????? | tail -n 1)"'
        body = {
            "convert": self.convert,
            "train": f"exec python -m megatron_nft train {self.arguments()}",
            "eval": f"python -m megatron_nft eval --model {run_dir}/hf --out {run_dir}/eval {self.eval}",
            "export": f"python {home}/tools/convert_megatron_to_hf.py {newest} {run_dir}/exported",
        }[name]
        # For the scripts of examples/.
        names = {"NFT_HOME": self.home, "NFT_WORK": self.work, "NFT_PYTHON": self.python}
        exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in names.items())
        return run.Script(inline=f"set -e\nexport {exports}\ncd {shlex.quote(self.work)}\n{body}\n")

    def environment(self) -> dict[str, str]:
        """For every stage: our package and interpreter come first."""
        folder = str(Path(self.python).parent)
        return {"PYTHONPATH": f"{self.home}:$PYTHONPATH", "PATH": f"{folder}:$PATH", "PYTHONUNBUFFERED": "1"}


@run.cli.factory
@run.autoconvert
def quickstart() -> Recipe:
    """The synthetic task on one machine without a GPU."""
    return Recipe(
        config="quickstart.yaml",
        run_dir="runs/quickstart-nemo",
        nodes=1,
        procs_per_node=2,
        convert='python "$NFT_HOME/examples/quickstart/prepare.py" runs/quickstart-nemo/start',
        eval="--benchmarks runs/quickstart-nemo/start/task/held_out.jsonl --engine embedded --samples 1 "
        "--temperature 1.0 --top-p 1.0 --max-prompt-tokens 16 --max-response-tokens 16",
        settings=[
            "model.path=runs/quickstart-nemo/start/model",
            "data.train=[runs/quickstart-nemo/start/task/train.jsonl]",
            "eval.data=[runs/quickstart-nemo/start/task/held_out.jsonl]",
        ],
    )


@run.cli.factory
@run.autoconvert
def nft_qwen2_5_math_7b() -> Recipe:
    """The published 7B run."""
    return Recipe(
        config="nft_qwen2.5_math_7b.yaml",
        run_dir="runs/nft_qwen2.5_math_7b",
        nodes=4,
        procs_per_node=8,
        convert='bash "$NFT_HOME/examples/nft_qwen2.5_math_7b/2_convert.sh" --weights',
        eval="--data data/datasets/VeRL_math_validation --engine sglang --protocol nft-7b "
        "rollout.server.num_servers=2 rollout.server.tensor_parallel_size=4 verify.workers=8",
        settings=[],
    )


@run.cli.factory
@run.autoconvert
def nft_qwen2_5_32b() -> Recipe:
    """The published 32B run."""
    return Recipe(
        config="nft_qwen2.5_32b.yaml",
        run_dir="runs/nft_qwen2.5_32b",
        nodes=16,
        procs_per_node=8,
        convert='bash "$NFT_HOME/examples/nft_qwen2.5_32b/2_convert.sh" --weights',
        eval="--data data/datasets/VeRL_math_validation --engine sglang --protocol nft-32b "
        "--chat-template data/models/qwen2.5-math-7b.jinja "
        "rollout.server.num_servers=2 rollout.server.tensor_parallel_size=4 verify.workers=8",
        settings=[],
    )


@run.cli.factory
def local() -> run.Config[run.LocalExecutor]:
    """This machine."""
    return run.Config(run.LocalExecutor)


def _slurm(tunnel: run.Config) -> run.Config[run.SlurmExecutor]:
    return run.Config(
        run.SlurmExecutor,
        account=os.environ.get("SBATCH_ACCOUNT", ""),
        partition=os.environ.get("SBATCH_PARTITION"),
        time="24:00:00",
        gpus_per_node=8,
        mem="0",
        exclusive=True,
        container_image=None,  # without one, NeMo-Run asks for a container of its own
        job_name_prefix="nft.",
        packager=run.Config(run.Packager),
        tunnel=tunnel,
    )


@run.cli.factory
def slurm() -> run.Config[run.SlurmExecutor]:
    """The cluster whose sbatch is on this machine."""
    home = os.environ.get("NEMORUN_HOME", os.path.expanduser("~/.nemo_run"))
    return _slurm(run.Config(run.LocalTunnel, job_dir=os.path.join(home, "experiments")))


@run.cli.factory
def slurm_ssh() -> run.Config[run.SlurmExecutor]:
    """A cluster over SSH: executor.tunnel.host=… executor.tunnel.user=… executor.tunnel.job_dir=…"""
    return _slurm(run.Config(run.SSHTunnel, host="", user="", job_dir=""))


def cores(per_task: int | None) -> str:
    """Bash that gives each step's one task `per_task` cores, or all that the node with the fewest has.

    srun takes neither from the job by itself, and would bind the task, with all of its ranks, to fewer: launcher.sh.
    """
    fewest = r"""$(tr , '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)"""
    return f"export SRUN_CPUS_PER_TASK={per_task or fewest}"


def container_options(executor: run.SlurmExecutor) -> list[str]:
    """Options of srun for the container that NeMo-Run runs the stages in; its own mounts of job folders left out."""
    if executor.container_image is None:
        return []
    mounts = [mount for mount in executor.container_mounts if mount.startswith("/")]
    shown = [f"--container-mounts={','.join(mounts)}"] if mounts else []
    return [f"--container-image={executor.container_image}", *shown]


def executor_of(stage: str, recipe: Recipe, chosen: run.Executor) -> run.Executor:
    """The chosen executor, sized for a stage: all nodes with torchrun for `train`, one task else."""
    sized = chosen.clone()
    training = stage == "train"
    sized.launcher = "torchrun" if training else None
    sized.nodes = recipe.nodes if training else 1
    environment = recipe.environment()
    if isinstance(sized, run.SlurmExecutor):
        # NeMo-Run writes `export NAME=value` without quotes: a folder's name may hold a space.
        sized.env_vars = {**{name: f'"{value}"' for name, value in environment.items()}, **sized.env_vars}
        sized.ntasks_per_node = 1
        sized.torchrun_nproc_per_node = recipe.procs_per_node if training else None
        sized.srun_args = ["--cpu-bind=none", *(sized.srun_args or [])]
        lines = [sized.setup_lines, cores(sized.cpus_per_task)]
        lines += [recipe.doctor_step(container_options(sized))] if training and recipe.doctor else []
        sized.setup_lines = "\n".join(line for line in lines if line)
    else:
        sized.env_vars = {**environment, **sized.env_vars}
        sized.ntasks_per_node = recipe.procs_per_node if training else 1
        # No shell stands between: what a Slurm script would expand is expanded here.
        for name in ("PATH", "PYTHONPATH"):
            sized.env_vars[name] = sized.env_vars[name].replace(f"${name}", os.environ.get(name, "")).rstrip(":")
    return sized


@run.cli.entrypoint(type="experiment", namespace="nft")
def nft(
    ctx: run.cli.RunContext,
    recipe: Recipe,
    executor: run.Executor,
    stages: list[str] = list(STAGES),  # noqa: B006 (NeMo-Run reads the default)
) -> None:
    """Convert, train, evaluate and export."""
    unknown = [s for s in stages if s not in STAGES]
    if unknown:
        raise ValueError(f"stages: {', '.join(unknown)}; allowed: {', '.join(STAGES)}")
    chosen = [s for s in STAGES if s in stages]
    if isinstance(executor, run.SlurmExecutor):
        launch(ctx, recipe, executor, chosen)
    else:  # NeMo-Run would start a stage although the one before has failed
        for stage in chosen:
            launch(ctx, recipe, executor, [stage])


def launch(ctx: run.cli.RunContext, recipe: Recipe, executor: run.Executor, stages: list[str]) -> None:
    """One NeMo-Run experiment. SystemExit 1 if a stage fails."""
    # The title names folders, and torchrun does not take paths with spaces from NeMo-Run.
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(recipe.run_dir).name)
    title = "-".join(["nft", name, *(stages if len(stages) == 1 else ())])
    with run.Experiment(title) as experiment:
        before: list[str] = []
        for stage in stages:
            sized = executor_of(stage, recipe, executor)
            before = [experiment.add(recipe.stage(stage), executor=sized, name=stage, dependencies=before)]
        if ctx.dryrun:
            experiment.dryrun()
            return
        experiment.run(detach=ctx.detach, tail_logs=ctx.tail_logs)
    if not ctx.detach:  # leaving the experiment has waited for it
        finish(experiment)


def finish(experiment: run.Experiment) -> None:
    """SystemExit 1 if a stage did not succeed: NeMo-Run itself ends with 0."""
    status = experiment.status(return_dict=True)
    failed = {name: str(facts["status"]) for name, facts in status.items() if "SUCCEEDED" not in str(facts["status"])}
    if failed:
        print("nft: failed: " + ", ".join(f"{name} ({what})" for name, what in failed.items()), file=sys.stderr)
        raise SystemExit(1)


def with_settings(arguments: list[str]) -> list[str]:
    """`optimizer.lr=1e-5` and the like, gathered into `recipe.settings`."""
    ours = [a for a in arguments if a.split("=")[0].split(".")[0] in Config.model_fields and "=" in a]
    rest = [a for a in arguments if a not in ours]
    return [*rest, f"recipe.settings+={ours!r}"] if ours else rest


def main() -> int:
    """Exit status 1 and one line for what goes wrong: NeMo-Run alone prints it and ends with 0."""
    sys.argv[1:] = [*with_settings(sys.argv[1:]), "--verbose"]  # verbose: errors reach us
    try:
        run.cli.main(nft)
    except Exception as e:
        print(f"nft: {e.__cause__ or e}", file=sys.stderr)  # NeMo-Run wraps what it did not foresee
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
