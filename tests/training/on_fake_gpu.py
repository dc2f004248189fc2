"""`python on_fake_gpu.py LIBRARY WORDS`: pytest in a process whose PyTorch believes in a GPU.

The library must be there before PyTorch, and stays for good: hence a process of its own.
"""

import ctypes
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_gpu.cpp")


def find_compiler():
    """The path of a C++ compiler, or None."""
    return shutil.which("g++") or shutil.which("clang++")


def build_library(directory):
    """Compiles fake_gpu.cpp; returns the path of the library."""
    torch = Path(sysconfig.get_paths()["purelib"]) / "torch"
    library, needed = Path(directory) / "fake_gpu.so", torch / "lib"
    command = [find_compiler(), "-std=c++20", "-shared", "-fPIC", f"-I{torch / 'include'}"]
    command += [SOURCE, f"-L{needed}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{needed}"]
    subprocess.run([*command, "-o", library], check=True)
    return library


def main(library, *words):
    """Ends with pytest's exit status."""
    ctypes.CDLL(library)
    import pytest

    raise SystemExit(pytest.main(["-n", "0", "-p", "no:cacheprovider", *words]))


if __name__ == "__main__":
    main(*sys.argv[1:])
