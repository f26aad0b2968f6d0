# lightning-ssiuu on a CPU. In a directory of yours, which gets what a command writes:
#   docker build --tag lightning-ssiuu path/to/checkout
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/workspace" lightning-ssiuu fit --config ssiuu
FROM python:3.11-slim

RUN useradd --uid 1000 --create-home --home-dir /workspace user
WORKDIR /source
COPY constraints.txt pyproject.toml setup.cfg LICENSE ./
COPY docs/pypi.md docs/
COPY recipes recipes
COPY lightning_ssiuu lightning_ssiuu
# Of versions that are else the same pip takes the one with a local label, here torch's +cpu.
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu .

USER 1000
WORKDIR /workspace
# A user of whatever number has a place for caches.
ENV HOME=/tmp
ENTRYPOINT ["lightning-ssiuu"]
CMD ["--help"]
