# A GPU node: CUDA toolkit (for extensions), MPI, ffmpeg, pdsh and this package.
#   docker build -t megatron-nuwa .
#   docker run --gpus all --ipc host --shm-size 16g -it megatron-nuwa make demo
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update && apt-get install -y --no-install-recommends \
        build-essential ffmpeg git iproute2 libopenmpi-dev make ninja-build numactl \
        openmpi-bin openssh-client openssh-server pdsh python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/megatron_nuwa
COPY pyproject.toml setup.py constraints.txt demo-media.txt Makefile README.md ./
COPY megatron_nuwa megatron_nuwa
COPY preprocessing preprocessing
RUN make install
COPY . .

# MPI refuses root, the usual user of a container, unless told otherwise.
ENV OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
ENV PATH=/opt/megatron_nuwa/.venv/bin:$PATH
CMD ["bash"]
