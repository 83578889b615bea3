"""The pages in docs/ say what the rows say, name what exists, and the worked example runs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from hypersd.kernels._op import OPS

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
RESULTS = ROOT / "bench/results"
# the section of the page, the folder of its rows
MACHINES = {"Operators on two cores": "epyc-2-threads", "Operators on two cores with AMX": "xeon-amx-2-threads"}
LINE = re.compile(r"^\| `(\w+)` \| ([a-zA-Z()]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.–]+) \| ([\d.–]+) \|$", re.MULTILINE)
SECTIONS = dict(part.split("\n", 1) for part in (ROOT / "docs/measured_facts.md").read_text("utf-8").split("\n## ")[1:])
FACTS = [(folder, *fact) for title, folder in MACHINES.items() for fact in LINE.findall(SECTIONS[title])]


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: "-".join(fact[:3]))
def test_figures_of_the_operators_are_those_of_the_rows(fact):
    folder, op, peer, *figures = fact
    rows = [json.loads(line) for line in (RESULTS / folder / f"{op}.jsonl").read_text("utf-8").splitlines()]
    found = []
    for mode in ("fwd", "full"):
        ratios = [r["over_ours"] for r in rows if r["provider"] == peer and r["mode"] == mode and r["over_ours"]]
        found += [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}"] if ratios else ["–", "–"]
    assert found == figures


@pytest.mark.parametrize("folder", MACHINES.values())
def test_every_measured_operator_has_its_line(folder):
    measured = {path.stem for path in (RESULTS / folder).glob("*.jsonl")} & set(OPS)
    assert measured == {op for machine, op, *_ in FACTS if machine == folder}
    assert len(FACTS) >= 14


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_files_and_commands_that_a_page_names_exist(page):
    text = page.read_text("utf-8")
    example = set(re.findall(r"\bgated_residual\b", text)) and {"hypersd/kernels/gated_residual.py"}
    for name in set(re.findall(r"`((?:hypersd|bench|tests|csrc|docs)/[\w./*-]+)`", text)) - (example or set()):
        assert any(ROOT.glob(name)), name
    for name in re.findall(r"\]\((\w[\w./-]*\.md)\)", text):
        assert (page.parent / name).is_file(), name
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module) is not None, module
    commands = set(re.findall(r"hypersd (\w+)", text)) & {"bench", "demo", "distill", "evaluate", "sample", "merge"}
    cli = (ROOT / "hypersd/cli.py").read_text("utf-8")
    assert all(f"def {command}(" in cli or f'name="{command}"' in cli for command in commands)


EXAMPLE = """
import sys, torch, pytest
import gated_residual as module
from hypersd.kernels import explain
from hypersd.kernels._op import OPS
from tests.kernels import checks

op = OPS["gated_residual"]
for case in op.cases[1:]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert checks.check(op, case.inputs(dtype)) == [], (case.name, dtype)
inputs = op.cases[1].inputs()
torch.testing.assert_close(module.gated_residual(**inputs), inputs["x"] + inputs["gate"][:, None] * inputs["y"])
with pytest.raises(ValueError, match="gate: got shape"):
    module.gated_residual(inputs["x"], inputs["y"], inputs["gate"][:1])
assert explain(module.gated_residual, **inputs).cost.bytes == 3 * 3 * 7 * 13 * 4
print("checked", len(op.cases) - 1)
"""


def test_the_worked_example_is_an_operator(tmp_path):
    """The page's code, as it stands: within the error rule in every dtype, forward and backward, and explained. In a
    process of its own, where nobody else counts the operators."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding_an_op.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "gated_residual.py").write_text(code, "utf-8")
    places = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-c", EXAMPLE]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": places}, capture_output=True, text=True)
    assert done.returncode == 0 and "checked 2" in done.stdout, done.stderr
