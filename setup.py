"""Build of the native core: setuptools hands the extension to CMake. Nothing here needs torch."""

import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))
import build_backend  # noqa: E402


class CMakeBuild(build_ext):
    """Configure and build csrc/ with CMake and ninja, and leave _native where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        cuda = build_backend.plan()
        if cuda.nvcc and cuda.reason:
            print(f"quietstar: {cuda.reason}", flush=True)
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={destination}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DQUIETSTAR_VERSION={self.distribution.get_version()}",
            f"-DQUIETSTAR_CUDA={'on' if cuda.nvcc else 'off'}",
            f"-DQUIETSTAR_NVCC={cuda.nvcc or ''}",
            f"-DQUIETSTAR_CUDA_ARCHS={','.join(cuda.archs)}",
            f"-DQUIETSTAR_CPU_REASON={cuda.reason}",
        ]
        # A build folder configured by another build environment names tools that are gone.
        subprocess.run([*configure, "--fresh"], check=True)
        jobs = ["--parallel", str(self.parallel)] if self.parallel else []
        run_and_keep(["cmake", "--build", str(build), *jobs], build / "build.log")


def run_and_keep(command: list[str], log: Path) -> None:
    """Run a command; what it prints goes into a file, too, where scripts/compile_check.py reads what
    the CUDA compiler says of the kernels."""
    with (
        log.open("w") as kept,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            kept.write(line)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)


setup(
    packages=[*find_packages("python"), *find_packages(".", include=["quietstar_ext*"])],
    py_modules=["quietstar_command"],
    package_dir={"": "python", "quietstar_ext": "quietstar_ext"},
    package_data={
        "quietstar": ["py.typed", "**/*.yaml", "**/*.json", "**/*.html", "**/*.txt"],
        "quietstar_ext": ["py.typed"],
    },
    ext_modules=[Extension("quietstar_ext._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
