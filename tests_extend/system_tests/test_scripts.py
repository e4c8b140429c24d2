"""The scripts as a user runs them: feature scripts, the environment, the README's example, the package."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mindspeed_cp.testing.rank_pool import LIMIT_S

REPOSITORY = Path(__file__).resolve().parents[2]
FEATURE_TESTS = Path("tests_extend/system_tests/feature_tests")


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment = {**clean, "PYTHON": sys.executable, **environment}
    # Two trainings and what starts them; beside other tests on a slow machine each has taken minutes.
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=4 * LIMIT_S)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder like a Megatron-LM checkout into which tests_extend was copied, with a training script of its own."""
    shutil.copytree(REPOSITORY / "tests_extend", tmp_path / "tests_extend")
    shutil.copy(REPOSITORY / "scripts" / "pretrain_gpt.py", tmp_path / "pretrain_gpt.py")
    return tmp_path


@pytest.mark.slow
def test_feature_script_passes_in_a_checkout_with_its_own_training_script(checkout):
    script = str(FEATURE_TESTS / "ulysses.sh")
    sizes = {"CP": "2", "ITERS": "3", "SEQ_LENGTH": "64"}
    profile = "--profile --use-pytorch-profiler --profile-step-start 1 --profile-step-end 2"
    done = run(["bash", script], checkout, **sizes, FLAGS=profile, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "over 3 iterations: within 1e-05" in done.stdout
    runs = checkout / "runs" / "ulysses"
    assert (runs / "ulysses-cp2.log").exists()
    traces = {str(path.relative_to(runs)) for path in runs.rglob("*.json.gz")}
    assert {f"ulysses-cp{size}/torch_profile/rank-0.json.gz" for size in (1, 2)} <= traces


@pytest.mark.slow
def test_feature_script_fails_with_the_command_and_the_last_lines(tmp_path):
    environment = {"CP": "2", "HEADS": "1", "HIDDEN": "32", "OUTPUT": str(tmp_path)}
    done = run(["bash", str(FEATURE_TESTS / "ulysses.sh")], REPOSITORY, **environment)
    assert done.returncode == 1
    assert "ulysses-cp2: training failed\ncommand: " in done.stderr
    assert "--num-attention-heads 1" in done.stderr.splitlines()[1]
    assert "error: --num-attention-heads 1 with --tensor-model-parallel-size 1 gives each rank 1, fewer" in done.stderr


PYTHON_THAT_DOES_NOT_TRAIN = f"""#!/usr/bin/env bash
if [[ ${{2:-}} != torch.distributed.run ]]; then exec {sys.executable} "$@"; fi
[[ " $* " == *" --context-parallel-size "* ]] && loss=7.001 || loss=7.0
echo "iteration 1/ 1 | lm loss: $loss |"
"""


def test_feature_script_fails_when_the_losses_differ(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text(PYTHON_THAT_DOES_NOT_TRAIN)
    stand_in.chmod(0o755)
    environment = {"OUTPUT": str(tmp_path), "PYTHON": str(stand_in), "BACKEND": "gloo"}
    done = run(["bash", str(FEATURE_TESTS / "ring_attention.sh")], REPOSITORY, **environment)
    assert done.returncode == 1
    assert "ring_attention: the losses differ from those of CP = 1\ncommand: " in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("feature", "environment", "iterations"),
    [
        ("hybrid", {}, 20),
        ("double_ring", {"ITERS": "3", "SEQ_LENGTH": "64"}, 3),
        ("ring_attention", {"ITERS": "3", "SEQ_LENGTH": "64", "CP": "2"}, 3),
        *((name, {"ITERS": "3", "CP": "2", "MICRO_BATCH": "2"}, 3) for name in ("packed_documents", "sliding_windows")),
    ],
)
def test_feature_script_passes(feature, environment, iterations, tmp_path):
    done = run(["bash", str(FEATURE_TESTS / f"{feature}.sh")], REPOSITORY, OUTPUT=str(tmp_path), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"over {iterations} iterations: within 1e-05" in done.stdout


@pytest.mark.slow
@pytest.mark.every_release
@pytest.mark.skipif("MEGATRON_LM" not in os.environ, reason="MEGATRON_LM names no Megatron-LM checkout")
@pytest.mark.parametrize("feature", ["ulysses", "ring_attention", "double_ring", "hybrid"])
def test_feature_script_passes_with_megatrons_own_training_script(feature, tmp_path, record_property):
    script = str(REPOSITORY / FEATURE_TESTS / f"{feature}.sh")
    environment = {"OUTPUT": str(tmp_path), "ITERS": "10", "SEQ_LENGTH": "64", "PYTHONPATH": str(REPOSITORY)}
    done = run(["bash", script], Path(os.environ["MEGATRON_LM"]), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    record_property("check", "own script, CP 4")
    record_property("algorithm", feature.removesuffix("_attention").replace("_", " "))
    (last,) = re.findall(r"^ +10 +\S+ +(\S+) ", done.stdout, re.MULTILINE)
    (difference,) = re.findall(r"largest relative difference (\S+) over 10 iterations", done.stdout)
    record_property("result", f"{float(last):.5f} {float(difference):.0e}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nosuch"], "there is no feature 'nosuch'; available: double_ring"), (["a", "b"], "usage:")],
)
def test_quickstart_says_what_is_wrong_with_its_arguments(arguments, message, tmp_path):
    venv = tmp_path / "venv"
    done = run(["bash", "scripts/quickstart.sh", *arguments], REPOSITORY, VENV=str(venv))
    assert done.returncode == 2
    assert message in done.stderr
    assert not venv.exists(), "an environment was made before the arguments were looked at"


