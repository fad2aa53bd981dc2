# quickmerge on a CPU: `docker build -t quickmerge .`, then `docker run --rm quickmerge` runs the demo, and
# `docker run --rm -v "$PWD:/work" quickmerge generate text /work/report.txt --prompt "Summarise."` any other command.
FROM python:3.11-slim

# An index with CPU builds of torch saves some gigabytes: --build-arg TORCH_INDEX=...
ARG TORCH_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_EXTRA_INDEX_URL=$TORCH_INDEX

WORKDIR /opt/quickmerge
COPY constraints.txt ./
RUN pip install torch==2.13.0 && pip install -c constraints.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install -c constraints.txt --no-build-isolation .

RUN useradd --create-home reader
USER reader
WORKDIR /home/reader
# The model is fetched while the image is built, so that a container needs no network.
RUN quickmerge demo
ENTRYPOINT ["quickmerge"]
CMD ["demo"]
