"""apex and FlashAttention: what keeps them from being built, the commands, and a real pip on a small stand-in.

No test compiles the real ones: that takes a CUDA toolkit and up to hours. The stand-in is a git repository whose build
backend writes a wheel with modules of the same names; git, pip, wheel, environment and installation are real.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from megatron_small_repository import git

from train.engine.megatron_deepspeed import (
    checkout,
    cuda_toolchain,
    extension_build,
    extensions,
    install,
    report,
)
from train.engine.megatron_deepspeed.cuda_toolchain import Toolchain
from train.engine.megatron_deepspeed.extensions import APEX, FLASH_ATTN
from train.engine.megatron_deepspeed.install import InstallSettings
from train.engine.megatron_deepspeed.patches import Outcome, all_patches
from train.errors import UserError

GOOD = Toolchain(torch="2.12.0+cu130", torch_cuda="13.0", cuda_home="/opt/cuda", nvcc="13.0")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of wheels, empty, on a machine without GPUs of its own."""
    monkeypatch.setattr(checkout, "PROJECT_ROOT", tmp_path / "project")
    monkeypatch.setattr(cuda_toolchain, "compute_capabilities", lambda: ())
    monkeypatch.setattr(cuda_toolchain, "package_headers", lambda: ())
    for name in ("MAX_JOBS", "FLASH_ATTN_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CPATH"):
        monkeypatch.delenv(name, raising=False)
    return checkout.extensions_dir()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"torch": "2.12.0+cpu", "torch_cuda": None}, r"torch 2\.12\.0\+cpu is a build without CUDA.*get-started"),
        ({"cuda_home": None, "nvcc": None}, r"no CUDA toolkit: nvcc is not on the PATH.*toolkit of CUDA 13\.0"),
        ({"nvcc": None}, r"/opt/cuda/bin/nvcc does not run: point CUDA_HOME at"),
        ({"has_headers": False}, r"/opt/cuda has an nvcc but no include/cuda_runtime\.h.*set CUDA_HOME to the toolkit"),
        ({"nvcc": "12.8"}, r"nvcc in /opt/cuda is of CUDA 12\.8, torch 2\.12\.0\+cu130 of CUDA 13\.0"),
    ],
)
def test_a_toolchain_that_does_not_fit_is_refused(change: dict[str, str | None], told: str) -> None:
    for option, same_minor in (("--with_apex", True), ("--with_flash_attn", False)):
        (problem,) = cuda_toolchain.misfits(replace(GOOD, **change), option, same_minor=same_minor)  # type: ignore[arg-type]
        assert re.search(told, problem) and problem.startswith(f"{option}: ")
        assert problem.endswith(f"or leave {option} out: torch's own kernels stand in.")
    assert not list(cuda_toolchain.misfits(GOOD, "--with_apex", same_minor=True))


def test_only_apex_insists_on_the_minor_version() -> None:
    found = extensions.problems((APEX, FLASH_ATTN), replace(GOOD, nvcc="13.2"))
    told = [problem for problem in found if "building needs" not in problem]
    assert len(told) == 1 and told[0].startswith("--with_apex: nvcc in /opt/cuda is of CUDA 13.2")
    assert "the build wants equal ones" in told[0]


def test_flash_attention_needs_a_torch_it_compiles_with() -> None:
    assert not list(extensions._torch_problems(FLASH_ATTN, GOOD))
    (problem,) = extensions._torch_problems(FLASH_ATTN, replace(GOOD, torch="2.14.1+cu130"))
    assert "flash_attn 2.8.3.post1 does not compile with torch 2.14.1+cu130 (2.14 and later want C++20)" in problem
    assert not list(extensions._torch_problems(APEX, replace(GOOD, torch="2.14.1+cu130")))


def test_build_tools_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "_BUILD_TOOLS", ("json", "pip_not_there"))
    (problem,) = extensions.problems((APEX, FLASH_ATTN), GOOD)
    assert problem.startswith(
        "--with_apex and --with_flash_attn: building needs pip_not_there in this environment: run"
    )
    assert problem.endswith("-m pip install pip_not_there")
    monkeypatch.setattr(extensions, "_BUILD_TOOLS", ("pip", "pip_not_there"))
    monkeypatch.setattr(extensions.importlib.util, "find_spec", lambda _name: None)
    (problem,) = extensions.problems((APEX,), GOOD)
    assert "-m ensurepip && " in problem and problem.endswith("-m pip install pip_not_there")


