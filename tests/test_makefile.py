"""The environment that `make` keeps, with shell scripts in the place of interpreters."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    ("own", "made"), [("exit 0", ""), ("exit 1", "-m venv --clear {venv}\n"), (None, "-m venv --clear {venv}\n")]
)
def test_an_environment_without_pip_is_made_anew(tmp_path: Path, own: str | None, made: str) -> None:
    """`own`: what the environment's Python does with each command; None: there is no environment."""
    venv, calls = tmp_path / "venv", tmp_path / "calls"
    calls.write_text("")
    python = venv / "bin" / "python"
    if own is not None:
        script(python, own)
    works = script(tmp_path / "works", "exit 0")
    system = script(tmp_path / "python", f'echo "$@" >> {calls}; mkdir -p {venv}/bin; cp {works} {python}')
    done = subprocess.run(
        ["make", f"{venv}/.installed", f"VENV={venv}", f"PYTHON={system}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert calls.read_text() == made.format(venv=venv) and (venv / ".installed").exists()
