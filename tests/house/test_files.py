"""What lies in the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOMS = ("kernels", "pipelines", "search")

# Written in pieces, so that this file passes its own test.
FORBIDDEN = re.compile(
    "|".join(
        [
            r"(?<![\w.])/" + "work/",
            r"(?<![\w.])/" + r"(root|home/\w+|Users/\w+)/",
            "/" + "opt/(wheels|pypi)",
            r"(files\.)?python" + r"hosted\.org",
            r"\bpypi" + r"\.org",
            r"\b(deb|security|ftp)\." + r"debian\.org",
            r"registry\." + r"npmjs",
            r"\+" + r"cpu\b.*\.whl",
            r"--(extra-)?index" + "-url",
            r"--find" + "-links",
        ]
    )
)


def tracked(root: Path) -> list[Path]:
    """Files under version control and those that would be; none where this is no clone."""
    if not (root / ".git").exists():
        return []
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=True,
        text=True,
    )
    return [path for name in listed.stdout.split("\0") if name and (path := root / name).is_file()]


def test_no_paths_of_a_machine_and_no_package_hosts(repo_root: Path) -> None:
    wrong = []
    for path in tracked(repo_root):
        try:
            lines = path.read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            if found := FORBIDDEN.search(line):
                wrong.append(f"{path.relative_to(repo_root)}:{number}: {found.group()}")
    assert not wrong


def test_no_large_file(repo_root: Path) -> None:
    large = {path.relative_to(repo_root): size for path in tracked(repo_root) if (size := path.stat().st_size) > 30e6}
    assert not large


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_relative_links(repo_root: Path, room: str) -> None:
    link = repo_root / "diffsparse" / room
    assert link.is_symlink()
    assert os.readlink(link) == f"../{room}/src"
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("room", ["diffsparse", *ROOMS])
def test_room_says_what_lives_there(repo_root: Path, room: str) -> None:
    text = (repo_root / room / "README.md").read_text("utf-8")
    assert "**Contract.**" in text


def test_links_in_documents_lead_somewhere(repo_root: Path) -> None:
    wrong = []
    for path in tracked(repo_root):
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text("utf-8")):
            if "://" not in target and not (path.parent / target).exists():
                wrong.append(f"{path.relative_to(repo_root)}: {target}")
    assert not wrong


def test_constraints_pin_every_dependency(repo_root: Path) -> None:
    pins = {}
    for line in (repo_root / "constraints.txt").read_text("utf-8").splitlines():
        if line.startswith("#"):
            continue
        found = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
        assert found, line
        pins[re.sub(r"[-_.]+", "-", found.group(1)).lower()] = found.group(2)
    assert pins["torch"] == "2.13.0"
    project = tomllib.loads((repo_root / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["dev"], *extras["docs"], *extras["viz"]]
    names = {re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", text).group()).lower() for text in needed}
    assert names - {"diffsparse"} <= set(pins)


def test_version_is_said_once_and_the_same(repo_root: Path) -> None:
    import diffsparse

    project = tomllib.loads((repo_root / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == diffsparse.__version__


def test_make_venv_names_a_python_that_is_too_old(repo_root: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo "Python 3.9.2"; exit 0; }\nexit 1\n')
    old.chmod(0o755)
    venv = tmp_path / "venv"
    done = subprocess.run(
        ["make", "-s", "venv", f"PYTHON={old}", f"VENV={venv}"],
        cwd=repo_root,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))},
    )
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stdout
    assert "Python 3.9.2" in done.stdout
    assert not venv.exists()


def test_python_here_is_new_enough(repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["requires-python"] == ">=3.11"
    assert sys.version_info >= (3, 11)
