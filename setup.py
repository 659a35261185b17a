"""Package metadata. Versions here are ranges; constraints.txt pins those the tests ran with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "bn_detection/__init__.py").read_text(), re.MULTILINE
)[1]

setup(
    name="bn_detection",
    version=VERSION,
    description="BatchNorm in detectors: measure what leaks and what is stale, and cure it",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["bn_detection", "bn_detection.*"]),
    package_data={
        "bn_detection.install_detectron2": ["*.patch"],
        "bn_detection.page": ["templates/*"],
    },
    python_requires=">=3.10",
    # Detectron2 itself is not on the package index: tools/install_detectron2.py installs it. What
    # it needs at run time is listed here, because that tool installs it without dependencies. So is
    # what imagecorruptions-imaug needs: with its dependencies it brings opencv-python, which
    # replaces the files of opencv-python-headless, and cannot be imported without libGL.
    install_requires=[
        "torch>=2.5",
        "torchvision>=0.20",
        "numpy>=1.24",
        "Pillow>=9.1",
        "faster-coco-eval>=1.6",
        "matplotlib>=3.6",
        "pycocotools>=2.0.6",
        "fvcore>=0.1.5,<0.1.6",
        "iopath>=0.1.7,<0.1.10",
        "omegaconf>=2.1,<2.4",
        "hydra-core>=1.1",
        "numba>=0.57",
        "opencv-python-headless>=4.6",
        "cloudpickle",
        "jinja2>=3.0",
        "packaging",
        "psutil",
        "rich>=12",
        "scikit-image>=0.20",
        "scipy>=1.9",
        "shapely>=2.0",
        "tabulate",
        "tensorboard",
        "termcolor>=1.1",
        "tqdm>=4.29",
        "yacs>=0.1.8",
    ],
    extras_require={
        "slurm": ["submitit>=1.5"],
        "docs": [
            "latex2mathml>=3.77",
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.6,<10",
            "mkdocstrings-python>=2",
        ],
        "dev": [
            "pytest>=7",
            "pytest-cov>=6",
            "pytest-timeout>=2.1",
            "pytest-xdist>=3.3",
            "hypothesis>=6.80",
            "mypy>=1.15",
            "ruff>=0.5",
            "submitit>=1.5",
            "playwright>=1.40",  # drives an installed Chromium in the tests of pages
        ],
    },
)