def test_nvcc_is_asked_for_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.48\nBuild r13.0"
    assert cuda_toolchain.parse_nvcc_release(text) == "13.0" and cuda_toolchain.parse_nvcc_release("no") is None
    nvcc = tmp_path / "bin" / "nvcc"  # no toolkit here: a program that answers as one
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho '{text}'\n")
    answer = f'print("a warning")\nprint(\'["2.12.0+cu130", "13.0", "{tmp_path}"]\')'
    monkeypatch.setattr(cuda_toolchain, "_ASK_TORCH", answer)
    nvcc.chmod(0o755)
    assert cuda_toolchain.read_toolchain() == Toolchain("2.12.0+cu130", "13.0", str(tmp_path), "13.0", False)
    for folder in (tmp_path / "include", tmp_path / "targets" / "x86_64-linux" / "include"):
        folder.mkdir(parents=True)
        (folder / "cuda_runtime.h").touch()
        assert cuda_toolchain.read_toolchain().has_headers
        (folder / "cuda_runtime.h").unlink()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    assert cuda_toolchain.read_toolchain().nvcc is None
    nvcc.unlink()
    assert cuda_toolchain.read_toolchain().nvcc is None
    monkeypatch.setattr(cuda_toolchain, "_ASK_TORCH", "import torch_not_there")
    with pytest.raises(UserError, match=r"torch does not import in .*No module named 'torch_not_there'"):
        cuda_toolchain.read_toolchain()


def test_apex_is_built_for_the_gpus_here_and_several_modules_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def environment() -> dict[str, str]:
        return dict(extension_build.wheel_command(APEX, "source", Path("folder")).environment)

    assert not {"TORCH_CUDA_ARCH_LIST", "CPATH"} & set(environment())
    monkeypatch.setattr(cuda_toolchain, "compute_capabilities", lambda: ("8.6", "9.0"))
    monkeypatch.setattr(cuda_toolchain, "package_headers", lambda: ("/packages/include",))
    monkeypatch.setenv("MAX_JOBS", "32")
    found = environment()
    assert found["TORCH_CUDA_ARCH_LIST"] == "8.6;9.0" and found["CPATH"] == "/packages/include"
    assert (found["APEX_PARALLEL_BUILD"], found["MAX_JOBS"]) == ("9", "16")  # 16 and 8 x 2 files: 32 compilers
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    monkeypatch.setenv("CPATH", "/mine")
    monkeypatch.setenv("MAX_JOBS", "3")
    found = environment()
    assert found["TORCH_CUDA_ARCH_LIST"] == "10.0" and found["CPATH"] == f"/mine{os.pathsep}/packages/include"
    assert found["MAX_JOBS"] == "3" and "APEX_PARALLEL_BUILD" not in found
    flash = extension_build.wheel_command(FLASH_ATTN, "source", Path("folder")).environment
    assert "TORCH_CUDA_ARCH_LIST" not in flash and "APEX_PARALLEL_BUILD" not in flash


def test_headers_of_the_cuda_libraries_are_found_in_torchs_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    spec = importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(cuda_toolchain.importlib.util, "find_spec", lambda _name: spec)
    assert cuda_toolchain.package_headers() == ()
    for package, name in (("cublas", "cublas_v2.h"), ("cusparse", "cusparse.h"), ("nccl", "nccl.h")):
        (tmp_path / package / "include").mkdir(parents=True)
        (tmp_path / package / "include" / name).touch()
    assert cuda_toolchain.package_headers() == tuple(
        str(tmp_path / name / "include") for name in ("cublas", "cusparse")
    )
    monkeypatch.setattr(cuda_toolchain.importlib.util, "find_spec", lambda _name: None)
    assert cuda_toolchain.package_headers() == ()


