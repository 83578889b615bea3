"""The generic checks against wrong C++: a line of csrc/cpu is changed, and they must turn red.

One library a source file holds its changed copies, each in a namespace and under operators of its own, for the smallest
instruction set alone: headers are read once, and a copy compiles in a second.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from hypersd.kernels import _lora, _native
from hypersd.kernels._op import OPS
from tests.kernels import checks

SOURCES = Path(__file__).resolve().parents[2] / "csrc/cpu"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = "-std=c++17 -O1 -w -shared -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math".split()
TORCH = Path(torch.__file__).parent
FLAGS += [f"-I{TORCH}/include", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(not _native.available(), reason=_native.status()),
]


class Mutation(NamedTuple):
    file: str
    what: str
    old: str
    new: str


CHUNK = "stop - begin < kChunk ? stop - begin : kChunk;"
ROUNDED = "from_bfloat16(to_bfloat16(static_cast<float>({})))".format
TAPS = "oy * sh - ph + tap / kw, ix = ox * sw - pw + tap % kw"
MUTATIONS = [
    Mutation(*row)
    for row in (
        ("affine_step", "scale dropped", "sum += k2 * c[i]", "sum += c[i]"),
        ("affine_step", "another row", "p.coef->at(row, p.column[j])", "p.coef->at(0, p.column[j])"),
        ("affine_step", "no tail", CHUNK, f"({CHUNK[:-1]}) / 16 * 16;"),
        ("affine_step", "16-bit sum", "out[i] = sum;", f"out[i] = {ROUNDED('sum')};"),
        ("consistency_loss", "scale dropped", "p1 * eps_student[i]", "eps_student[i]"),
        ("consistency_loss", "another row", "p.coef->at(row, 1)", "p.coef->at(0, 1)"),
        ("consistency_loss", "no tail", "for (; i < count; ++i) total += values[i];", ""),
        ("consistency_loss", "16-bit sum",
         "lane[j] += values[i + j];", f"lane[j] = {ROUNDED('lane[j] + values[i + j]')};"),
        ("score_gradient", "scale dropped", "const C value = factor * (", "const C value = ("),
        ("score_gradient", "another row", "p.factor[row]", "p.factor[0]"),
        ("score_gradient", "no tail", "for (; i < count; ++i) total += std::fabs(x[i] - x_real[i]);", ""),
        ("score_gradient", "16-bit sum",
         "lane[j] += std::fabs(x[i + j] - x_real[i + j]);",
         f"lane[j] = {ROUNDED('lane[j] + std::fabs(x[i + j] - x_real[i + j])')};"),
        ("geglu", "scale dropped", "upstream * (g * phi)", "(g * phi)"),
        ("geglu", "halves swapped", "forward<T>(x + at, x + at + p.width,", "forward<T>(x + at + p.width, x + at,"),
        ("geglu", "no tail", "p.width - first < kChunk ? p.width - first : kChunk;",
         "(p.width - first < kChunk ? p.width - first : kChunk) - 1;"),
        ("geglu", "16-bit product", "widen(value[i]) * (g * phi)", f"widen(value[i]) * {ROUNDED('g * phi')}"),
        ("adamw_ema", "scale dropped", "const C g = clip * grad[i]", "const C g = grad[i]"),
        ("adamw_ema", "moments swapped", "m[i] = first;\n      v[i] = second;", "m[i] = second;\n      v[i] = first;"),
        ("adamw_ema", "no tail",
         "end - begin < kChunk ? end - begin : kChunk;", "(end - begin < kChunk ? end - begin : kChunk) / 16 * 16;"),
        ("adamw_ema", "16-bit sum", "m[i] = first;", f"m[i] = {ROUNDED('first')};"),
        ("clip_coefficient", "scale dropped", "ratio = max_norm / (", "ratio = 1 / ("),
        ("clip_coefficient", "no tail",
         "for (; i < count; ++i) total += static_cast<double>(values[i]) * values[i];", ""),
        ("clip_coefficient", "16-bit sum",
         "lane[j] += static_cast<double>(values[i + j]) * values[i + j];",
         f"lane[j] = {ROUNDED('lane[j] + values[i + j] * values[i + j]')};"),
        ("lora", "scale dropped", "left.times(packed_a, 0, s.rank, nullptr, out(0), scale, 1);",
         "left.times(packed_a, 0, s.rank, nullptr, out(0), 1.0f, 1);"),
        ("lora", "scale of dS dropped", "ds_rows.data(), scale, together", "ds_rows.data(), 1.0f, together"),
        ("lora", "bias dropped", "if (!bias) return;", "return;"),
        ("lora", "transposed", "w.stride[1], w.stride[0], w.size[1]}", "w.stride[0], w.stride[1], w.size[1]}"),
        ("lora", "no tail", "width = columns - column < wide ? columns - column : wide;",
         "width = (columns - column < wide ? columns - column : wide) - 1;"),
        ("lora", "16-bit sum", "store(i, column + j, total[i * kPanel + j]);",
         f"store(i, column + j, {ROUNDED('total[i * kPanel + j]')});"),
    )
]  # fmt: skip
# the operators of each file, and the case that is checked
FUNCTIONS = {
    "affine_step": ("affine_step", "affine_step_backward"),
    "consistency_loss": ("consistency_loss", "consistency_loss_backward"),
    "score_gradient": ("score_gradient",),
    "geglu": ("geglu", "geglu_backward"),
    "adamw_ema": ("adamw_ema_",),
    "clip_coefficient": ("clip_coefficient",),
    "lora": ("_lora_rows", "_lora_rows_backward"),
}
CASES = {"score_gradient": "odd_weighted", "adamw_ema": "graph", "clip_coefficient": "unclipped"}  # else "odd"
KERNEL_FOR = """
#undef HYPERSD_KERNEL_FOR
#define HYPERSD_KERNEL_FOR(NAME, PARAMETERS, ARGUMENTS, BODY16, BODY32, BODY64) \\
  static void NAME PARAMETERS { BODY16 ARGUMENTS; }
