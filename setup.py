"""Package definition; versions that are known to work together are pinned in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

# What only training imports. DeepSpeed is built where it is installed, and imputation does without it.
TRAIN = ["deepspeed>=0.19,<0.20", "nvidia-ml-py", "psutil"]
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"]

setup(
    name="embrag_ds",
    version="0.1.0",
    description="Embedding RAG: genotype imputation with retrieval, trained with DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the embrag_ds authors",
    license_expression="MIT",
    license_files=["LICENSE"],
    keywords=["genotype imputation", "haplotypes", "retrieval", "transformer", "Li and Stephens", "DeepSpeed", "VCF"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Bio-Informatics",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    package_data={"embrag_ds": ["py.typed", "pretrained/*.safetensors"], "embrag_ds.ds_configs": ["*.json"]},
    packages=[*find_packages(include=["embrag_ds", "embrag_ds.*"]), "embrag_ds.ds_configs"],
    # The configurations that come with the package keep their place at the top of the repository.
    package_dir={"embrag_ds.ds_configs": "ds_configs"},
    entry_points={"console_scripts": ["embrag = embrag_ds.cli.main:main"]},
    # Enough to impute, to evaluate and to simulate.
    install_requires=[
        "torch>=2.6",
        "numpy>=2",
        "pysam>=0.22",
        "msprime>=1.3",
        "safetensors>=0.5",
        "hjson",
        "numba>=0.61",
        "pydantic>=2",
        "typing_extensions>=4.1",
        "matplotlib",
        "tqdm",
    ],
    extras_require={
        "train": TRAIN,
        # Each of the three owns the folder faiss/: never install two. A GPU extra has one CUDA for all its packages.
        "cpu": ["faiss-cpu>=1.10"],
        # CUDA 13. Later versions of faiss-cuda are CUDA 12, and none has a wheel for Python 3.10.
        "gpu": ["torch>=2.11", "cupy-cuda13x>=14", "faiss-cuda==1.14.1.post4; python_version >= '3.11'"],
        # CUDA 12, for older drivers and GPUs. torch 2.10 is PyPI's last with it.
        "gpu-cu12": ["torch<2.11", "cupy-cuda12x>=14", "faiss-gpu>=1.14"],
        # DeepSpeed's monitors, by the sections that enable them.
        "tensorboard": ["tensorboard>=2.15"],
        "wandb": ["wandb>=0.17"],
        "docs": DOCS,
        "dev": [
            *TRAIN,
            *DOCS,
            "tensorboard>=2.15",
            "pytest",
            "pytest-xdist",
            "hypothesis",
            # The tests execute the notebook in examples/.
            "nbclient",
            "nbformat",
            "ipykernel",
            "ruff",
            "mypy",
            "setuptools",
        ],
        # NVIDIA's compiler, by which the tests look over the CUDA kernels: both GPU extras have one.
        "nvrtc": ["nvidia-cuda-nvrtc-cu12; sys_platform == 'linux'"],
    },
)
