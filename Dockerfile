# syntax=docker/dockerfile:1
# docker build -t av-ade .                                     serves on the CPU
# docker build -t av-ade --build-arg DEVICE=cuda .             serves on an NVIDIA GPU (docker run --gpus all)
# docker build -t av-ade --build-arg ENGINE=process .          without TorchServe and Java
# docker build -t av-ade --build-arg ENGINE=ray .              for a Ray cluster
# docker run -p 127.0.0.1:8080:8080 -p 127.0.0.1:7860:7860 av-ade
ARG PYTHON=3.11
ARG DEVICE=cpu

FROM python:${PYTHON}-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY ade_base ade_base
COPY ade_model ade_model
COPY training training
COPY export export
COPY fitting fitting
COPY serving serving
COPY handlers handlers
COPY extensions extensions
COPY ade_client ade_client
COPY ade_cli ade_cli
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:${PYTHON}-slim AS libraries
ARG DEVICE
ARG ENGINE=torchserve
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
# Without our packages: this layer, the largest, is kept until one of these three files changes.
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir ".[${DEVICE},${ENGINE}]" \
    && /opt/venv/bin/pip uninstall --yes av-ade

FROM python:${PYTHON}-slim
ARG DEVICE
ARG ENGINE=torchserve
# tini reaps orphans: as zombies they would keep process groups alive, for whose end a stop waits. KubeRay's probes call wget.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*
# A named volume takes the owner of the folder in its place. Everybody may write to one of Kubernetes: nobody else may reach it.
RUN useradd --create-home --uid 10001 ade && install --directory --owner ade --group ade --mode 0700 /home/ade /home/ade/.cache
COPY --from=libraries /opt/venv /opt/venv
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel /opt/venv/bin/pip install --no-cache-dir --no-deps /wheel/*.whl
COPY pretrained /bundles
# Whatever the umask of the checkout was.
RUN chmod -R a+rX /bundles
ENV PATH=/opt/venv/bin:$PATH ADE_DEVICE=${DEVICE} PYTHONUNBUFFERED=1
# By number: Kubernetes's runAsNonRoot cannot judge a name.
USER 10001:10001
WORKDIR /home/ade
EXPOSE 8080 8082 7860
HEALTHCHECK --interval=30s --timeout=30s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:%s/readyz' % os.environ.get('ADE_UI_PORT', 7860), timeout=25)"]
# In a container the service must listen on all addresses, so it requires a token: that of `docker run -e ADE_TOKEN=…`, or
# else a random one, in the file whose path is printed at the start.
ENTRYPOINT ["tini", "--", "sh", "-c", "exec ade serve --host 0.0.0.0 --device \"$ADE_DEVICE\" \"$@\"", "ade"]
CMD ["/bundles/cifar10"]
