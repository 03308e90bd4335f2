"""The folders that are installed, and under which names; pyproject.toml has everything else."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["smca_kernels*", "smca_model*"]), "smca_benchmarks"],
    package_dir={"smca_benchmarks": "benchmarks"},  # no top-level package of a name that any project may have
)
