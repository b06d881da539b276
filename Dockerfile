# The demo in a container, on the CPU or on a GPU. The folder outputs receives the results.
#
#   docker build --target cpu --tag sftlab:cpu .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD/outputs:/sftlab/outputs" sftlab:cpu
#
#   docker build --target cuda --tag sftlab:cuda .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD/outputs:/sftlab/outputs" --gpus all --ipc=host sftlab:cuda
#
# Arguments after the name of the image are those of `python -m sftlab`: … sftlab:cpu dry_run=true
FROM python:3.11-slim-bookworm AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1
# gcc: Triton and vLLM compile kernels when they start. libnuma1: a library that vLLM loads on the CPU.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /sftlab

FROM base AS cpu-packages
COPY locks/torch-cpu.lock locks/cpu.lock locks/
# Only PyTorch's own index has the CPU build of torch.
RUN pip install --no-deps --require-hashes --extra-index-url https://download.pytorch.org/whl/cpu -r locks/torch-cpu.lock \
    && pip install --no-deps --require-hashes -r locks/cpu.lock

FROM base AS cuda-packages
COPY locks/cuda.lock locks/
RUN pip install --no-deps --require-hashes -r locks/cuda.lock

FROM cpu-packages AS cpu
COPY . .
# Modules are compiled here: the user of `docker run --user` may write to outputs only.
RUN pip install --no-deps --no-build-isolation --editable . \
    && python -m compileall -q sftlab \
    && chmod a+rwx outputs
# The user of `docker run --user` has no name and no folder in the image; torch and wandb ask for both.
ENV HOME=/tmp \
    USER=sftlab
ENTRYPOINT ["python", "-m", "sftlab"]

FROM cuda-packages AS cuda
COPY . .
RUN pip install --no-deps --no-build-isolation --editable . \
    && python -m compileall -q sftlab \
    && chmod a+rwx outputs
ENV HOME=/tmp \
    USER=sftlab \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all
ENTRYPOINT ["python", "-m", "sftlab"]
