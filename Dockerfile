# syntax=docker/dockerfile:1
# docker build -t av-ade .                                     serves on the CPU
# docker build -t av-ade --build-arg DEVICE=cuda .             serves on an NVIDIA GPU (docker run --gpus all)
# docker build -t av-ade --build-arg ENGINE=process .          without TorchServe and Java
# docker build -t av-ade --build-arg ENGINE=ray .              for a Ray cluster
# docker run -p 127.0.0.1:8080:8080 -p 127.0.0.1:7860:7860 av-ade
ARG PYTHON=3.11
ARG DEVICE=cpu

FROM python:${PYTHON}-slim AS build
ARG DEVICE
ARG ENGINE=torchserve
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
# The dependencies first, without our packages: this layer is kept until one of these three files changes.
RUN /opt/venv/bin/pip install ".[${DEVICE},${ENGINE}]"
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
RUN /opt/venv/bin/pip install --no-deps --force-reinstall .

FROM python:${PYTHON}-slim
ARG DEVICE
ARG ENGINE=torchserve
# tini reaps orphans: as zombies they would keep process groups alive, for whose end a stop waits. KubeRay's probes call wget.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini $(if [ "$ENGINE" = ray ]; then echo wget; fi) \
    && rm -rf /var/lib/apt/lists/*
# A named volume takes the owner of the folder in its place. Everybody may write to one of Kubernetes: nobody else may reach it.
RUN useradd --create-home --uid 10001 ade && install --directory --owner ade --group ade --mode 0700 /home/ade /home/ade/.cache
COPY --from=build /opt/venv /opt/venv
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
