# A GPU node: CUDA toolkit (for kernels), pdsh and ssh, and this package with its MPI and ffmpeg.
#   docker build -t megatron-nuwa .
#   docker run --gpus all --ipc host -v "$PWD/runs:/opt/megatron_nuwa/runs" -it megatron-nuwa make demo
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential git iproute2 make ninja-build numactl \
        openssh-client openssh-server pdsh python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# An image without the CUDA kernels would be slow everywhere: its build fails instead.
ENV MEGATRON_NUWA_CUDA=1 PIP_NO_CACHE_DIR=1
WORKDIR /opt/megatron_nuwa
# The largest layer comes first, so that a change of the sources downloads nothing again.
COPY constraints.txt Makefile ./
RUN make torch
COPY pyproject.toml setup.py demo-media.txt README.md ./
COPY megatron_nuwa megatron_nuwa
COPY preprocessing preprocessing
RUN make install
COPY . .

# MPI refuses root, the usual user of a container, unless told otherwise.
ENV OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
ENV PATH=/opt/megatron_nuwa/.venv/bin:$PATH
CMD ["bash"]