def test_the_first_error_is_told_not_pips_own() -> None:
    pip = ["  error: subprocess-exited-with-error", "  ERROR: Failed building wheel for apex"]
    why = "      x.h:10:10: fatal error: cusparse.h: No such file or directory"
    assert extension_build.first_error([*pip[:1], "note", why, "  error: command 'g++' failed", *pip]) == why.strip()
    assert extension_build.first_error(["/usr/bin/ld: cannot find -lcudart"]) == "/usr/bin/ld: cannot find -lcudart"
    assert extension_build.first_error(pip) == ""


@pytest.mark.slow
def test_the_running_torch_is_asked() -> None:
    torch = pytest.importorskip("torch")
    found = cuda_toolchain.read_toolchain()
    assert (found.torch, found.torch_cuda) == (torch.__version__, torch.version.cuda)


def test_jobs_are_bounded_by_memory_and_cores() -> None:
    jobs = cuda_toolchain.parallel_jobs
    assert jobs(cores=64, free_gib=100, gib_per_job=9) == 11
    assert jobs(cores=4, free_gib=100, gib_per_job=9) == 4
    assert jobs(cores=64, free_gib=2, gib_per_job=9) == 1


def test_the_commands_that_build_apex(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    *git_steps, build, into, probe = extension_build.commands(APEX, "https://me:secret@example.org/apex")
    assert [step.argv[0] for step in git_steps] == ["git", "git", "git"]
    assert git_steps[1].argv[-2:] == ("https://***@example.org/apex", APEX.version)
    folder = extension_build.wheel_folder(APEX)
    assert folder.parent == own_cache and folder.name.startswith("apex-6424da3b4faa-torch")
    assert dict(build.environment) == {
        "APEX_CPP_EXT": "1",
        "APEX_CUDA_EXT": "1",
        "MAX_JOBS": "3",
        "TMPDIR": str(folder),
    }
    assert build.argv[:4] == (sys.executable, "-m", "pip", "wheel") and build.argv[-1] == str(folder / "source")
    assert {"--no-build-isolation", "--no-deps", "--no-cache-dir"} < set(build.argv)
    assert into.argv[1:4] == ("-m", "pip", "install") and {"--no-deps", "--no-index"} < set(into.argv)
    assert probe.argv == (sys.executable, "-c", "import torch, fused_layer_norm_cuda, amp_C")


def test_the_commands_that_build_flash_attention_for_the_gpus_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_toolchain, "compute_capabilities", lambda: ("8.6", "8.9", "9.0", "7.5"))
    build = extension_build.commands(FLASH_ATTN, FLASH_ATTN.source)[0]
    assert build.argv[-1] == "flash-attn==2.8.3.post1" and "--no-binary" in build.argv
    assert build.environment["FLASH_ATTENTION_FORCE_BUILD"] == "TRUE"
    assert build.environment["FLASH_ATTN_CUDA_ARCHS"] == "80;90"
    assert extension_build.wheel_folder(FLASH_ATTN).name.endswith("-sm86-sm89-sm90-sm75")
    monkeypatch.setenv("FLASH_ATTN_CUDA_ARCHS", "100")
    assert extension_build.commands(FLASH_ATTN, "x")[0].environment["FLASH_ATTN_CUDA_ARCHS"] == "100"
    monkeypatch.undo()
    monkeypatch.setattr(cuda_toolchain, "compute_capabilities", lambda: ())
    assert "FLASH_ATTN_CUDA_ARCHS" not in extension_build.commands(FLASH_ATTN, "x")[0].environment


def test_dry_run_shows_the_builds_and_refuses_nothing(capsys: pytest.CaptureFixture[str], own_cache: Path) -> None:
    assert install.install(InstallSettings(with_apex=True, with_flash_attn=True, dry_run=True)) == 0
    shown = capsys.readouterr().out
    assert f"--depth 1 https://github.com/NVIDIA/apex {APEX.version}" in shown
    assert "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 MAX_JOBS=" in shown and "flash-attn==2.8.3.post1" in shown
    assert not own_cache.exists()


@pytest.mark.slow
def test_all_that_stands_against_the_builds_is_told_before_anything_is_done(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA")
    with pytest.raises(UserError, match=r"(?s)--with_apex: torch .*--with_flash_attn: torch .* without CUDA"):
        install.install(InstallSettings(repository=str(tmp_path), with_apex=True, with_flash_attn=True))
    assert not checkout.cache_dir().exists()


def put_distribution(folder: Path, *, files: tuple[str, ...], record: bool = True) -> None:
    """A package called apex as pip leaves it."""
    info = folder / "apex-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.1\n")
    for name in files:
        (folder / name).write_text("")
    if record:
        (info / "RECORD").write_text("".join(f"{name},,\n" for name in (*files, "apex-0.1.dist-info/METADATA")))


