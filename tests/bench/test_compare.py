"""`bench compare`: each state runs its own kernels, above 1 is slower, and a change is one only beyond its noise."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from bench import compare
from hypersd.kernels import _native

SETUP = "from pathlib import Path\nPath('hypersd/_C.abi3.so').write_text('of ' + Path('csrc/a.cpp').read_text())\n"


def test_a_reference_of_other_sources_has_its_own_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "repository"
    for name, text in {"bench/a": "", "hypersd/a": "", "csrc/a.cpp": "old", "setup.py": SETUP}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git = partial(compare.git, folder=root)
    git("init", "-q")
    for text in ("old", "new"):
        (root / "csrc" / "a.cpp").write_text(text)
        git("add", ".")
        git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", text)
    (root / "hypersd" / "_C.abi3.so").write_text("this tree's")
    monkeypatch.setattr(compare, "git", partial(compare.git, folder=root / "bench"))
    for reference, kernels in (("HEAD", "this tree's"), ("HEAD~1", "of old")):
        with compare.checkout(reference, Console(quiet=True)) as tree:
            assert (tree / "hypersd" / "_C.abi3.so").read_text() == kernels
        assert not tree.exists()


def test_a_state_without_compiled_kernels_is_named_and_its_rows_are_stamped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is this tree without the library."""
    this = compare.HERE.parent
    (tmp_path / "csrc").symlink_to(this / "csrc")
    (tmp_path / "setup.py").symlink_to(this / "setup.py")
    ignored = shutil.ignore_patterns("_C.*", "_CUDA.*", "emoji", "__pycache__")
    shutil.copytree(this / "hypersd", tmp_path / "hypersd", ignore=ignored)
    monkeypatch.setattr(compare, "checkout", lambda reference, console: nullcontext(tmp_path))
    said = Console(record=True, width=300, file=io.StringIO())
    options = {"shapes": ["emoji"], "dtypes": ["float32"], "seconds": 1e-3, "rounds": 2, "counters": False}
    compare.trees("HEAD", ["geglu"], **options, json_path=tmp_path / "rows", console=said)
    warned = [line for line in said.export_text().splitlines() if "no compiled kernels" in line]
    missing = [] if _native.available() else ["this tree"]
    assert [line.split(" has no")[0] for line in warned] == ["the reference", *missing]
    assert "build them with" in warned[0]
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert rows
    assert all((row["before_compiled"], row["now_compiled"]) == (False, _native.available()) for row in rows)


@pytest.mark.parametrize(
    ("before", "now", "ratio", "verdict"),
    [
        ([1.0, 2.0, 3.0], [1.5, 3.0, 4.5], 1.5, "slower"),
        ([1.5, 3.0, 4.5], [1.0, 2.0, 3.0], 1 / 1.5, "faster"),
        ([1.0, 2.0], [1.04, 2.08], 1.04, "same"),  # below 5 % in every turn
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.6], 1.6 ** (1 / 3), "same"),  # 17 %, from one turn of three
    ],
)
def test_a_change_is_one_beyond_its_noise(before: list[float], now: list[float], ratio: float, verdict: str) -> None:
    change = compare.change(("key",), before, now)
    assert change.ratio == pytest.approx(ratio) and change.verdict == verdict


def test_three_standard_errors_of_the_mean_over_the_turns_are_noise() -> None:
    # logs of the ratios 0.1, 0.2 and 0.3: their mean is 0.2, its standard error 0.1 / sqrt(3)
    change = compare.change(("key",), [1.0] * 3, [1.1051709, 1.2214028, 1.3498588])
    assert change.bound == pytest.approx(1.2214028 * 3 * 0.1 / 3**0.5)
    assert compare.change(("key",), [1.0], [1.3], sigma=0.2).bound == pytest.approx(0.6)


def test_two_files_are_compared_row_by_row(tmp_path: Path) -> None:
    about = {"op": "o", "dtype": "float32", "mode": "fwd", "provider": "hypersd", "device": "cpu", "cpu": "x"}
    for name, times in (("old", {"a": (2.0, 2.0), "b": (1.0, 1.0)}), ("new", {"a": (1.0, 1.0), "b": (3.0, 3.0)})):
        rows = [about | {"case": case, "p20": p, "p50": p, "p80": p} for case, turns in times.items() for p in turns]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = Console(record=True, width=200, file=io.StringIO())
    assert compare.files(tmp_path / "old", tmp_path / "new", [], said) == 0
    lines = [line.split() for line in said.export_text().splitlines()]
    assert ["a", "hypersd", "fwd", "2", "1", "0.500", "5%", "faster"] in lines
    assert ["b", "hypersd", "fwd", "1", "3", "3.000", "5%", "slower"] in lines
    assert "1 faster, 0 the same, 1 slower of 2".split() in lines
