# Two images of one file:
#   docker build -t tdmpc2:cuda .                                              for NVIDIA GPUs
#   docker build -t tdmpc2 --build-arg TORCH_INDEX=ADDRESS .                   for CPUs
#
# ADDRESS is that of PyTorch's CPU wheels, which its installation page names. The default wheels for Linux bring
# their own CUDA: the host needs a driver and NVIDIA's container toolkit, nothing else.
FROM python:3.12-slim-bookworm

# libegl1 with Mesa's driver draws without a screen, and without a GPU; g++ builds the kernels of a CPU, gcc Triton's launchers.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev libegl1 libegl-mesa0 libgl1-mesa-dri \
    && rm -rf /var/lib/apt/lists/*

ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"

COPY . /src
RUN pip install --no-cache-dir "/src[train,wandb]" && rm -rf /src

# compute and utility are the toolkit's default; graphics hands the GPU's OpenGL in.
ENV MUJOCO_GL=egl \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics \
    PYTHONUNBUFFERED=1

RUN useradd --create-home --uid 1000 agent && mkdir /home/agent/runs && chown agent:agent /home/agent/runs
USER agent
WORKDIR /home/agent
VOLUME /home/agent/runs

# As process 1 it gets SIGTERM from `docker stop` itself, writes a checkpoint and ends; give it time: --stop-timeout 120.
ENTRYPOINT ["tdmpc2-fast"]
CMD ["--help"]
