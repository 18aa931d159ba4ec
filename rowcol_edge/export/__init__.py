"""PyTorch to ONNX: capture, convert, simplify, and compare the outputs after each stage."""
