# embrag_ds in a container: docker build -t embrag_ds . for a CPU, and for GPUs
#   docker build --build-arg EXTRA=gpu -t embrag_ds:gpu .
#   docker build --build-arg EXTRA=gpu-cu12 --build-arg CONSTRAINTS=constraints-cu12.txt -t embrag_ds:gpu-cu12 .
# The CUDA libraries come with torch; the host needs NVIDIA's driver and its container toolkit (docker run --gpus all).
# For a CPU, --build-arg PIP_EXTRA_INDEX_URL=... with PyTorch's CPU wheels spares several GB.
FROM python:3.12-slim

ARG EXTRA=cpu
ARG CONSTRAINTS=constraints.txt
ARG PIP_EXTRA_INDEX_URL=

# torch.compile and DeepSpeed call the compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/embrag_ds
COPY . .
RUN pip install --no-cache-dir -c "$CONSTRAINTS" ".[train,$EXTRA]"

# Any user may run it, with the cache in a folder that is mounted or thrown away.
ENV XDG_CACHE_HOME=/cache NUMBA_CACHE_DIR=/cache/numba
RUN mkdir --mode=1777 /cache
WORKDIR /data
ENTRYPOINT ["embrag"]
