"""The built wheel, installed where there is no clone and no compiler."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.helpers.process import ROOT, run_python

pytestmark = pytest.mark.slow(reason="builds the wheel and installs it in an environment of its own")

ROOMS = ("kernels", "pipelines", "search")


def _run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clone's files, links kept, without what builds and tests left beside them."""
    tree = tmp_path_factory.mktemp("source") / "tree"
    listed = _run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        origin = ROOT / name
        if name.startswith(("examples/", "tests/")) or not (origin.is_symlink() or origin.is_file()):
            continue
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(origin, target, follow_symlinks=False)
    return tree


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel alone, and borrows the dependencies, which are gigabytes, by path.

    Folders that a .pth file names are searched, but their own .pth files are not read, so the editable install of the
    clone is not borrowed with them.
    """
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    _run(python, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--no-index", wheel, cwd=folder)
    site = run_python("import sysconfig; print(sysconfig.get_path('purelib'))", python=python, cwd=folder)
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(site) / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return python


def _no_compiler(python: Path) -> dict[str, str]:
    """An environment in which nothing but the venv's own commands is found."""
    return {"PATH": str(python.parent), "CC": "", "CXX": ""}


def test_wheel_holds_the_package_and_nothing_else(wheel: Path, source: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"{wheel.name.split('-py3')[0]}.dist-info"
    assert wheel.name.endswith("-py3-none-any.whl")
    assert {
        "diffsparse/py.typed",
        "diffsparse/kernels/backends/cpu/attend.c",
        "diffsparse/search/inspector.html",
        f"{info}/licenses/LICENSE",
        f"{info}/entry_points.txt",
    } <= names
    assert {name.split("/")[0] for name in names} == {"diffsparse", info}
    home = source / "diffsparse"
    links = {home / room for room in ROOMS}
    own = [path for path in home.rglob("*.py") if not links & set(path.parents)]
    expected = {f"diffsparse/{path.relative_to(home)}" for path in own}
    for room in ROOMS:
        folder = source / room / "src"
        expected |= {f"diffsparse/{room}/{path.relative_to(folder)}" for path in folder.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected


def test_wheel_holds_every_backend_and_no_benchmark(wheel: Path, source: Path) -> None:
    backends = {path.name for path in (source / "kernels" / "src" / "backends").iterdir() if path.is_dir()}
    assert {"reference", "cpu", "triton", "gluon_sm90"} <= backends
    library = {path.stem for path in (source / "benchmarks" / "library").iterdir()} - {"__init__"}
    assert library, "the sources have benchmarks, so that the wheel could have them too"
    with zipfile.ZipFile(wheel) as archive:
        kernels = [name.split("/")[2:] for name in archive.namelist() if name.startswith("diffsparse/kernels/")]
    assert {parts[1] for parts in kernels if len(parts) > 2 and parts[0] == "backends"} >= backends
    assert not library & {part.removesuffix(".py") for parts in kernels for part in parts}


def test_sdist_builds_alone(built: Path) -> None:
    """The wheel above was built from it: the rooms are real folders there."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "diffsparse/__init__.py",
        "diffsparse/kernels/__init__.py",
    } <= names


def test_metadata(clean_python: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.metadata import metadata, version, entry_points\n"
        "import diffsparse\n"
        "meta = metadata('diffsparse')\n"
        "assert version('diffsparse') == diffsparse.__version__\n"
        "assert meta['License-Expression'] == 'Apache-2.0'\n"
        "assert meta['Requires-Python'] == '>=3.11'\n"
        "assert {'xformers', 'metrics', 'viz', 'demo', 'dev'} <= set(meta.get_all('Provides-Extra'))\n"
        "(script,) = entry_points(group='console_scripts', name='diffsparse')\n"
        "assert script.value == 'diffsparse.search.cli:main'\n"
    )
    run_python(code, python=clean_python, cwd=tmp_path)


def test_rooms_are_folders_of_the_wheel(clean_python: Path, tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, diffsparse, diffsparse.kernels, diffsparse.pipelines, diffsparse.search\n"
        "home = pathlib.Path(diffsparse.__file__).parent\n"
        "assert home.is_relative_to(sys.prefix), home\n"
        "for room in (diffsparse.kernels, diffsparse.pipelines, diffsparse.search):\n"
        "    folder = pathlib.Path(room.__file__).parent\n"
        "    assert folder.parent == home and not folder.is_symlink(), folder\n"
        f"assert not [path for path in sys.path if path == {str(ROOT)!r}]\n"
    )
    run_python(code, python=clean_python, cwd=tmp_path)


def test_command_line(clean_python: Path, tmp_path: Path) -> None:
    command = clean_python.parent / "diffsparse"
    for arguments, expected in ((("env",), "diffsparse"), (("--help",), "search")):
        done = subprocess.run(
            [command, *arguments], cwd=tmp_path, env=_no_compiler(clean_python), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


# One generation step of a random Wan of 2 layers, dense and with a preset, without a compiler.
GENERATE = """
import shutil, torch, diffsparse
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

assert not any(shutil.which(name) for name in ("gcc", "g++", "cc", "c++", "clang", "nvcc"))
torch.manual_seed(0)
vae = AutoencoderKLWan(
    base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
)
transformer = WanTransformer3DModel(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=16, out_channels=16, text_dim=32,
    freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
)
pipe = WanPipeline(
    tokenizer=None, text_encoder=None, vae=vae.eval(), transformer=transformer.eval(),
    scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
)
pipe.set_progress_bar_config(disable=True)

def generate():
    embeds = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
    return pipe(
        prompt_embeds=embeds, negative_prompt_embeds=-embeds, height=128, width=128, num_frames=17,
        num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="latent",
    ).frames

dense = generate()
plan = diffsparse.preset("window", size=(1, 2, 2), sparse_below=1.0)
pipe.enable_sparse_attention(plan, backend="cpu")
sparse = generate()
print(pipe.sparse_attention_summary())
pipe.disable_sparse_attention()
assert sparse.isfinite().all() and sparse.shape == dense.shape
assert not torch.equal(sparse, dense), "the plan did nothing"
assert (sparse - dense).norm() < dense.norm()
assert torch.equal(generate(), dense)
"""


def test_generates_without_a_compiler(clean_python: Path, tmp_path: Path) -> None:
    printed = run_python(GENERATE, python=clean_python, cwd=tmp_path, env=_no_compiler(clean_python))
    assert printed