def test_without_a_suitable_python_the_scripts_say_which_one_and_where_they_looked(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "cat", "cksum", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    environment = {
        "PATH": str(tools),
        "HOME": str(tmp_path),
        "PYENV_ROOT": str(tmp_path),
        "VENV": str(tmp_path / "venv"),
    }
    done = subprocess.run(
        [str(tools / "bash"), "scripts/test.sh"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "error: CPython 3.12 is needed" in done.stderr
    assert "looked for: python3.12 python3 python" in done.stderr
    assert "PYTHON_FOR_VENV=/path/to/python3.12" in done.stderr


def test_an_environment_that_pip_could_not_fill_is_not_taken_for_a_complete_one(tmp_path):
    python, venv = tmp_path / "python", tmp_path / "venv"
    # A Python whose virtual environments have a pip that always fails, as on a full disk.
    python.write_text(
        "#!/usr/bin/env bash\n"
        "if [[ $1 == -c ]]; then echo 3.12; fi\n"
        "if [[ $2 != venv ]]; then exit; fi\n"
        'mkdir -p "$3/bin"; printf "#!/bin/sh\\nexit 1\\n" >"$3/bin/python"; chmod +x "$3/bin/python"\n'
    )
    python.chmod(0o755)
    for _ in range(2):
        done = run(["bash", "scripts/test.sh"], REPOSITORY, VENV=str(venv), PYTHON_FOR_VENV=str(python))
        assert done.returncode == 1
        assert f"error: the environment {venv} is not complete" in done.stderr
        assert not (venv / "complete").exists()


def test_the_readmes_example_prints_that_it_is_attention_on_one_rank(training):
    (example,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
        if "build_attention" in block
    ]
    assert len([line for line in example.splitlines() if line.strip()]) <= 22
    for printed in training.run_program(4, example):
        assert float(printed.rpartition("differs from one rank by ")[2]) < 1e-5, printed


def losses_of_core_training(ranks: int, **environment: str) -> list[float]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = run([*launch, "scripts/train_with_megatron_core.py"], REPOSITORY, **environment)
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"^iteration +\d+  loss (\d+\.\d+)$", done.stdout, re.MULTILINE)]


@pytest.mark.slow
def test_training_on_megatron_core_alone_has_the_losses_of_cp_1_beside_data_parallelism():
    reference, ring = losses_of_core_training(2, CP="1"), losses_of_core_training(4, CP="2")
    assert len(reference) == 10
    assert ring == pytest.approx(reference, rel=1e-5, abs=0)
    assert len(set(reference)) == 10, "it learns"


def test_setup_names_every_package():
    named = set(re.findall(r'^ +"(mindspeed_cp[\w.]*)",$', (REPOSITORY / "setup.py").read_text(), re.MULTILINE))
    folders = {path.parent.relative_to(REPOSITORY) for path in (REPOSITORY / "mindspeed_cp").rglob("*.py")}
    folders |= {"mindspeed_cp" / path.parent.relative_to(REPOSITORY) for path in (REPOSITORY / "patches").rglob("*.py")}
    assert named == {".".join(folder.parts) for folder in folders}


@pytest.mark.slow
def test_wheel_holds_the_named_packages_and_no_tests(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "runs")
    shutil.copytree(REPOSITORY, source, ignore=ignored, symlinks=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(source)]
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    code = {name for name in names if name.endswith(".py")}
    assert {"mindspeed_cp/patches/attention.py", "mindspeed_cp/attention/ring.py", "mindspeed_cp/__main__.py"} <= code
    assert {name.split("/")[0] for name in code} == {"mindspeed_cp"}
    assert "mindspeed_cp/py.typed" in names
