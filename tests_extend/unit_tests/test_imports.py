"""What an import brings along, and the program `python -m mindspeed_cp`: each proven in a fresh interpreter."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mindspeed_cp import __main__ as program
from mindspeed_cp.kernels import KERNELS
from mindspeed_cp.testing.rank_pool import LIMIT_S

ROOT = Path(__file__).resolve().parents[2]

needs_megatron = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")


def run_python(*arguments, path=ROOT, cwd=ROOT):
    """Run Python with the repository, or what `path` says, on its path."""
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT_S)


def modules_imported_by(statement):
    """Modules that a statement imports, beside those of a bare interpreter."""
    done = run_python(
        "-c", f"import sys\nbefore = set(sys.modules)\n{statement}\nprint(*sorted(set(sys.modules) - before))"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def run_blocked(statement, *blocked):
    """Run a statement where some modules cannot be imported."""
    return run_python("-c", f"import sys\nsys.modules |= dict.fromkeys({blocked!r})\n{statement}")


def test_importing_the_package_imports_nothing_else():
    # Neither torch nor Megatron, and nothing that could patch them.
    assert modules_imported_by("import mindspeed_cp") == ["mindspeed_cp"]


def test_that_check_sees_what_is_imported():
    assert {"mindspeed_cp.topology", "dataclasses"} <= set(modules_imported_by("import mindspeed_cp.topology"))


def test_importing_the_package_prints_nothing():
    done = run_python("-c", "import mindspeed_cp")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_that_check_sees_what_is_printed():
    done = run_python("-c", "import mindspeed_cp, sys; print('out'); print('err', file=sys.stderr)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "err\n")


OPTIONAL = ("megatron", "torch_npu", "apex", "transformer_engine", "triton", "flash_attn")


def test_attention_works_without_any_vendor():
    done = run_blocked(
        "import torch\nfrom mindspeed_cp.attention import build_attention\n"
        "from mindspeed_cp.config import ContextParallelConfig\n"
        "x = torch.ones(1, 2, 4, 8)\n"
        "print(build_attention(ContextParallelConfig())(x, x, x).shape)",
        *OPTIONAL,
    )
    assert (done.returncode, done.stdout) == (0, "torch.Size([1, 2, 4, 8])\n"), done.stderr


@pytest.mark.parametrize("vendor", OPTIONAL)
def test_that_check_finds_a_vendor_that_is_imported(vendor):
    done = run_blocked(f"import {vendor}", *OPTIONAL)
    assert done.returncode == 1
    assert f"import of {vendor} halted" in done.stderr


# One interpreter for all Megatrons that will not do, because torch takes seconds to import: prints as JSON, for each of
# them, how the import of the adaptor, the report and a script end.
UNFIT_MEGATRONS = """
import contextlib, io, json, runpy, sys, types

def ending(argv):
    out, err, status = io.StringIO(), io.StringIO(), 0
    sys.argv = ["mindspeed_cp", *argv]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module("mindspeed_cp", run_name="__main__")
        except SystemExit as exit:
            status = exit.code
        except Exception as error:
            status = repr(error)
    return status, out.getvalue(), err.getvalue()

script, endings = sys.argv[1], {}
for version in (None, "0.15.3", "0.16.0rc0", "0.19.9", "0.20.0+abc123"):
    for name in ("megatron", "megatron.core", "megatron.core.package_info"):
        sys.modules[name] = None if version is None else types.ModuleType(name)
    if version is not None:
        sys.modules["megatron"].__path__ = sys.modules["megatron.core"].__path__ = []
        sys.modules["megatron.core.package_info"].__version__ = sys.modules["megatron.core"].__version__ = version
    try:
        import mindspeed_cp.megatron_adaptor
        adaptor = "imported"
    except Exception as error:
        adaptor = f"{type(error).__name__}: {error}"
    endings[str(version)] = {"adaptor": adaptor, "report": ending([]), "script": ending([script])}
