"""Builds the extension: python setup.py build_ext --build-lib FOLDER."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

setup(
    name="free_transformer_losses",
    ext_modules=[
        CppExtension(
            "free_transformer_losses",
            ["free_transformer_losses.cpp"],
            include_dirs=[str(Path(__file__).resolve().parents[3] / "include")],
            extra_compile_args=["-O2", "-fvisibility=hidden"],  # hidden as pybind11 asks
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