"""
ISA = "namespace hypersd { Isa isa() { return Isa::baseline; } int set_isa(int) { return 0; } }\n"


def copies_of(file: str) -> list[Mutation | None]:
    """The file as it is, then its changed copies."""
    return [None, *(mutation for mutation in MUTATIONS if mutation.file == file)]


def source_of(file: str) -> str:
    """All copies of a file and their operators, as one source."""
    head, body = (SOURCES / f"{file}.cpp").read_text().split("namespace hypersd {", 1)
    for element in ("Triple", "BFloat16"):  # one kind of product: the others compile for as long
        body = body.replace(f"<{element}>(s, ", "<Float32>(s, ")
    made, definitions, kernels = [head, ISA], [], []
    for index, mutation in enumerate(copies_of(file)):
        changed = body
        if mutation:
            assert mutation.old in body, f"{file}.cpp no longer has this line: {mutation.old}"
            changed = body.replace(mutation.old, mutation.new)
        made.append(f"namespace hypersd {{ namespace copy_{index} {{ {changed} }}\n")
        for name in FUNCTIONS[file]:
            schema = str(getattr(torch.ops.hypersd, name).default._schema).removeprefix("hypersd::" + name)
            definitions.append(f'  m.def("{name}_{index}{schema}");\n')
            kernels.append(f'  m.impl("{name}_{index}", TORCH_BOX(&hypersd::copy_{index}::{name.lstrip("_")}));\n')
    made += ["STABLE_TORCH_LIBRARY_FRAGMENT(hypersd_copies, m) {\n", *definitions, "}\n"]
    return "".join([*made, "STABLE_TORCH_LIBRARY_IMPL(hypersd_copies, CPU, m) {\n", *kernels, "}\n"])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiles and loads the copies of all files."""
    folder = tmp_path_factory.mktemp("copies")
    for header in SOURCES.glob("*.h"):
        shutil.copy(header, folder)
    text = (folder / "isa.h").read_text()
    assert "#define HYPERSD_KERNEL(" in text
    (folder / "isa.h").write_text(text.replace("#define HYPERSD_KERNEL(", KERNEL_FOR + "#define HYPERSD_KERNEL("))

    def compiled(file: str) -> Path:
        source, library = folder / f"{file}.cpp", folder / f"{file}.so"
        source.write_text(source_of(file))
        command = [COMPILER, *FLAGS, source, "-o", library, f"-L{TORCH}/lib", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return library

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        for library in pool.map(compiled, sorted(FUNCTIONS, reverse=True)):
            torch.ops.load_library(str(library))


def findings(file: str, index: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the checks find with this copy of the file in place of the library's own functions."""
    copies = {name: getattr(torch.ops.hypersd_copies, f"{name}_{index}") for name in FUNCTIONS[file]}
    op = OPS[{"adamw_ema": "adamw_ema_", "lora": "lora_linear"}.get(file, file)]
    module = importlib.import_module(f"hypersd.kernels.{op.name.rstrip('_')}")
    if file == "lora":
        if torch.float32 not in _native.lora_dtypes():
            pytest.skip("its products are written for AVX-512")
        monkeypatch.setattr(module, "_plan", lambda *sizes: _lora.Plan("rows", "rows", "rows", ""))
        monkeypatch.setattr(module, "_form", lambda *sizes: "rows")
        for name, copy in copies.items():
            monkeypatch.setattr(torch.ops.hypersd, name, copy)
    else:
        for owner in (op, getattr(module, "BACKWARD", None)):
            if owner and owner.name in copies:
                monkeypatch.setattr(owner, "raw", copies[owner.name].default)
    case = next(case for case in op.cases if case.name == CASES.get(file, "odd"))
    return checks.check(op, case.inputs())


@pytest.mark.parametrize("file", FUNCTIONS)
def test_the_source_as_it_is_stays_green(file, built, poisoned, monkeypatch):
    assert findings(file, 0, monkeypatch) == []
    kinds = {mutation.what for mutation in copies_of(file)[1:]}
    assert {"scale dropped", "no tail"} <= kinds and any(kind.startswith("16-bit") for kind in kinds)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.file}-{m.what}".replace(" ", "_"))
def test_a_changed_line_turns_the_checks_red(mutation, built, poisoned, monkeypatch):
    assert findings(mutation.file, copies_of(mutation.file).index(mutation), monkeypatch) != []
