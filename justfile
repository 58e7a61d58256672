# Every argument after a command is key=value; `just COMMAND --help` lists the keys.

set positional-arguments
set no-exit-message

export PYTHONUTF8 := "1"  # whatever the locale's letters are, which may lack … and ×
export PYTHONSAFEPATH := ""  # `python -m` finds the packages here

python := ".venv/bin/python"
sync := "uv pip sync --python " + python
resolve := "uv pip compile --python-version 3.11 --no-emit-index-url --group dev pyproject.toml " \
    + "--custom-compile-command 'just pins' --quiet"
everything := "--group extras-tests --group fuzz --all-extras -o requirements-all.lock"

[private]
default:
    @just --list --unsorted

# recordings inside Parquet (hub datasets) → tars of recordings, for shard-codes
pack-parquet *args: _env
    @exec {{ python }} -m pipeline pack-parquet "$@"

# recordings → frozen SNAC 24 kHz → codes (Parquet)
shard-codes *args: _env
    @exec {{ python }} -m pipeline shard-codes "$@"

# codes + SIDON's 48 kHz targets → tar shards, sidecars and index
shard-targets *args: _env
    @exec {{ python }} -m pipeline shard-targets "$@"

# do SIDON's targets stand at their recordings' time and level? (same settings as shard-targets)
calibrate *args: _env
    @exec {{ python }} -m pipeline calibrate "$@"

# fit the 48 kHz decoder to shards: just train gpu=0
train *args: _env
    @exec {{ python }} -m trainer train "$@"

# where a training stands, while it runs and after it died: just status run=RUN
status *args: _env
    @exec {{ python }} -m trainer status "$@"

# codes, targets and training in one go, skipping what is done
workflow *args: _env
    @exec {{ python }} -m pipeline workflow "$@"

# a recording or a codes file → a 48 kHz WAV of its length
decode *args: _env
    @exec {{ python }} -m trainer decode "$@"

# a directory that the stock snac package loads
export *args: _env
    @exec {{ python }} -m trainer export "$@"

# decoder and encoder as ONNX, with the ecosystem's names
export-onnx *args: _env
    @exec {{ python }} -m trainer export-onnx "$@"

# a static page that decodes codes in the browser
web *args: _env
    @exec {{ python }} -m trainer web "$@"

# an export to the Hugging Face hub: just push model=DIR repo=USER/NAME dry_run=true
push *args: _env
    @exec {{ python }} -m trainer push "$@"

# judge decoders and other systems on unseen voices, with intervals: just eval models=RUN shards=SHARDS
eval *args: _env
    @exec {{ python }} -m trainer eval "$@"

# an evaluation as one HTML page to listen to: just report eval=EVAL
report *args: _env
    @exec {{ python }} -m trainer report "$@"

# what a plan, codes file, sidecar, index, shard or folder holds
inspect *args: _env
    @exec {{ python }} -m pipeline inspect "$@"

# check shards: sizes, sha256, crc32, contract
verify *args: _env
    @exec {{ python }} -m pipeline verify "$@"

# finished shards and index → a dataset repository of the hub
push-shards *args: _env
    @exec {{ python }} -m pipeline push-shards "$@"

# download and verify the pinned SNAC and SIDON files
prefetch *args: _env
    @exec {{ python }} -m pipeline prefetch "$@"

# check the real models on this machine: files, tokens, delay, level, seams, speed, disk
doctor *args: _env
    @exec {{ python }} -m demo doctor "$@"

# the whole way in minutes on a CPU, with a made voice or audio=FOLDER
demo *args: _env
    @exec {{ python }} -m demo demo "$@"

# the figures of docs/speed.md, scale.md and use.md that need no GPU: just bench SPEECH (a folder of recordings; half an hour on 2 cores)
bench speech: _env
    @exec {{ python }} -m benchmarks "$1"

# the figures of a GPU: just bench-gpu SPEECH
bench-gpu speech: _env
    @exec {{ python }} -m benchmarks --gpu "$1"

# results of benchmarks → the tables in README.md and docs/
bench-report: _env
    @exec {{ python }} -m benchmarks.tables

# which recipe gives the best voice? just bench-quality SPEECH OUT --minutes 30 (stand-in SNAC; run again to go on)
bench-quality *args: _env
    @exec {{ python }} -m benchmarks.quality "$@"

# format, lint, types; of the optional parts too, which it installs
check: extras
    @{{ python }} -m ruff format --check .
    @{{ python }} -m ruff check .
    @{{ python }} -m mypy

# the tests, in two processes (up to 3 GB each); one that dies ends them: xdist would wait for its files for ever
test *args: _env
    @exec {{ python }} -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 "$@"

# kills, damage and strange input, many times over: just torture --times 20 (hours)
torture *args="--times=10": _env
    @exec {{ python }} -m pytest tests/torture tests/test_killed_pipeline.py tests/test_killed_training.py "$@"

# coverage-guided fuzzing of every reader, so many seconds for each: just fuzz 60 OUT (needs `just extras`; Linux)
fuzz seconds out: _env
    @exec {{ python }} -m tests.torture.fuzz "$@"

# training killed again and again beside the same left alone, memory and files watched: just soak 4000 OUT
soak steps out: _env
    @exec {{ python }} -m tests.torture.soak "$@"

# everything optional too: metrics, ONNX, Ray, remote storage, W&B
extras:
    @just _install requirements-all.lock

# resolve newer versions into requirements.lock and requirements-all.lock: one of each package, for every Python
pins:
    {{ resolve }} {{ everything }} --upgrade
    {{ resolve }} {{ everything }} --universal
    cp requirements-all.lock requirements.lock
    {{ resolve }} --universal -o requirements.lock

# .venv holds exactly requirements.lock, or requirements-all.lock once `just extras` has run
_env:
    @cmp -s "$(cat .venv/.wanted 2>/dev/null || echo requirements.lock)" .venv/.installed || just _install

# one at a time, so the default is read when it is this one's turn
_install *lock:
    @mkdir -p .venv && flock .venv/.installing just _sync {{ lock }}

# what is there already, or in uv's cache, needs no network; the stamp is written last
# (not in .venv/.lock: uv makes that one, for every user of the machine to write)
_sync lock=`cat .venv/.wanted 2>/dev/null || echo requirements.lock`:
    @echo "installing {{ lock }} into .venv" >&2
    @test -x {{ python }} || uv venv --quiet --allow-existing .venv
    @rm -f .venv/.installed
    @{{ sync }} --offline {{ lock }} >/dev/null 2>&1 || {{ sync }} {{ lock }} >&2
    @echo {{ lock }} > .venv/.wanted && cp {{ lock }} .venv/.installed
