"""The optional C++ extension; everything else about the package is in pyproject.toml.

`python setup.py build_ext --inplace` builds hypersd/_C.abi3.so for a checkout. It uses nothing but the stable C ABI of
libtorch, so one build serves every Python and every torch from 2.10 on. Without torch or a C++ compiler at build time
the package installs as pure Python: the operators then run their reference. HYPERSD_NATIVE=0 asks for that. pip's
isolated builds take torch's headers from the environment that is installed into.

HYPERSD_BUILD_CUDA=1 also builds hypersd/_CUDA.abi3.so from csrc/cuda for sm_80 and sm_90a, where a CUDA toolkit is: in
$CUDA_HOME, on PATH or in /usr/local/cuda. Take one of the release that torch.version.cuda names. The build needs
neither a GPU nor a torch that has CUDA.

HYPERSD_SANITIZE=address,undefined builds with these sanitizers of the compiler, as tests/kernels/sanitized.py does.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020a000000000000"  # 2.10, the oldest torch that the stable ABI used here exists in


def torch_include() -> Path | None:
    """torch's headers, found without importing torch; an isolated build sees torch beside its interpreter alone."""
    spec = importlib.util.find_spec("torch") or PathFinder.find_spec("torch", [sysconfig.get_path("platlib")])
    include = Path(spec.origin).parent / "include" if spec and spec.origin else None
    return include if include and (include / "torch/csrc/stable/library.h").is_file() else None


def why_not() -> str:
    """Why no extension is built; empty when it is."""
    if os.environ.get("HYPERSD_NATIVE") == "0":
        return "HYPERSD_NATIVE=0"
    if sys.platform == "win32":
        return "it is not ported to Windows"
    if torch_include() is None:
        return "there is no torch >= 2.10 here (install it first; where pip still misses it, add --no-build-isolation)"
    compiler = os.environ.get("CXX", "c++").split()[0]
    return "" if shutil.which(compiler) else f"no C++ compiler ({compiler}) is on PATH"


def nvcc() -> Path | None:
    """The compiler of a CUDA toolkit, one with its headers beside it."""
    toolkits = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    toolkits += [Path(on_path).resolve().parents[1]] if on_path else []
    for toolkit in [*toolkits, Path("/usr/local/cuda")]:
        if (toolkit / "bin/nvcc").is_file() and (toolkit / "include/cuda_runtime_api.h").is_file():
            return toolkit / "bin/nvcc"
    return None


def cuda_wanted() -> bool:
    if os.environ.get("HYPERSD_BUILD_CUDA") != "1":
        return False
    if sys.platform == "linux" and nvcc():
        return True
    reason = "no nvcc in $CUDA_HOME, on PATH or in /usr/local/cuda" if sys.platform == "linux" else "this is not Linux"
    print(f"hypersd: no CUDA kernels are built: {reason}", file=sys.stderr)
    return False


def fingerprint(folder: str) -> str:
    """What hypersd.kernels._native looks for in the library, as a C string; by its own code, so that both agree."""
    text = (ROOT / "hypersd/kernels/_native.py").read_text()
    start = text.index("def fingerprint")
    scope: dict = {"hashlib": __import__("hashlib"), "Path": Path}
    exec(text[start : text.index("\n\n\n", start)], scope)
    return f'"{scope["fingerprint"](ROOT / folder)}"'


def say(reason: str) -> None:
    if not {"egg_info", "dist_info"} & set(sys.argv):  # steps of an installation that say it again
        print(f"hypersd: no C++ kernels are built: {reason}; the operators run their reference", file=sys.stderr)


class OptionalBuild(build_ext):
    """A failing compiler leaves the pure-Python package and one line that says so; a failing nvcc the C++ kernels."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # whatever a foreign tool chain does, the pure-Python package must install
            say(f"the compiler failed ({type(error).__name__}; `python setup.py build_ext --inplace` shows its words)")
            self.extensions = []

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "hypersd._CUDA":
            folder = Path(self.build_temp) / "cuda"
            folder.mkdir(parents=True, exist_ok=True)
            for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
                made = folder / f"{source.stem}.o"
                try:
                    subprocess.run([*nvcc_command(), str(source), "-o", str(made)], check=True)
                except (OSError, subprocess.CalledProcessError) as error:  # what is optional may fail by this name
                    raise CompileError(f"nvcc failed on {source.name}: the CUDA kernels are left out") from error
                ext.extra_objects.append(str(made))
        super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # a library for torch.ops.load_library, not a Python module


def nvcc_command() -> list[str]:
    """Compiles one .cu for the GPUs that kernels are tuned for; no PTX, so no other GPU compiles it anew."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
    host = ["-ccbin", os.environ["CXX"].split()[0], "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return [str(nvcc()), "-c", "-O3", "-std=c++17", *targets, *host]


def cuda_extension() -> Extension:
    toolkit = nvcc().parent.parent
    return Extension(
        "hypersd._CUDA",
        ["csrc/cuda/ops.cpp"],
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").iterdir()),
        include_dirs=[str(torch_include() or ""), str(toolkit / "include")],
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET),
            ("HYPERSD_SOURCES", fingerprint("csrc/cuda")),
            ("Py_LIMITED_API", "0x030A0000"),
        ],
        extra_compile_args=["-O2", "-std=c++17", "-fvisibility=hidden", "-Wall", "-g0"],
        library_dirs=[str(torch_include().parent / "lib"), str(toolkit / "lib64")],
        libraries=["torch_cpu", "cudart_static", "dl", "rt", "pthread"],
        extra_link_args=["-s"],
        language="c++",
        py_limited_api=True,
        optional=True,
    )


def extension() -> Extension:
    os.environ.setdefault("CC", "cc")
    os.environ.setdefault("CXX", "c++")
    flags = ["-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
    link = ["-s"] if sys.platform == "linux" else []
    sanitizers = os.environ.get("HYPERSD_SANITIZE", "")
    if sanitizers:
        link = [f"-fsanitize={sanitizers}"]
        flags += [*link, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1"]
    else:
        flags += ["-O3", "-g0"]
    return Extension(
        "hypersd._C",
        sorted(str(path.relative_to(ROOT)) for path in [ROOT / "csrc/ops.cpp", *(ROOT / "csrc/cpu").glob("*.cpp")]),
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.h")),
        include_dirs=[str(torch_include() or "")],
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET),
            ("HYPERSD_SOURCES", fingerprint("csrc")),
            ("Py_LIMITED_API", "0x030A0000"),
        ],
        extra_compile_args=flags,
        library_dirs=[str(torch_include().parent / "lib")] if torch_include() else [],
        libraries=["torch_cpu"],  # found by its name: it is in the process already
        extra_link_args=link,
        language="c++",
        py_limited_api=True,
    )


missing = why_not()
if missing:
    say(missing)
    setup()
else:
    setup(
        ext_modules=[extension(), *([cuda_extension()] if cuda_wanted() else [])],
        cmdclass={"build_ext": OptionalBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