print(json.dumps(endings))
"""


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """How things end by version of Megatron, "None" where it is missing."""
    script = tmp_path_factory.mktemp("unfit") / "script.py"
    script.write_text("print('ran')\n")
    done = run_python("-c", UNFIT_MEGATRONS, script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


MISSING = (
    "mindspeed_cp.megatron_adaptor patches Megatron, and megatron.core cannot be imported (import of "
    "megatron.core.package_info halted; None in sys.modules); install megatron-core>=0.16, or put a Megatron-LM "
    "checkout on PYTHONPATH. The attention alone is mindspeed_cp.attention."
)
UNFIT = {"None": MISSING} | {
    version: f"megatron-core {version} is too old for mindspeed_cp; install megatron-core>=0.16."
    for version in ("0.15.3", "0.16.0rc0")
}


@pytest.mark.parametrize("version", UNFIT)
def test_adaptor_says_which_megatron_to_install(endings, version):
    assert endings[version]["adaptor"] == f"ImportError: {UNFIT[version]}"


@pytest.mark.parametrize("version", UNFIT)
def test_report_without_fit_megatron_says_so(endings, version):
    status, out, err = endings[version]["report"]
    assert (status, err) == (0, "")
    assert _headings(out) == ["mindspeed_cp", "device", "kernels", "example", "terms", "patches"]
    assert out.splitlines()[-1] == f"patches      none: {UNFIT[version]}"


@pytest.mark.parametrize("version", UNFIT)
def test_script_without_fit_megatron_is_one_line_and_status_2(endings, version):
    status, out, err = endings[version]["script"]
    assert (status, out) == (2, "")
    assert err.splitlines() == [f"mindspeed_cp: error: {UNFIT[version]}"]


@pytest.mark.parametrize("version", ["0.19.9", "0.20.0+abc123"])
def test_megatron_of_a_fit_version_without_the_targets_is_refused_by_name_and_version(endings, version):
    # And the three tests above see that a version is fit.
    refusal = (
        f"cannot patch megatron.core.parallel_state:initialize_model_parallel: No module named "
        f"'megatron.core.parallel_state'. Has it moved in megatron.core {version}?"
    )
    assert endings[version]["adaptor"] == f"PatchError: {refusal}"
    status, out, err = endings[version]["script"]
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == f"mindspeed_cp: error: {refusal}"


@pytest.mark.parametrize(("version", "times"), [("0.19.9", 0), ("0.20.0+abc123", 1)])
def test_megatron_newer_than_any_tried_is_said_once(endings, version, times):
    _, _, err = endings[version]["script"]
    assert err.count(f"UserWarning: megatron-core {version} is newer than 0.19, the newest that") == times


def test_report_names_the_patch_that_finds_no_target(endings):
    status, out, _ = endings["0.20.0+abc123"]["report"]
    assert status == 0
    assert "cannot patch megatron.core.parallel_state:" in out


def test_missing_script_is_one_line_and_status_2():
    done = run_python("-m", "mindspeed_cp", "missing.py", "--flag")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mindspeed_cp: error: there is no script 'missing.py'; --help says what there is.\n"


def test_help_tells_the_usage(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mindspeed_cp", "--help"])
    program.main()
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python -m mindspeed_cp  ") and "check FILE" in printed
    assert "--context-parallel-algo {" in printed


@needs_megatron
def test_script_runs_as_the_main_program_with_its_own_arguments_and_folder(programs):
    done = programs["last"]
    folder = Path(done.args[3]).parent
    assert done.stdout.splitlines()[0] == f"__main__ ['a', '--b'] True {folder} beside"
    assert done.returncode == 7


@needs_megatron
def test_script_runs_patched(programs):
    done = programs["last"]
    states = _sections(done)[0].splitlines()
    assert "megatron.core.parallel_state:initialize_model_parallel|applied|" in "\n".join(states)
    assert any(line.startswith("torch.cuda:device_count|not applied|") for line in states)


@needs_megatron
def test_report_lists_every_patch_with_target_reason_and_state(programs):
    done = programs["last"]
    states, report = _sections(done)
    groups = {
        " ".join(heading.split()): heading_and_targets
        for group in re.split(r"\n  (?=\[)", report)
        for heading, _, heading_and_targets in [group.partition("\n      ")]
    }
    for target, state, why in (line.split("|") for line in states.splitlines()):
        module, attribute = target.split(":")
        listed = " ".join(groups[f"[{state}] {' '.join(why.split())}"].split())
        assert re.search(rf"(^| ){re.escape(module)}:( [\w.]+,)* {re.escape(attribute)}(,| |$)", listed), target


@needs_megatron
def test_report_gives_each_reason_once(programs):
    done = programs["last"]
    states, report = _sections(done)
    reasons = {tuple(line.split("|")[1:]) for line in states.splitlines()}
    assert report.count("\n  [") == len(reasons) < len(states.splitlines())


@needs_megatron
def test_report_names_versions_device_kernels_and_terms(programs):
    done = programs["last"]
    _, report = _sections(done)
    assert _headings(report)[:6] == ["mindspeed_cp", "device", "kernels", "example", "terms", "megatron"]


@needs_megatron
def test_report_says_which_kernel_would_be_chosen_and_why_not_each_before_it(programs):
    done = programs["last"]
    example = done.stdout.partition("\nexample ")[2].partition("\nterms")[0].splitlines()
    assert "cpu_flash computes causal attention of 4096 queries over 4096 keys" in example[0]
    passed_over = KERNELS.names[: KERNELS.names.index("cpu_flash")]
    assert [line.split(":")[0] for line in example[1:]] == [f"  not {name}" for name in passed_over]


def _sections(done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """What the script prints of the patches' states, and the report."""
    states, _, report = done.stdout.partition("== states\n")[2].partition("== bindings\n")[0].partition("== report\n")
    return states, report


def _headings(report: str) -> list[str]:
    """First words of the lines that are not indented."""
    return [line.split()[0] for line in report.splitlines() if line and not line.startswith(" ")]


def test_patches_cannot_be_imported_by_another_name():
    done = run_python("-c", "import patches")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: the patches were imported as 'patches'; import them as 'mindspeed_cp.patches', "
        "so that each patch exists only once."
    )


def test_patches_can_be_imported_by_their_own_name():
    assert modules_imported_by("import mindspeed_cp.patches") == ["mindspeed_cp", "mindspeed_cp.patches"]
