"""Package metadata, dependencies and console commands."""

import sys
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from fewstep import COMMANDS  # noqa: E402
from utils.version import VERSION  # noqa: E402

CODE = ("model", "pipeline", "scripts", "trainer", "utils")
SHIPPED = ("configs", "prompts")  # files alone, found by utils/shipped.py

setup(
    name="fewstep",
    version=VERSION,
    description="Distil many-step video diffusion models (Wan2.1) into 4-step students",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="video diffusion distillation few-step Wan2.1 DMD self-forcing",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Video",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=find_namespace_packages(
        include=[pattern for name in (*CODE, *SHIPPED) for pattern in (name, f"{name}.*")]
    ),
    py_modules=["fewstep", "train", "inference", "demo", "convert_checkpoint"],
    package_data={
        "utils.web": ["page/*"],
        "configs": ["*.yaml", "**/*.yaml"],
        "prompts": ["*", "**/*"],
    },
    install_requires=[
        "torch==2.13.0",
        "omegaconf>=2.4",
        "numpy",
        "einops",
        "lmdb",
        "safetensors",
        "diffusers>=0.38",
        "transformers>=5",
        "ftfy>=6.3",
        "imageio>=2.37",
        "imageio-ffmpeg",
        "pillow",
        "flask>=3",
        "tqdm",
        "wandb",
    ],
    extras_require={
        "report": ["matplotlib"],
        "flash": ["flash-attn"],
        "tensorboard": ["tensorboard"],
        "test": [
            "accelerate",  # diffusers' pipelines want it
            "matplotlib",
            "mypy==2.4.1",
            "peft>=0.21",  # diffusers reads adapters with it; nothing else does
            "pytest>=9",
            "pytest-timeout",
            "pytest-xdist>=3.8",
            "ruff==0.17.5",
            "setuptools>=77",
            "tensorboard",
        ],
    },
    entry_points={
        "console_scripts": [f"{command}=fewstep:main" for command in COMMANDS],
    },
)
