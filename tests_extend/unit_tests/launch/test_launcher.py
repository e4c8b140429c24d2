"""Which commands of a script start a training, on how many ranks."""

import pytest

from mindspeed_cp.launch.launcher import find_launches, find_unread
from mindspeed_cp.launch.shell import read_script

FLAGS = "train.py --micro-batch-size 1"


@pytest.mark.parametrize(
    ("command", "ranks"),
    [
        ("torchrun --nproc_per_node 4 train.py", 4),
        ("torchrun --nproc-per-node=4 --nnodes=2 train.py", 8),
        ("torchrun --nproc-per-node=gpu train.py", None),
        ("torchrun --nproc_per_node $N train.py", None),
        ("torchrun train.py", 1),
        ("torchrun $ARGS train.py", None),
        ("torchrun --master_addr $HOST train.py", 1),
        ("torchrun --nproc-per-node 2 --nproc-per-node 4 train.py", 4),
        ("PET_NPROC_PER_NODE=4 torchrun train.py", 4),
        ("torchrun --nproc-per-node 2 --master_addr your node train.py", 2),
        ("torchrun --log-dir /x/log.py train.py", 1),
        ("/opt/bin/python3.12 -m torch.distributed.run --nproc_per_node 2 -m mindspeed_cp train.py", 2),
        ("python -m torch.distributed.launch --nproc_per_node 2 train.py", 2),
        ("srun -N 2 torchrun --nproc_per_node 2 train.py", 2),
        ("srun -N 2 bash -c 'torchrun --nproc_per_node 2 train.py'", 2),
        (f"python {FLAGS}", None),
        (f"python -u -m mindspeed_cp {FLAGS}", None),
        (f"$LAUNCHER {FLAGS}", None),
        (f"./{FLAGS}", None),
    ],
)
def test_launch_is_found_with_its_ranks(tmp_path, command, ranks):
    (launch,) = find_launches(read_script(command, environment={}, folder=tmp_path).commands)
    assert (launch.script.rpartition("/")[2], launch.ranks) == ("train.py", ranks)


@pytest.mark.parametrize(
    "command",
    [
        "python tools/preprocess_data.py --input a",
        f"echo {FLAGS}",
        "torchrun -m package.train",
        "cp a.py b",
        f"echo torchrun {FLAGS}",
    ],
)
def test_other_commands_are_no_launch(tmp_path, command):
    assert find_launches(read_script(command, environment={}, folder=tmp_path).commands) == []


def test_each_of_several_launches_is_found_with_its_flags(tmp_path):
    script = f"torchrun {FLAGS} --a 1\nif $X; then torchrun {FLAGS} --b; fi"
    launches = find_launches(read_script(script, environment={}, folder=tmp_path).commands)
    assert [[field.text for field in launch.flags][2:] for launch in launches] == [["--a", "1"], ["--b"]]
    assert [launch.condition for launch in launches] == ["", f"`if $X; then torchrun {FLAGS} --b; fi` (line 2)"]


@pytest.mark.parametrize(
    "command",
    [
        "torchrun --nproc-per-node 2 $SCRIPT --micro-batch-size 1",
        "torchrun $(ls *.py)",
        "torchrun -m package.train",
        "python $SCRIPT --micro-batch-size 1",
        "sbatch --wrap 'torchrun train.py'",
        'srun bash -c "A=1 ${PREFIX} $COMMAND"',
    ],
)
def test_command_whose_script_is_not_known_is_listed(tmp_path, command):
    commands = read_script(command, environment={}, folder=tmp_path).commands
    assert [omission.line for omission in find_unread(commands)] == [1] and not find_launches(commands)