def test_what_is_installed_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("apex") is not None:
        pytest.skip("apex is installed here")
    assert extensions.state(APEX) == (None, "not installed")
    kernels = ("fused_layer_norm_cuda.py", "amp_C.py")
    for name, files, record, expected in (
        ("other", ("apex.py",), True, (None, "apex 0.1: without its CUDA kernels (fused_layer_norm_cuda, amp_C)")),
        ("killed", kernels, False, (None, "apex 0.1: half-installed")),
        ("whole", kernels, True, ("0.1", "")),
    ):
        put_distribution(tmp_path / name, files=files, record=record)
        with monkeypatch.context() as patched:
            patched.syspath_prepend(tmp_path / name)
            assert extensions.state(APEX) == expected
    (tmp_path / "whole" / "amp_C.py").unlink()
    monkeypatch.syspath_prepend(tmp_path / "whole")
    assert extensions.state(APEX) == (None, "apex 0.1: amp_C.py is missing")


BACKEND = """
import base64, hashlib, os, signal, sys, zipfile
NAME = "apex-0.1-py3-none-any.whl"
FILES = {
    "apex/__init__.py": "", "amp_C.py": "JOBS = %r" % os.environ.get("MAX_JOBS"), "fused_layer_norm_cuda.py": "",
    "apex-0.1.dist-info/METADATA": "Metadata-Version: 2.1\\nName: apex\\nVersion: 0.1\\n",
    "apex-0.1.dist-info/WHEEL": "Wheel-Version: 1.0\\nGenerator: t\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
}
def build_wheel(folder, config_settings=None, metadata_directory=None):
    assert os.environ["APEX_CUDA_EXT"] == os.environ["APEX_CPP_EXT"] == "1"
    plan = os.environ.get("PLAN")
    if plan == "fail":
        print("\\n".join("compiler line %d" % line for line in range(60)))
        sys.exit(1)
    if plan == "kill":
        open(os.path.join(os.environ["TMPDIR"], "half.o"), "w").close()
        os.kill(int(os.environ["INSTALLER"]), signal.SIGKILL)
        sys.exit(1)  # pip is gone, too
    with zipfile.ZipFile(os.path.join(folder, NAME), "w") as wheel:
        for name, text in FILES.items():
            wheel.writestr(name, text)
        record = "apex-0.1.dist-info/RECORD"
        wheel.writestr(record, "".join(name + ",,\\n" for name in (*FILES, record)))
    return NAME
"""
INSTALL = """
import os, sys
from dataclasses import replace
from pathlib import Path
from train import errors
from train.engine.megatron_deepspeed import checkout, extension_build, extensions
checkout.PROJECT_ROOT = Path(sys.argv[1])
os.environ["INSTALLER"] = str(os.getpid())
try:
    print(extension_build.install_extension(replace(extensions.APEX, version=sys.argv[3]), sys.argv[2], timeout_s=60))
except errors.UserError as error:
    sys.exit(str(error))
"""


class Environment:
    """A virtual environment over the running one, and what is built for it."""

    def __init__(self, folder: Path) -> None:
        self.project, self.repository = folder / "project", folder / "a pex"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.python = folder / "venv" / "bin" / "python"
        (self.packages,) = (folder / "venv" / "lib").glob("*/site-packages")
        own = next(path for path in sys.path if path.endswith("site-packages"))
        (self.packages / "parent.pth").write_text(f"import site; site.addsitedir({own!r})\n")
        self.repository.mkdir()
        backend = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        (self.repository / "pyproject.toml").write_text(backend)
        (self.repository / "backend.py").write_text(BACKEND)
        git(self.repository, "init", "--quiet")
        git(self.repository, "add", ".")
        git(self.repository, "commit", "--quiet", "-m", "one")
        self.commit = git(self.repository, "rev-parse", "HEAD")

    def install(self, **environment: str) -> subprocess.CompletedProcess[str]:
        words = [self.python, "-c", INSTALL, self.project, self.repository, self.commit]
        return subprocess.run(
            words, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
        )

    def cache(self) -> list[str]:
        """What is in the cache of wheels, by kind."""
        found = (self.project / ".cache" / "extensions").iterdir()
        return sorted("folder" if path.is_dir() else path.suffix for path in found)


