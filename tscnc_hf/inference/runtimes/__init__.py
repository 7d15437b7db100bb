"""Other ways to run a model on a CPU: ONNX files for them, and latencies beside them."""
