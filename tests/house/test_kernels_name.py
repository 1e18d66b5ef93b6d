"""Hugging Face's package `kernels`, which diffusers imports, is not hidden by our folder of that name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tests.helpers.process import run_python


def test_our_folders_are_no_packages(repo_root: Path) -> None:
    for room in ("kernels", "pipelines", "search"):
        assert not (repo_root / room / "__init__.py").exists()


def test_an_installed_package_wins_over_our_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("NAME = 'installed'\n")
    code = "import kernels, diffsparse.kernels\nprint(kernels.NAME, kernels.__file__)"
    name, file = run_python(code, env={"PYTHONPATH": str(tmp_path)}).split(maxsplit=1)
    assert name == "installed"
    assert Path(file).is_relative_to(tmp_path)


def test_hugging_face_kernels_is_theirs() -> None:
    """From the root: theirs where it is installed, and no diffusers that believes it is where it is not."""
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None:
        code = "import kernels, diffsparse.kernels\nprint(kernels.__file__)\nfrom kernels import get_kernel"
        assert "site-packages" in run_python(code)
    else:
        code = "import diffsparse\nfrom diffusers.utils import is_kernels_available\nprint(is_kernels_available())"
        assert run_python(code) == "False"