@pytest.mark.slow
def test_built_installed_killed_and_broken_with_a_real_pip(tmp_path: Path) -> None:
    if importlib.util.find_spec("pip") is None or importlib.util.find_spec("apex") is not None:
        pytest.skip("needs pip, and an environment without apex")
    there = Environment(tmp_path)

    failed = there.install(PLAN="fail")
    assert failed.returncode == 1 and "apex did not build from" in failed.stderr and "exit code 1." in failed.stderr
    log = re.search(r"The whole log is (.*\.log); it ends:", failed.stderr)
    assert log is not None and "compiler line 0\n" in Path(log[1]).read_text() and "compiler line 59" in failed.stderr
    assert there.cache() == [".log"]

    killed = there.install(PLAN="kill")
    assert killed.returncode == -signal.SIGKILL
    assert not (there.packages / "apex").exists()
    done = there.install(MAX_JOBS="3")
    assert done.returncode == 0 and "apex " in done.stdout and "built and installed" in done.stdout, done.stderr
    assert there.cache() == [".log", "folder"]  # nothing of the killed one is left
    assert (there.packages / "amp_C.py").read_text() == "JOBS = '3'"

    again = there.install(PLAN="fail")  # which a build would do
    assert "apex 0.1 is already installed: left as it is" in again.stdout and again.returncode == 0

    record = next(there.packages.glob("apex-*.dist-info")) / "RECORD"  # which pip writes last
    record.unlink()
    (there.packages / "fused_layer_norm_cuda.py").unlink()
    mended = there.install(PLAN="fail")  # from the wheel in the cache
    assert mended.returncode == 0 and "built and installed" in mended.stdout, mended.stderr
    assert record.is_file() and (there.packages / "fused_layer_norm_cuda.py").is_file()


def test_kernels_that_do_not_import_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension_build, "state", lambda _extension: (None, "not installed"))
    folder = extension_build.wheel_folder(APEX)
    folder.mkdir(parents=True)
    (folder / "apex-0.1-py3-none-any.whl").write_bytes(b"")
    monkeypatch.setattr(extension_build, "_run", lambda *_others: None)
    broken = extension_build.process.Command((sys.executable, "-c", "raise ImportError('undefined symbol')"))
    monkeypatch.setattr(extension_build, "import_command", lambda _extension: broken)
    with pytest.raises(UserError, match=r"does not import: ImportError: undefined symbol\. Take it out.*uninstall"):
        extension_build.install_extension(APEX, "x", timeout_s=1)


@pytest.mark.parametrize(
    ("said", "hint"),
    [("cicc died due to signal 9", "set MAX_JOBS lower"), ("No matching distribution found", "--flash_attn_source")],
)
def test_a_failed_build_says_what_may_help(said: str, hint: str, tmp_path: Path) -> None:
    command = extension_build.process.Command(("sh", "-c", f"echo {said}; exit 1"))
    with pytest.raises(UserError, match=f"failed: exit code 1.*{hint}.*(?s:.*{said})"):
        extension_build._run(command, tmp_path / "log", "failed")


def test_the_report_tells_every_patch_and_its_cost() -> None:
    known = {patch.name for patch in all_patches()}
    assert set(report._COSTS) <= known
    applied, unneeded, off = all_patches()[:3]
    rows = report.patch_rows(
        [
            Outcome(applied, "applied", "X: by torch"),
            Outcome(unneeded, "not needed", ""),
            Outcome(off, "switched off", ""),
        ]
    )
    assert [row.state for row in rows] == ["replaced", "as it is", "switched off"]
    assert rows[0].replacement == "X: by torch" and rows[0].cost and not rows[1].cost
    lines = report.table([report.extension_row(APEX, "cpu"), *rows]).splitlines()
    assert lines[0].split("  ")[0] == "component" and "what that costs" in lines[0] and len(lines) == 5
    assert lines[1].startswith("package apex")
