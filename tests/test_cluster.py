"""scripts/cluster: parsed by the tools that it is for, and run with stand-ins for a cluster."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from cluster import fsdp, shared
from irpo_utils import UserError, profiles
from irpo_utils.ops import checksums, cli
from irpo_utils.ops.run import engine_of
from irpo_utils.scale import processes as started

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "scripts" / "cluster"
ENGINES = Path(sys.prefix) / "cluster"  # made by the Makefile
SMALL = [
    "--profile",
    "smoke",
    "--quiet",
    "--iterations",
    "1",
    "--n-questions",
    "24",
    "--n-samples",
    "4",
    "--n-eval-questions",
    "20",
    "--eval-samples",
    "1",
    "--eval-samples-ends",
    "1",
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def documented(name: str, start: str) -> list[str]:
    """The words of the command in the first comment of a file that begins with `start`."""
    text = (CLUSTER / name).read_text().replace("\\\n#", " ")
    [line] = re.findall(rf"^#\s+({re.escape(start)}.*)$", text, re.M)
    return shlex.split(line)


def accepted_by_run(words: list[str]) -> profiles.Profile:
    """The profile that a run makes of these options."""
    return cli.parse_profile(words)[0]


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def engines(program: str, *words, code: str | None = None, home: Path):
    """A program of the engines' environment, with an empty home."""
    if not (ENGINES / ".ready").exists():
        pytest.skip("the engines' parsers are not installed: run `make .venv/cluster/.ready`")
    command = [ENGINES / "bin" / program, *(["-c", code] if code else []), *words]
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, "HOME": str(home)},
    )


# accelerate


def merged(words: list[str]) -> tuple[Namespace, dict[str, str]]:
    """The arguments of `accelerate launch` with its file, and the environment of the processes."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch.launch_command_parser().parse_args(words)
    arguments, _, _ = launch._validate_launch_command(arguments)
    return arguments, prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize(
    "name, machines, processes", [("accelerate_1x8.yaml", 1, 8), ("accelerate_2x8.yaml", 2, 16)]
)
def test_accelerate_takes_file_and_command(monkeypatch, name, machines, processes):
    from accelerate.commands.config.config_args import load_config_from_file

    monkeypatch.chdir(ROOT)
    config = load_config_from_file(str(CLUSTER / name))
    assert (config.num_machines, config.num_processes, config.distributed_type.value) == (
        machines,
        processes,
        "MULTI_GPU",
    )
    assert config.mixed_precision == "no" and not config.fsdp_config
    words = documented(name, "accelerate launch")
    if machines > 1:
        words[words.index("--machine_rank") + 1] = (
            "1"  # rank 0 would look whether the port is free here
        )
    arguments, environment = merged(words[2:])
    assert (arguments.num_machines, arguments.num_processes, arguments.nproc_per_node) == (
        machines,
        processes,
        "8",
    )
    assert (
        arguments.multi_gpu
        and not arguments.use_fsdp
        and environment["ACCELERATE_MIXED_PRECISION"] == "no"
    )
    assert not arguments.module and arguments.training_script == "scripts/run.py"
    if machines > 1:
        assert (
            arguments.nnodes,
            arguments.node_rank,
            arguments.rdzv_backend,
            arguments.rdzv_endpoint,
        ) == ("2", 1, "static", "HOST:29500")
    profile = accepted_by_run(arguments.training_script_args)
    launched = {"WORLD_SIZE": str(processes), "RANK": "0", "MASTER_ADDR": "localhost"}
    monkeypatch.setattr(os, "environ", {**environment, **launched})
    monkeypatch.setattr(started, "engine", fsdp.engine)
    assert type(engine_of(profile)) is shared.SharedEngine
    [added] = re.findall(
        r"options: (--shard.*?adamw_torch)", (CLUSTER / "accelerate_1x8.yaml").read_text()
    )
    profile = accepted_by_run([*arguments.training_script_args, *added.split()])
    assert profile.shard and type(fsdp.engine(profile, None)) is fsdp.ShardedEngine


def test_accelerate_would_refuse_a_wrong_file_and_a_run_its_fsdp(monkeypatch, tmp_path):
    text = (CLUSTER / "accelerate_1x8.yaml").read_text()
    wrong, splitting = tmp_path / "wrong.yaml", tmp_path / "fsdp.yaml"
    wrong.write_text(text.replace("num_processes:", "num_procs:"))
    with pytest.raises(ValueError, match="num_procs"):
        merged(["--config_file", str(wrong), "scripts/run.py"])
    with pytest.raises(SystemExit):
        merged(
            [
                "--configfile",
                str(CLUSTER / "accelerate_1x8.yaml"),
                "--machines",
                "2",
                "scripts/run.py",
            ]
        )
    splitting.write_text(text.replace("MULTI_GPU", "FSDP"))
    monkeypatch.setattr(
        os, "environ", merged(["--config_file", str(splitting), "scripts/run.py"])[1]
    )
    with pytest.raises(UserError, match="without FSDP, and use --shard true"):
        engine_of(profiles.get("smoke"))


@pytest.mark.slow
def test_two_machines_of_accelerate_make_one_run(tmp_path):
    """Two launchers on this machine with one process each, as on two machines."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--config_file",
                CLUSTER / "accelerate_2x8.yaml",
                "--num_processes",
                "2",
                "--main_process_ip",
                "127.0.0.1",
                "--main_process_port",
                str(port),
                "--machine_rank",
                str(rank),
                ROOT / "scripts" / "run.py",
                *SMALL,
                "--out",
                tmp_path / "run",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=ENVIRONMENT,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=400)[0] for process in group]
    assert [process.returncode for process in group] == [0, 0], said
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == 2
    assert (tmp_path / "run" / "metrics.csv").exists()


