"""Metadata of the distribution. pyproject.toml configures the tools, constraints.txt is a known-good set."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    source = (HERE / "smca_kernels/__init__.py").read_text("utf-8")
    match = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert match is not None, "smca_kernels/__init__.py has no __version__"
    return match[1]


setup(
    name="smca_kernels",
    version=version(),
    description="Fused spatially modulated co-attention (SMCA) for DETR decoders, in Triton and PyTorch",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="smca_kernels authors",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["attention", "DETR", "object detection", "PyTorch", "SMCA", "Triton"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=[*find_packages(include=["smca_kernels*", "smca_model*"]), "smca_benchmarks"],
    package_dir={"smca_benchmarks": "benchmarks"},  # no top-level package of a name that any project may have
    package_data={"smca_kernels": ["py.typed"], "smca_model": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
        "numpy",  # Triton's interpreter and the pictures; torch does without
    ],
    extras_require={
        "model": [
            "matplotlib",
            "pycocotools",
            "safetensors",
            "scikit-image",
            "scikit-learn",
            "scipy",
            "tensorboard",
            "torchvision",
            "tqdm",
        ],
        "demo": ["matplotlib", "scikit-image", "torchvision"],
        "test": ["hypothesis", "pytest", "pytest-benchmark", "pytest-xdist"],
        "dev": ["mypy", "ruff"],
    },
    entry_points={"console_scripts": ["smca = smca_kernels.tools.cli:main"]},
)
