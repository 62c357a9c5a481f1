"""Package metadata, dependencies and console commands."""

from setuptools import find_packages, setup

setup(
    name="fewstep",
    version="0.1.0",
    description="Distil many-step video diffusion models (Wan2.1) into 4-step students",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["model*", "pipeline*", "trainer*", "utils*"]),
    py_modules=["train", "inference", "demo", "convert_checkpoint"],
    package_data={"utils.web": ["page/*"]},
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
        "test": [
            "accelerate",  # diffusers' pipelines want it
            "matplotlib",
            "mypy==2.4.1",
            "pytest>=9",
            "pytest-timeout",
            "pytest-xdist>=3.8",
            "ruff==0.17.5",
        ],
    },
    entry_points={
        "console_scripts": [
            "fewstep-train=train:main",
            "fewstep-inference=inference:main",
            "fewstep-demo=demo:main",
            "fewstep-convert=convert_checkpoint:main",
        ]
    },
)
