"""What `pip install .` and a source distribution hold, and that the installed package needs nothing of the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import smallreduce

ROOT = Path(__file__).parents[1]
backend = pytest.importorskip("scikit_build_core.build", reason="scikit-build-core is not installed")


def build(hook: str, folder: Path, settings: dict[str, str]) -> Path:
    """Calls a hook of the build backend as pip does: in a process of its own, in the root of the sources."""
    program = (
        "import sys; from scikit_build_core import build; "
        f"print('built:' + build.{hook}(sys.argv[1], dict(item.split('=', 1) for item in sys.argv[2:])))"
    )
    arguments = [f"{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-c", program, str(folder), *arguments]
    # Unless make says otherwise, without CUDA, for the time it takes; nothing here depends on it.
    environment = {"CMAKE_ARGS": "-DSMALLREDUCE_CUDA=OFF", **os.environ}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder / finished.stdout.rpartition("built:")[2].strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    # What make has compiled for its environment is not compiled again.
    compiled = ROOT / "build" / "install" if Path(sys.prefix) == ROOT / ".venv" else folder / "build"
    return zipfile.ZipFile(build("build_wheel", folder, {"build-dir": str(compiled)}))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


@pytest.mark.timeout(300)
def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    [native] = [name for name in names if name.endswith(".so")]
    assert re.fullmatch(r"smallreduce/_C\..*\.so", native)
    sources = {str(path.relative_to(ROOT / "python")) for path in (ROOT / "python").rglob("*.py*")}
    sources = {name for name in sources if not name.endswith(".pyc")}
    assert set(names) == sources | {native, "smallreduce/py.typed"}
    assert {"smallreduce/_C.pyi", "smallreduce/__init__.py"} <= sources


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "smallreduce"
    assert metadata["Version"] == smallreduce.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [name for name in metadata.get_all("Requires-Dist", []) if "extra ==" not in name]
    assert required == ["torch>=2.11", "numpy>=2.1"]
    assert set(metadata.get_all("Provides-Extra", [])) == {"dev", "examples"}


def test_installed_package_imports_by_itself(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    program = (
        "import sys, torch; sys.path.insert(0, 'site'); import smallreduce as sr; "
        "assert 'site' in sr.__file__, sr.__file__; sr.build_info(); "
        "x = torch.ones(1000); "
        "assert torch.equal(sr.decode(sr.encode(x, 'sign'), 'sign', numel=1000, dtype=x.dtype), x)"
    )
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env={"PATH": ""})
    assert finished.returncode == 0, finished.stderr


def test_native_module_links_to_nothing_of_torch(wheel: zipfile.ZipFile) -> None:
    [native] = [name for name in wheel.namelist() if name.endswith(".so")]
    module = wheel.read(native)
    for library in (b"libtorch", b"libc10", b"libgomp"):
        assert library not in module


def test_source_distribution_is_clean(tmp_path: Path) -> None:
    with tarfile.open(build("build_sdist", tmp_path, {})) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "csrc/formats/packet.h"} <= names
    unwanted = re.compile(r"\.so$|\.pyc$|^build/|^\.(?!gitignore)|\.egg-info|^PKG-INFO/|^demo/|^gpu-check-report/")
    assert not sorted(name for name in names if unwanted.search(name))


def test_version_is_written_once() -> None:
    version = re.compile(re.escape(smallreduce.__version__))
    places = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", *(ROOT / "python").rglob("*.py")]
    assert [str(path.relative_to(ROOT)) for path in places if version.search(path.read_text())] == [
        "python/smallreduce/__init__.py"
    ]
