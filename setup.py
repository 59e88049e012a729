"""Package definition; versions that are known to work together are pinned in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="embrag_ds",
    version="0.1.0",
    description="Embedding RAG: genotype imputation with retrieval, trained with DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    package_data={"embrag_ds": ["pretrained/*.safetensors"], "embrag_ds.ds_configs": ["*.json"]},
    packages=[*find_packages(include=["embrag_ds", "embrag_ds.*"]), "embrag_ds.ds_configs"],
    # The configurations that come with the package keep their place at the top of the repository.
    package_dir={"embrag_ds.ds_configs": "ds_configs"},
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19,<0.20",
        "numpy>=2",
        "pysam>=0.22",
        "msprime>=1.3",
        "safetensors>=0.5",
        "nvidia-ml-py",
        "psutil",
        "hjson",
        "numba>=0.61",
        "pydantic>=2",
        "typing_extensions>=4.1",
        "matplotlib",
        "tqdm",
    ],
    extras_require={
        # Both own the folder faiss/: never install the two together.
        "cpu": ["faiss-cpu>=1.10"],
        "gpu": ["faiss-gpu>=1.10", "cupy-cuda12x>=13"],
        # NVIDIA's compiler looks over the CUDA kernels where there is no GPU, too.
        "dev": [
            "pytest",
            "hypothesis",
            "ruff",
            "mypy",
            "setuptools",
            "nvidia-cuda-nvrtc-cu12; sys_platform == 'linux'",
        ],
    },
)