# Slurm


@pytest.fixture
def slurm(tmp_path):
    """A folder of stand-ins for Slurm's programs, and what a job finds in its environment."""

    def make(srun: str, end: str = ""):
        log = f'echo "${{0##*/}} $*" >> {tmp_path}/calls'
        executable(
            tmp_path / "bin" / "scontrol",
            f'#!/bin/bash\n{log}\n[ "$1" != show ] || printf "127.0.0.1\\nother\\n"\n',
        )
        executable(tmp_path / "bin" / "scancel", f"#!/bin/bash\n{log}\n{end}\n")
        executable(
            tmp_path / "bin" / "srun",
            f"#!/bin/bash\n{log}\nwhile [[ $1 == --* ]]; do shift; done\n{srun}\n",
        )
        return {
            **ENVIRONMENT,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "a,b",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "1",
            "SLURM_CPUS_PER_TASK": "32",
            "BIN": str(Path(sys.executable).parent),
        }

    return make


def calls(tmp_path) -> str:
    return (tmp_path / "calls").read_text()


def wait_for(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition(), process.communicate()[0] if process.poll() is not None else "in vain"


def test_bash_and_sbatch_take_the_script_and_would_refuse_a_wrong_one(tmp_path):
    """sbatch reads the whole script before it looks for a controller, of which there is none."""
    assert subprocess.run(["bash", "-n", CLUSTER / "slurm.sh"], capture_output=True).returncode == 0
    if not shutil.which("sbatch"):
        pytest.skip("sbatch is not installed (slurm-client in Debian and Ubuntu)")
    (tmp_path / "slurm.conf").write_text(
        "ClusterName=none\nSlurmctldHost=localhost\nSlurmctldPort=1\nMessageTimeout=1\nGresTypes=gpu\n"
    )

    def submit(*words):
        return (
            subprocess.run(
                ["sbatch", "--test-only", *map(str, words)],
                capture_output=True,
                text=True,
                cwd=ROOT,
                env={**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")},
            )
            .stderr.strip()
            .splitlines()
        )

    [said] = submit(*documented("slurm.sh", "sbatch scripts")[1:])
    assert "Unable to contact slurm controller" in said
    assert submit("--nodes", "1", "--gpus-per-node", "4", CLUSTER / "slurm.sh") == [said]
    for right, wrong in (
        ("--nodes=", "--nodez="),
        ("B:USR1@", "B:USER@"),
        ("--time=24:00:00", "--time=long"),
    ):
        text = (CLUSTER / "slurm.sh").read_text()
        assert right in text
        assert submit(executable(tmp_path / "wrong.sh", text.replace(right, wrong))) != [said], (
            wrong
        )


def test_the_words_after_the_script_reach_the_run_as_they_are(slurm, tmp_path):
    from torch.distributed.run import get_args_parser

    program = executable(tmp_path / "fake" / "torchrun", "#!/bin/bash\nprintf '%s\\0' \"$@\"\n")
    environment = {**slurm('exec "$@"'), "BIN": str(program.parent), "SLURM_GPUS_ON_NODE": "8"}
    words = [
        *documented("slurm.sh", "sbatch scripts")[2:],
        "--data",
        "my own questions.jsonl",
        "--task",
        "jsonl",
    ]
    done = subprocess.run(
        [CLUSTER / "slurm.sh", *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    seen = get_args_parser().parse_args(done.stdout.split("\0")[:-1])
    assert (
        seen.nnodes,
        seen.nproc_per_node,
        seen.rdzv_backend,
        seen.rdzv_endpoint,
        seen.rdzv_id,
    ) == ("2", "8", "c10d", "127.0.0.1:29500", "77")
    assert not seen.module and seen.training_script == "scripts/run.py"
    assert seen.training_script_args == words
    assert accepted_by_run(seen.training_script_args).data == "my own questions.jsonl"
    assert "requeue" not in calls(tmp_path) and "--cpus-per-task=32" in calls(tmp_path)


@pytest.mark.parametrize("ends_with, again", [(143, True), (0, False)])
def test_a_job_whose_time_is_up_stops_its_run_and_queues_again(slurm, tmp_path, ends_with, again):
    environment = slurm(
        f"echo $$ > {tmp_path}/pid; trap 'exit {ends_with}' TERM; while :; do sleep 0.1; done",
        f"kill -TERM $(cat {tmp_path}/pid)",
    )
    job = subprocess.Popen(
        [CLUSTER / "slurm.sh"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    wait_for((tmp_path / "pid").exists, job)
    time.sleep(0.3)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == ends_with
    assert (
        "scancel --signal=TERM 77" in calls(tmp_path)
        and ("scontrol requeue 77" in calls(tmp_path)) == again
    )


def test_a_run_that_fails_is_not_queued_again(slurm, tmp_path):
    done = subprocess.run(
        [CLUSTER / "slurm.sh"], capture_output=True, text=True, env=slurm("exit 3")
    )
    assert done.returncode == 3 and "requeue" not in calls(tmp_path)


@pytest.mark.slow
def test_a_job_of_two_nodes_is_stopped_and_resumed(slurm, tmp_path):
    """Two torchruns on this machine instead of two nodes; the same command finishes the run."""
    both = f'"$@" & "$@" & jobs -p > {tmp_path}/pids; wait %1; one=$?; wait %2 && exit $one'
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment = {
            **slurm(both, f"kill -TERM $(cat {tmp_path}/pids)"),
            "PORT": str(probe.getsockname()[1]),
        }
    command = [CLUSTER / "slurm.sh", *SMALL, "--out", tmp_path / "run"]
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    wait_for((tmp_path / "run" / "iteration_0" / "evaluation").exists, job)
    job.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=120)[0]
    assert job.returncode != 0 and "Stopped. What was finished is kept" in said, said[-3000:]
    assert (
        "scontrol requeue 77" in calls(tmp_path)
        and not (tmp_path / "run" / "iteration_1" / "metrics.json").exists()
    )
    kept = (tmp_path / "run" / "iteration_0" / "evaluation" / "checksums.json").stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "iteration_1" / "metrics.json").exists()
    assert (
        tmp_path / "run" / "iteration_0" / "evaluation" / "checksums.json"
    ).stat().st_mtime_ns == kept


# SkyPilot

TASK = """
import json, sys, yaml
from sky import task
from sky.backends import task_codegen
changes = [pair.split("=", 1) for pair in sys.argv[2:]]
read = task.Task.from_yaml_config(yaml.safe_load(open(sys.argv[1])), env_overrides=changes)
[resources], mounts = read.resources, read.storage_mounts
print(json.dumps({
    "accelerators": resources.accelerators,
    "spot": resources.use_spot,
    "recovery": resources.job_recovery,
    "mounts": {place: [store.name, store.mode.value] for place, store in mounts.items()},
    "workdir": read.workdir,
    "envs": read.envs,
    "secrets": list(read.secrets),
    "nodes": read.num_nodes,
    "setup": read.setup,
    "script": task_codegen.TaskCodeGen.build_task_bash_script(read.run),
}))
"""


@pytest.fixture
def sky(tmp_path):
    """A task file as SkyPilot reads it, without an account or a server."""

    def read(path, *pairs):
        return engines("python", path, *pairs, code=TASK, home=tmp_path)

    return read


def test_skypilot_takes_the_task_and_would_refuse_a_wrong_one(sky, tmp_path):
    words = documented("sky.yaml", "sky jobs launch")
    done = sky(CLUSTER / "sky.yaml", *[word for word in words if "=" in word])
    assert done.returncode == 0, done.stderr[-3000:]
    task = json.loads(done.stdout.splitlines()[-1])
    assert (
        task["accelerators"] == {"A100-80GB": 8}
        and task["spot"]
        and task["nodes"] == 1
        and task["workdir"] == "."
    )
    assert (
        task["mounts"] == {"/bucket": ["my-irpo-runs", "MOUNT_CACHED"]}
        and task["recovery"]["strategy"] == "EAGER_NEXT_REGION"
    )
    assert task["envs"]["NAME"] == "llama" and task["secrets"] == ["HF_TOKEN"]
    assert "--requirement requirements.lock" in task["setup"]
    assert (
        subprocess.run(["bash", "-n"], input=task["setup"] + task["script"], text=True).returncode
        == 0
    )
    refused = sky(CLUSTER / "sky.yaml")
    assert refused.returncode != 0 and "'BUCKET' is None" in refused.stderr
    for right, wrong in (("use_spot", "use_spots"), ("MOUNT_CACHED", "MOUNT_CASHED")):
        (tmp_path / "wrong.yaml").write_text(
            (CLUSTER / "sky.yaml").read_text().replace(right, wrong)
        )
        refused = sky(tmp_path / "wrong.yaml", "BUCKET=b")
        assert refused.returncode != 0 and wrong in refused.stderr


@pytest.mark.slow
def test_a_task_on_a_new_machine_resumes_from_the_bucket(sky, tmp_path):
    """SkyPilot's script of the task, run twice: two processes, and a folder as the bucket."""
    done = sky(CLUSTER / "sky.yaml", "BUCKET=b")
    assert done.returncode == 0, done.stderr[-3000:]
    script = json.loads(done.stdout.splitlines()[-1])["script"]
    assert script.count("sleep 30") == 1 and script.count("/bucket/") == 1
    script = (
        script.replace("sleep 30", "sleep 0.2").replace("/bucket/", f"{tmp_path}/bucket/") + "\n"
    )
    (tmp_path / "irpo" / "bin").mkdir(parents=True)
    (tmp_path / "irpo" / "bin" / "accelerate").symlink_to(
        Path(sys.executable).parent / "accelerate"
    )
    if not shutil.which("rsync"):  # SkyPilot's machines have it
        executable(
            tmp_path / "bin" / "rsync",
            "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"
            'cp -r --preserve=timestamps "$1." "$2"\n',
        )
    environment = {
        **ENVIRONMENT,
        "HOME": str(tmp_path),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PROFILE": "smoke",
        "NAME": "n",
        "OPTIONS": " ".join(SMALL[2:]),
        "SKYPILOT_NUM_GPUS_PER_NODE": "2",
    }

    def machine(name, **changes):
        place = tmp_path / name
        place.mkdir()
        (place / "scripts").symlink_to(ROOT / "scripts")
        return place, subprocess.Popen(
            ["bash", "-c", script],
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, **changes},
            start_new_session=True,
        )

    kept = tmp_path / "bucket" / "n" / "iteration_0" / "evaluation"
    first, job = machine("first")
    wait_for(lambda: checksums.read(kept), job)
    os.killpg(job.pid, signal.SIGKILL)  # the machine is taken away
    kill_all_in(first)
    job.communicate()
    shutil.rmtree(first)
    record = checksums.read(
        kept
    )  # with the seconds that it took, which would differ if it were made again
    assert record and not (tmp_path / "bucket" / "n" / "iteration_1" / "metrics.json").exists()
    second, job = machine("second")
    said = job.communicate(timeout=400)[0]
    assert job.returncode == 0, said[-3000:]
    assert (tmp_path / "bucket" / "n" / "metrics.csv").read_text() == (
        second / "runs" / "n" / "metrics.csv"
    ).read_text()
    assert json.loads((second / "runs" / "n" / "environment.json").read_text())["world_size"] == 2
    assert (
        checksums.read(second / "runs" / "n" / "iteration_0" / "evaluation")
        == checksums.read(kept)
        == record
    )
    (tmp_path / "irpo" / "bin" / "accelerate").unlink()
    executable(tmp_path / "irpo" / "bin" / "accelerate", "#!/bin/bash\nexit 7\n")
    executable(
        tmp_path / "bin" / "findmnt", f"#!/bin/bash\ntouch {tmp_path}/waited\n"
    )  # how SkyPilot's own lines begin
    _, job = machine("third")
    job.communicate(timeout=60)
    assert job.returncode == 7 and (tmp_path / "waited").exists()


def kill_all_in(folder: Path) -> None:
    """End the processes that work in that folder: the launcher starts each in a new session."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder:
                process.kill()
                found.append(process)
        except (psutil.Error, OSError):
            pass
    psutil.wait_procs(found, timeout=30)


# the container

READ = """
import dataclasses, json, sys, dockerfile
commands = dockerfile.parse_file(sys.argv[1])
print(json.dumps([[c.cmd, c.json, list(c.flags), list(c.value)] for c in commands]))
"""


def test_the_container_file_is_sound_and_takes_what_there_is(tmp_path):
    done = engines("python", CLUSTER / "Dockerfile", code=READ, home=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = json.loads(done.stdout)
    of = {
        name: [value for command, _, _, value in lines if command == name]
        for name, _, _, _ in lines
    }
    [[base]] = of["FROM"]
    assert re.fullmatch(r"nvidia/cuda:13\.\d+\.\d+-runtime-ubuntu24\.04", base)
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    let_through = {
        line[1:]
        for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
        if line[0] == "!"
    }
    sources = [source for *several, _ in of["COPY"] for source in several]
    assert set(sources) == let_through
    for source in sources:
        assert (ROOT / source).exists()
        if tracked.returncode == 0:
            assert re.search(rf"^{re.escape(source)}(/|$)", tracked.stdout, re.M), (
                f"{source} is not in the repository"
            )
    assert any("--requirement requirements.lock" in words for [words] in of["RUN"])
    assert all(is_json for name, is_json, _, _ in lines if name in ("ENTRYPOINT", "CMD"))
    [entrypoint], [command] = of["ENTRYPOINT"], of["CMD"]
    assert entrypoint == ["python", "-m", "irpo_utils"]
    assert command[0] == "run" and accepted_by_run(command[1:])


def test_the_linter_takes_the_container_file_and_would_refuse_a_wrong_one(tmp_path):
    def lint(path):
        return engines(
            "hadolint", "--no-color", "--ignore", "DL3008", path, home=tmp_path
        )  # DL3008: versions of Debian packages

    done = lint(CLUSTER / "Dockerfile")
    assert done.returncode == 0, done.stdout
    for right, wrong in (
        ("COPY irpo_utils irpo_utils", "COPI irpo_utils irpo_utils"),
        ("COPY pyproject.toml README.md LICENSE ./", "COPY a b c"),
    ):
        text = (CLUSTER / "Dockerfile").read_text()
        assert right in text
        (tmp_path / "Dockerfile").write_text(text.replace(right, wrong))
        assert lint(tmp_path / "Dockerfile").returncode != 0, wrong


def test_the_commands_for_the_container_are_taken(monkeypatch):
    monkeypatch.chdir(ROOT)
    words = documented("Dockerfile", "docker run")
    command, *options = words[words.index("irpo") + 1 :]
    assert command == "run" and accepted_by_run(options)
    arguments, _ = merged(documented("Dockerfile", "launch --config_file")[1:])
    assert arguments.num_processes == 8
    accepted_by_run(arguments.training_script_args)
    assert shlex.split("docker build --tag irpo --file scripts/cluster/Dockerfile .") == documented(
        "Dockerfile", "docker build"
    )
