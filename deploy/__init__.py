"""From PyTorch to files that a runtime can run: deployable graphs, ONNX export, manifests."""
