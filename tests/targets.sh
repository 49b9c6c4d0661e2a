#!/usr/bin/env bash
# Installs what the targets of docs/targets.md need, beside the virtual environment, and runs their tests: one that is
# skipped has failed. What this machine cannot have is named and left out. Called by make, which sets the versions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY=${PY:-.venv/bin/python}
FOLDER=$PWD/build/targets
LOG=$FOLDER/install.log
mkdir -p "$FOLDER"
: > "$LOG"
# What needs nothing that is installed here was run by make test.
chosen="not test_interleaved_sequences and not the_page and not what_is_refused"
cells="ExecuTorch or OpenVINO_ or Node_js or Browser or Cpp"

left_out() { # what, why, the tests that go with it
    echo "left out: $1: $2"
    chosen="$chosen and not ($3)"
}

# Without dependencies: those that these tests use are in the list or in the environment. ExecuTorch asks for more,
# for other devices, and Triton's client for an older protobuf than ONNX's.
beside() { # folder, packages
    "$PY" -m pip install -qq --progress-bar off --no-deps --upgrade --target "$FOLDER/$1" "${@:2}"
}

debian() { # packages; needs root, apt and a mirror
    [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null || return 1
    timeout 60 apt-get update -qq >> "$LOG" 2>&1 && DEBIAN_FRONTEND=noninteractive timeout 180 apt-get install -y -qq \
        --no-install-recommends "$@" >> "$LOG" 2>&1
}

javascript() { # folder of examples/
    # no scripts: they would fetch libraries for GPUs
    timeout 120 npm ci --ignore-scripts --no-audit --no-fund --prefix "examples/$1" >> "$LOG" 2>&1
}

browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; }

headers() { # a folder that tests/test_readers.py looks at, with JSON for C++ beside it
    local include=${ONNXRUNTIME_HOME:-/usr}/include
    [ -e /usr/include/nlohmann/json.hpp ] && command -v g++ > /dev/null &&
        { [ -e "$include/onnxruntime_cxx_api.h" ] || [ -e "$include/onnxruntime/onnxruntime_cxx_api.h" ]; }
}

beside python openvino openvino-telemetry executorch torchao tritonclient \
    expecttest flatbuffers kgb parameterized python-rapidjson ruamel.yaml tabulate
beside provider onnxruntime-openvino

# LiteRT's packages ask for older versions of what is installed here: an environment of its own, which sees the other,
# and in which only what computes has the versions that are pinned.
"$PY" -m venv --without-pip "$FOLDER/litert"
SITE=$("$FOLDER/litert/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
"$PY" -c "import sys; print('\n'.join([*(p for p in sys.path if p.endswith('site-packages')), '$PWD']))" > "$SITE/beside.pth"
grep -i -E "^(torch|torchvision|numpy|onnx|onnx-ir|onnxruntime|onnxscript|protobuf|flatbuffers|ml_dtypes|sympy)==" \
    constraints.txt > "$FOLDER/litert.txt"
PIP_CONSTRAINT="$FOLDER/litert.txt" "$PY" -m pip --python "$FOLDER/litert/bin/python" install -qq --progress-bar off \
    litert-torch==0.10.0 ai-edge-litert==2.3.0 >> "$LOG" 2>&1 || left_out "LiteRT" "its packages could not be installed, see $LOG" "test_litert"

if ! command -v npm > /dev/null || ! command -v node > /dev/null; then
    left_out "Node.js and browser" "there is no node with npm" "test_readers and node or Node_js or test_web or Browser"
else
    javascript node || left_out "Node.js" "npm could not install onnxruntime-node, see $LOG" "test_readers and node or Node_js"
    if ! javascript web; then
        left_out "browser" "npm could not install onnxruntime-web, see $LOG" "test_web or Browser"
    elif ! browser > /dev/null && ! debian chromium; then
        left_out "browser" "there is no Chromium, and it cannot be installed with apt" "test_web"
    fi
fi
# One at a time: Debian 12 has no headers of ONNX Runtime, and apt installs nothing where one package is unknown.
headers || debian g++ nlohmann-json3-dev || true
headers || debian libonnxruntime-dev || true
if ! headers; then
    left_out "C++" "there are no headers of ONNX Runtime (set ONNXRUNTIME_HOME) or no nlohmann/json" "test_readers and cpp or Cpp"
fi
if ! "$PY" -c "import _tkinter" 2> /dev/null; then
    left_out "window" "this Python has no tkinter" "test_window"
elif ! command -v Xvfb > /dev/null && ! debian xvfb; then
    left_out "window" "there is no Xvfb, and it cannot be installed with apt" "test_window"
fi

run() { # folders, pytest's arguments
    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 CO3D_NO_SKIPS=1 PYTHONPATH=$1 "$PY" -m pytest "${@:2}"
}
run "$FOLDER/provider" tests/test_targets.py -k ONNX_Runtime_with_OpenVINO
run "$FOLDER/python" tests/test_bench.py -k test_every_side
if [ -e "$SITE/litert_torch" ]; then
    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 CO3D_NO_SKIPS=1 "$FOLDER/litert/bin/python" -m pytest \
        tests/test_litert.py tests/test_targets.py -k "test_litert and not a_missing_package or LiteRT_XNNPACK"
fi
run "$FOLDER/python" -n 2 --dist worksteal -k "$chosen and (not test_targets or $cells)" \
    tests/test_{targets,triton,openvino,readers,web,window}.py
