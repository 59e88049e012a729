"""Package definition; versions that are known to work together are pinned in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

# What only training imports. DeepSpeed is built where it is installed, and imputation does without it.
TRAIN = ["deepspeed>=0.19,<0.20", "nvidia-ml-py", "psutil"]

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
        # Both own the folder faiss/: never install the two together.
        "cpu": ["faiss-cpu>=1.10"],
        "gpu": ["faiss-gpu>=1.10", "cupy-cuda12x>=13"],
        # NVIDIA's compiler looks over the CUDA kernels where there is no GPU, too.
        "dev": [
            *TRAIN,
            "pytest",
            "hypothesis",
            "ruff",
            "mypy",
            "setuptools",
            "nvidia-cuda-nvrtc-cu12; sys_platform == 'linux'",
        ],
    },
)
