"""Shards → a 48 kHz decoder for the same tokens."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read by onnxruntime, which else reports its use to its makers
